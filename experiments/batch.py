"""Many prompts from a file, and their texts into another one.

A line of the prompts is a JSON object: "prompt", "ids" or "messages", that is a
text, token ids or a conversation, and whatever a text has of its own of
"max_tokens", "temperature", "top_p", "top_k", "seed" and "stop". Lines without
a seed have the command's plus their number.

A line of the texts has "index", the line of the prompt counted from 0, what the
line asked for, and "text", "ended", "tokens" and "logprobs"; or "error". They
are in order when all are there. The same command again goes on where the last
one stopped; lines that had an error are tried again.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from collections.abc import Mapping
from typing import IO
from typing import Any

from rich import console
from rich import progress

from dsv3_jax import fields
from dsv3_jax.infer import sampling
from dsv3_jax.infer import text

FORMS = ("prompt", "ids", "messages")
_TYPES = {
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "seed": (int,),
    "stop": (list,),
}


def problems(settings: Mapping[str, Any]) -> list[str]:
  """What is wrong with settings that all lines begin with, a line each."""
  found = sampling.problems(
      *(settings[name] for name in ("temperature", "top_p", "top_k", "seed"))
  )
  if settings["max_tokens"] < 1:
    found.append(f"max_tokens={settings['max_tokens']}: must be at least 1")
  if "" in settings["stop"]:
    found.append("stop=: a stop string must not be empty")
  return found


@dataclasses.dataclass(frozen=True)
class _Line:
  """A line of the prompts."""

  index: int
  asked: dict[str, Any]  # what is repeated beside the text
  ask: text.Ask | None
  error: str = ""


def _ask(row: Any, settings: Mapping[str, Any]) -> tuple[dict, text.Ask]:
  """What a line asks for, as in its row of texts, and for the writer.

  Raises:
    ValueError: it is none.
  """
  if not isinstance(row, dict):
    raise ValueError(f"must be a JSON object, is {type(row).__name__}")
  forms = [form for form in FORMS if form in row]
  if len(forms) != 1:
    raise ValueError(f"must have one of {', '.join(FORMS)}; has {forms}")
  known = (*FORMS, *_TYPES)
  for name in row.keys() - set(known):
    raise ValueError(
        f"{name!r} is none of {', '.join(known)}{fields.nearest(name, known)}"
    )
  form = forms[0]
  asked = {form: row[form]} | dict(settings)
  for name, types in _TYPES.items():
    if name in row:
      if type(row[name]) not in types:
        raise ValueError(f"{name}={row[name]!r}: must be {_name(types)}")
      asked[name] = row[name]
  asked["stop"] = list(asked["stop"])
  if not all(isinstance(stop, str) for stop in asked["stop"]):
    raise ValueError(f"stop={asked['stop']!r}: must be a list of strings")
  _check_form(form, row[form])
  given = {k: v for k, v in asked.items() if k != form}
  given["stop"] = tuple(given["stop"])
  return asked, text.Ask(row[form], **given)


def _name(types: tuple[type, ...]) -> str:
  return {list: "a list of strings", int: "an integer"}.get(
      types[0] if len(types) == 1 else None, "a number"
  )


def _check_form(form: str, value: Any) -> None:
  if form == "prompt":
    good = isinstance(value, str)
    wanted = "a string"
  elif form == "ids":
    good = isinstance(value, list) and all(type(i) is int for i in value)
    wanted = "a list of integers"
  else:
    good = isinstance(value, list) and value and all(map(_is_message, value))
    wanted = 'a list of {"role": ..., "content": ...}, at least one'
  if not good:
    raise ValueError(f"{form}={value!r}: must be {wanted}")


def _is_message(value: Any) -> bool:
  return (
      isinstance(value, dict)
      and value.keys() == {"role", "content"}
      and all(isinstance(part, str) for part in value.values())
  )


def _lines(path: pathlib.Path, writer: text.Writer, settings) -> list[_Line]:
  """All lines that are not empty."""
  try:
    content = path.read_bytes()
  except OSError as error:
    raise ValueError(f"--prompts={path}: cannot be read: {error}") from error
  found = []
  for index, line in enumerate(content.splitlines()):
    if not line.strip():
      continue
    own = settings | {"seed": (settings["seed"] + index) % 2**32}
    try:
      asked, ask = _ask(json.loads(line), own)
      writer.request(ask)
      found.append(_Line(index, asked, ask))
    except (ValueError, RecursionError) as error:
      found.append(_Line(index, {}, None, f"line {index + 1}: {error}"))
  return found


# --- what is there ---


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Complete rows of texts; one that was being written is left out."""
  if not path.exists():
    return
  try:
    content = path.read_bytes()
  except OSError as error:
    raise ValueError(f"--out={path}: cannot be read: {error}") from error
  *lines, _ = content.split(b"\n")
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      row["index"], row.get("text")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(
          f"--out={path}: line {number} is no row of texts; take another file"
      ) from error
    yield row


def _done(path: pathlib.Path, lines: list[_Line]) -> dict[int, dict[str, Any]]:
  """Rows of an earlier try, by line.

  Raises:
    ValueError: they are of other prompts or settings.
  """
  asked = {line.index: line.asked for line in lines}
  done = {}
  for row in _rows(path):
    if "error" in row:
      continue
    index = row["index"]
    there = {k: v for k, v in row.items() if k in (*FORMS, *_TYPES)}
    if there != asked.get(index):
      raise ValueError(
          f"--out={path}: holds a text of line {index + 1} that was asked for"
          " otherwise; take another file, or the old prompts and settings"
      )
    done[index] = row
  return done


def _append(file: IO[str], row: dict[str, Any]) -> None:
  file.write(json.dumps(row, ensure_ascii=False) + "\n")
  file.flush()


def _save(path: pathlib.Path, rows: Mapping[int, dict[str, Any]]) -> None:
  """The file with these rows, in order; the old one until all are written."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    with open(partial, "w", encoding="utf-8") as file:
      for index in sorted(rows):
        _append(file, rows[index])
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError as error:
    raise ValueError(f"--out={path}: cannot be written: {error}") from error


# --- writing ---


def write(
    writer: text.Writer,
    prompts: pathlib.Path,
    out: pathlib.Path,
    settings: Mapping[str, Any],
) -> None:
  """Writes the texts of all prompts that have none yet.

  Args:
    writer: who writes.
    prompts: file of prompts.
    out: file of texts.
    settings: of lines that do not say otherwise.

  Raises:
    ValueError: a file cannot be read or written, or `out` is of other prompts.
  """
  lines = _lines(prompts, writer, dict(settings))
  if not lines:
    raise ValueError(f"--prompts={prompts}: holds no line")
  rows = _done(out, lines)
  # An unfinished last row, and those with errors, go.
  _save(out, rows)
  bad = [line for line in lines if line.error]
  rows |= {b.index: {"index": b.index, "error": b.error} for b in bad}
  todo = [x for x in lines if x.index not in rows]
  start = time.perf_counter()
  try:
    with open(out, "a", encoding="utf-8") as file, _bar() as bar:
      for line in bad:
        _append(file, rows[line.index])
      task = bar.add_task("texts", total=len(lines), speed="")
      bar.update(task, completed=len(rows))
      for row in _texts(writer, todo):
        rows[row["index"]] = row
        _append(file, row)
        bar.update(task, advance=1, speed=_speed(writer, start))
  except OSError as error:
    raise ValueError(f"--out={out}: cannot be written: {error}") from error
  _save(out, rows)
  _summary(writer, len(todo), len(bad), time.perf_counter() - start)


def _texts(
    writer: text.Writer, todo: list[_Line]
) -> Iterator[dict[str, Any]]:
  """Rows as their texts end."""
  parts = [([], [], []) for _ in todo]
  for piece in writer.stream(line.ask for line in todo):
    texts, tokens, logprobs = parts[piece.ask]
    texts.append(piece.text)
    tokens.append(piece.token)
    logprobs.append(round(piece.logprob, 6))
    if piece.ended:
      line = todo[piece.ask]
      yield {"index": line.index} | line.asked | {
          "text": "".join(texts),
          "ended": piece.ended,
          "tokens": tokens,
          "logprobs": logprobs,
      }
      parts[piece.ask] = ([], [], [])


def _bar() -> progress.Progress:
  columns = (
      progress.TextColumn("texts"),
      progress.BarColumn(),
      progress.MofNCompleteColumn(),
      progress.TextColumn("{task.fields[speed]}"),
      progress.TimeRemainingColumn(),
  )
  return progress.Progress(*columns, console=console.Console(stderr=True))


def _speed(writer: text.Writer, start: float) -> str:
  rate = writer.engine.stats.tokens / (time.perf_counter() - start)
  return f"{rate:.0f} tokens/s"


def _summary(
    writer: text.Writer, n_texts: int, n_bad: int, seconds: float
) -> None:
  stats = writer.engine.stats
  say = lambda line: print(line, file=sys.stderr)
  say(f"{n_texts} texts, {stats.tokens} tokens in {seconds:.1f} s")
  if stats.drafts:
    say(
        f"of {stats.drafts} drafts {stats.acceptance:.0%} accepted:"
        f" {stats.calls_per_token:.2f} passes of the main model a token"
    )
  if n_bad:
    say(f"{n_bad} lines had an error, see their rows")

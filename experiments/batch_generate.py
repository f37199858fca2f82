"""Batch generation: a JSON Lines file of prompts to one of texts.

A line of the prompts is a JSON object with one of "prompt" (a text), "ids"
(token ids, with BOS if wanted) and "messages" (a conversation); "max_tokens",
"temperature", "top_p", "top_k", "seed" and "stop" override the command's. A
line without a seed has the command's seed plus the line's number.

A line of the texts has "index", the line of the prompt counted from 0, the
request, and "text", "ended", "tokens" and "logprobs"; or "error". A complete
file is ordered by index. The same command again resumes an interrupted one and
retries lines with an error; it does not check that the model is the same.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import reprlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from rich import console, progress

from dsv3_jax import io
from dsv3_jax.config import fields
from dsv3_jax.errors import InputError
from dsv3_jax.infer import generate, sampling
from dsv3_jax.infer import stats as stats_lib

Row = dict[str, Any]

_BEGIN = b'{"index": '  # of every row


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_integer(value: Any) -> bool:
  return type(value) is int  # no bool


def _is_number(value: Any) -> bool:
  return type(value) in (int, float)


def _is_message(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and value.keys() == {"role", "content"}
    and all(map(_is_text, value.values()))
  )


def _list_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: isinstance(value, list) and all(map(good, value))


# Keys of a line of prompts: the check of a value, and its description.
_FORMS = {
  "prompt": (_is_text, "a string"),
  "ids": (_list_of(_is_integer), "a list of integers"),
  "messages": (
    _list_of(_is_message),
    'a list of {"role": ..., "content": ...}',
  ),
}
_TYPES = {
  int: (_is_integer, "an integer"),
  float: (_is_number, "a number"),
  tuple[str, ...]: (_list_of(_is_text), "a list of strings"),
}
SETTINGS = {
  field.name: _TYPES[field.type]
  for field in dataclasses.fields(generate.GenerationRequest)
  if field.name != "prompt"
}
_KNOWN = _FORMS | SETTINGS


def problems(settings: Mapping[str, Any]) -> list[str]:
  """The problems of the settings that lines have by default, a line each."""
  found = sampling.validate(
    *(settings[name] for name in ("temperature", "top_p", "top_k", "seed"))
  )
  if settings["max_tokens"] < 1:
    found.append(f"max_tokens={settings['max_tokens']}: must be at least 1")
  if "" in settings["stop"]:
    found.append("stop=: a stop string must not be empty")
  return found


def file_problems(prompts: pathlib.Path, out: pathlib.Path) -> list[str]:
  """The problems of the files that show before a model is loaded."""
  found = []
  if not os.path.isfile(prompts):
    found.append(f"--prompts={prompts}: there is no such file")
  if not os.path.isdir(out.parent):
    found.append(f"--out={out}: there is no such folder")
  elif os.path.exists(out) and not os.path.isfile(out):
    found.append(f"--out={out}: is not a file")
  elif os.path.exists(out) and not found and os.path.samefile(out, prompts):
    found.append(f"--out={out}: is the file of prompts")
  return found


@contextlib.contextmanager
def _input_errors(flag: str) -> Iterator[None]:
  """Turns an OSError into an InputError that names the flag."""
  try:
    yield
  except OSError as error:
    raise InputError(f"{flag}: {error}") from error


# --- prompts ---


@dataclasses.dataclass(frozen=True)
class _Line:
  """A line of the prompts."""

  index: int
  asked: Row | None = None  # what is repeated beside the text
  ask: generate.GenerationRequest | None = None
  error: str = ""


def _asked(line: bytes, settings: Mapping[str, Any]) -> Row:
  """The request of a line of prompts, as its row of texts repeats it.

  Raises:
    InputError: the line is malformed.
  """
  row = json.loads(line)
  if not isinstance(row, dict):
    raise InputError(f"must be a JSON object, is {reprlib.repr(row)}")
  found = [
    f"{name!r} is none of {', '.join(_KNOWN)}{fields.nearest(name, _KNOWN)}"
    for name in row
    if name not in _KNOWN
  ]
  found += [
    f"{name}={reprlib.repr(row[name])}: must be {kind}"
    for name, (good, kind) in _KNOWN.items()
    if name in row and not good(row[name])
  ]
  forms = _FORMS.keys() & row.keys()
  if len(forms) != 1:
    found.append(f"must have one of {', '.join(_FORMS)}, has {len(forms)}")
  if found:
    raise InputError("\n".join(found))
  asked = {form: row[form] for form in forms} | dict(settings) | row
  # JSON may hold halves of characters, which no file and no tokenizer takes.
  json.dumps(asked, ensure_ascii=False).encode()
  return asked


def _ask(asked: Row) -> generate.GenerationRequest:
  settings = {name: asked[name] for name in SETTINGS}
  (prompt,) = (asked[form] for form in _FORMS if form in asked)
  for name in ("temperature", "top_p"):
    settings[name] = float(settings[name])
  return generate.GenerationRequest(
    prompt, **settings | {"stop": tuple(settings["stop"])}
  )


def _lines(
  path: pathlib.Path, writer: generate.Generator, settings: Mapping[str, Any]
) -> list[_Line]:
  """The lines of a file of prompts that are not empty."""
  with _input_errors(f"--prompts={path}"):
    content = path.read_bytes()
  found = []
  # Other line breaks than this one may stand in a line of JSON.
  for index, line in enumerate(content.split(b"\n")):
    if not line.strip():
      continue
    seed = (settings["seed"] + index) % 2**32
    own = {**settings, "seed": seed, "stop": list(settings["stop"])}
    try:
      asked = _asked(line, own)
      ask = _ask(asked)
      writer.request(ask)
      found.append(_Line(index, asked, ask))
    except (ValueError, OverflowError, RecursionError) as error:
      found.append(_Line(index, error=f"line {index + 1}: {error}"))
  return found


# --- texts ---


def _rows(path: pathlib.Path) -> Iterator[Row]:
  """Yields the complete rows of a file of texts."""
  with _input_errors(f"--out={path}"):
    content = path.read_bytes() if path.exists() else b""
  *lines, last = content.split(b"\n")
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      good = type(row["index"]) is int and row.keys() & {"error", "text"}
    except (ValueError, TypeError, KeyError, RecursionError):
      good = False
    if not good:
      raise InputError(
        f"--out={path}: line {number} is no row of texts; take another file"
      )
    yield row
  if last[: len(_BEGIN)] != _BEGIN[: len(last)]:
    raise InputError(f"--out={path}: is no file of texts; take another one")


def _done(path: pathlib.Path, lines: list[_Line]) -> dict[int, Row]:
  """Rows of an interrupted command, by line.

  Raises:
    InputError: they belong to other prompts or settings.
  """
  asked = {line.index: line.asked for line in lines}
  done = {}
  for row in _rows(path):
    if "error" in row:
      continue
    index = row["index"]
    if {k: v for k, v in row.items() if k in _KNOWN} != asked.get(index):
      raise InputError(
        f"--out={path}: holds a text of line {index + 1} that was asked for"
        " otherwise; take another file, or the old prompts and settings"
      )
    done[index] = row
  return done


def _append(file: IO[str], row: Row) -> None:
  file.write(json.dumps(row, ensure_ascii=False) + "\n")
  file.flush()


def _save(path: pathlib.Path, rows: Mapping[int, Row]) -> None:
  """Replaces the file by one with these rows, in order."""
  with io.atomic_write(path) as file:
    for index in sorted(rows):
      _append(file, rows[index])


def _written(writer: generate.Generator, todo: list[_Line]) -> Iterator[Row]:
  """Yields the row of each text when it ends."""
  parts = {}
  for piece in writer.stream(line.ask for line in todo):
    texts, tokens, logprobs = parts.setdefault(piece.index, ([], [], []))
    texts.append(piece.text)
    tokens.append(piece.token)
    logprobs.append(round(piece.logprob, 6))
    if piece.finish_reason:
      line = todo[piece.index]
      yield (
        {"index": line.index}
        | line.asked
        | {
          "text": "".join(texts),
          "ended": piece.finish_reason,
          "tokens": tokens,
          "logprobs": logprobs,
        }
      )
      del parts[piece.index]


def write(
  writer: generate.Generator,
  prompts: pathlib.Path,
  out: pathlib.Path,
  settings: Mapping[str, Any],
) -> None:
  """Generates the texts of all prompts that `out` does not have yet.

  Args:
    writer: generates the texts.
    prompts: file of prompts.
    out: file of texts.
    settings: defaults of the lines.

  Raises:
    InputError: a file cannot be read or written, or `out` belongs to other
      prompts.
  """
  lines = _lines(prompts, writer, settings)
  if not lines:
    raise InputError(f"--prompts={prompts}: holds no line")
  out = pathlib.Path(os.path.realpath(out))  # what a link leads to
  rows = _done(out, lines)
  todo = [x for x in lines if x.index not in rows and not x.error]
  bad = [{"index": x.index, "error": x.error} for x in lines if x.error]
  start, n_tokens = time.perf_counter(), 0
  with _input_errors(f"--out={out}"):
    # An unfinished last row, and those with errors, go.
    _save(out, rows)
    with open(out, "a", encoding="utf-8") as file, _bar() as bar:
      task = bar.add_task("texts", total=len(lines), speed="")
      bar.update(task, completed=len(rows))
      for row in itertools.chain(bad, _written(writer, todo)):
        rows[row["index"]] = row
        _append(file, row)
        n_tokens += len(row.get("tokens", ()))
        speed = n_tokens / (time.perf_counter() - start)
        bar.update(task, advance=1, speed=f"{speed:.0f} tokens/s")
    _save(out, rows)
  seconds = time.perf_counter() - start
  _print_line(
    f"{len(todo)} texts, {n_tokens} tokens in {seconds:.1f} s, compiling"
    " included"
  )
  if writer.engine.stats.drafts:
    _print_line(drafted(writer.engine.stats))
  if bad:
    _print_line(f"{len(bad)} lines had an error, see their rows")


def _bar() -> progress.Progress:
  columns = (
    progress.TextColumn("texts"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TextColumn("{task.fields[speed]}"),
    progress.TimeRemainingColumn(),
  )
  return progress.Progress(*columns, console=console.Console(stderr=True))


def _print_line(line: str) -> None:
  print(line, file=sys.stderr)


def drafted(stats: stats_lib.EngineStats) -> str:
  """The acceptance rate of drafts and what it saves, as a sentence."""
  return (
    f"of {stats.drafts} drafts {stats.acceptance:.0%} accepted:"
    f" {stats.calls_per_token:.2f} passes of the main model a token"
  )

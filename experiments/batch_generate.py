"""Generates texts for a JSON Lines file of prompts, into another such file.

A line of the prompts is a JSON object: "prompt", "ids" or "messages", that is a
text, token ids (with BOS if there is to be one), or a conversation; and any of
"max_tokens", "temperature", "top_p", "top_k", "seed" and "stop" that differ
from the command's. A line without a seed has the command's plus its number.

A line of the texts has "index", the line of the prompt counted from 0; what the
line asked for; and "text", "ended", "tokens" and "logprobs", or "error". They
are in order when all are there. The same command again resumes where the last
one stopped; lines that had an error are tried again. The user makes sure that
the model is the same.

With --json instead of --out, such lines are printed as texts end, with
"n_tokens", "tokens_per_s" (null for two tokens or less) and, with drafts,
"draft_acceptance" (of all texts so far).
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
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.infer import engine, generate
from dsv3_jax.infer.request import SETTINGS, GenerationRequest

Row = dict[str, Any]

_BEGIN = b'{"index": '  # of every row


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_integer(value: Any) -> bool:
  return type(value) is int  # a bool is none


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


# Fields of a line: a check of the value, and what it must be.
_FORMS = {
  "prompt": (_is_text, "a string"),
  "ids": (_list_of(_is_integer), "a list of integers"),
  "messages": (
    _list_of(_is_message),
    'a list of {"role": ..., "content": ...}',
  ),
}
_CHECKS = {
  int: (_is_integer, "an integer"),
  float: (_is_number, "a number"),
  tuple[str, ...]: (_list_of(_is_text), "a list of strings"),
}
_KNOWN = _FORMS | {name: _CHECKS[f.type] for name, f in SETTINGS.items()}


def validate_files(
  prompts: pathlib.Path, out: pathlib.Path | None
) -> list[str]:
  """Lists problems of the two paths; opens no file."""
  problems = []
  if not os.path.isfile(prompts):
    problems.append(f"--prompts={prompts}: there is no such file")
  if out is None:
    return problems
  if not os.path.isdir(out.parent):
    problems.append(f"--out={out}: there is no such folder")
  elif os.path.exists(out) and not os.path.isfile(out):
    problems.append(f"--out={out}: is not a file")
  elif os.path.exists(out) and not problems and os.path.samefile(out, prompts):
    problems.append(f"--out={out}: is the file of prompts")
  return problems


@contextlib.contextmanager
def _input_errors(flag: str) -> Iterator[None]:
  """Raises errors of a user's file as InputError."""
  try:
    yield
  except OSError as error:
    raise InputError(f"{flag}: {error}") from error


# --- prompts ---


@dataclasses.dataclass(frozen=True)
class _Line:
  """A line of the prompts."""

  index: int
  fields: Row | None = None  # repeated beside the text
  request: GenerationRequest | None = None
  error: str = ""


def _parse_line(line: bytes, defaults: Row) -> Row:
  """Returns the fields of a line, as they are in its row of texts.

  Raises:
    InputError: a field is unknown or of the wrong type.
  """
  row = json.loads(line)
  if not isinstance(row, dict):
    raise InputError(f"must be a JSON object, is {reprlib.repr(row)}")
  problems = [
    f"{name!r} is none of {', '.join(_KNOWN)}{fields.nearest(name, _KNOWN)}"
    for name in row
    if name not in _KNOWN
  ]
  problems += [
    f"{name}={reprlib.repr(row[name])}: must be {expected}"
    for name, (check, expected) in _KNOWN.items()
    if name in row and not check(row[name])
  ]
  forms = _FORMS.keys() & row.keys()
  if len(forms) != 1:
    problems.append(f"must have one of {', '.join(_FORMS)}, has {len(forms)}")
  raise_problems(problems)
  values = {form: row[form] for form in forms} | defaults | row
  # JSON may hold surrogates, which no file and no tokenizer takes.
  json.dumps(values, ensure_ascii=False).encode()
  return values


def _make_request(row: Row) -> GenerationRequest:
  (prompt,) = (row[form] for form in _FORMS if form in row)
  # A JSON number may be an integer, and JSON has no tuples.
  settings = {
    name: type(field.default)(row[name]) for name, field in SETTINGS.items()
  }
  return GenerationRequest(prompt, **settings)


def _settings(request: GenerationRequest) -> Row:
  settings = {name: getattr(request, name) for name in SETTINGS}
  return settings | {"stop": list(request.stop)}


def _read_prompts(
  path: pathlib.Path, generator: generate.Generator, defaults: GenerationRequest
) -> list[_Line]:
  """Returns all lines that are not empty."""
  with _input_errors(f"--prompts={path}"):
    content = path.read_bytes()
  settings, lines = _settings(defaults), []
  # Other line breaks than this one may stand in a line of JSON.
  for index, line in enumerate(content.split(b"\n")):
    if not line.strip():
      continue
    seed = (defaults.seed + index) % 2**32
    try:
      row = _parse_line(line, settings | {"seed": seed})
      request = _make_request(row)
      generator.tokenize(request)
      lines.append(_Line(index, row, request))
    except (ValueError, OverflowError, RecursionError) as error:
      lines.append(_Line(index, error=f"line {index + 1}: {error}"))
  if not lines:
    raise InputError(f"--prompts={path}: holds no line")
  return lines


# --- texts ---


def _read_rows(path: pathlib.Path) -> Iterator[Row]:
  """Yields the complete rows of texts; skips one that was being written."""
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


def _finished(path: pathlib.Path, lines: list[_Line]) -> dict[int, Row]:
  """Returns the rows of an earlier run, by line.

  Raises:
    InputError: they are of other prompts or settings.
  """
  expected = {line.index: line.fields for line in lines}
  finished = {}
  for row in _read_rows(path):
    if "error" in row:
      continue
    index = row["index"]
    if {k: v for k, v in row.items() if k in _KNOWN} != expected.get(index):
      raise InputError(
        f"--out={path}: holds a text of line {index + 1} with another prompt or"
        " other settings; take another file, or the old prompts and settings"
      )
    finished[index] = row
  return finished


def _append(file: IO[str], row: Row) -> None:
  file.write(json.dumps(row, ensure_ascii=False) + "\n")
  file.flush()


def _save(path: pathlib.Path, rows: Mapping[int, Row]) -> None:
  """Replaces the file by these rows, in order, once all are written."""
  with io.atomic_write(path) as file:
    for index in sorted(rows):
      _append(file, rows[index])


def _generate_rows(
  generator: generate.Generator, lines: list[_Line]
) -> Iterator[tuple[Row, generate.GeneratedText]]:
  """Yields the rows of lines, and their texts, as these end."""
  unfinished: dict[int, generate.GeneratedText] = {}
  for chunk in generator.stream(line.request for line in lines):
    text = unfinished.setdefault(chunk.index, generate.GeneratedText())
    text.add(chunk)
    if chunk.finish_reason:
      line = lines[chunk.index]
      row = {"index": line.index, **line.fields, "text": text.text}
      row |= {"ended": text.finish_reason, "tokens": text.tokens}
      row["logprobs"] = [round(logprob, 6) for logprob in text.logprobs]
      yield row, text
      del unfinished[chunk.index]


def generate_all(
  generator: generate.Generator,
  prompts: pathlib.Path,
  out: pathlib.Path,
  defaults: GenerationRequest,
) -> None:
  """Generates the texts of all prompts that have none yet.

  Lines that do not state a setting have that of `defaults`.

  Raises:
    InputError: a file cannot be read or written, or `out` is of other prompts.
  """
  lines = _read_prompts(prompts, generator, defaults)
  out = pathlib.Path(os.path.realpath(out))  # the target of a link
  rows = _finished(out, lines)
  todo = [x for x in lines if x.index not in rows and not x.error]
  bad = _error_rows(lines)
  start, n_tokens = time.perf_counter(), 0
  with _input_errors(f"--out={out}"):
    _save(out, rows)  # drops an unfinished last row, and rows with errors
    with open(out, "a", encoding="utf-8") as file, _bar() as bar:
      task = bar.add_task("texts", total=len(lines), speed="")
      bar.update(task, completed=len(rows))
      made = (row for row, _ in _generate_rows(generator, todo))
      for row in itertools.chain(bad, made):
        rows[row["index"]] = row
        _append(file, row)
        n_tokens += len(row.get("tokens", ()))
        speed = n_tokens / (time.perf_counter() - start)
        bar.update(task, advance=1, speed=f"{speed:.0f} tokens/s")
    _save(out, rows)
  took = f"{time.perf_counter() - start:.1f} s, compiling included"
  _log(f"{len(todo)} texts, {n_tokens} tokens in {took}")
  if generator.engine.stats.drafts:
    _log(describe_drafts(generator.engine.stats))
  if bad:
    _log(f"{len(bad)} lines had an error, see their rows")


def print_all(
  generator: generate.Generator,
  prompts: pathlib.Path | None,
  defaults: GenerationRequest,
) -> None:
  """Prints the rows of all prompts, or that of `defaults` alone, as they end.

  Raises:
    InputError: the file of prompts cannot be read.
  """
  if prompts:
    lines = _read_prompts(prompts, generator, defaults)
  else:
    row = {"prompt": defaults.prompt, **_settings(defaults)}
    lines = [_Line(0, row, defaults)]
  bad, stats = _error_rows(lines), generator.engine.stats
  for row in bad:
    print(json.dumps(row), flush=True)
  for row, text in _generate_rows(generator, [x for x in lines if not x.error]):
    speed = text.tokens_per_s
    row["n_tokens"] = len(text.tokens)
    row["tokens_per_s"] = None if speed is None else round(speed, 1)
    if stats.drafts:
      row["draft_acceptance"] = round(stats.acceptance, 4)
    print(json.dumps(row, allow_nan=False), flush=True)
  if bad:
    _log(f"{len(bad)} lines had an error, see their rows")


def _error_rows(lines: list[_Line]) -> list[Row]:
  return [{"index": x.index, "error": x.error} for x in lines if x.error]


def _bar() -> progress.Progress:
  columns = (
    progress.TextColumn("texts"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TextColumn("{task.fields[speed]}"),
    progress.TimeRemainingColumn(),
  )
  return progress.Progress(*columns, console=console.Console(stderr=True))


def _log(line: str) -> None:
  print(line, file=sys.stderr)


def describe_drafts(stats: engine.EngineStats) -> str:
  """Returns a sentence about the acceptance of drafts."""
  return (
    f"of {stats.drafts} drafts {stats.acceptance:.0%} accepted:"
    f" {stats.calls_per_token:.2f} passes of the main model a token"
  )

"""Files and streams: atomic writes, checksums, JSON, closed outputs."""

import contextlib
import hashlib
import json
import os
import pathlib
import select
import sys
from collections.abc import Iterator
from typing import IO, Any

from dsv3_jax.errors import InputError


@contextlib.contextmanager
def atomic_write(
  path: pathlib.Path, mode: str = "w", *, errors: str = "strict"
) -> Iterator[IO[Any]]:
  """Opens a file for writing that replaces `path` once all is on the disk.

  If the block raises, `path` stays as it was. What a killed process leaves is
  overwritten by the next write; only one process may write a file at a time.

  Args:
    path: file to write; its folder exists.
    mode: "w" for UTF-8 text, "wb" for bytes.
    errors: treatment of text that has no UTF-8, as of `open`.
  """
  temporary = path.with_name(f".{path.name}.partial")
  text = {} if "b" in mode else {"encoding": "utf-8", "errors": errors}
  try:
    with open(temporary, mode, **text) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file, complete or not at all."""
  with atomic_write(path) as file:
    file.write(text)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a value as indented JSON, complete or not at all."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def sha256(data: str | bytes) -> str:
  """Hexadecimal SHA-256 of bytes, or of a text in UTF-8."""
  data = data.encode() if isinstance(data, str) else data
  return hashlib.sha256(data).hexdigest()


def file_sha256(path: pathlib.Path) -> str:
  """Hexadecimal SHA-256 of a file's bytes."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object that a file holds.

  Raises:
    InputError: the file cannot be read, or holds something else.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error}") from error
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path}: is not JSON: {error}") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: must hold an object")
  return value


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
  """The JSON objects of a file with one a line.

  Other lines are left out: a process that was killed, or that is writing just
  now, leaves a torn last one.
  """
  found = []
  with open(path, encoding="utf-8", errors="replace") as lines:
    for line in lines:
      with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, dict):
          found.append(value)
  return found


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts as one: {"a": {"b": 1}} becomes {"a.b": 1}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def discard_closed_output() -> bool:
  """Discards what is printed where the reader has closed the pipe.

  Returns whether the reader of standard output or error has. What is printed
  afterwards, and what waits in a buffer, raises no error.
  """
  closed = False
  for stream in filter(None, (sys.stdout, sys.stderr)):
    with contextlib.suppress(OSError, ValueError):  # no stream of the system
      poll = select.poll()
      poll.register(stream.fileno(), 0)  # errors are always reported
      if poll.poll(0):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        closed = True
  return closed

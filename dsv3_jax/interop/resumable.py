"""Work of many pieces: some at a time, in bounded memory, and resumable."""

import collections
import concurrent.futures
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from dsv3_jax.errors import InputError
from dsv3_jax.interop import safetensors

T, R = TypeVar("T"), TypeVar("R")

WORKERS = 4
IN_FLIGHT = 1 << 28  # bytes of pieces being worked on, unless one is larger


def in_order(
  work: Callable[[T], R], pieces: Iterable[T], n_bytes: Callable[[T], int]
) -> Iterator[tuple[T, R]]:
  """Pieces and what became of them, several worked on at once.

  Args:
    work: called by threads.
    pieces: what to call it with.
    n_bytes: the size of a piece; those in work together stay below IN_FLIGHT,
      or there is one alone.
  """
  with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
    running, size = collections.deque(), 0
    for piece in pieces:
      while running and size + n_bytes(piece) > IN_FLIGHT:
        size -= n_bytes(running[0][0])
        # No name holds on to a result while the next pieces are worked on.
        yield running[0][0], running.popleft()[1].result()
      running.append((piece, pool.submit(work, piece)))
      size += n_bytes(piece)
    while running:
      yield running[0][0], running.popleft()[1].result()


class Journal:
  """What is done, in a file that survives an interruption."""

  def __init__(self, path: pathlib.Path, source: str):
    """Reads what an earlier try has done.

    Args:
      path: a line of JSON for each entry.
      source: identifies what the work is of.

    Raises:
      InputError: the earlier try was of another source, or the file is not
        what it wrote.
    """
    self.path, self.done = path, {}
    self._source = source
    text = path.read_bytes() if path.exists() else b""
    # What follows the last newline was being written when the try ended.
    lines = text.split(b"\n")[:-1]
    self.begun = bool(lines)
    try:
      entries = [json.loads(line) for line in lines]
      for entry in entries:
        self.done |= entry.get("done", {})
      other = self.begun and entries[0]["source"] != source
    except (
      ValueError,
      KeyError,
      TypeError,
      AttributeError,
      RecursionError,
    ) as error:
      raise InputError(
        f"{path}: is not what an earlier try wrote ({error!r}); remove the"
        " folder"
      ) from error
    if other:
      raise InputError(
        f"{path.parent}: holds part of something else; remove the folder, or"
        " take another"
      )

  def begin(self) -> None:
    """From now on there is something to go on from."""
    self._append({"source": self._source})

  def add(self, done: dict[str, Any], files: Iterable[pathlib.Path]) -> None:
    """Enters what is done, once it is on the disk with the files given."""
    for path in files:
      with path.open("rb") as file:
        os.fsync(file.fileno())
        safetensors.forget(file.fileno())
    self._append({"done": done})
    self.done |= done

  def _append(self, entry: dict[str, Any]) -> None:
    with self.path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(entry) + "\n")
      file.flush()
      os.fsync(file.fileno())


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object that a file holds; InputError where there is none."""
  try:
    facts = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error}") from error
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path}: is not JSON: {error}") from error
  if not isinstance(facts, dict):
    raise InputError(f"{path}: must hold an object")
  return facts


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file, complete or not at all."""
  partial = path.with_name(f".{path.name}.partial")
  with partial.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def check_room(folder: pathlib.Path, n_bytes: int) -> None:
  """Raises InputError where a disk has no room for so many bytes."""
  free = shutil.disk_usage(folder).free
  if n_bytes > free:
    raise InputError(
      f"{folder}: disk full: {n_bytes:,} bytes are to be written, {free:,}"
      " are free"
    )


def disk_error(folder: pathlib.Path, error: OSError) -> InputError:
  """What to tell where writing failed."""
  full = error.errno in (errno.ENOSPC, errno.EDQUOT)
  what = "disk full" if full else "cannot be written"
  return InputError(f"{folder}: {what}, it is not complete: {error}")

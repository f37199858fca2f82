"""Parallel map in bounded memory, and a journal to resume interrupted work."""

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
Advance = Callable[[int], None]  # called with the bytes of what was just done

WORKERS = 4
IN_FLIGHT = 1 << 28  # bytes of items being worked on, unless one has more


def map_in_order(
  work: Callable[[T], R], items: Iterable[T], n_bytes: Callable[[T], int]
) -> Iterator[tuple[T, R]]:
  """Yields items with their results in order; threads work on several at once.

  `n_bytes` returns the size of an item; items in work together have at most
  IN_FLIGHT bytes, unless there is only one.
  """
  with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
    running, size = collections.deque(), 0
    for item in items:
      while running and size + n_bytes(item) > IN_FLIGHT:
        size -= n_bytes(running[0][0])
        # Not bound to a name, which would keep the result in memory.
        yield running[0][0], running.popleft()[1].result()
      running.append((item, pool.submit(work, item)))
      size += n_bytes(item)
    while running:
      yield running[0][0], running.popleft()[1].result()


_MALFORMED = ValueError, KeyError, TypeError, AttributeError, RecursionError


class Journal:
  """Records finished items in a file that survives an interruption."""

  def __init__(self, path: pathlib.Path, source: str) -> None:
    """Reads the entries of an interrupted call, if there was one.

    The journal has a line of JSON for each entry; the first names the source,
    which identifies the work.

    Raises:
      InputError: the journal belongs to other work, or is corrupt.
    """
    self.path, self._source, self.done = path, source, {}
    text = path.read_bytes() if path.exists() else b""
    lines = text.split(b"\n")[:-1]
    if text and not text.endswith(b"\n"):
      # The interruption cut off the last entry: the next one takes its place.
      path.write_bytes(b"".join(line + b"\n" for line in lines))
    self.begun = bool(lines)
    try:
      entries = [json.loads(line) for line in lines]
      for entry in entries:
        self.done |= entry.get("done", {})
      other = self.begun and entries[0]["source"] != source
    except _MALFORMED as error:
      raise InputError(
        f"{path}: corrupt: {error!r}; remove the folder and start again"
      ) from error
    if other:
      raise InputError(
        f"{path.parent}: holds a part of another checkpoint; remove the folder"
        " or take another"
      )

  def begin(self, n_bytes: int) -> None:
    """Writes the first entry of work that will write n_bytes into the folder.

    Raises:
      InputError: the folder holds anything, or its disk has too little space.
    """
    folder = self.path.parent
    if present := sorted(path.name for path in folder.iterdir()):
      raise InputError(
        f"{folder}: must be empty, holds {', '.join(present)}; take a"
        " new folder"
      )
    check_free_space(folder, n_bytes)
    self._append({"source": self._source})

  def add(self, done: dict[str, Any], files: Iterable[pathlib.Path]) -> None:
    """Records finished items, once the files given are on the disk."""
    for path in files:
      with path.open("rb") as file:
        os.fsync(file.fileno())
        safetensors.drop_from_cache(file.fileno())
    self._append({"done": done})
    self.done |= done

  def _append(self, entry: dict[str, Any]) -> None:
    with self.path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(entry) + "\n")
      file.flush()
      os.fsync(file.fileno())


def check_free_space(folder: pathlib.Path, n_bytes: int) -> None:
  """Raises InputError if the disk of a folder has less space than needed."""
  free = shutil.disk_usage(folder).free
  if n_bytes > free:
    raise InputError(
      f"{folder}: disk full: {n_bytes:,} bytes are needed, {free:,} are free"
    )


def disk_error(folder: pathlib.Path, error: OSError) -> InputError:
  """Returns the error to raise if writing into a folder failed."""
  full = error.errno in (errno.ENOSPC, errno.EDQUOT)
  problem = "disk full" if full else "cannot be written"
  return InputError(f"{folder}: {problem}, the folder is incomplete: {error}")

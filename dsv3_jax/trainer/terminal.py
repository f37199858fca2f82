"""Terminal: lines of a run, for a person and for log.txt, and one live line."""

import contextlib
import math
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from dsv3_jax import io

LOG = "log.txt"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S  "  # before each line of log.txt
WAIT_S = 30.0  # time between two plain lines while something takes long

_CLEAR = "\r\x1b[K"


def printable(text: str) -> str:
  """Replaces the characters of a text that cannot be shown."""
  return "".join(
    c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
    for c in text
  )


def excerpt(text: str, length: int) -> str:
  """Returns the start of a text on one line, without control characters."""
  text = printable(" ".join(text.split()))
  return text if len(text) <= length else text[: length - 3] + "..."


def duration(seconds: float) -> str:
  """Formats seconds as 1:02:03, or 2:03 below an hour."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"


class Terminal:
  """Prints lines, which log.txt gets too, and one live line on a terminal."""

  def __init__(
    self, workdir: pathlib.Path | None, stream: TextIO | None = None
  ):
    """Opens log.txt, if there is a workdir; by default on standard output."""
    log = workdir / LOG if workdir else os.devnull
    self._log = open(log, "a", encoding="utf-8")
    self._stream = stream or sys.stdout
    self._lock = threading.RLock()
    self._shown = False
    self.live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
    self._stderr = sys.stderr
    if self.live and self._stderr.isatty():
      sys.stderr = _BesideLiveLine(self._stderr, self)

  def print(self, text: str, *, to_stream: bool = True) -> None:
    """Prints a line and appends it to log.txt."""
    with self._lock:
      self._log.write(time.strftime(TIME_FORMAT) + text + "\n")
      self._log.flush()
      if to_stream:
        self.clear()
        self._put(text + "\n")

  def show(self, *columns: tuple[int, str]) -> None:
    """Replaces the live line, if there is one.

    It has those of the (rank, text) columns that have room; where not all do,
    the ones of the highest ranks go first.
    """
    if self.live:
      width = shutil.get_terminal_size().columns - 1
      with self._lock:
        self._put(f"\r{fit(columns, width)}\x1b[K")
        self._shown = True

  def clear(self) -> None:
    """Removes the live line, until it is shown again."""
    with self._lock:
      if self._shown:
        self._put(_CLEAR)
        self._shown = False

  @contextlib.contextmanager
  def waiting(self, text: str) -> Iterator[None]:
    """Shows for how long the block has been running, which `text` names."""
    began, ended = time.monotonic(), threading.Event()

    def tick():
      line_at = began + WAIT_S
      while not ended.wait(0.5):
        now = time.monotonic()
        state = f"{text}  {duration(now - began)}"
        self.show((0, state))
        if not self.live and now >= line_at:
          self.print(state)
          line_at = now + WAIT_S

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
      yield
    finally:
      ended.set()
      thread.join()
      self.clear()

  def _put(self, text: str) -> None:
    # A model may write letters that the terminal's encoding does not have.
    encoding = self._stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
      self._stream.write(text)
      self._stream.flush()
    except BrokenPipeError:
      if not io.discard_closed_output():
        raise
      self.print("nobody reads the output: it goes to this file alone")

  def close(self) -> None:
    """Removes the live line and closes log.txt."""
    self.clear()
    if isinstance(sys.stderr, _BesideLiveLine):
      sys.stderr = self._stderr
    self._log.close()


class _BesideLiveLine:
  """Standard error of a terminal; a message first removes the live line."""

  def __init__(self, stream: TextIO, terminal: Terminal):
    self._stream, self._terminal = stream, terminal

  def write(self, text: str) -> int:
    self._terminal.clear()
    return self._stream.write(text)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def fit(columns: Sequence[tuple[int, str]], width: float = math.inf) -> str:
  """Joins (rank, text) columns in their order, as many as fit in `width`."""
  columns = list(columns)
  while True:
    line = "  ".join(text for _, text in columns)
    if len(line) <= width or len(columns) == 1:
      return line if width == math.inf else line[: int(width)]
    columns.remove(max(columns, key=lambda column: column[0]))

"""Leaving when told to: SIGTERM and SIGINT."""

import os
import signal
import sys
import threading
from collections.abc import Callable

from dsv3_jax.trainer import exit_codes

SIGNALS = signal.SIGTERM, signal.SIGINT


class Listener:
  """Hears signals while it is entered, whatever the main thread does.

  After the first one there is a while to save. When it is over, or at a second
  signal, the process ends at once: what was saved before stays as it is.
  """

  def __init__(self, grace_s: float, told: Callable[[], None]):
    """Prepares to listen.

    Args:
      grace_s: from the first signal to the end.
      told: called once, from another thread, at the first signal.
    """
    self._grace_s, self._told = grace_s, told
    self._old = {}

  def __enter__(self) -> "Listener":
    # Python calls handlers between its own instructions only, which a
    # compilation of minutes is not; the byte in the pipe is there at once.
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    for number in SIGNALS:
      self._old[number] = signal.signal(number, lambda *_: None)
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_fd)
    os.close(self._write)
    self._thread.join()
    os.close(self._read)

  def _listen(self) -> None:
    if not (name := self._next()):
      return
    late = f"not saved in {self._grace_s:g} s; the last checkpoint is whole"
    over = threading.Timer(self._grace_s, leave, (exit_codes.PREEMPTED, late))
    over.daemon = True
    over.start()
    say(
      f"{name}: saving, then leaving, in {self._grace_s:g} s at most; again:"
      " leaving at once"
    )
    self._told()
    if again := self._next():
      leave(exit_codes.PREEMPTED, f"{again} again: leaving at once")
    over.cancel()

  def _next(self) -> str:
    """The next of the signals' names; "": it is over."""
    while byte := os.read(self._read, 1):
      if byte[0] in SIGNALS:
        return signal.Signals(byte[0]).name
    return ""


def say(text: str) -> None:
  """Writes a line to stderr, from any thread."""
  try:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
  except OSError:  # nobody reads it any more
    pass


def leave(code: int, text: str) -> None:
  """Ends the process at once, from any thread."""
  say(f"error: {text}")
  os._exit(code)

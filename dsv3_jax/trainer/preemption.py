"""Preemption: signals, and agreement on the step after which to stop."""

import os
import signal
import sys
import threading
from collections.abc import Callable

from dsv3_jax.trainer import exit_codes

SIGNALS = signal.SIGTERM, signal.SIGINT


class Listener:
  """Handles signals in its own thread; the first one starts the grace period.

  When that is over, or at a second signal, the process exits at once: what was
  saved before stays as it is. Before `begin` there is nothing to save, and the
  first signal does not wait.
  """

  def __init__(
    self,
    grace_s: float,
    on_signal: Callable[[], None],
    leave: Callable[[str], None],
  ):
    """Prepares to listen; `__enter__` must be called in the main thread.

    At the first signal, another thread calls `on_signal`, once; before `begin`
    it calls `leave` instead, with the name of the signal.
    """
    self._grace_s, self._on_signal, self._leave = grace_s, on_signal, leave
    self._begun = False
    self._old = {}

  def begin(self) -> None:
    """States that there is work that a signal must not lose."""
    self._begun = True

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
    if not self._begun:
      self._leave(name)
    late = f"not saved in {self._grace_s:g} s; earlier checkpoints are complete"
    timer = threading.Timer(
      self._grace_s, exit_now, (exit_codes.PREEMPTED, late)
    )
    timer.daemon = True
    timer.start()
    write_line(
      f"{name}: saving, then exiting, within {self._grace_s:g} s; a second"
      " signal exits at once"
    )
    self._on_signal()
    if again := self._next():
      exit_now(exit_codes.PREEMPTED, f"second signal, {again}: exiting at once")
    timer.cancel()

  def _next(self) -> str:
    """Waits for a signal; returns its name, or "" when listening ends."""
    while byte := os.read(self._read, 1):
      if byte[0] in SIGNALS:
        return signal.Signals(byte[0]).name
    return ""


class StopVote:
  """Agreement of all processes on the step after which to stop.

  After a request to stop, each process tells process 0 how many steps it has
  started, and waits. Process 0 picks the most: one process may be ahead of
  another by the steps that are under way.
  """

  def __init__(self, index: int, count: int, send: Callable[..., None]):
    """Begins without a request, in process `index`.

    `send` sends a message to process 0, or from process 0 to all others.
    """
    self._index, self._count, self._send = index, count, send
    self._changed = threading.Condition()  # guards what follows
    self._requested = False
    self._started: dict[int, int] = {}  # in process 0: steps by waiting process
    self._stop_at: int | None = None

  def request(self) -> None:
    """Asks all processes to stop; from any thread."""
    with self._changed:
      if not self._requested:
        self._requested = True
        self._send(stop=True)
      self._decide()

  def set_started(self, index: int, done: int) -> None:
    """Stores, in process 0, that a process waits after `done` steps."""
    with self._changed:
      self._started[index] = done
      self._decide()

  def set_stop(self, step: int) -> None:
    """Stores, in the others, the decision of process 0."""
    with self._changed:
      self._stop_at = step
      self._changed.notify_all()

  def _decide(self) -> None:
    everyone = len(self._started) == self._count
    if self._requested and everyone and self._stop_at is None:
      self._stop_at = max(self._started.values())
      self._send(stop_at=self._stop_at)
      self._changed.notify_all()

  def should_continue(self, done: int, *, last: bool) -> bool:
    """Returns whether to start a step after `done`; waits for a decision.

    `last` says that there is no further step.
    """
    with self._changed:
      if last or (self._requested and self._stop_at is None):
        if self._index:
          self._send(ready=done)
        else:
          self.set_started(0, done)
      if not last and self._requested:
        self._changed.wait_for(lambda: self._stop_at is not None)
      return self._stop_at is None or done < self._stop_at


def write_line(text: str) -> None:
  """Writes a line to stderr, from any thread."""
  try:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
  except OSError:  # its reader has ended
    pass


def exit_now(code: int, text: str) -> None:
  """Ends the process at once, from any thread."""
  write_line(f"error: {text}")
  os._exit(code)

"""Comparison of mathematical expressions by `math-verify`, in a process.

Time limits of `math-verify` are alarms of the main thread: in another one each
comparison fails. And an answer like 9^9^9^9 takes all memory and time. So a
worker (`expressions_worker.py`) compares, and is ended when it takes too long.
"""

import json
import pathlib
import select
import subprocess
import sys
import threading
import time
import weakref

from dsv3_jax.errors import InputError

_WORKER = str(pathlib.Path(__file__).with_name("expressions_worker.py"))
_START = 120.0  # seconds to import sympy on a busy machine


def _end(process: subprocess.Popen) -> None:
  process.kill()
  process.wait()
  for pipe in (process.stdin, process.stdout):
    if pipe is not None:
      pipe.close()


class ExpressionComparer:
  """Worker that compares expressions, one at a time; threads may share it."""

  def __init__(self, timeout: float):
    """Starts the worker.

    Args:
      timeout: seconds for a comparison.

    Raises:
      InputError: `math-verify` is not installed.
    """
    self._timeout, self._lock = timeout, threading.Lock()
    self._start()

  def _start(self) -> None:
    self._process = subprocess.Popen(
      [sys.executable, "-P", _WORKER],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      bufsize=0,
    )
    self.close = weakref.finalize(self, _end, self._process)
    ready = self._read(_START)
    if missing := ready.get("missing"):
      self.close()
      raise InputError(
        f"the reward `correctness` needs math-verify ({missing}): pip install"
        " 'dsv3_jax[posttrain]'"
      )

  def _read(self, timeout: float) -> dict:
    """Returns the worker's next line; {} if it has ended or takes too long."""
    line, end = b"", time.monotonic() + timeout
    while not line.endswith(b"\n"):
      left = max(0.0, end - time.monotonic())
      if not select.select([self._process.stdout], [], [], left)[0]:
        return {"error": f"timeout: expression compared for {timeout:g} s"}
      if not (read := self._process.stdout.read(4096)):
        return {"error": "worker ended: an expression took all memory"}
      line += read
    return json.loads(line)

  def equal(self, expected: str, given: str) -> tuple[bool, str]:
    """Returns whether expressions in LaTeX are equal, and an error or ""."""
    with self._lock:
      if not self.close.alive:
        self._start()
      task = json.dumps({"expected": expected, "given": given}) + "\n"
      try:
        self._process.stdin.write(task.encode())
        reply = self._read(self._timeout)
      except BrokenPipeError:
        reply = {"error": "worker ended: before it was asked"}
      if "equal" not in reply:
        self.close()
        return False, reply["error"]
    return reply["equal"], ""

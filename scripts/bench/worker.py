"""The conversation between `scripts.bench` and the processes that it times.

A worker gets a job on its first line of standard input, compiles, says so, and
then runs a round for every further line; both sides send one JSON object a
line. While it waits it is blocked in a read, so that several workers can take
turns on one machine without disturbing each other. Only the standard library is
imported here: a worker may live in an interpreter without JAX.
"""

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

PEAK_SIZE = 2048  # square matrices, large enough that a matmul is at its peak
PEAK_REPEATS = 4
Worker = subprocess.Popen


class Task(NamedTuple):
  """Functions that a worker times."""

  # Does one optimizer step, prefill or generation, and returns a number of it
  # when it is done: the loss, a logit, the sum of new tokens.
  step: Callable[[], float]
  matmul: Callable[[], object]  # of two float32 matrices of `PEAK_SIZE`, waits
  version: str  # of the libraries, for the record


def _seconds(work: Callable[[], object]) -> float:
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def _peak_rss_mib() -> float:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _reset_peak_rss() -> None:
  """Forgets the peak so far, where the system can."""
  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak_gflops(matmul: Callable[[], object]) -> float:
  fastest = min(_seconds(matmul) for _ in range(PEAK_REPEATS))
  return 2 * PEAK_SIZE**3 / fastest / 1e9


def _round(task: Task, steps: int) -> dict[str, float]:
  start = time.perf_counter()
  values = [task.step() for _ in range(steps)]
  seconds = time.perf_counter() - start
  return {
    "seconds": seconds,
    "value": values[-1],
    "peak_gflops": _peak_gflops(task.matmul),
    "peak_rss_mib": _peak_rss_mib(),
  }


def serve(prepare: Callable[[dict[str, Any]], Task]) -> None:
  """Runs in the worker: prepares the job, then answers until input ends.

  A round's answer says what the worker did while it waited for it: `idle_s`
  seconds by the clock, `idle_cpu_s` seconds of processor time of all threads.
  Its peak of memory is that of the process, or with `reset_peak` in the job
  that since everything is compiled.
  """
  if "--help" in sys.argv[1:]:
    print(sys.modules["__main__"].__doc__)
    print("A worker that other programs start: it reads a job from stdin.")
    sys.exit()
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what a library prints must not mix with the answers

  def answer(fields: dict[str, Any]) -> tuple[float, float]:
    print(json.dumps(fields), file=answers, flush=True)
    return time.perf_counter(), time.process_time()

  job, import_rss_mib = json.loads(sys.stdin.readline()), _peak_rss_mib()
  task = prepare(job)
  first_s, _, step_s = (_seconds(task.step) for _ in range(3))
  if job.get("reset_peak"):
    _reset_peak_rss()
  fields = {
    "version": task.version,
    "compile_s": max(0.0, first_s - step_s),
    "step_s": step_s,
    "import_rss_mib": import_rss_mib,
  }
  clock, cpu = answer(fields)
  for line in sys.stdin:
    idle = {
      "idle_s": time.perf_counter() - clock,
      "idle_cpu_s": time.process_time() - cpu,
    }
    clock, cpu = answer(_round(task, json.loads(line)["steps"]) | idle)


def start(command: Sequence[str], env: Mapping[str, str], cwd: str) -> Worker:
  """Starts a worker; as a context manager it ends the worker on leaving."""
  return subprocess.Popen(
    command,
    env=os.environ | env,
    cwd=cwd,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def ask(worker: Worker, message: dict[str, Any]) -> dict[str, Any]:
  """Sends one message and waits for its answer.

  Raises:
    RuntimeError: the worker ended instead; its own words are on stderr.
  """
  try:
    print(json.dumps(message), file=worker.stdin, flush=True)
    line = worker.stdout.readline()
  except BrokenPipeError:
    line = ""
  if not line:
    raise RuntimeError(
      f"worker {' '.join(worker.args)} ended with exit code {worker.wait()};"
      " its error is above"
    )
  return json.loads(line)

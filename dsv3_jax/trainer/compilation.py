"""Compilation of programs: a cache on disk, and a step compiled beside others.

Most of the first minute of a run is compilation, on a processor one program
after another.
"""

import atexit
import contextlib
import hashlib
import os
import pathlib
import platform
import sys
import threading
from typing import Any

import jax

CACHE_BYTES = 2 << 30  # at most, on disk; the programs used last stay
HELP = "folder of compiled programs, which later starts read; empty: none"
_THREAD = "compilation"


def default_cache() -> str:
  """Returns the folder of compiled programs: JAX's, or one of the user's."""
  if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return given
  caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return os.path.join(os.path.expanduser(caches), "dsv3_jax", _processor())


def _processor() -> str:
  """Names the instructions of this processor, which programs are made of."""
  flags = ""
  with contextlib.suppress(OSError):
    text = pathlib.Path("/proc/cpuinfo").read_text()
    flags = next((x for x in text.splitlines() if x.startswith("flags")), "")
  digest = hashlib.sha256(f"{platform.machine()} {flags}".encode())
  return f"compiled-{digest.hexdigest()[:8]}"


def use_cache(folder: str) -> None:
  """Keeps compiled programs in a folder, for later starts; "" keeps none.

  Call it before anything is compiled.
  """
  if folder:
    try:
      os.makedirs(folder, exist_ok=True)
    except OSError as error:
      print(
        f"warning: --compile_cache={folder}: {error}; compiled programs are not"
        " kept",
        file=sys.stderr,
      )
      folder = ""
  if not folder:
    jax.config.update("jax_enable_compilation_cache", False)
    return
  jax.config.update("jax_compilation_cache_dir", folder)
  # In JAX's own folder other programs may write without a limit, whose entries
  # have no times of use; with a limit JAX would then write nothing more there.
  if folder != os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
  # Dozens of programs take less than a second each, by default the limit.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def options_to_run_once() -> dict[str, str] | None:
  """Returns options for a program that runs once; None: those of others.

  On a processor it is then compiled in a third of the time, to the same numbers
  as at levels 2 and 3; level 0 has others.
  """
  name = "xla_backend_optimization_level"
  if jax.default_backend() != "cpu" or name in os.environ.get("XLA_FLAGS", ""):
    return None
  return {name: "1"}


def start(step: Any, *args: Any) -> threading.Thread:
  """Compiles a jitted function for abstract arguments, in a thread.

  A call after the thread has ended finds the program.
  """

  def work():
    with contextlib.suppress(Exception):  # a call of the step raises it again
      step.trace(*args).lower().compile()

  thread = threading.Thread(target=work, name=_THREAD, daemon=True)
  thread.start()
  return thread


def is_running() -> bool:
  """Returns whether a thread of `start` still compiles."""
  return any(thread.name == _THREAD for thread in threading.enumerate())


@atexit.register
def _wait() -> None:
  """Waits for the thread: XLA does not survive the end of the interpreter."""
  for thread in threading.enumerate():
    if thread.name == _THREAD:
      thread.join()


def exit_at_once(code: int) -> None:
  """Makes a process that exits with this code not wait for a compilation."""

  def leave():
    if is_running():
      for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
      os._exit(code)

  atexit.register(leave)

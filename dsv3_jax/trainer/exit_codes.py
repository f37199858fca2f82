"""Exit codes of programs, and the errors that they stand for."""

import contextlib
import errno
from collections.abc import Iterator

import jax

from dsv3_jax.checkpoint import manifest
from dsv3_jax.errors import InputError, NotFiniteError
from dsv3_jax.parallel import replica_check

OK, BAD_INPUT, NOT_FINITE, NO_CHECKPOINT = 0, 2, 3, 4
INTERNAL, PREEMPTED, STUCK = 70, 75, 124

# Errors of storage: full, read-only, broken.
_STORAGE = {
  getattr(errno, name)
  for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE")
}
# Errors of a user's path: too long, permission, symlink loop, not a directory.
_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.ENOTDIR}


class PreemptedError(Exception):
  """A signal stopped the run, which is saved."""


class MismatchError(RuntimeError):
  """A replayed step gave other numbers."""


class OutOfMemoryError(RuntimeError):
  """The memory of a device, or of this machine, was full."""


class SpikeError(RuntimeError):
  """Loss or gradient jumped; the data around that step is to be skipped."""

  def __init__(self, step: int, text: str):
    """Stores the number of steps done, including the one that jumped."""
    super().__init__(text)
    self.step = step
    self.back_to: int | None = None  # checkpoint to restart from


_CODES = {
  PreemptedError: PREEMPTED,
  KeyboardInterrupt: PREEMPTED,  # in a notebook; nothing of the run failed
  manifest.MissingError: NO_CHECKPOINT,
  InputError: BAD_INPUT,
  NotFiniteError: NOT_FINITE,
  SpikeError: NOT_FINITE,
  manifest.SaveError: INTERNAL,
  replica_check.DivergedError: INTERNAL,
  MismatchError: INTERNAL,
  OutOfMemoryError: INTERNAL,
}


@contextlib.contextmanager
def out_of_memory_says(remedy: str) -> Iterator[None]:
  """Raises OutOfMemoryError with a remedy where the block lacks memory."""
  try:
    yield
  except Exception as error:
    if not is_out_of_memory(error):
      raise
    first = next(iter(str(error).splitlines()), type(error).__name__)
    raise OutOfMemoryError(f"out of memory: {first}\n{remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether XLA, or the system, could not allocate memory."""
  is_xla = isinstance(error, jax.errors.JaxRuntimeError)
  exhausted = is_xla and "RESOURCE_EXHAUSTED" in str(error)
  return exhausted or isinstance(error, MemoryError)


def code_of(error: BaseException) -> int | None:
  """Returns the exit code of an expected error; None: it is a bug."""
  if isinstance(error, OSError) and error.errno in _STORAGE:
    return INTERNAL
  if isinstance(error, OSError) and error.errno in _PATH:
    return BAD_INPUT
  for error_type, code in _CODES.items():
    if isinstance(error, error_type):
      return code
  return None

"""Exit codes, and which error stands for which."""

import errno

from dsv3_jax.checkpoint import manifest
from dsv3_jax.errors import InputError, NotFiniteError
from dsv3_jax.parallel import replica_check

OK, BAD_INPUT, NOT_FINITE, NO_CHECKPOINT = 0, 2, 3, 4
INTERNAL, PREEMPTED, STUCK = 70, 75, 124

# Of the storage: full, read-only, broken.
_STORAGE = {
  getattr(errno, name)
  for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE")
}
# Of a path that somebody gave: forbidden, without end, through a file.
_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.ENOTDIR}


class PreemptedError(Exception):
  """The run was told to leave, and has saved what it did."""


class MismatchError(RuntimeError):
  """A step that was done again gave something else."""


class SpikeError(RuntimeError):
  """Loss or gradient jumped, and the data around it is to be left out."""

  def __init__(self, step: int, text: str):
    """Remembers where.

    Args:
      step: steps done with the one that jumped.
      text: what happened.
    """
    super().__init__(text)
    self.step = step
    self.back_to: int | None = None  # the step of a checkpoint


_CODES = {
  PreemptedError: PREEMPTED,
  manifest.MissingError: NO_CHECKPOINT,
  InputError: BAD_INPUT,
  NotFiniteError: NOT_FINITE,
  SpikeError: NOT_FINITE,
  manifest.SaveError: INTERNAL,
  replica_check.DivergedError: INTERNAL,
  MismatchError: INTERNAL,
}


def code_of(error: BaseException) -> int | None:
  """The exit code of an error that says what is wrong; None: of a bug."""
  if isinstance(error, OSError) and error.errno in _STORAGE:
    return INTERNAL
  if isinstance(error, OSError) and error.errno in _PATH:
    return BAD_INPUT
  for kind, code in _CODES.items():
    if isinstance(error, kind):
      return code
  return None

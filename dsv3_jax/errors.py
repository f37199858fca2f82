"""Errors with an exit code of their own: bad input, non-finite numbers."""

from collections.abc import Iterable


class InputError(ValueError):
  """A flag, setting, file or request is wrong; programs end with exit code 2.

  The message names the value, what is allowed and what to do, one line a
  problem. Every other ValueError is a bug and keeps its traceback.
  """


def raise_problems(problems: Iterable[str], prefix: str = "") -> None:
  """Raises InputError with a line for each problem, if there are any."""
  if lines := [prefix + problem for problem in problems]:
    raise InputError("\n".join(lines))


class NotFiniteError(FloatingPointError):
  """Too much of a run is NaN or infinite; programs end with exit code 3."""

"""Reads and writes array trees with Orbax; reduces its errors to one line."""

import functools
import logging
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

T = TypeVar("T")


def orbax_keys(leaves: dict[str, T]) -> dict[str, T]:
  """Renames leaves to the names that Orbax writes."""
  return {name.replace("/", "."): leaf for name, leaf in leaves.items()}


def dtype_and_shape(a: Any) -> str:
  """Formats dtype and shape of an array, such as float32[2,3]."""
  return f"{a.dtype}[{','.join(map(str, a.shape))}]"


def read(
  folder: pathlib.Path, like: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Reads some of the arrays of a folder, by name, as `like` describes them.

  Raises:
    Exception: one cannot be read.
  """
  item = orbax_keys(like)
  # Not `Checkpointer`: it would wait for a process in which this fails.
  restored = ocp.PyTreeCheckpointHandler().restore(
    folder,
    args=ocp.args.PyTreeRestore(
      item=item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,
    ),
  )
  arrays = {name: restored[key] for name, key in zip(like, item, strict=True)}
  for name, array in arrays.items():
    # Orbax returns the request itself for an array that it does not know.
    expected = dtype_and_shape(like[name])
    if not isinstance(array, jax.Array) or dtype_and_shape(array) != expected:
      raise ValueError(f"{name} is not there as {expected}")
  return arrays


def first_error_line(work: Callable[[], None]) -> str:
  """Runs `work`; returns the first line of its error, "" if there is none."""
  try:
    work()
    return ""
  except Exception as error:
    return next(iter(str(error).splitlines()), repr(error))


@functools.cache
def silence() -> None:
  """Stops Orbax from logging an error many times; callers report it once.

  If one of its tasks fails, it logs tracebacks and abandons the others.
  """
  before = sys.unraisablehook
  late = "Event loop is closed", "Encountered error while reading array"

  def hook(unraisable):
    if not str(unraisable.exc_value).startswith(late):
      before(unraisable)

  sys.unraisablehook = hook
  warnings.filterwarnings("ignore", "coroutine .* never awaited")
  logging.getLogger("asyncio").disabled = True
  logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
  )

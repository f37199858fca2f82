"""Arrays in a folder, by orbax, whose errors are many and loud."""

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
  """Leaves by the names that orbax makes files of."""
  return {name.replace("/", "."): leaf for name, leaf in leaves.items()}


def dtype_and_shape(a: Any) -> str:
  """Type and shape of an array, such as float32[2,3]."""
  return f"{a.dtype}[{','.join(map(str, a.shape))}]"


def read(
  folder: pathlib.Path, like: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Some of the arrays of a folder, by name, of the types and places given.

  Raises:
    Exception: one cannot be read.
  """
  item = orbax_keys(like)
  # Not `Checkpointer`: it would wait for a process in which this fails.
  found = ocp.PyTreeCheckpointHandler().restore(
    folder,
    args=ocp.args.PyTreeRestore(
      item=item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,
    ),
  )
  arrays = {name: found[key] for name, key in zip(like, item, strict=True)}
  for name, array in arrays.items():
    # What its metadata do not know, orbax leaves as it was asked for.
    kind = dtype_and_shape(like[name])
    if not isinstance(array, jax.Array) or dtype_and_shape(array) != kind:
      raise ValueError(f"{name} is not there as {kind}")
  return arrays


def first_error_line(work: Callable[[], None]) -> str:
  """The first line of the error of any kind that orbax raises; "": none."""
  try:
    work()
    return ""
  except Exception as error:
    return next(iter(str(error).splitlines()), repr(error))


@functools.cache
def silence() -> None:
  """Keeps orbax from telling an error many times over: we tell it once.

  Where one of its tasks fails it logs tracebacks, and leaves the others behind.
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

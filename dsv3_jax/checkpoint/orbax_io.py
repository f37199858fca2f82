"""Reads and writes array trees with Orbax; reduces its errors to one line."""

import functools
import logging
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


def orbax_keys(leaves: dict[str, Any]) -> dict[str, Any]:
  """Renames leaves to the names that Orbax writes; leaves out empty arrays.

  Orbax writes no array of size 0, such as the bias of a model without routers.
  """
  return {
    name.replace("/", "."): leaf for name, leaf in leaves.items() if leaf.size
  }


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
  restored = {}
  if item:  # or there is no file of Orbax that could be read
    # Not `Checkpointer`: it would wait for a process in which this fails.
    restored = ocp.PyTreeCheckpointHandler().restore(
      folder,
      args=ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
      ),
    )
  arrays = {}
  for name, leaf in like.items():
    if not leaf.size:
      arrays[name] = jax.device_put(
        jnp.empty(leaf.shape, leaf.dtype), leaf.sharding
      )
      continue
    (key,) = orbax_keys({name: leaf})
    array, expected = restored[key], dtype_and_shape(leaf)
    # Orbax returns the request itself for an array that it does not know.
    if not isinstance(array, jax.Array) or dtype_and_shape(array) != expected:
      raise ValueError(f"{name} is not there as {expected}")
    arrays[name] = array
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

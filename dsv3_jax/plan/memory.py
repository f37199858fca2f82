"""Bytes that arrays take, compared with what devices and host have."""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dsv3_jax.errors import InputError

# Limits of a container, in the two versions of Linux' control groups.
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def bytes_per_device(tree: Any) -> int:
  """Sums the bytes that one device holds of arrays, or of their shapes."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def host_bytes() -> int:
  """Returns the bytes of memory of this machine, or of its container."""
  there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  for path in map(pathlib.Path, _LIMITS):
    if path.is_file() and (text := path.read_text().strip()).isdecimal():
      there = min(there, int(text))
  return there


def device_bytes(devices: Sequence[jax.Device]) -> float:
  """Returns the bytes of the accelerator that has least; inf: unknown."""
  stats = [device.memory_stats() or {} for device in devices]
  return min(each.get("bytes_limit", math.inf) for each in stats)


def check_fits(
  what: str, held: float, devices: Sequence[jax.Device], hint: str
) -> None:
  """Raises InputError if devices of this process lack room for what each holds.

  Call it before anything is allocated. `held` is in bytes and at most what is
  needed, so that what is refused can never run; `hint` says what to do.
  """
  if devices[0].platform == "cpu":  # virtual devices share the host's memory
    needed, there = held * len(devices), host_bytes()
    where = "of this machine's memory, which has"
  else:
    needed, there = held, device_bytes(devices)
    where = f"on each of {len(devices)} devices, which have"
  if needed > there:
    raise InputError(f"{what} need {gib(needed)} {where} {gib(there)}; {hint}")


def gib(n_bytes: float) -> str:
  """Formats bytes in GiB."""
  return f"{n_bytes / 2**30:,.2f} GiB"

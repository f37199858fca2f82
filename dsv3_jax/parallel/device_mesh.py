"""The device mesh: the same axes in every run, of size 1 if not used."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from dsv3_jax.errors import InputError

Axes = tuple[str, ...]  # of the mesh
Sizes = Mapping[str, int]  # by axis; 1 for axes that are missing

# Outermost first; `node` crosses hosts, `expert` stays inside one.
AXES = ("pipe", "data", "node", "expert", "model")
BATCH = ("data", "node", "expert")  # tokens are divided over these
ROWS = ("pipe", *BATCH)  # tokens are divided over these if there are no stages
EXPERTS = ("node", "expert")  # routed experts are divided over these

_EXPLICIT = (jax.sharding.AxisType.Explicit,) * len(AXES)


def make_mesh(sizes: Sizes) -> jax.sharding.Mesh:
  """Makes a mesh of the first devices, with Explicit axes.

  Raises:
    InputError: there are fewer devices.
  """
  shape = _shape(sizes)
  needed, devices = math.prod(shape), jax.devices()
  if needed > len(devices):
    raise InputError(
      f"mesh {dict(sizes)}: needs {needed} devices, there are {len(devices)}"
    )
  return jax.make_mesh(
    shape, AXES, axis_types=_EXPLICIT, devices=devices[:needed]
  )


def abstract_mesh(sizes: Sizes) -> jax.sharding.AbstractMesh:
  """Makes a mesh for tracing, without devices."""
  return jax.sharding.AbstractMesh(_shape(sizes), AXES, axis_types=_EXPLICIT)


def _shape(sizes: Sizes) -> tuple[int, ...]:
  return tuple(sizes.get(axis, 1) for axis in AXES)


def active_axes(sizes: Sizes, axes: Axes) -> Axes:
  """Selects the axes that are larger than 1."""
  return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def axis_size(sizes: Sizes, axes: Axes) -> int:
  """Counts the devices along the axes together."""
  return math.prod(sizes.get(axis, 1) for axis in axes)


def spec(*dims: Axes) -> jax.P:
  """Makes a PartitionSpec from the mesh axes of each dim."""
  return jax.P(*(dim or None for dim in dims))


def batch_spec(sizes: Sizes, dim: int, axes: Axes = BATCH) -> jax.P:
  """Makes the PartitionSpec of an array with sequences of a batch in dim."""
  return spec(*[()] * dim, active_axes(sizes, axes))


def local_rows(
  n: int, mesh: jax.sharding.Mesh, axes: Axes = BATCH
) -> list[int]:
  """Lists the rows, of n divided over mesh axes, on this process' devices."""
  sharding = jax.NamedSharding(mesh, batch_spec(mesh.shape, 0, axes))
  indices = sharding.addressable_devices_indices_map((n,)).values()
  return sorted({row for (rows,) in indices for row in range(n)[rows]})


def make_global_batch(
  tree: Any, n: int, mesh: jax.sharding.Mesh, dim: int = 0, axes: Axes = BATCH
) -> Any:
  """Makes global arrays of n rows from the `local_rows` of every process.

  The rows are along `dim` of each array; the mesh axes `axes` divide them.
  """
  sharding = jax.NamedSharding(mesh, batch_spec(mesh.shape, dim, axes))
  local = local_rows(n, mesh, axes)

  def leaf(a: Any) -> jax.Array:
    def shard(index: tuple[slice, ...]) -> Any:
      rows = range(n)[index[dim]]
      start = local.index(rows[0])
      local_slice = slice(start, start + len(rows))
      return a[(*index[:dim], local_slice, *index[dim + 1 :])]

    shape = (*a.shape[:dim], n, *a.shape[dim + 1 :])
    return jax.make_array_from_callback(shape, sharding, shard)

  return jax.tree.map(leaf, tree)


def on_first_device(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Copies arrays, unsharded, to this process' first device of the mesh."""
  replicated = jax.NamedSharding(mesh, jax.P())
  copies = jax.jit(lambda tree: tree, out_shardings=replicated)(tree)
  return jax.tree.map(lambda a: a.addressable_data(0), copies)

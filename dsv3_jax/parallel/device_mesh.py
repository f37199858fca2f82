"""The device mesh: always the same axes, of size 1 where they are not used."""

import math
from collections.abc import Mapping

import jax

from dsv3_jax.errors import InputError

# Outermost first; `node` crosses hosts, `expert` stays inside one.
AXES = ("pipe", "data", "node", "expert", "model")
BATCH = ("data", "node", "expert")  # tokens are divided over these
ROWS = ("pipe", *BATCH)  # and over these where there are no stages
EXPERTS = ("node", "expert")  # routed experts are divided over these

_EXPLICIT = (jax.sharding.AxisType.Explicit,) * len(AXES)


def make_mesh(sizes: Mapping[str, int]) -> jax.sharding.Mesh:
  """A mesh over the first devices, with Explicit axes.

  Args:
    sizes: by axis; 1 for those not named.

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


def abstract_mesh(sizes: Mapping[str, int]) -> jax.sharding.AbstractMesh:
  """A mesh of devices that need not be here; for tracing."""
  return jax.sharding.AbstractMesh(_shape(sizes), AXES, axis_types=_EXPLICIT)


def _shape(sizes: Mapping[str, int]) -> tuple[int, ...]:
  return tuple(sizes.get(axis, 1) for axis in AXES)


def active_axes(
  sizes: Mapping[str, int], axes: tuple[str, ...]
) -> tuple[str, ...]:
  """Those of the axes that are larger than 1."""
  return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def axis_size(sizes: Mapping[str, int], axes: tuple[str, ...]) -> int:
  """The number of devices along the axes together."""
  return math.prod(sizes.get(axis, 1) for axis in axes)


def spec(*dims: tuple[str, ...]) -> jax.P:
  """The partition of an array with these mesh axes along its dims."""
  return jax.P(*(dim or None for dim in dims))


def batch_spec(
  sizes: Mapping[str, int], dim: int, axes: tuple[str, ...] = BATCH
) -> jax.P:
  """The partition of an array whose dim runs over the sequences of a batch."""
  return spec(*[()] * dim, active_axes(sizes, axes))


def local_rows(
  n: int, devices: jax.sharding.Mesh, axes: tuple[str, ...] = BATCH
) -> list[int]:
  """Which of n rows, divided over mesh axes, this process' devices hold."""
  sharding = jax.NamedSharding(devices, batch_spec(devices.shape, 0, axes))
  parts = sharding.addressable_devices_indices_map((n,)).values()
  return sorted({row for (part,) in parts for row in range(n)[part]})


def make_global_batch(
  tree,
  n: int,
  devices: jax.sharding.Mesh,
  dim: int = 0,
  axes: tuple[str, ...] = BATCH,
):
  """Arrays of this process' `local_rows` of n along dim, as global ones."""
  sharding = jax.NamedSharding(devices, batch_spec(devices.shape, dim, axes))
  own = local_rows(n, devices, axes)

  def leaf(a):
    def part(index):
      rows = range(n)[index[dim]]
      start = own.index(rows[0])
      here = slice(start, start + len(rows))
      return a[(*index[:dim], here, *index[dim + 1 :])]

    shape = (*a.shape[:dim], n, *a.shape[dim + 1 :])
    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(leaf, tree)


def on_first_device(tree, devices: jax.sharding.Mesh):
  """Whole copies on this process' first device of the mesh."""
  whole = jax.NamedSharding(devices, jax.P())
  copies = jax.jit(lambda tree: tree, out_shardings=whole)(tree)
  return jax.tree.map(lambda a: a.addressable_data(0), copies)

"""The device mesh: always the same axes, of size 1 where they are not used."""

import math
from collections.abc import Mapping

import jax

# Outermost first. Tokens are sharded over data, node and expert.
AXES = ("pipe", "data", "node", "expert", "model")


def mesh(sizes: Mapping[str, int]) -> jax.sharding.Mesh:
  """A mesh over the first devices, with Explicit axes.

  Args:
    sizes: by axis; 1 for those not named.

  Raises:
    ValueError: there are fewer devices.
  """
  shape = tuple(sizes.get(axis, 1) for axis in AXES)
  needed, devices = math.prod(shape), jax.devices()
  if needed > len(devices):
    raise ValueError(
        f"mesh {dict(sizes)}: needs {needed} devices, there are {len(devices)}"
    )
  explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
  return jax.make_mesh(
      shape, AXES, axis_types=explicit, devices=devices[:needed]
  )


def replicated(devices: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Every device holds the whole array."""
  return jax.NamedSharding(devices, jax.P())


def first_replica(tree):
  """The copy of replicated arrays on the first device; nothing is moved."""
  return jax.tree.map(lambda a: a.addressable_data(0), tree)

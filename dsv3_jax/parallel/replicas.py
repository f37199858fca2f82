"""Whether devices that hold the same part of an array hold the same bits."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import manual
from dsv3_jax import schema
from dsv3_jax.parallel import topology


class DivergedError(RuntimeError):
  """Copies that must be equal are not: the devices no longer agree."""


def check(tree: Any, mesh: jax.sharding.Mesh) -> None:
  """Compares all copies of all parts of a tree of arrays.

  Reads every array once and sends four bytes an array and device.

  Raises:
    DivergedError: some differ; names the arrays and the devices.
  """
  leaves = schema.paths(tree)
  digests = np.asarray(_digests(list(leaves.values()), mesh))
  found = [
      line
      for (name, leaf), column in zip(leaves.items(), digests.T, strict=True)
      for line in _differences(name, leaf, column, mesh)
  ]
  if found:
    raise DivergedError("\n".join(found))


@functools.partial(jax.jit, static_argnames="mesh")
def _digests(leaves: list[jax.Array], mesh: jax.sharding.Mesh) -> jax.Array:
  """A digest of what each device holds of each leaf, [devices, leaves]."""

  def local(leaves):
    own = jnp.stack([
        manual.vary(_digest(leaf), topology.AXES) for leaf in leaves
    ])
    return own[None]

  of_devices = jax.shard_map(local, mesh=mesh, out_specs=jax.P(topology.AXES))
  whole = jax.NamedSharding(mesh, jax.P())
  return jax.reshard(of_devices(leaves), whole)


def _digest(a: jax.Array) -> jax.Array:
  """A number that another value of any one element would change."""
  if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
    a = jax.random.key_data(a)
  bits = jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")
  bits = bits.astype(jnp.uint32).ravel()
  # An odd factor loses no bit; one for each place sees elements change places.
  place = jax.lax.iota(jnp.uint32, bits.size)
  return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)


def _differences(
    name: str, leaf: jax.Array, digests: np.ndarray, mesh: jax.sharding.Mesh
) -> list[str]:
  """A line for each part of a leaf of which there are several versions."""
  versions = collections.defaultdict(lambda: collections.defaultdict(list))
  part_of = leaf.sharding.devices_indices_map(leaf.shape)
  for device, digest in zip(mesh.devices.flat, digests, strict=True):
    versions[str(part_of[device])][int(digest)].append(device)
  lines = []
  for holders in versions.values():
    if len(holders) > 1:
      groups = map(_names, sorted(holders.values(), key=len))
      lines.append(f"{name}: " + " differs from ".join(groups))
  return lines


def _names(devices: list[jax.Device]) -> str:
  """The copy of some devices, by their number and process."""
  names = (f"{d.id} (process {d.process_index})" for d in devices)
  return "the copy of devices " + ", ".join(names)

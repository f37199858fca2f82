"""Whether devices that hold the same part of an array hold the same bits."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import checksum, param_spec, varying
from dsv3_jax.parallel import device_mesh


class DivergedError(RuntimeError):
  """Copies that must be equal are not: the devices no longer agree."""


def check_replicas(tree: Any, mesh: jax.sharding.Mesh) -> None:
  """Compares all copies of all parts of a tree of arrays.

  Reads every array once and sends eight bytes an array and device.

  Raises:
    DivergedError: some differ; names the arrays and the devices.
  """
  leaves = param_spec.paths(tree)
  digests = np.asarray(_digests(list(leaves.values()), mesh))
  found = [
    line
    for i, (name, leaf) in enumerate(leaves.items())
    for line in _differences(name, leaf, digests[:, i], mesh)
  ]
  if found:
    raise DivergedError("\n".join(found))


@functools.partial(jax.jit, static_argnames="mesh")
def _digests(leaves: list[jax.Array], mesh: jax.sharding.Mesh) -> jax.Array:
  """Digests of what each device holds of each leaf, [devices, leaves, 2]."""

  def local(leaves):
    own = jnp.stack(
      [
        varying.vary(checksum.compute(leaf), device_mesh.AXES)
        for leaf in leaves
      ]
    )
    return own[None]

  of_devices = jax.shard_map(
    local, mesh=mesh, out_specs=jax.P(device_mesh.AXES)
  )
  whole = jax.NamedSharding(mesh, jax.P())
  return jax.reshard(of_devices(leaves), whole)


def _differences(
  name: str, leaf: jax.Array, digests: np.ndarray, mesh: jax.sharding.Mesh
) -> list[str]:
  """A line for each part of a leaf of which there are several versions."""
  versions = collections.defaultdict(lambda: collections.defaultdict(list))
  part_of = leaf.sharding.devices_indices_map(leaf.shape)
  for device, found in zip(mesh.devices.flat, digests, strict=True):
    versions[str(part_of[device])][checksum.to_hex(found)].append(device)
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

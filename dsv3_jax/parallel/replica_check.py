"""Comparison of replicas: devices with the same shard hold the same bits."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import checksum, param_spec, varying
from dsv3_jax.parallel import device_mesh


class DivergedError(RuntimeError):
  """Replicas of an array differ: the devices no longer agree."""


def check_replicas(tree: Any, mesh: jax.sharding.Mesh) -> None:
  """Compares all replicas of all shards of a tree of arrays.

  Reads every array once, and sends eight bytes for each array and device.

  Raises:
    DivergedError: some replicas differ; with the arrays and the devices.
  """
  leaves = param_spec.flatten_with_paths(tree)
  checksums = np.asarray(_checksums(list(leaves.values()), mesh))
  differences = [
    line
    for i, (name, leaf) in enumerate(leaves.items())
    for line in _differences(name, leaf, checksums[:, i], mesh)
  ]
  if differences:
    raise DivergedError("\n".join(differences))


@functools.partial(jax.jit, static_argnames="mesh")
def _checksums(leaves: list[jax.Array], mesh: jax.sharding.Mesh) -> jax.Array:
  """Returns checksums [devices, leaves, 2] of each device's shards."""

  def local(leaves: list[jax.Array]) -> jax.Array:
    checksums = map(checksum.compute, leaves)
    by_leaf = [varying.vary(c, device_mesh.AXES) for c in checksums]
    return jnp.stack(by_leaf)[None]

  by_device = jax.shard_map(local, mesh=mesh, out_specs=jax.P(device_mesh.AXES))
  replicated = jax.NamedSharding(mesh, jax.P())
  return jax.reshard(by_device(leaves), replicated)


def _differences(
  name: str, leaf: jax.Array, checksums: np.ndarray, mesh: jax.sharding.Mesh
) -> list[str]:
  """Describes each shard of a leaf whose replicas have several checksums."""
  devices_of = collections.defaultdict(lambda: collections.defaultdict(list))
  indices = leaf.sharding.devices_indices_map(leaf.shape)
  for device, words in zip(mesh.devices.flat, checksums, strict=True):
    devices_of[str(indices[device])][checksum.to_hex(words)].append(device)
  lines = []
  for versions in devices_of.values():
    if len(versions) > 1:
      groups = map(_describe, sorted(versions.values(), key=len))
      lines.append(f"{name}: " + " differs from ".join(groups))
  return lines


def _describe(devices: list[jax.Device]) -> str:
  """Describes the replica of some devices by their number and process."""
  names = (f"{d.id} (process {d.process_index})" for d in devices)
  return "the copy of devices " + ", ".join(names)

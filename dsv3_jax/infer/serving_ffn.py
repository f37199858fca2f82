"""The routed experts of a serving mesh, inside `shard_map`."""

import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec
from dsv3_jax.infer.serving_mesh import GROUP, ServingMesh
from dsv3_jax.model import moe
from dsv3_jax.parallel import device_mesh, dispatch


def make_experts(mesh: ServingMesh, cfg: config.Model) -> moe.Experts:
  """Returns the feed-forward of the routed experts of a serving mesh."""
  sizes = mesh.mesh.shape
  inner = dispatch.make_expert_parallel_ffn(
    mesh.dispatch, sizes, cfg.router, group=GROUP
  )
  n_shared = mesh.n_shared(cfg)
  axes = device_mesh.active_axes(sizes, (*device_mesh.BATCH, "model"))

  def ffn(p, x, chosen, gates, n_slots=None):
    """Sends each token to one replica of each of its experts.

    The devices of a `model` group, which all have the same tokens, each take a
    part of them.
    """
    del n_slots
    n_experts, n_rows = len(p["count"]), len(x)
    chosen, gates = _append_shared(chosen, gates, n_experts, n_shared)
    if split := "model" in axes:
      x, chosen, gates = _local_rows(x, chosen, gates, n_experts)
    slot = _replica_slots(p, chosen, axes)
    weights = {name: p[name] for name in ("gate_up", "down")}
    y = inner.ffn(weights, x, slot, gates)
    if split:
      y = jax.lax.all_gather(y, "model", tiled=True, to="invarying")[:n_rows]
    return y

  return moe.Experts(ffn)


def _replica_slots(
  p: param_spec.Params, chosen: jax.Array, axes: tuple[str, ...]
) -> jax.Array:
  """Returns the slot [M, K] of one replica of each chosen expert [M, K].

  Replicas take turns; every device begins with another one. Choices of no
  expert get the slot behind the last.
  """
  first = jax.lax.axis_index(axes) if axes else 0
  turn = first + jnp.arange(len(chosen), dtype=jnp.int32)[:, None]

  def lookup(table, *index):
    return table.at[index].get(mode="fill", fill_value=0)

  count = jnp.maximum(lookup(p["count"], chosen), 1)
  slot = lookup(p["replicas"], chosen, turn % count)
  group = tuple(axis for axis in GROUP if axis in axes)
  n_slots = len(p["down"]) * (jax.lax.axis_size(group) if group else 1)
  return jnp.where(chosen < len(p["count"]), slot, n_slots)


def _append_shared(
  chosen: jax.Array, gates: jax.Array, n_experts: int, n_shared: int
) -> tuple[jax.Array, jax.Array]:
  """Appends the shared experts to choices and gates: [M, K + n_shared] each.

  Rows that choose no expert, which is n_experts, choose no shared one either.
  """
  n_routed = n_experts - n_shared
  shared = jnp.arange(n_routed, n_experts, dtype=chosen.dtype)
  shared = jnp.broadcast_to(shared[None], (len(chosen), n_shared))
  both = jnp.concatenate([chosen, shared], axis=1)
  both = jnp.where(chosen[:, :1] < n_routed, both, n_experts)
  ones = jnp.ones_like(gates, shape=(len(gates), n_shared))
  return both, jnp.concatenate([gates, ones], axis=1)


def _local_rows(
  x: jax.Array, chosen: jax.Array, gates: jax.Array, no_expert: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns this device's part of the rows; padding chooses no expert."""
  n, i = jax.lax.axis_size("model"), jax.lax.axis_index("model")
  size = -(-len(x) // n)

  def local(a, fill):
    padding = (0, n * size - len(a)), (0, 0)
    padded = jnp.pad(a, padding, constant_values=fill)
    return jax.lax.dynamic_slice_in_dim(padded, i * size, size)

  return local(x, 0), local(chosen, no_expert), local(gates, 0)

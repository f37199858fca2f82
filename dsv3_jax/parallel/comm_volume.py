"""Communication volume of expert parallelism: copies of tokens, and bytes."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.linear import recipe
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh


def token_copies(
  chosen: jax.Array, *, sizes: device_mesh.Sizes, cfg: config.Router, form: str
) -> jax.Array:
  """Counts copies [2] of this device's tokens, across nodes and inside one.

  The tokens have chosen experts [M, K]; `form` is that of the dispatch, see
  `dispatch.make_expert_parallel_ffn`.
  """
  n_nodes, n_devices = (sizes.get(axis, 1) for axis in device_mesh.EXPERTS)
  n_local = cfg.n_experts // (n_nodes * n_devices)
  node, device = (
    jax.lax.axis_index(axis) if sizes.get(axis, 1) > 1 else 0
    for axis in device_mesh.EXPERTS
  )
  device_of = chosen // n_local
  reached = jax.nn.one_hot(device_of, n_nodes * n_devices, dtype=jnp.bool_)
  reached = reached.any(1).reshape(-1, n_nodes, n_devices)
  if form == "allgather":
    reached = jnp.ones_like(reached)
  other_node = (jnp.arange(n_nodes) != node)[None, :, None]
  other_device = (jnp.arange(n_devices) != device)[None, None]
  if form == "hierarchical_all_to_all":
    across = reached.any(2, keepdims=True) & other_node
    inside = reached & other_device
  else:
    across, inside = reached & other_node, reached & ~other_node & other_device
  return jnp.stack([across.sum(), inside.sum()]).astype(jnp.int32)


def bytes_sent(copies: np.ndarray, run: config.Run) -> dict[str, int]:
  """Returns the bytes that forward passes of a step send over each axis.

  A copy of a token is its state, in both directions, and its top-k choices and
  gates on the way to the experts. With FP8 weights, the state takes one byte
  for each number and four for each tile on the way to the experts. `copies` is
  [n_routers, 2], as `moe.MoEStats` counts them.
  """
  itemsize = 4 if run.precision.recipe == "fp32" else 2
  model, tile = run.model, run.precision.tile
  to_experts = back = model.d_model * itemsize
  specs = transformer.specs(model)
  if "moe/ffn/experts/gate_up" in recipe.fp8_paths(specs, run.precision):
    to_experts = model.d_model + 4 * -(-model.d_model // tile)
  bytes_of_copy = to_experts + back + 8 * model.router.top_k
  totals = copies.sum(0, dtype=np.int64)
  return {
    axis: int(n) * bytes_of_copy
    for axis, n in zip(device_mesh.EXPERTS, totals, strict=True)
  }

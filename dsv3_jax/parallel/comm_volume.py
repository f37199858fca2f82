"""How much expert parallelism sends, in copies of tokens and in bytes."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.linear import recipe
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh


def token_copies(
  chosen: jax.Array,
  *,
  sizes: Mapping[str, int],
  cfg: config.Router,
  form: str,
) -> jax.Array:
  """Copies of this device's tokens that cross nodes, and that stay in one.

  Args:
    chosen: [M, K] int32 experts.
    sizes: of the mesh axes.
    cfg: routing rules.
    form: of the dispatch, see `dispatch.make_expert_parallel_ffn`.

  Returns:
    [2] int32.
  """
  n_nodes, n_places = (sizes.get(axis, 1) for axis in device_mesh.EXPERTS)
  n_here = cfg.n_experts // (n_nodes * n_places)
  node, place = (
    jax.lax.axis_index(axis) if sizes.get(axis, 1) > 1 else 0
    for axis in device_mesh.EXPERTS
  )
  reached = jax.nn.one_hot(
    chosen // n_here, n_nodes * n_places, dtype=jnp.bool_
  ).any(1)
  reached = reached.reshape(-1, n_nodes, n_places)
  if form == "allgather":
    reached = jnp.ones_like(reached)
  away = (jnp.arange(n_nodes) != node)[None, :, None]
  beside = (jnp.arange(n_places) != place)[None, None]
  if form == "hierarchical_all_to_all":
    across = reached.any(2, keepdims=True) & away
    inside = reached & beside
  else:
    across, inside = reached & away, reached & ~away & beside
  return jnp.stack([across.sum(), inside.sum()]).astype(jnp.int32)


def bytes_sent(sent: np.ndarray, run: config.Run) -> dict[str, int]:
  """Bytes that the forward passes of a step send over each axis.

  A copy of a token is its state, there and back, and on the way there the
  choices and gates of its top-k. In FP8, the state takes a byte a number and
  four a tile on the way there.

  Args:
    sent: [n_routers, 2] copies, as `moe.Stats` counts them.
    run: the configuration.
  """
  itemsize = 4 if run.precision.recipe == "fp32" else 2
  model, tile = run.model, run.precision.tile
  there = back = model.d_model * itemsize
  specs = transformer.specs(model)
  if "moe/ffn/experts/gate_up" in recipe.fp8_paths(specs, run.precision):
    there = model.d_model + 4 * -(-model.d_model // tile)
  copy = there + back + 8 * model.router.top_k
  token_copies = sent.sum(0, dtype=np.int64)
  return {
    axis: int(n) * copy
    for axis, n in zip(device_mesh.EXPERTS, token_copies, strict=True)
  }

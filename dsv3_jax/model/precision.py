"""What the network computes in: a cast of the float32 master parameters."""

import jax
import jax.numpy as jnp

from dsv3_jax import schema

_KEPT = ("norm", "router")  # read in float32 whatever the recipe (section 3.3)


def compute_params(params: schema.Params, recipe: str) -> schema.Params:
  """Parameters as the forward pass reads them, cast once an optimizer step.

  Norm gains and router centroids stay float32.

  Args:
    params: float32 master parameters.
    recipe: `fp32`, or `bf16` for matrices in bfloat16.
  """
  if recipe == "fp32":
    return params

  def cast(path, leaf):
    kept = path[-1].key.endswith(_KEPT)
    return leaf if kept else leaf.astype(jnp.bfloat16)

  return jax.tree.map_with_path(cast, params)

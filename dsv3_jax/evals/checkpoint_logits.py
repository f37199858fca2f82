"""Computes the logits of a checkpoint, loaded shard by shard."""

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.evals import hidden, logits
from dsv3_jax.interop import load_sharded
from dsv3_jax.parallel import layout_check, layouts


def compute_logits(
  source: load_sharded.SliceSource,
  run: config.Run,
  tokens: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> list[np.ndarray]:
  """Returns float32 logits of the main model and of each MTP depth.

  Args:
    source: the checkpoint.
    run: its model and the layout of its parameters.
    tokens: [B, T] integers.
    mesh: the devices to compute on.

  Returns:
    [B, T - k, C] for each depth k, 0 for the main model.

  Raises:
    InputError: the mesh does not fit the run, or the tokens not the model.
  """
  if problems := layout_check.validate(run, mesh.shape):
    raise InputError("\n".join(problems))
  layout = layouts.make_layout(run, mesh.shape, staged=False)
  parts = load_sharded.load(source, layout.specs, mesh, np.float32)
  model = hidden.EvalModel(*parts, run, mesh)
  b, t = tokens.shape if tokens.ndim == 2 else (0, 0)
  result = [
    np.empty((b, max(t - k, 0), run.model.vocab_size), np.float32)
    for k in range(1 + run.model.mtp.depth)
  ]
  for rows, depths in logits.of_rows(model, tokens):
    for array, values in zip(result, depths, strict=True):
      array[rows] = values
  return result

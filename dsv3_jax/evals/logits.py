"""Logits of whole rows, of the main model and of every MTP depth."""

from collections.abc import Iterator

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.evals import hidden
from dsv3_jax.interop import hf_read, load_sharded
from dsv3_jax.model import transformer
from dsv3_jax.parallel import layout_check, layouts


def _logits(params, out):
  states = out.hidden, *out.mtp_hidden
  return tuple(transformer.logits(params, state) for state in states)


def of_rows(
  model: hidden.EvalModel, tokens: np.ndarray
) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
  """Computes logits of a few rows at a time, one for each shard of the mesh.

  Args:
    model: to evaluate, on devices of one process.
    tokens: [B, T] int32, T above the MTP depth.

  Yields:
    A slice of the rows, and their logits in float32: [b, T, C] of the main
    model, where position t predicts token t + 1, and [b, T - k, C] of MTP depth
    k, where it predicts token t + k + 1.

  Raises:
    InputError: a token id is not in the vocabulary, or rows are too short.
  """
  cfg = model.run.model
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise InputError(
      f"tokens: {tokens.dtype} {tokens.shape}, must be integers [B, T]"
    )
  if tokens.shape[1] <= cfg.mtp.depth:
    raise InputError(
      f"tokens: {tokens.shape[1]} in a row, must be above the MTP depth of"
      f" {cfg.mtp.depth}"
    )
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < cfg.vocab_size:
    raise InputError(
      f"tokens: {tokens.min()} to {tokens.max()}, must be in"
      f" [0, {cfg.vocab_size})"
    )
  tokens, first = tokens.astype(np.int32), 0
  for values in hidden.map_hidden(
    model, _logits, tokens, batch_size=1, per_row=True, with_mtp=True
  ):
    n = min(len(values[0]), len(tokens) - first)
    yield slice(first, first + n), tuple(np.asarray(a)[:n] for a in values)
    first += n


def compute_logits(
  source: hf_read.ReleasedCheckpoint,
  run: config.Run,
  tokens: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> list[np.ndarray]:
  """Loads a checkpoint by shards, and computes float32 logits of tokens [B, T].

  Returns:
    [B, T - k, C] for each depth k, 0 for the main model.

  Raises:
    InputError: the mesh does not fit the run, or the tokens not the model.
  """
  raise_problems(layout_check.validate(run, mesh.shape))
  layout = layouts.make_layout(run, mesh.shape, staged=False)
  parts = load_sharded.load(source, layout.specs, mesh, np.float32)
  b, t = tokens.shape if tokens.ndim == 2 else (0, 0)
  result = [
    np.empty((b, max(t - k, 0), run.model.vocab_size), np.float32)
    for k in range(1 + run.model.mtp.depth)
  ]
  for rows, depths in of_rows(hidden.EvalModel(*parts, run, mesh), tokens):
    for array, values in zip(result, depths, strict=True):
      array[rows] = values
  return result

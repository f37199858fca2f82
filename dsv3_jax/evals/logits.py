"""Logits of whole rows, of the main model and of every MTP depth."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from dsv3_jax.errors import InputError
from dsv3_jax.evals import hidden
from dsv3_jax.linear import recipe
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, layouts


def _local(params, bias, tokens, *, run, layout):
  params = recipe.compute_params(
    params, transformer.specs(run.model), run.precision, layout.fsdp_dims
  )
  params = layout.gather_for_step(params)
  out = transformer.forward(
    params,
    bias,
    tokens,
    run.model,
    segment_start=run.data.segment_start,
    experts=layout.experts,
    gather=layout.gather_layer,
  )
  states = out.hidden, *out.mtp_hidden
  return tuple(transformer.logits(params, state) for state in states)


@functools.partial(jax.jit, static_argnames=("run", "mesh"))
def _logits(params, bias, tokens, *, run, mesh):
  layout = layouts.make_layout(run, mesh.shape, staged=False)
  divided = device_mesh.batch_spec(mesh.shape, 0, device_mesh.ROWS)
  return jax.shard_map(
    functools.partial(_local, run=run, layout=layout),
    mesh=mesh,
    in_specs=(layout.specs, jax.P(), divided),
    out_specs=(divided,) * (1 + run.model.mtp.depth),
  )(params, bias, tokens)


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
  cfg, size = (
    model.run.model,
    device_mesh.axis_size(model.mesh.shape, device_mesh.ROWS),
  )
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
  for first in range(0, len(tokens), size):
    rows = tokens[first : first + size].astype(np.int32)
    n = len(rows)
    rows = np.pad(rows, ((0, size - n), (0, 0)))
    rows = device_mesh.make_global_batch(
      rows, size, model.mesh, axes=device_mesh.ROWS
    )
    found = _logits(
      model.params, model.bias, rows, run=model.run, mesh=model.mesh
    )
    yield slice(first, first + n), tuple(np.asarray(a)[:n] for a in found)

"""Scores of the last hidden states of rows, computed on a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.linear import recipe
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, layouts


@dataclasses.dataclass(frozen=True)
class EvalModel:
  """Parameters of a run, sharded by its layout, to be evaluated."""

  params: param_spec.Params  # MTP modules are not used
  bias: jax.Array  # [n_routers, E] f32
  run: config.Run
  mesh: jax.sharding.Mesh


# A function of hidden states [b, T, D] of some rows, the weights of the head,
# and the data of these rows. It returns a sum [] or a value for each row [b].
Score = Callable[..., jax.Array]


def _local(params, bias, tokens, data, *, score, run, layout):
  main = config.override(run.model, "mtp.depth=0")
  params = recipe.compute_params(
    params, transformer.specs(run.model), run.precision, layout.fsdp_dims
  )
  params = layout.gather_for_step(params)
  out = transformer.forward(
    params,
    bias[: main.n_routers],
    tokens,
    main,
    segment_start=run.data.segment_start,
    experts=layout.experts,
    gather=layout.gather_layer,
  )
  found = score(out.hidden, params["head"], *data)
  return found if found.ndim else jax.lax.psum(found, layout.batch_axes)


@functools.partial(jax.jit, static_argnames=("score", "per_row", "run", "mesh"))
def _scored(params, bias, tokens, data, *, score, per_row, run, mesh):
  layout = layouts.make_layout(run, mesh.shape, staged=False)
  divided = device_mesh.batch_spec(mesh.shape, 0, device_mesh.ROWS)
  return jax.shard_map(
    functools.partial(_local, score=score, run=run, layout=layout),
    mesh=mesh,
    in_specs=(layout.specs, jax.P(), divided, (divided,) * len(data)),
    out_specs=divided if per_row else jax.P(),
  )(params, bias, tokens, data)


def map_hidden(
  model: EvalModel,
  score: Score,
  per_row: bool,
  tokens: np.ndarray,
  *data: np.ndarray,
  batch_size: int,
) -> list[Any]:
  """Applies `score` to the final hidden states of each batch.

  Args:
    model: to evaluate.
    score: see `Score`; a top-level function, so that it is compiled once.
    per_row: whether it returns a value for each row [b], not one sum [].
    tokens: [R, T] int32.
    *data: [R, ...] each; `score` gets the same rows of them as of tokens. Rows
      that pad the last batch are zeros.
    batch_size: rows in a batch, rounded up to a multiple of the mesh's shards.

  Returns:
    The value of each batch, [] or [b].
  """
  mesh = model.mesh
  n_shards = device_mesh.axis_size(mesh.shape, device_mesh.ROWS)
  size = min(batch_size, len(tokens))
  size = -(-size // n_shards) * n_shards
  padding = -len(tokens) % size
  padded = [
    np.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1)))
    for a in (tokens, *data)
  ]
  values = []
  for i in range(0, len(padded[0]), size):
    local = device_mesh.local_rows(size, mesh, device_mesh.ROWS)
    rows = tuple(a[i : i + size][local] for a in padded)
    rows = device_mesh.make_global_batch(
      rows, size, mesh, axes=device_mesh.ROWS
    )
    value = _scored(
      model.params,
      model.bias,
      rows[0],
      rows[1:],
      score=score,
      per_row=per_row,
      run=model.run,
      mesh=mesh,
    )
    values.append(value)
  return values

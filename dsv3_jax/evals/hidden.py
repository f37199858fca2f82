"""Scores of the last hidden states of rows, computed on a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.parallel import device_mesh, layouts, sharded_forward


@dataclasses.dataclass(frozen=True)
class EvalModel:
  """Parameters of a run, sharded by its layout, to be evaluated."""

  params: param_spec.Params
  bias: jax.Array  # [n_routers, E] f32
  run: config.Run
  mesh: jax.sharding.Mesh


# A function of the gathered parameters, the `transformer.Output` of some rows,
# and the data of these rows. It returns a sum [], or arrays [b, ...].
Score = Callable[..., Any]


@functools.partial(
  jax.jit, static_argnames=("score", "per_row", "with_mtp", "run", "mesh")
)
def _scored(params, bias, rows, *, score, per_row, with_mtp, run, mesh):
  layout = layouts.make_layout(run, mesh.shape, staged=False)
  divided = device_mesh.batch_spec(mesh.shape, 0, device_mesh.ROWS)
  main = config.override(run.model, "mtp.depth=0")
  cfg = run.model if with_mtp else main

  def local(params, bias, rows):
    tokens, segments, routes, *data = rows
    if routes is not None:
      routes = routes[:, :, : cfg.n_routers]
    params, out = sharded_forward.forward(
      params, bias[: cfg.n_routers], tokens, run, layout, cfg, segments, routes
    )
    value = score(params, out, *data)
    return value if per_row else jax.lax.psum(value, layout.batch_axes)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(layout.specs, jax.P(), divided),
    out_specs=divided if per_row else jax.P(),
  )(params, bias, rows)


def _rows_from(
  a: np.ndarray, start: int, size: int, local: list[int]
) -> np.ndarray:
  """Selects the `local` ones of `size` rows, zeros after the last of all."""
  a = a[start : start + size]
  return np.pad(a, ((0, size - len(a)), *((0, 0),) * (a.ndim - 1)))[local]


def map_hidden(
  model: EvalModel,
  score: Score,
  tokens: np.ndarray,
  *data: np.ndarray,
  batch_size: int,
  segments: np.ndarray | None = None,
  routes: np.ndarray | None = None,
  per_row: bool = False,
  with_mtp: bool = False,
) -> Iterator[Any]:
  """Yields the `score` of the final hidden states of each batch.

  Args:
    model: to evaluate.
    score: see `Score`; a top-level function, so that it is compiled once.
    tokens: [R, T] int32.
    *data: [R, ...] each; `score` gets the same rows of them as of tokens. Rows
      that pad the last batch are zeros.
    batch_size: rows in a batch, rounded up to a multiple of the mesh's shards.
    segments: [R, T] int32, which attention stays inside of.
    routes: [R, T, n_routers, K] int32, see `data.batch.Batch`.
    per_row: whether the score has values for each row, not one sum.
    with_mtp: whether the output has the states of the MTP modules too.
  """
  mesh = model.mesh
  n_shards = device_mesh.axis_size(mesh.shape, device_mesh.ROWS)
  size = -(-min(batch_size, len(tokens)) // n_shards) * n_shards
  for i in range(0, len(tokens), size or 1):
    local = device_mesh.local_rows(size, mesh, device_mesh.ROWS)
    here = functools.partial(_rows_from, start=i, size=size, local=local)
    rows = jax.tree.map(here, (tokens, segments, routes, *data))
    rows = device_mesh.make_global_batch(
      rows, size, mesh, axes=device_mesh.ROWS
    )
    yield _scored(
      model.params,
      model.bias,
      rows,
      score=score,
      per_row=per_row,
      with_mtp=with_mtp,
      run=model.run,
      mesh=mesh,
    )

"""Likelihood of held-out text: loss and bits per byte."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax import losses
from dsv3_jax import schema
from dsv3_jax.model import precision
from dsv3_jax.model import transformer
from dsv3_jax.parallel import layouts
from dsv3_jax.parallel import topology


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Of a text under a model."""

  nats: float  # sum of -log p over the targets
  n_targets: int
  n_bytes: int  # of the text in UTF-8

  def row(self, suffix: str) -> dict[str, float]:
    """Loss a token, and bits per byte of the text."""
    return {
        f"heldout_loss{suffix}": self.nats / self.n_targets,
        f"heldout_bpb{suffix}": self.nats / math.log(2) / self.n_bytes,
    }


def _local_nll(params, bias, tokens, labels, mask, *, run, layout):
  """Sum of -log p over the labels that the mask selects, [B, T] each."""
  main = config.override(run.model, "mtp.depth=0")
  params = precision.compute_params(
      params, transformer.specs(run.model), run.precision, layout.slices
  )
  params = layout.step(params)
  out = transformer.forward(
      params,
      bias[: main.n_routers],
      tokens,
      main,
      segment_start=run.data.segment_start,
      experts=layout.experts,
      gather=layout.layer,
  )
  nll = losses.cross_entropy(
      out.hidden.reshape(-1, main.d_model),
      params["head"],
      labels.reshape(-1),
      mask.reshape(-1),
  )
  return jax.lax.psum(nll, layout.batch_axes)


@functools.partial(jax.jit, static_argnames=("run", "mesh"))
def _nll(params, *args, run, mesh):
  """The sum over rows that are divided over a mesh."""
  layout = layouts.layout(run, mesh.shape, staged=False)
  divided = topology.batch_spec(mesh.shape, 0, topology.ROWS)
  return jax.shard_map(
      functools.partial(_local_nll, run=run, layout=layout),
      mesh=mesh,
      in_specs=(layout.specs, jax.P(), divided, divided, divided),
      out_specs=jax.P(),
  )(params, *args)


def heldout(
    params: schema.Params,
    bias: jax.Array,
    rows: np.ndarray,
    mask: np.ndarray,
    n_bytes: int,
    run: config.Run,
    mesh: jax.sharding.Mesh,
) -> Likelihood:
  """Of windows of a text.

  Args:
    params: parameters of the model; MTP modules are not used.
    bias: [n_routers, E] f32.
    rows: [R, T + 1] int32 windows.
    mask: [R, T] bool, targets to score.
    n_bytes: UTF-8 bytes of the text that the scored targets spell.
    run: the configuration.
    mesh: where the parameters are, as `run` lays them out.
  """
  n_shards = topology.extent(mesh.shape, topology.ROWS)
  size = min(run.evaluate.batch_size, len(rows))
  size = -(-size // n_shards) * n_shards
  padding = -len(rows) % size
  rows = np.pad(rows, ((0, padding), (0, 0)))
  weight = np.pad(mask, ((0, padding), (0, 0))).astype(np.float32)
  total = 0.0
  for i in range(0, len(rows), size):
    part, here = rows[i : i + size], weight[i : i + size]
    own = topology.own_rows(size, mesh, topology.ROWS)
    data = (part[own, :-1], part[own, 1:], here[own])
    data = topology.put_rows(data, size, mesh, axes=topology.ROWS)
    total += _nll(params, bias, *data, run=run, mesh=mesh)
  return Likelihood(float(total), int(mask.sum()), n_bytes)


def joined(found: Mapping[str, Likelihood]) -> dict[str, float]:
  """What metrics say of the texts of domains: of all, then of each."""
  columns = zip(*map(dataclasses.astuple, found.values()), strict=True)
  rows = Likelihood(*map(sum, columns)).row("")
  for name, likelihood in found.items():
    if name:
      rows |= likelihood.row(f"/{name}")
  return rows

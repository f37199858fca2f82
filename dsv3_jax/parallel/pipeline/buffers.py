"""Buffers of a pipeline rank between the ticks of a step, and their rows."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import param_spec
from dsv3_jax.data.batch import Batch
from dsv3_jax.model import moe
from dsv3_jax.parallel.pipeline.split_backward import Passes, Types
from dsv3_jax.parallel.pipeline.stages import LayerStacks
from dsv3_jax.parallel.pipeline.tick_table import TickTable


@flax.struct.dataclass
class Buffers:
  """The carry of the scan over ticks; every array differs between devices."""

  inputs: jax.Array  # [slots + 1, B, T, D]
  gradients: jax.Array  # [slots + 1, B, T, D]
  residuals: dict[str, list[jax.Array]]  # [slots * layers, ...] by layer type
  wgrad: dict[str, list[jax.Array]]  # the same, for weight gradients
  sums: param_spec.Params  # of gradients, f32
  main: jax.Array  # sums of losses
  mtp: jax.Array
  metrics: dict[str, jax.Array]  # sums, of the batch's objective
  stats: moe.MoEStats  # sums


def zeros(
  table: TickTable,
  stacks: Mapping[str, LayerStacks],
  passes: Mapping[str, Passes],
  *,
  x: Any,
  sums: param_spec.Params,
  load: Any,
  batch: Batch,
) -> Buffers:
  """Returns empty buffers.

  Args:
    table: with the numbers of slots.
    stacks: layers of a rank, by layer type.
    passes: of a layer of each type.
    x: array or type of the hidden states [B, T, D].
    sums: arrays or types of the gradients.
    load: array or type of the experts' counts [n_routers, E].
    batch: whose objective may have metrics, and which may have routes.
  """

  def of_layers(n_slots: int, types: Types, size: int) -> list[jax.Array]:
    return [jnp.zeros((n_slots * size, *t.shape), t.dtype) for t in types]

  n_routers = load.shape[0]
  metrics = batch.objective.metrics if batch.objective else ()
  pairs = jnp.zeros((n_routers, 2), jnp.int32)
  return Buffers(
    inputs=jnp.zeros((table.n_input_slots + 1, *x.shape), x.dtype),
    gradients=jnp.zeros((table.n_gradient_slots + 1, *x.shape), x.dtype),
    residuals={
      name: of_layers(
        table.n_residual_slots, passes[name].residual_types, stack.size
      )
      for name, stack in stacks.items()
    },
    wgrad={
      name: of_layers(table.n_wgrad_slots, passes[name].wgrad_types, stack.size)
      for name, stack in stacks.items()
    },
    sums=jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), sums),
    main=jnp.float32(0),
    mtp=jnp.float32(0),
    metrics={name: jnp.float32(0) for name in metrics},
    stats=moe.MoEStats(
      load=jnp.zeros(load.shape, jnp.int32),
      balance=jnp.zeros(n_routers),
      sent=pairs,
      replayed=None if batch.routes is None else pairs,
    ),
  )


def get(a: jax.Array, row: jax.Array) -> jax.Array:
  """Returns a row of an array."""
  return jax.lax.dynamic_index_in_dim(a, row, keepdims=False)


def put(tree: Any, row: jax.Array, new: Any) -> Any:
  """Replaces a row of every array."""

  def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(a, b, row, 0)

  return jax.tree.map(leaf, tree, new)


def add(a: jax.Array, row: jax.Array, new: jax.Array) -> jax.Array:
  """Adds to a row of an array."""
  return put(a, row, get(a, row) + new.astype(a.dtype))


def add_gradients(
  buffers: Buffers, name: str, row: jax.Array, gradients: list[jax.Array | None]
) -> Buffers:
  """Adds gradients of a layer; None for those of another pass."""
  totals, structure = jax.tree.flatten(buffers.sums[name])
  totals = [
    total if g is None else add(total, row, g)
    for total, g in zip(totals, gradients, strict=True)
  ]
  totals = jax.tree.unflatten(structure, totals)
  return buffers.replace(sums=buffers.sums | {name: totals})

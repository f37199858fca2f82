"""Pipeline stages: layers of each stage, and the exchange of their parameters.

Layers are divided into stages as evenly as possible, the first stages larger:
the last one also computes the output head and the MTP modules. A rank holds the
layers of its stages in one stack for each layer type. Stacks have the same
number of slots on every rank; some slots stay empty.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.parallel.pipeline import schedules


@dataclasses.dataclass(frozen=True)
class LayerStacks:
  """The stacks of one layer type, `dense` or `moe`, on all ranks."""

  first: np.ndarray  # [stage] index of its first layer among those of the type
  count: np.ndarray  # [stage] number of its layers
  size: int  # slots of a stage in the stack of a rank
  layers: np.ndarray  # [rank, slot] index of the layer; n_layers: empty
  n_layers: int


@dataclasses.dataclass(frozen=True)
class Stages:
  """A schedule, and the layers of its stages."""

  schedule: schedules.Schedule
  stacks: Mapping[str, LayerStacks]  # by layer type, in the order of the layers


def assign_stages(schedule: schedules.Schedule, model: config.Model) -> Stages:
  """Divides the layers of a model into the stages of a schedule."""
  layers_of = np.array_split(np.arange(model.n_layers), schedule.n_stages)
  stages_of_rank = np.array(schedule.stages)
  n_dense = model.n_dense_layers
  stacks = {}
  for name, start, n in (
    ("dense", 0, n_dense),
    ("moe", n_dense, model.n_moe_layers),
  ):
    of_type = [
      layers[(start <= layers) & (layers < start + n)] - start
      for layers in layers_of
    ]
    if n:
      stacks[name] = _stack_layers(of_type, stages_of_rank, n)
  return Stages(schedule, stacks)


def _stack_layers(
  layers_of: list[np.ndarray], stages_of_rank: np.ndarray, n_layers: int
) -> LayerStacks:
  count = np.array([len(layers) for layers in layers_of])
  first = np.array([layers[0] if len(layers) else 0 for layers in layers_of])
  size = int(count.max())
  padded = np.full((len(layers_of), size), n_layers)
  for row, layers in zip(padded, layers_of, strict=True):
    row[: len(layers)] = layers
  by_rank = padded[stages_of_rank].reshape(len(stages_of_rank), -1)
  return LayerStacks(first, count, size, by_rank, n_layers)


# --- inside shard_map ---


def to_ranks(a: jax.Array, stacks: LayerStacks, dim: int | None) -> jax.Array:
  """Selects this rank's stack from the layers [L, ...] that all ranks store.

  Args:
    a: replicated over `pipe`, or this rank's shard of every layer.
    stacks: of the layer type.
    dim: along which a is sharded over `pipe`; None: replicated.
  """
  if dim is None:
    layers = jnp.asarray(stacks.layers)[jax.lax.axis_index("pipe")]
    return a.at[layers].get(mode="fill", fill_value=0)
  shards = a.at[stacks.layers.reshape(-1)].get(mode="fill", fill_value=0)
  return jax.lax.all_to_all(shards, "pipe", 0, dim, tiled=True)


def from_ranks(g: jax.Array, stacks: LayerStacks, dim: int | None) -> jax.Array:
  """Returns gradients of all layers [L, ...] from those of a rank's stack.

  The transpose of `to_ranks`: gradients of a layer that two ranks hold are
  added. With dim None the caller must sum over `pipe`.
  """
  if dim is None:
    layers = jnp.asarray(stacks.layers)[jax.lax.axis_index("pipe")]
  else:
    g = jax.lax.all_to_all(g, "pipe", dim, 0, tiled=True)
    layers = stacks.layers.reshape(-1)
  zeros = jnp.zeros_like(g, shape=(stacks.n_layers, *g.shape[1:]))
  return zeros.at[layers].add(g, mode="drop")

"""Pipeline stages: which layers each has, and how they get to its ranks.

Layers are cut into stages as evenly as they go, the first stages larger: the
last one has the output head and the MTP modules besides. A rank holds the
layers of its stages as one stack of each kind, in places that are as many on
every rank; some stay empty.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.parallel.pipeline import schedules


@dataclasses.dataclass(frozen=True)
class Kind:
  """The layers of a kind, `dense` or `moe`."""

  first: np.ndarray  # [stage] index of the stage's first layer in its kind
  count: np.ndarray  # [stage] how many it has
  size: int  # places of a stage in the stack of a rank
  layers: np.ndarray  # [rank, places] index of the layer; n_layers: empty
  n_layers: int


@dataclasses.dataclass(frozen=True)
class Stages:
  """A schedule and what its stages are made of."""

  schedule: schedules.Schedule
  kinds: Mapping[str, Kind]  # in the order of the layers


def stages(schedule: schedules.Schedule, model: config.Model) -> Stages:
  """The stages of a model."""
  cuts = np.array_split(np.arange(model.n_layers), schedule.n_stages)
  of_rank = np.array(schedule.stages)
  n_dense = model.n_dense_layers
  kinds = {}
  for name, start, n in (
    ("dense", 0, n_dense),
    ("moe", n_dense, model.n_moe_layers),
  ):
    own = [cut[(start <= cut) & (cut < start + n)] - start for cut in cuts]
    if n:
      kinds[name] = _kind(own, of_rank, n)
  return Stages(schedule, kinds)


def _kind(own: list[np.ndarray], of_rank: np.ndarray, n_layers: int) -> Kind:
  count = np.array([len(layers) for layers in own])
  first = np.array([layers[0] if len(layers) else 0 for layers in own])
  size = int(count.max())
  padded = np.full((len(own), size), n_layers)
  for row, layers in zip(padded, own, strict=True):
    row[: len(layers)] = layers
  places = padded[of_rank].reshape(len(of_rank), -1)
  return Kind(first, count, size, places, n_layers)


# --- inside shard_map ---


def to_ranks(a: jax.Array, kind: Kind, dim: int | None) -> jax.Array:
  """This rank's stack, of layers [L, ...] that all ranks hold.

  Args:
    a: whole, or a slice of all layers, along dim, divided over `pipe`.
    kind: of the layers.
    dim: along which slices run; None: a is whole.
  """
  if dim is None:
    mine = jnp.asarray(kind.layers)[jax.lax.axis_index("pipe")]
    return a.at[mine].get(mode="fill", fill_value=0)
  stacks = a.at[kind.layers.reshape(-1)].get(mode="fill", fill_value=0)
  return jax.lax.all_to_all(stacks, "pipe", 0, dim, tiled=True)


def from_ranks(g: jax.Array, kind: Kind, dim: int | None) -> jax.Array:
  """Gradients of all layers from those of every rank's stack.

  The transpose of `to_ranks`: a layer that two ranks hold gets the sum of both.
  With dim None the sum over `pipe` is left to the caller.
  """
  if dim is None:
    layers = jnp.asarray(kind.layers)[jax.lax.axis_index("pipe")]
  else:
    g = jax.lax.all_to_all(g, "pipe", dim, 0, tiled=True)
    layers = kind.layers.reshape(-1)
  zeros = jnp.zeros_like(g, shape=(kind.n_layers, *g.shape[1:]))
  return zeros.at[layers].add(g, mode="drop")

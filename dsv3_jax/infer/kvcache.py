"""The cache of earlier positions: one array per layer.

Its dims beyond texts and positions are those of the model's attention.
"""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec
from dsv3_jax.model import attentions

MIN_LENGTH = 16  # positions

Cache = dict[str, tuple[jax.Array, ...]]  # of `specs`
Tree = TypeVar("Tree")


def specs(
  cfg: config.Model,
  n_slots: int,
  length: int,
  dtype: jax.typing.DTypeLike,
  *,
  drafting: bool = False,
) -> param_spec.Specs:
  """Returns the specs {"main": one a layer} and, to draft, {"mtp": one}.

  Each is of n_slots texts of `length` positions.
  """
  dims = attentions.functions(cfg.attention).cache_spec(cfg.attention)
  dims = ("slots", n_slots), ("positions", length), *dims
  zeros = jax.nn.initializers.zeros
  layer = param_spec.ParamSpec(dims, zeros, jnp.dtype(dtype))
  tree = {"main": (layer,) * cfg.n_layers}
  return tree | {"mtp": (layer,)} if drafting else tree


def empty(tree: param_spec.Specs) -> Cache:
  """Returns a cache of zeros."""
  return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), tree)


def length(cache: Cache) -> int:
  """Returns the number of positions of a slot."""
  return jax.tree.leaves(cache)[0].shape[1]


def bucket(n: int, most: int) -> int:
  """Rounds n up to one of few lengths, so that few programs are compiled."""
  return min(max(MIN_LENGTH, 1 << (n - 1).bit_length()), most)


@functools.partial(jax.jit, donate_argnums=1)
def grow(old: Tree, new: Tree) -> Tree:
  """Returns larger arrays, `new`, that begin with the values of old ones."""
  return jax.tree.map(
    lambda a, b: jax.lax.dynamic_update_slice(b, a, (0,) * a.ndim), old, new
  )

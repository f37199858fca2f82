"""The latent cache: all that attention needs of the positions before.

Of every layer and position it holds the normalised latent and the rotated key
that all heads share, R + H numbers (arXiv:2412.19437, section 2.1.1).
"""

import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec

MIN_LENGTH = 16  # positions

Cache = dict[str, tuple[jax.Array, ...]]  # of `specs`


def specs(
  cfg: config.Model,
  n_slots: int,
  length: int,
  dtype: jax.typing.DTypeLike,
  *,
  drafting: bool = False,
) -> param_spec.Specs:
  """Its arrays: {"main": one a layer} and, for MTP drafts, {"mtp": one}.

  Args:
    cfg: the model.
    n_slots: texts at the same time.
    length: positions of each.
    dtype: of the numbers.
    drafting: with what the MTP module needs that drafts.
  """
  layer = param_spec.ParamSpec(
    (
      ("slots", n_slots),
      ("positions", length),
      ("latent", cfg.mla.kv_rank + cfg.mla.rope_dim),
    ),
    jax.nn.initializers.zeros,
    jnp.dtype(dtype),
  )
  tree = {"main": (layer,) * cfg.n_layers}
  return tree | {"mtp": (layer,)} if drafting else tree


def empty(tree: param_spec.Specs) -> Cache:
  """The cache of these specs, with nothing in it."""
  return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), tree)


def length(cache: Cache) -> int:
  """Positions of a slot."""
  return jax.tree.leaves(cache)[0].shape[1]


def bucket(n: int, most: int) -> int:
  """A length for n positions: few there are, so that few programs are made."""
  return min(max(MIN_LENGTH, 1 << (n - 1).bit_length()), most)


def grow(cache: Cache, n: int) -> Cache:
  """The same with room for n positions."""

  def leaf(a):
    return jnp.pad(a, ((0, 0), (0, n - a.shape[1]), (0, 0)))

  return jax.tree.map(leaf, cache)

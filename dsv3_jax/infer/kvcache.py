"""The KV cache of MLA: latents instead of keys and values.

For every layer and position it holds the normalised latent and the rotated key
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
  """Returns the specs {"main": one a layer} and, to draft, {"mtp": one}.

  Args:
    cfg: the model.
    n_slots: number of texts at the same time.
    length: number of positions of each.
    dtype: of the arrays.
    drafting: whether to include the cache of the MTP module.
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
  """Returns a cache of zeros."""
  return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), tree)


def length(cache: Cache) -> int:
  """Returns the number of positions of a slot."""
  return jax.tree.leaves(cache)[0].shape[1]


def bucket(n: int, most: int) -> int:
  """Rounds n up to one of few lengths, so that few programs are compiled."""
  return min(max(MIN_LENGTH, 1 << (n - 1).bit_length()), most)


def grow(cache: Cache, n: int) -> Cache:
  """Returns the cache with room for n positions."""

  def leaf(a):
    return jnp.pad(a, ((0, 0), (0, n - a.shape[1]), (0, 0)))

  return jax.tree.map(leaf, cache)

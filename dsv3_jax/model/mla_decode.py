"""MLA against a cache of latents, for prompts and for the next tokens.

The cache holds the normalised latent of every position and its rotated key,
concatenated: R + H numbers that all heads share (arXiv:2412.19437, section
2.1.1).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import dot, linear
from dsv3_jax.model import cached_attention, mla, rope
from dsv3_jax.model.cached_attention import Start
from dsv3_jax.model.layers import Hidden

Cache = Float[Array, "B S R+H"]


def cache_spec(cfg: config.MLA) -> tuple[tuple[str, int], ...]:
  """(logical axis, size) of what the cache holds per position."""
  return (("latent", cfg.kv_rank + cfg.rope_dim),)


def inference_params(
  p: param_spec.Params, cfg: config.MLA
) -> param_spec.Params:
  """Parameters as `decode` and `prefill` read them.

  The up-projections of keys [N, P, R] and of values [N, R, V] are separate, one
  matrix per head: their products with queries and weighted sums need no copy.
  """
  others = {name: w for name, w in p.items() if name != "kv_up"}
  up_k, up_v = p["kv_up"][..., : cfg.nope_dim], p["kv_up"][..., cfg.nope_dim :]
  return others | {
    "up_k": up_k.transpose(1, 2, 0),
    "up_v": up_v.transpose(1, 0, 2),
  }


def inference_specs(
  tree: param_spec.Specs, cfg: config.MLA
) -> param_spec.Specs:
  """Specs of what `inference_params` returns, from those of a layer."""
  up = tree["kv_up"]
  rank, heads, _ = up.dims
  others = {name: spec for name, spec in tree.items() if name != "kv_up"}
  to_k = heads, ("qk", cfg.nope_dim), rank
  to_v = heads, rank, ("v", cfg.v_dim)
  return others | {
    "up_k": dataclasses.replace(up, dims=to_k),
    "up_v": dataclasses.replace(up, dims=to_v),
  }


def _write(
  p: param_spec.Params, x: Hidden, cache: Cache, start: Start, cfg: config.MLA
) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
  """Queries of new tokens, their positions, and the cache with them written."""
  positions = cached_attention.new_positions(start, x)
  angle = rope.angles(positions, mla.frequencies(cfg))
  q_nope, q_rope = mla.queries(p, x, angle, cfg)
  new = jnp.concatenate(mla.latents(p, x, angle, cfg), axis=-1)
  cache = cached_attention.write(cache, new, start)
  return q_nope, q_rope, positions, cache


def decode(
  p: param_spec.Params, x: Hidden, cache: Cache, start: Start, cfg: config.MLA
) -> tuple[Hidden, Cache]:
  """Attends from a few new tokens, without expanding the cache.

  The key up-projection moves into the query and the value up-projection behind
  the weighted sum (it is absorbed), so that all heads read the same latent.
  Parameters are those of `inference_params`; arguments and results otherwise as
  in `attentions.Attention`.
  """
  q_nope, q_rope, positions, cache = _write(p, x, cache, start, cfg)
  q = dot.einsum("BTNP,NPR->BTNR", q_nope, p["up_k"])
  q = jnp.concatenate([q, q_rope], axis=-1) / cfg.softmax_divisor
  # Queries as columns, so that the cache is the left operand in its own layout:
  # twice as fast on CPU when it is long.
  columns = jnp.einsum("BTNC->BCTN", q.astype(cache.dtype))
  scores = dot.einsum(
    "BSC,BCTN->BSTN",
    cache,
    jax.lax.optimization_barrier(columns),
    preferred_element_type=jnp.float32,
  )
  key = jnp.arange(cache.shape[1])
  visible = key[None, :, None] <= positions[:, None]
  scores = jnp.where(visible[..., None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=1).astype(cache.dtype)
  mixed = dot.einsum("BSTN,BSC->BTNC", weights, cache)[..., : cfg.kv_rank]
  out = dot.einsum("BTNR,NRV->BTNV", mixed.astype(x.dtype), p["up_v"])
  return _output(p, out), cache


def _output(p: param_spec.Params, out: Float[Array, "B T N V"]) -> Hidden:
  return varying.psum_if_varying(linear.linear(out, p["out"], 2), "model")


def prefill(
  p: param_spec.Params, x: Hidden, cache: Cache, start: Start, cfg: config.MLA
) -> tuple[Hidden, Cache]:
  """Attends from many new tokens, expanding a block of the cache at a time.

  Memory depends on the number of new tokens, not on that of earlier ones.
  Arguments and results are those of `decode`.
  """
  q_nope, q_rope, _, cache = _write(p, x, cache, start, cfg)
  q = jnp.concatenate([q_nope, q_rope], axis=-1) / cfg.softmax_divisor

  def expand(block):
    latent, k_rope = jnp.split(block.astype(x.dtype), [cfg.kv_rank], axis=-1)
    k_nope = dot.einsum("SR,NPR->NSP", latent, p["up_k"])
    k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:2], cfg.rope_dim))
    v = dot.einsum("SR,NRV->NVS", latent, p["up_v"])
    return jnp.concatenate([k_nope, k_rope], axis=-1), v

  out = cached_attention.extend(jnp.swapaxes(q, 1, 2), cache, start, expand)
  return _output(p, out), cache

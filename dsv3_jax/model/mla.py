"""Multi-head latent attention (arXiv:2412.19437, section 2.1.1)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import linear
from dsv3_jax.model import attention, layers, remat, rope


def specs(cfg: config.MLA, d: int, std: float) -> param_spec.Specs:
  """Down- and up-projections of queries and keys-values, and the output."""
  n, q, r = cfg.n_heads, cfg.q_rank, cfg.kv_rank
  if q:
    query = {
      "q_down": param_spec.linear(std, embed=d, q_rank=q),
      "q_norm": param_spec.gain(q),
      "q_up": param_spec.linear(std, q_rank=q, heads=n, qk=cfg.qk_dim),
    }
  else:
    query = {"q": param_spec.linear(std, embed=d, heads=n, qk=cfg.qk_dim)}
  return query | {
    "kv_down": param_spec.linear(std, embed=d, kv_rank=r + cfg.rope_dim),
    "kv_norm": param_spec.gain(r),
    "kv_up": param_spec.linear(
      std, kv_rank=r, heads=n, kv=cfg.nope_dim + cfg.v_dim
    ),
    "out": param_spec.linear(std, 2, heads=n, v=cfg.v_dim, embed=d),
  }


def queries(
  p: param_spec.Params,
  x: jax.Array,
  angle: jax.Array,
  cfg: config.MLA,
) -> tuple[jax.Array, jax.Array]:
  """Nope [B, T, N, P] and rotated rope [B, T, N, H] parts (eq. 6-9)."""
  if cfg.q_rank:
    latent = remat.named(linear.linear(x, p["q_down"]), "latents")
    latent = layers.rms_norm(p["q_norm"], latent, cfg.norm_eps)
    q = linear.linear(latent, p["q_up"])
  else:
    q = linear.linear(x, p["q"])
  nope, rotary = jnp.split(q, [cfg.nope_dim], axis=-1)
  return nope, rope.rotate(rotary, angle[..., None, :])


def latents(
  p: param_spec.Params,
  x: jax.Array,
  angle: jax.Array,
  cfg: config.MLA,
) -> tuple[jax.Array, jax.Array]:
  """What a cache holds: latent [B, T, R] and rotated key [B, T, H] (eq. 1, 3).

  Only the latent is normalised; the rope key is shared by all heads.
  """
  down = remat.named(linear.linear(x, p["kv_down"]), "latents")
  kv, key = jnp.split(down, [cfg.kv_rank], axis=-1)
  latent = layers.rms_norm(p["kv_norm"], kv, cfg.norm_eps)
  return latent, rope.rotate(key, angle)


def _frequencies(cfg: config.MLA) -> np.ndarray:
  """Of the rotation, extended where the model is (section 4.3)."""
  yarn = cfg.yarn
  if yarn.factor == 1:
    return rope.frequencies(cfg.rope_dim, cfg.rope_theta)
  return rope.yarn_frequencies(
    cfg.rope_dim,
    cfg.rope_theta,
    factor=yarn.factor,
    original_len=yarn.original_len,
    beta_fast=yarn.beta_fast,
    beta_slow=yarn.beta_slow,
  )


def mla(
  p: param_spec.Params,
  x: jax.Array,
  cfg: config.MLA,
  segments: jax.Array | None = None,
) -> jax.Array:
  """Attention of a whole sequence from position 0, [B, T, D] -> [B, T, D].

  The training and prefill form: keys and values are expanded from the latent
  (eq. 1-11). With segments [B, T] a token sees those of its own alone.
  """
  angle = rope.angles(jnp.arange(x.shape[1]), _frequencies(cfg))
  q_nope, q_rope = queries(p, x, angle, cfg)
  latent, k_rope = latents(p, x, angle, cfg)
  k_nope, v = jnp.split(
    linear.linear(latent, p["kv_up"]), [cfg.nope_dim], axis=-1
  )
  k_rope = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
  q = jnp.concatenate([q_nope, q_rope], axis=-1) / cfg.divisor
  k = jnp.concatenate([k_nope, k_rope], axis=-1)
  q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
  q, k, v = remat.named((q, k, v), "up")
  out = attention.attend(q, k, v, segments, linear.tile(p["out"]))
  # Kept as it is: attention keeps it already.
  y = linear.linear(out, p["out"], 2, keep_input=True)
  return varying.total(y, "model")


# --- against a cache ---
#
# A cache keeps of every position its latent and its rotated key, joined: what
# all heads read alike, [B, S, R + H].


def served(p: param_spec.Params, cfg: config.MLA) -> param_spec.Params:
  """The parameters as `absorbed` and `chunk` read them.

  Up-projections of keys [N, P, R] and of values [N, R, V] are apart, a matrix a
  head: their product with queries and mixtures then needs no copy.
  """
  up_k, up_v = jnp.split(p["kv_up"], [cfg.nope_dim], axis=-1)
  rest = {name: w for name, w in p.items() if name != "kv_up"}
  return rest | {
    "up_k": jnp.einsum("RNP->NPR", up_k),
    "up_v": jnp.einsum("RNV->NRV", up_v),
  }


def served_specs(tree: param_spec.Specs, cfg: config.MLA) -> param_spec.Specs:
  """Those of `served`, from those of a layer."""
  up = tree["kv_up"]
  rank, heads, _ = up.dims
  rest = {name: spec for name, spec in tree.items() if name != "kv_up"}
  to_k = heads, ("qk", cfg.nope_dim), rank
  to_v = heads, rank, ("v", cfg.v_dim)
  return rest | {
    name: dataclasses.replace(up, dims=dims)
    for name, dims in (("up_k", to_k), ("up_v", to_v))
  }


def _written(
  kept: jax.Array, new: jax.Array, positions: jax.Array
) -> jax.Array:
  """kept [B, S, C] with new [B, T, C] at positions [B, T] that are in it."""
  if positions.size == 1:
    # A lone row XLA takes for a slice that is updated, which it does anew for
    # all that reads the cache, in a copy each time. So one more row, nowhere.
    nowhere = jnp.full_like(positions, kept.shape[1])
    positions = jnp.concatenate([positions, nowhere], axis=1)
    new = jnp.concatenate([new, new], axis=1)
  row = jnp.arange(len(kept))[:, None]
  return kept.at[row, positions].set(new, mode="drop")


def _new(
  p: param_spec.Params,
  x: jax.Array,
  kept: jax.Array,
  start: jax.Array,
  cfg: config.MLA,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Queries of new tokens, their positions, and the cache with them written.

  What would be behind the end of the cache is not written.
  """
  positions = start[:, None] + jnp.arange(x.shape[1])[None]
  angle = rope.angles(positions, _frequencies(cfg))
  q_nope, q_rope = queries(p, x, angle, cfg)
  new = jnp.concatenate(latents(p, x, angle, cfg), axis=-1)
  kept = _written(kept, new.astype(kept.dtype), positions)
  return q_nope, q_rope, positions, kept


def absorbed(
  p: param_spec.Params,
  x: jax.Array,
  kept: jax.Array,
  start: jax.Array,
  cfg: config.MLA,
) -> tuple[jax.Array, jax.Array]:
  """Attention of a few new tokens, without expanding the cache.

  The key up-projection moves into the query and the value up-projection behind
  the weighted sum, so that all heads read the same latent: the form for decode.

  Args:
    p: parameters of `served`.
    x: [B, T, D], row b at positions start[b] .. start[b] + T - 1.
    kept: [B, S, R + H] cache; positions before start are filled.
    start: [B] int32.
    cfg: the attention.

  Returns:
    [B, T, D] and the cache with the new positions written.
  """
  q_nope, q_rope, positions, kept = _new(p, x, kept, start, cfg)
  q = jnp.einsum("BTNP,NPR->BTNR", q_nope, p["up_k"])
  q = jnp.concatenate([q, q_rope], axis=-1) / cfg.divisor
  # Queries as columns, so that the cache is a left operand as it lies: twice as
  # fast on CPU when it is long.
  columns = jnp.einsum("BTNC->BCTN", q.astype(kept.dtype))
  scores = jnp.einsum(
    "BSC,BCTN->BSTN",
    kept,
    jax.lax.optimization_barrier(columns),
    preferred_element_type=jnp.float32,
  )
  key = jnp.arange(kept.shape[1])
  visible = key[None, :, None] <= positions[:, None]
  scores = jnp.where(visible[..., None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=1).astype(kept.dtype)
  mixed = jnp.einsum("BSTN,BSC->BTNC", weights, kept)[..., : cfg.kv_rank]
  out = jnp.einsum("BTNR,NRV->BTNV", mixed.astype(x.dtype), p["up_v"])
  return varying.total(linear.linear(out, p["out"], 2), "model"), kept


def chunk(
  p: param_spec.Params,
  x: jax.Array,
  kept: jax.Array,
  start: jax.Array,
  cfg: config.MLA,
) -> tuple[jax.Array, jax.Array]:
  """Attention of many new tokens: the form for prefill.

  Keys and values are expanded from the latents, a block of the cache at a time,
  so that memory depends on the chunk and not on what was before it.
  Arguments and results are those of `absorbed`.
  """
  q_nope, q_rope, _, kept = _new(p, x, kept, start, cfg)
  q = jnp.concatenate([q_nope, q_rope], axis=-1) / cfg.divisor

  def expand(block):
    latent, k_rope = jnp.split(block.astype(x.dtype), [cfg.kv_rank], axis=-1)
    k_nope = jnp.einsum("SR,NPR->NSP", latent, p["up_k"])
    k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:2], cfg.rope_dim))
    v = jnp.einsum("SR,NRV->NVS", latent, p["up_v"])
    return jnp.concatenate([k_nope, k_rope], axis=-1), v

  out = attention.extend(jnp.swapaxes(q, 1, 2), kept, start, expand)
  return varying.total(linear.linear(out, p["out"], 2), "model"), kept

"""Multi-head latent attention (arXiv:2412.19437, section 2.1.1)."""


import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax import manual
from dsv3_jax import schema
from dsv3_jax.model import attention
from dsv3_jax.model import gemm
from dsv3_jax.model import layers
from dsv3_jax.model import recompute
from dsv3_jax.model import rope


def specs(cfg: config.MLA, d: int, std: float) -> schema.Specs:
  """Down- and up-projections of queries and keys-values, and the output."""
  n, q, r = cfg.n_heads, cfg.q_rank, cfg.kv_rank
  if q:
    query = {
        "q_down": schema.linear(std, embed=d, q_rank=q),
        "q_norm": schema.gain(q),
        "q_up": schema.linear(std, q_rank=q, heads=n, qk=cfg.qk_dim),
    }
  else:
    query = {"q": schema.linear(std, embed=d, heads=n, qk=cfg.qk_dim)}
  return query | {
      "kv_down": schema.linear(std, embed=d, kv_rank=r + cfg.rope_dim),
      "kv_norm": schema.gain(r),
      "kv_up": schema.linear(
          std, kv_rank=r, heads=n, kv=cfg.nope_dim + cfg.v_dim
      ),
      "out": schema.linear(std, 2, heads=n, v=cfg.v_dim, embed=d),
  }


def queries(
    p: schema.Params,
    x: jax.Array,
    angle: jax.Array,
    cfg: config.MLA,
) -> tuple[jax.Array, jax.Array]:
  """Nope [B, T, N, P] and rotated rope [B, T, N, H] parts (eq. 6-9)."""
  if cfg.q_rank:
    latent = recompute.named(gemm.linear(x, p["q_down"]), "latents")
    latent = layers.rms_norm(p["q_norm"], latent, cfg.norm_eps)
    q = gemm.linear(latent, p["q_up"])
  else:
    q = gemm.linear(x, p["q"])
  nope, rotary = jnp.split(q, [cfg.nope_dim], axis=-1)
  return nope, rope.rotate(rotary, angle[..., None, :])


def latents(
    p: schema.Params,
    x: jax.Array,
    angle: jax.Array,
    cfg: config.MLA,
) -> tuple[jax.Array, jax.Array]:
  """What a cache holds: latent [B, T, R] and rotated key [B, T, H] (eq. 1, 3).

  Only the latent is normalised; the rope key is shared by all heads.
  """
  down = recompute.named(gemm.linear(x, p["kv_down"]), "latents")
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
    p: schema.Params,
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
      gemm.linear(latent, p["kv_up"]), [cfg.nope_dim], axis=-1
  )
  k_rope = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
  q = jnp.concatenate([q_nope, q_rope], axis=-1) / cfg.divisor
  k = jnp.concatenate([k_nope, k_rope], axis=-1)
  q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
  q, k, v = recompute.named((q, k, v), "up")
  out = attention.attend(q, k, v, segments, gemm.tile(p["out"]))
  # Kept as it is: attention keeps it already.
  y = gemm.linear(out, p["out"], 2, keep_input=True)
  return manual.total(y, "model")


def absorbed(
    p: schema.Params,
    x: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    start: jax.Array,
    cfg: config.MLA,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Attention of new tokens against a latent cache, without expanding it.

  The key up-projection moves into the query and the value up-projection behind
  the weighted sum, so that all heads read the same latent.

  Args:
    p: parameters of `specs`.
    x: [B, T, D] at positions start .. start + T - 1.
    cache: latents [B, S, R] and rotated keys [B, S, H]; positions before start
      are filled.
    start: [] int32.
    cfg: the attention.

  Returns:
    [B, T, D] and the cache with the new positions written.
  """
  positions = start + jnp.arange(x.shape[1])
  angle = rope.angles(positions, _frequencies(cfg))
  q_nope, q_rope = queries(p, x, angle, cfg)
  latent, k_rope = (
      jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)
      for old, new in zip(cache, latents(p, x, angle, cfg), strict=True)
  )
  up_k, up_v = jnp.split(p["kv_up"], [cfg.nope_dim], axis=-1)
  q_latent = jnp.einsum("BTNP,RNP->BTNR", q_nope, up_k)
  scores = jnp.einsum("BTNR,BSR->BNTS", q_latent, latent)
  scores = scores + jnp.einsum("BTNH,BSH->BNTS", q_rope, k_rope)
  scores = scores.astype(jnp.float32) / cfg.divisor
  visible = positions[:, None] >= jnp.arange(latent.shape[1])[None]
  weights = jax.nn.softmax(
      jnp.where(visible[None, None], scores, -jnp.inf), axis=-1
  )
  mixed = jnp.einsum("BNTS,BSR->BTNR", weights.astype(latent.dtype), latent)
  out = jnp.einsum("BTNR,RNV->BTNV", mixed, up_v)
  y = jnp.einsum("BTNV,NVD->BTD", out, p["out"])
  return manual.total(y, "model"), (latent, k_rope)

"""Multi-head latent attention (arXiv:2412.19437, section 2.1.1)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import linear
from dsv3_jax.model import attention, layers, remat, rope
from dsv3_jax.model.layers import Hidden, Segments

Angles = Float[Array, "*T pairs"]


def specs(cfg: config.MLA, d: int, std: float) -> param_spec.Specs:
  """Down- and up-projections of queries and keys-values, and the output."""
  n, q, r = cfg.n_heads, cfg.q_rank, cfg.kv_rank
  kv = cfg.nope_dim + cfg.v_dim
  if q:
    query = {
      "q_down": param_spec.linear(std, embed=d, q_rank=q),
      "q_norm": param_spec.norm_scale(q),
      "q_up": param_spec.linear(std, q_rank=q, heads=n, qk=cfg.qk_dim),
    }
  else:
    query = {"q": param_spec.linear(std, embed=d, heads=n, qk=cfg.qk_dim)}
  return query | {
    "kv_down": param_spec.linear(std, embed=d, kv_rank=r + cfg.rope_dim),
    "kv_norm": param_spec.norm_scale(r),
    "kv_up": param_spec.linear(std, kv_rank=r, heads=n, kv=kv),
    "out": param_spec.linear(std, 2, heads=n, v=cfg.v_dim, embed=d),
  }


def queries(
  p: param_spec.Params, x: Hidden, angle: Angles, cfg: config.MLA
) -> tuple[Float[Array, "B T N P"], Float[Array, "B T N H"]]:
  """Nope and rotated rope parts of queries (eq. 6-9)."""
  if cfg.q_rank:
    latent = remat.named(linear.linear(x, p["q_down"]), "latents")
    latent = layers.rms_norm(p["q_norm"], latent, cfg.norm_eps)
    q = linear.linear(latent, p["q_up"])
  else:
    q = linear.linear(x, p["q"])
  nope, rotary = jnp.split(q, [cfg.nope_dim], axis=-1)
  return nope, rope.rotate(rotary, angle[..., None, :])


def latents(
  p: param_spec.Params, x: Hidden, angle: Angles, cfg: config.MLA
) -> tuple[Float[Array, "B T R"], Float[Array, "B T H"]]:
  """The latent and the rotated key of each position (eq. 1, 3).

  Only the latent is normalised; the rope key is shared by all heads.
  """
  down = remat.named(linear.linear(x, p["kv_down"]), "latents")
  kv, key = jnp.split(down, [cfg.kv_rank], axis=-1)
  latent = layers.rms_norm(p["kv_norm"], kv, cfg.norm_eps)
  return latent, rope.rotate(key, angle)


def frequencies(cfg: config.MLA) -> np.ndarray:
  """Frequencies of the rotation, with YaRN where it extends (section 4.3)."""
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
  p: param_spec.Params, x: Hidden, cfg: config.MLA, segments: Segments = None
) -> Hidden:
  """Attention of whole sequences from position 0, as in training (eq. 1-11).

  Keys and values are expanded from the latent. A segment is a sequence of its
  own: attention stays inside it, and its positions begin at 0.
  """
  positions = rope.positions(x.shape[1], segments)
  angle = rope.angles(positions, frequencies(cfg))
  q_nope, q_rope = queries(p, x, angle, cfg)
  latent, k_rope = latents(p, x, angle, cfg)
  kv = linear.linear(latent, p["kv_up"])
  k_nope, v = jnp.split(kv, [cfg.nope_dim], axis=-1)
  # In float32, as its gradient is a sum over heads.
  k_rope = k_rope.astype(jnp.float32)[:, :, None]
  k_nope, k_rope = varying.same_varying(k_nope, k_rope)
  k_rope = jnp.broadcast_to(k_rope, q_rope.shape).astype(k_nope.dtype)
  q = jnp.concatenate([q_nope, q_rope], axis=-1) / cfg.softmax_divisor
  k = jnp.concatenate([k_nope, k_rope], axis=-1)
  q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
  q, k, v = remat.named((q, k, v), "up")
  out = attention.attend(q, k, v, segments, linear.block_size(p["out"]))
  # The input is saved unquantized: `attend` saves it already.
  y = linear.linear(out, p["out"], 2, save_input=True)
  return varying.psum_if_varying(y, "model")

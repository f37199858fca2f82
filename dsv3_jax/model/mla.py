"""Multi-head latent attention (arXiv:2412.19437, section 2.1.1)."""

import functools
import math

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax import manual
from dsv3_jax import schema
from dsv3_jax.model import gemm
from dsv3_jax.model import layers
from dsv3_jax.model import recompute
from dsv3_jax.model import rope
from dsv3_jax.model import tiles

CHUNK = 128  # queries that attend together; keys after them are never touched


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
    eps: float,
) -> tuple[jax.Array, jax.Array]:
  """Nope [B, T, N, P] and rotated rope [B, T, N, H] parts (eq. 6-9)."""
  if cfg.q_rank:
    latent = recompute.named(gemm.linear(x, p["q_down"]), "latents")
    latent = layers.rms_norm(p["q_norm"], latent, eps)
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
    eps: float,
) -> tuple[jax.Array, jax.Array]:
  """What a cache holds: latent [B, T, R] and rotated key [B, T, H] (eq. 1, 3).

  Only the latent is normalised; the rope key is shared by all heads.
  """
  down = recompute.named(gemm.linear(x, p["kv_down"]), "latents")
  kv, key = jnp.split(down, [cfg.kv_rank], axis=-1)
  return layers.rms_norm(p["kv_norm"], kv, eps), rope.rotate(key, angle)


def _spans(t: int) -> list[tuple[int, int]]:
  return [(start, min(start + CHUNK, t)) for start in range(0, t, CHUNK)]


def _mask_future(scores: jax.Array, fill: float) -> jax.Array:
  """Scores [N, S, T] of the last T of S keys: `fill` where key is after query.

  Only the last T keys can be, so the others are not touched.
  """
  t = scores.shape[2]
  future = jnp.arange(t)[:, None] > jnp.arange(t)[None]
  near = jnp.where(future[None], fill, scores[:, -t:])
  return scores.at[:, -t:].set(near)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    e5m6_columns: int = 0,
) -> jax.Array:
  """Causal softmax attention, q and k [B, N, T, X], v [B, N, T, V].

  Returns [B, T, N, V], rounded to E5M6 with a scale for so many columns if any
  are given. It is also what the backward pass reads (section 3.3.3).

  One sequence at a time, and in it one chunk of queries against the keys up to
  the chunk's end: the scores stay in cache and the future costs nothing. Only
  the log-sum-exp is kept for the backward pass, which makes the scores again;
  softmax in float32.

  Scores are [keys, queries], so that what belongs to a query lies along the
  last dim, and queries' sums are made as [X, queries]: no product contracts the
  leading dims of both its operands. Both are much faster on CPU.
  """
  return _attend_fwd(q, k, v, e5m6_columns)[0]


def _attend_fwd(q, k, v, e5m6_columns):
  def sequence(qkv):
    q, k, v = qkv  # v is [N, V, S]
    out, lse = [], []
    for start, end in _spans(q.shape[1]):
      scores = _dot("NSX,NTX->NST", k[:, :end], q[:, start:end])
      scores = _mask_future(scores, -jnp.inf)
      top = scores.max(1, keepdims=True)
      weights = jnp.exp(scores - top)
      total = weights.sum(1, keepdims=True)
      weights = weights.astype(v.dtype)
      y = _dot("NVS,NST->NVT", v[:, :, :end], weights)
      out.append((y / total).astype(v.dtype))
      lse.append((top + jnp.log(total))[:, 0])
    return jnp.concatenate(out, axis=2), jnp.concatenate(lse, axis=1)

  # Turned outside of the loop: XLA would fold it into the products again.
  out, lse = jax.lax.map(sequence, (q, k, jnp.swapaxes(v, 2, 3)))
  out = jnp.moveaxis(out, 3, 1)
  if e5m6_columns:
    rows = out.reshape(-1, out.shape[2] * out.shape[3])
    out = tiles.e5m6(rows, e5m6_columns).reshape(out.shape)
  out, lse = recompute.named((out, lse), "attention")
  return out, (q, k, v, out, lse)


def _attend_bwd(e5m6_columns, residuals, dout):
  del e5m6_columns  # rounding has the gradient of its argument

  def sequence(args):
    q, k, v, lse, dout, mean, k_turned = args
    dq = []
    dk, dv = (jnp.zeros_like(a, jnp.float32) for a in (k, v))
    for start, end in _spans(q.shape[1]):
      q_here, dout_here = q[:, start:end], dout[:, start:end]
      scores = _dot("NSX,NTX->NST", k[:, :end], q_here)
      weights = jnp.exp(scores - lse[:, None, start:end])
      weights = _mask_future(weights, 0)
      dweights = _dot("NSV,NTV->NST", v[:, :end], dout_here)
      dscores = weights * (dweights - mean[:, None, start:end])
      dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
      dq.append(_dot("NXS,NST->NXT", k_turned[:, :, :end], dscores))
      dk = dk.at[:, :end].add(_dot("NST,NTX->NSX", dscores, q_here))
      dv = dv.at[:, :end].add(_dot("NST,NTV->NSV", weights, dout_here))
    dq = jnp.concatenate(dq, axis=2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

  q, k, v, out, lse = residuals
  # sum_s p dp = sum_v out dout: what the softmax takes off its gradient.
  mean = _dot("BTNV,BTNV->BNT", out, dout)
  dout, k_turned = jnp.swapaxes(dout, 1, 2), jnp.swapaxes(k, 2, 3)
  dq, dk, dv = jax.lax.map(sequence, (q, k, v, lse, dout, mean, k_turned))
  return jnp.swapaxes(dq, 2, 3), dk, dv


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
attend.defvjp(_attend_fwd, _attend_bwd)


def mla(
    p: schema.Params, x: jax.Array, cfg: config.MLA, eps: float
) -> jax.Array:
  """Attention of a whole sequence from position 0, [B, T, D] -> [B, T, D].

  The training and prefill form: keys and values are expanded from the latent
  (eq. 1-11).
  """
  angle = rope.angles(
      jnp.arange(x.shape[1]), rope.frequencies(cfg.rope_dim, cfg.rope_theta)
  )
  q_nope, q_rope = queries(p, x, angle, cfg, eps)
  latent, k_rope = latents(p, x, angle, cfg, eps)
  k_nope, v = jnp.split(
      gemm.linear(latent, p["kv_up"]), [cfg.nope_dim], axis=-1
  )
  k_rope = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
  q = jnp.concatenate([q_nope, q_rope], axis=-1) / math.sqrt(cfg.qk_dim)
  k = jnp.concatenate([k_nope, k_rope], axis=-1)
  q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
  q, k, v = recompute.named((q, k, v), "up")
  out = attend(q, k, v, gemm.tile(p["out"]))
  # Kept as it is: attention keeps it already.
  y = gemm.linear(out, p["out"], 2, keep_input=True)
  return manual.total(y, "model")


def absorbed(
    p: schema.Params,
    x: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    start: jax.Array,
    cfg: config.MLA,
    eps: float,
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
    eps: of the norms.

  Returns:
    [B, T, D] and the cache with the new positions written.
  """
  positions = start + jnp.arange(x.shape[1])
  angle = rope.angles(
      positions, rope.frequencies(cfg.rope_dim, cfg.rope_theta)
  )
  q_nope, q_rope = queries(p, x, angle, cfg, eps)
  latent, k_rope = (
      jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)
      for old, new in zip(cache, latents(p, x, angle, cfg, eps), strict=True)
  )
  up_k, up_v = jnp.split(p["kv_up"], [cfg.nope_dim], axis=-1)
  q_latent = jnp.einsum("BTNP,RNP->BTNR", q_nope, up_k)
  scores = jnp.einsum("BTNR,BSR->BNTS", q_latent, latent)
  scores = scores + jnp.einsum("BTNH,BSH->BNTS", q_rope, k_rope)
  scores = scores.astype(jnp.float32) / math.sqrt(cfg.qk_dim)
  visible = positions[:, None] >= jnp.arange(latent.shape[1])[None]
  weights = jax.nn.softmax(
      jnp.where(visible[None, None], scores, -jnp.inf), axis=-1
  )
  mixed = jnp.einsum("BNTS,BSR->BTNR", weights.astype(latent.dtype), latent)
  out = jnp.einsum("BTNR,RNV->BTNV", mixed, up_v)
  y = jnp.einsum("BTNV,NVD->BTD", out, p["out"])
  return manual.total(y, "model"), (latent, k_rope)

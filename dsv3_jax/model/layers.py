"""Norm, linear and SwiGLU: specs beside the functions that read them."""

import jax
import jax.numpy as jnp

from dsv3_jax import manual
from dsv3_jax import schema


def rms_norm(gain: jax.Array, x: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * gain over the last dim, statistics in float32."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  gain = jnp.expand_dims(gain.astype(jnp.float32), range(x.ndim - 1))
  return (y * gain).astype(x.dtype)


def linear(x: jax.Array, w: jax.Array) -> jax.Array:
  """Contracts the last dim of x with the first of w; the rest of w follows."""
  rows, matrix = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1)
  y = _matmul(*manual.alike(rows, matrix))
  return y.reshape(*x.shape[:-1], *w.shape[1:])


@jax.custom_vjp
def _matmul(x, w):
  return x @ w


def _matmul_bwd(residuals, dy):
  # Stated so that no operand is transposed first; autodiff makes dw.T.
  x, w = residuals
  dw = jax.lax.dot_general(
      x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )
  return dy @ w.T, dw.astype(w.dtype)


_matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_bwd)


def swiglu_specs(d: int, f: int, std: float) -> schema.Specs:
  """Gate and up projections side by side, then down."""
  return {
      "gate_up": schema.weight(std, embed=d, pair=2, ffn=f),
      "down": schema.weight(std, ffn=f, embed=d),
  }


def swiglu(p: schema.Params, x: jax.Array) -> jax.Array:
  """down(silu(gate(x)) * up(x)), [..., D] -> [..., D] (arXiv:2002.05202)."""
  h = linear(x, p["gate_up"])
  y = linear(jax.nn.silu(h[..., 0, :]) * h[..., 1, :], p["down"])
  return manual.total(y, "model")

"""Layers that others are made of: RMSNorm and SwiGLU.

A SwiGLU feed-forward is down(silu(gate(x)) * up(x)) (arXiv:2002.05202). Its
hidden state h = [gate(x), up(x)] is saved for the backward pass, in FP8 if the
weights are; the product of its halves is recomputed (section 3.3.3). The loops
over routed experts use the pieces too, with `scale` [M] on the rows' outputs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax import param_spec, varying
from dsv3_jax.linear import linear
from dsv3_jax.model import remat

Hidden = Float[Array, "B T D"]
Segments = Int[Array, "B T"] | None  # None: one segment
Valid = Bool[Array, "B T"] | None  # False: padding; None: there is none


def rms_norm(
  scale: Float[Array, " D"], x: Float[Array, "... D"], eps: float
) -> Float[Array, "... D"]:
  """x / rms(x) * scale over the last dim, statistics in float32."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
  return remat.named((y * scale).astype(x.dtype), "norm")


def swiglu_specs(d: int, f: int, std: float) -> param_spec.Specs:
  """Gate and up projections side by side, then down."""
  return {
    "gate_up": param_spec.linear(std, embed=d, pair=2, ffn=f),
    "down": param_spec.linear(std, ffn=f, embed=d),
  }


def swiglu(
  p: param_spec.Params, x: Float[Array, "... D"]
) -> Float[Array, "... D"]:
  """down(silu(gate(x)) * up(x))."""
  rows = x.reshape(-1, x.shape[-1])
  y = _swiglu(*varying.same_varying(p["gate_up"], p["down"], rows))
  return varying.psum_if_varying(y.reshape(x.shape), "model")


def swiglu_product(
  h: Float[Array, "M 2F"], scale: Float[Array, " M"] | None = None
) -> Float[Array, "M F"]:
  """silu(gate) * up of h = [gate, up] [M, 2F], times the scale of each row."""
  a, b = jnp.split(h, 2, axis=-1)
  silu = jax.nn.silu(a)
  return (silu if scale is None else scale[:, None] * silu) * b


def swiglu_product_grad(
  h: Float[Array, "M 2F"],
  dact: Float[Array, "M F"],
  scale: Float[Array, " M"] | None = None,
) -> tuple[Float[Array, "M 2F"], Float[Array, " M"] | None]:
  """Gradients of h and of scale, from that of `swiglu_product`."""
  a, b = jnp.split(h, 2, axis=-1)
  sigmoid = jax.nn.sigmoid(a)
  silu = a * sigmoid
  dscale = None
  if scale is not None:
    dscale = (silu * b * dact).sum(-1)
    dact = scale[:, None] * dact
  da = dact * b * (sigmoid + silu * (1 - sigmoid))
  return jnp.concatenate([da, dact * silu], axis=-1), dscale


@jax.custom_vjp
def _swiglu(gate_up, down, x):
  return _swiglu_fwd(gate_up, down, x)[0]


def _swiglu_fwd(gate_up, down, x):
  x_rows, x_counts = linear.quantize_rows(x, gate_up)
  h = linear.fprop(x_rows, gate_up).astype(x.dtype)
  act, act_counts = linear.quantize_rows(swiglu_product(h), down)
  y = linear.fprop(act, down).astype(x.dtype)
  h_rows, _ = linear.quantize_rows(h, gate_up)
  h_rows = remat.named(h_rows, "hidden")
  weights = linear.without_handle(gate_up), linear.without_handle(down)
  return y, (*weights, x_rows, h_rows, x_counts, act_counts)


def _swiglu_bwd(residuals, dy):
  gate_up, down, x, h_rows, x_counts, act_counts = residuals
  h = linear.dequantize_rows(h_rows, dy.dtype)
  dy_rows, dy_counts = linear.quantize_gradient(dy, down)
  dact = linear.dgrad(dy_rows, down).astype(dy.dtype)
  dh, _ = swiglu_product_grad(h, dact)
  ddown = linear.wgrad(swiglu_product(h), dy, down)
  dh_rows, dh_counts = linear.quantize_gradient(dh, gate_up)
  dx = linear.dgrad(dh_rows, gate_up).astype(dy.dtype)
  dgate_up = linear.wgrad(x, dh, gate_up)
  return (
    linear.weight_cotangent(gate_up, dgate_up, [x_counts, dh_counts]),
    linear.weight_cotangent(down, ddown, [act_counts, dy_counts]),
    dx,
  )


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)

"""A SwiGLU feed-forward: down(silu(gate(x)) * up(x)) (arXiv:2002.05202).

The hidden state h = [gate(x), up(x)] is kept for the backward pass, in FP8 if
the weights are; the product of its halves is made again (section 3.3.3). The
pieces serve the loops over routed experts as well; `scale` [M] multiplies the
output of each row there.
"""

import jax
import jax.numpy as jnp

from dsv3_jax import param_spec, varying
from dsv3_jax.linear import linear
from dsv3_jax.model import remat


def specs(d: int, f: int, std: float) -> param_spec.Specs:
  """Gate and up projections side by side, then down."""
  return {
    "gate_up": param_spec.linear(std, embed=d, pair=2, ffn=f),
    "down": param_spec.linear(std, ffn=f, embed=d),
  }


def swiglu(p: param_spec.Params, x: jax.Array) -> jax.Array:
  """[..., D] -> [..., D]."""
  leaves, structure = jax.tree.flatten(
    (p["gate_up"], p["down"], x.reshape(-1, x.shape[-1]))
  )
  args = jax.tree.unflatten(structure, varying.alike(*leaves))
  return varying.total(_swiglu(*args).reshape(x.shape), "model")


def activation(h: jax.Array, scale: jax.Array | None = None) -> jax.Array:
  """What the down projection reads, of h [M, 2F]."""
  a, b = jnp.split(h, 2, axis=-1)
  silu = jax.nn.silu(a)
  return (silu if scale is None else scale[:, None] * silu) * b


def activation_gradient(
  h: jax.Array, dact: jax.Array, scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
  """Gradients of h and of scale, from that of the activation."""
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
  left, of_x = linear.rows(x, gate_up)
  h = linear.output(left, gate_up).astype(x.dtype)
  act, of_act = linear.rows(activation(h), down)
  y = linear.output(act, down).astype(x.dtype)
  kept, _ = linear.rows(h, gate_up)
  kept = remat.named(kept, "hidden")
  weights = linear.untrained(gate_up), linear.untrained(down)
  return y, (*weights, left, kept, of_x, of_act)


def _swiglu_bwd(residuals, dy):
  gate_up, down, x, kept, of_x, of_act = residuals
  h = linear.numbers(kept, dy.dtype)
  left, of_dy = linear.gradient_rows(dy, down)
  dact = linear.input_gradient(left, down).astype(dy.dtype)
  dh, _ = activation_gradient(h, dact)
  ddown = linear.weight_gradient(activation(h), dy, down)
  left, of_dh = linear.gradient_rows(dh, gate_up)
  dx = linear.input_gradient(left, gate_up).astype(dy.dtype)
  dgate_up = linear.weight_gradient(x, dh, gate_up)
  return (
    linear.gradient(gate_up, dgate_up, [of_x, of_dh]),
    linear.gradient(down, ddown, [of_act, of_dy]),
    dx,
  )


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)

"""RMSNorm."""

import jax
import jax.numpy as jnp

from dsv3_jax.model import remat


def rms_norm(gain: jax.Array, x: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * gain over the last dim, statistics in float32."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  gain = jnp.expand_dims(gain.astype(jnp.float32), range(x.ndim - 1))
  return remat.named((y * gain).astype(x.dtype), "norm")

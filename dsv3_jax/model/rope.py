"""Rotary position embedding on interleaved pairs, and its YaRN frequencies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.model.layers import Segments


def frequencies(dim: int, theta: float) -> np.ndarray:
  """theta^(-2i/dim) for each of the dim/2 pairs, radians a position."""
  exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
  return (theta**-exponent).astype(np.float32)


def yarn_frequencies(
  dim: int,
  theta: float,
  *,
  factor: float,
  original_len: int,
  beta_fast: float = 32.0,
  beta_slow: float = 1.0,
) -> np.ndarray:
  """Frequencies after YaRN extension by `factor` (arXiv:2309.00071, sec. 3.2).

  Pairs that turn more than beta_fast times within original_len are unchanged,
  those that turn less than beta_slow times are divided by factor, with a linear
  ramp between.
  """

  def pair_turning(turns):
    log_ratio = math.log(original_len / (turns * 2 * math.pi))
    return dim * log_ratio / (2 * math.log(theta))

  low = max(math.floor(pair_turning(beta_fast)), 0)
  high = min(math.ceil(pair_turning(beta_slow)), dim - 1)
  ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
  base = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
  return (base / factor * ramp + base * (1 - ramp)).astype(np.float32)


def positions(length: int, segments: Segments = None) -> Int[Array, "*B T"]:
  """Positions of tokens, which begin anew with each segment.

  Args:
    length: T.
    segments: [B, T], runs of equal numbers; None: a row is one segment.

  Returns:
    [T], or [B, T] with segments.
  """
  index = jnp.arange(length)
  if segments is None:
    return index
  begins = segments[:, 1:] != segments[:, :-1]
  starts = jnp.where(begins, index[None, 1:], 0)
  starts = jnp.pad(jax.lax.cummax(starts, axis=1), ((0, 0), (1, 0)))
  return index[None] - starts


def angles(
  positions: Int[Array, "..."], freqs: np.ndarray
) -> Float[Array, "... pairs"]:
  """Rotation angles [..., dim/2] of integer positions [...]."""
  return jnp.multiply.outer(positions.astype(jnp.float32), freqs)


@jax.custom_vjp
def rotate(
  x: Float[Array, "*dims H"], angle: Float[Array, "... pairs"]
) -> Float[Array, "*dims H"]:
  """Rotates pairs (2i, 2i+1) of the last dim, in float32.

  Angles broadcast against the pairs of x. No gradient reaches them; that of x
  is rotated back.
  """
  angle = jnp.expand_dims(angle, range(x.ndim - angle.ndim))
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  # The barrier stops XLA from recomputing them for every sequence and head.
  cos, sin = jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
  rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return rotated.reshape(x.shape).astype(x.dtype)


rotate.defvjp(
  lambda x, angle: (rotate(x, angle), angle),
  lambda angle, dy: (rotate(dy, -angle), None),
)

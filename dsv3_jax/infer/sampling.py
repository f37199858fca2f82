"""Choosing tokens: what they are drawn from, and drawing.

Every row has settings and a seed of its own, and its draws depend on nothing
else: neither on other rows nor on params many there are.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# What the rows need together: sorting the vocabulary only where some row cuts
# it, no randomness where none draws.
GREEDY, UNTRUNCATED, TRUNCATED = "greedy", "plain", "cut"
# What a draw at a position is for.
DRAFT, ACCEPT, FINAL = range(3)
MAX_TEMPERATURE = 1e30  # temperature; in float32


@flax.struct.dataclass
class SamplingParams:
  """Of each row."""

  temperature: jax.Array  # [B] f32, 0: the most likely token
  top_p: jax.Array  # [B] f32, in (0, 1]
  top_k: jax.Array  # [B] int32, 0: all
  seed: jax.Array  # [B] uint32


def stack_params(
  rows: Sequence[tuple[float, float, int, int]],
) -> SamplingParams:
  """Those of rows of (temperature, top_p, top_k, seed), on the host."""
  types = np.float32, np.float32, np.int32, np.uint32
  columns = zip(*rows, strict=True)
  return SamplingParams(*map(np.array, columns, types))


def validate(
  temperature: float, top_p: float, top_k: int, seed: int
) -> list[str]:
  """What is wrong with settings, a line each."""
  found = []
  if not 0 <= temperature <= MAX_TEMPERATURE:
    found.append(
      f"temperature={temperature}: must be at least 0, and at most"
      f" {MAX_TEMPERATURE:.0e}"
    )
  if not 0 < top_p <= 1:
    found.append(f"top_p={top_p}: must be above 0 and at most 1")
  if not 0 <= top_k < 2**31:
    found.append(f"top_k={top_k}: must be in [0, 2^31), where 0 is no limit")
  if not 0 <= seed < 2**32:
    found.append(f"seed={seed}: must be in [0, 2^32)")
  return found


def mode(rows: Sequence[tuple[float, float, int]]) -> str:
  """What rows of (temperature, top_p, top_k) need together."""
  drawn = [(top_p, top_k) for temperature, top_p, top_k in rows if temperature]
  if not drawn:
    return GREEDY
  return TRUNCATED if any(p < 1 or k for p, k in drawn) else UNTRUNCATED


def most_likely(scores: jax.Array) -> jax.Array:
  """[..., C] -> [...] int32, the first of the largest.

  Two reductions; `argmax` is one that XLA does number by number on CPU.
  """
  top = scores.max(-1, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
  last = scores.shape[-1] - 1
  return jnp.where(scores == top, index, last).min(-1)


def probabilities(
  logits: jax.Array, params: SamplingParams, mode: str
) -> jax.Array:
  """What tokens are drawn from, [B, T, C] of logits [B, T, C].

  Temperature first, then the top_k most likely, then the fewest of those whose
  share of what is left reaches top_p. A temperature of 0 gives a one.

  Args:
    logits: f32.
    params: settings of the rows.
    mode: of all rows.
  """
  best = most_likely(logits)
  one = jax.nn.one_hot(best, logits.shape[-1], dtype=logits.dtype)
  if mode == GREEDY:
    return one
  temperature, top_p, top_k = (
    a[:, None, None] for a in (params.temperature, params.top_p, params.top_k)
  )
  logits = logits / jnp.where(temperature > 0, temperature, 1)
  if mode == TRUNCATED:
    order = jnp.argsort(-logits, axis=-1, stable=True)
    falling = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None, None]
    among = (rank < top_k) | (top_k == 0)
    share = jax.nn.softmax(jnp.where(among, falling, -jnp.inf), axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    # The most likely token has nothing before it and always stays. With top_p
    # of 1 rounding must cut nothing.
    kept = among & ((before < top_p) | (top_p >= 1))
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    logits = jnp.where(kept, logits, -jnp.inf)
  return jnp.where(temperature > 0, jax.nn.softmax(logits, axis=-1), one)


def _keys(seed: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
  """[B, T] keys of rows' seeds [B] and positions [B, T]."""

  def key(seed, position):
    return jax.random.fold_in(
      jax.random.fold_in(jax.random.key(seed), position), purpose
    )

  return jax.vmap(jax.vmap(key, (None, 0)))(seed, position)


def uniform(seed: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
  """Numbers in [0, 1), [B, T], for the tokens at these positions [B, T]."""
  draw = jax.vmap(jax.vmap(jax.random.uniform))
  return draw(_keys(seed, position, purpose))


def draw(
  p: jax.Array,
  seed: jax.Array,
  position: jax.Array,
  purpose: int,
  mode: str,
) -> jax.Array:
  """Tokens [B, T] int32 drawn from probabilities.

  Args:
    p: [B, T, C], not necessarily of sum 1.
    seed: [B] of each row.
    position: [B, T], where in their texts the tokens will stand.
    purpose: of the draw; draws for different ones are independent.
    mode: of all rows.
  """
  if mode == GREEDY:
    return most_likely(p)
  keys = _keys(seed, position, purpose)
  noise = jax.vmap(jax.vmap(lambda k: jax.random.gumbel(k, p.shape[-1:])))(keys)
  return most_likely(jnp.log(p) + noise)

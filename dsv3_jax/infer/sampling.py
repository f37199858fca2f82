"""Sampling of tokens: probabilities of each request, and draws from them.

Every row has settings and a seed of its own. Its draws depend on nothing else:
neither on other rows nor on how many there are.
"""

from collections.abc import Iterable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.infer.request import GenerationRequest

# Sampling modes of a batch: only TRUNCATED sorts the vocabulary, for top_p and
# top_k; GREEDY draws no random numbers.
GREEDY, UNTRUNCATED, TRUNCATED = "greedy", "untruncated", "truncated"
# Tokens that are sorted to truncate a distribution; all, where these are not
# enough. On a CPU sorting a vocabulary takes longer than a small model.
_BEST = 1024
# Purposes of a draw at a position.
DRAFT, ACCEPT, FINAL = range(3)


@flax.struct.dataclass
class SamplingParams:
  """Sampling settings of a batch, a row each."""

  temperature: jax.Array  # [B] f32, 0: the most likely token
  top_p: jax.Array  # [B] f32, in (0, 1]
  top_k: jax.Array  # [B] int32, 0: all
  seed: jax.Array  # [B] uint32


def stack_params(requests: Sequence[GenerationRequest]) -> SamplingParams:
  """Stacks the settings of requests, on the host."""
  return SamplingParams(
    temperature=np.array([r.temperature for r in requests], np.float32),
    top_p=np.array([r.top_p for r in requests], np.float32),
    top_k=np.array([r.top_k for r in requests], np.int32),
    seed=np.array([r.seed for r in requests], np.uint32),
  )


def mode(requests: Iterable[GenerationRequest]) -> str:
  """Returns the sampling mode that the settings of requests need together."""
  drawn = [r for r in requests if r.temperature]
  if not drawn:
    return GREEDY
  truncated = any(r.top_p < 1 or r.top_k for r in drawn)
  return TRUNCATED if truncated else UNTRUNCATED


def most_likely(scores: jax.Array) -> jax.Array:
  """Returns the index of the first largest score, [..., C] -> [...] int32."""
  # By two reductions, since XLA's `argmax` is not vectorized on CPU.
  top = scores.max(-1, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
  last = scores.shape[-1] - 1
  return jnp.where(scores == top, index, last).min(-1)


def probabilities(
  logits: jax.Array, params: SamplingParams, mode: str
) -> jax.Array:
  """Returns the distributions that tokens are drawn from, [B, T, C]."""
  return jax.nn.softmax(adjust(logits, params, mode), axis=-1)


def adjust(logits: jax.Array, params: SamplingParams, mode: str) -> jax.Array:
  """Returns logits [B, T, C] of `probabilities`, -inf for tokens not kept.

  Divides by the temperature, keeps the top_k most likely tokens, then the
  fewest of those whose share of the rest reaches top_p. A temperature of 0
  keeps the most likely token, with a logit of 0.
  """
  best = jax.nn.one_hot(most_likely(logits), logits.shape[-1], dtype=bool)
  greedy = jnp.where(best, 0, -jnp.inf).astype(logits.dtype)
  if mode == GREEDY:
    return greedy
  temperature, top_p, top_k = (
    a[:, None, None] for a in (params.temperature, params.top_p, params.top_k)
  )
  logits = logits / jnp.where(temperature > 0, temperature, 1)
  if mode == TRUNCATED:
    # With top_p of 1 rounding must cut nothing.
    whole = (temperature == 0) | ((top_k == 0) & (top_p >= 1))
    selected = _truncate(logits, top_p, top_k, whole) | whole
    logits = jnp.where(selected, logits, -jnp.inf)
  return jnp.where(temperature > 0, logits, greedy)


def _truncate(
  logits: jax.Array, top_p: jax.Array, top_k: jax.Array, whole: jax.Array
) -> jax.Array:
  """Returns which tokens top_k and then top_p keep, [B, T, C] bool.

  The settings are [B, 1, 1]. Rows that are `whole` may be anything.
  """
  n_tokens = logits.shape[-1]
  index = jnp.indices((*logits.shape[:-1], 1))[:-1]

  def of_best(n):
    """Looks at the n best tokens; also returns where those are enough."""
    # Ties are in order. A slice of what `top_k` returns, which XLA would move
    # to it, makes it a sort of everything on a CPU. (Of both at once, XLA's
    # compiler fails on a mesh.)
    falling, order = map(jax.lax.optimization_barrier, jax.lax.top_k(logits, n))
    rank = jnp.arange(n)[None, None]
    among = (rank < top_k) | (top_k == 0)
    weight = jnp.where(among, jnp.exp(falling - falling[..., :1]), 0)
    every = jnp.exp(logits - falling[..., :1]).sum(-1, keepdims=True)
    total = jnp.where(top_k == 0, every, weight.sum(-1, keepdims=True))
    before = (jnp.cumsum(weight, axis=-1) - weight) / total
    # The most likely token has nothing before it and always stays.
    kept = among & ((before < top_p) | (top_p >= 1))
    selected = jnp.zeros(logits.shape, bool).at[*index, order].set(kept)
    return selected, whole | jnp.where(top_k == 0, ~kept[..., -1:], top_k <= n)

  if n_tokens <= _BEST:
    return of_best(n_tokens)[0]
  selected, enough = of_best(_BEST)

  def of_all():
    # A row depends on itself alone.
    return jnp.where(enough, selected, of_best(n_tokens)[0])

  return jax.lax.cond(enough.all(), lambda: selected, of_all)


def _keys(seed: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
  """Derives keys [B, T] from seeds [B] and positions [B, T]."""

  def key(seed, position):
    of_position = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.fold_in(of_position, purpose)

  return jax.vmap(jax.vmap(key, (None, 0)))(seed, position)


def _uniform(low: jax.Array, high: jax.Array) -> jax.Array:
  """Returns numbers in (0, 1) from random words, f32.

  They have 24 leading bits at any magnitude down to 2^-64; those of
  `jax.random.uniform` are multiples of 2^-23, so that none is below 1e-7.
  """
  words = high.astype(jnp.float32), low.astype(jnp.float32)
  u = (words[0] + (words[1] + 0.5) * 2.0**-32) * 2.0**-32
  return jnp.minimum(u, 1 - 2.0**-24)


def _words(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
  """Draws two random words for each place, uint32."""
  return tuple(jax.random.bits(key, (2, *shape), jnp.uint32))


def uniform(seed: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
  """Draws numbers in (0, 1), [B, T], for tokens at these positions [B, T]."""
  words = jax.vmap(jax.vmap(lambda key: _words(key, ())))
  return _uniform(*words(_keys(seed, position, purpose)))


def exponential(low: jax.Array, high: jax.Array) -> jax.Array:
  """Returns exponentially distributed numbers from random words, f32.

  Both tails have all of float32's digits: half of the numbers is -log(v), half
  -log(1 - v), with v below 1/2.
  """
  v = _uniform(low, high) / 2
  return -jnp.where(low & 1, jnp.log(v), jnp.log1p(-v))


def draw(
  p: jax.Array, seed: jax.Array, position: jax.Array, purpose: int, mode: str
) -> jax.Array:
  """Draws tokens [B, T] int32 from p [B, T, C], not necessarily of sum 1.

  Draws depend on the seeds [B], the positions [B, T] of the tokens in their
  texts, and the purpose: those for different purposes are independent.
  """
  if mode == GREEDY:
    return most_likely(p)
  words = jax.vmap(jax.vmap(lambda key: _words(key, p.shape[-1:])))
  # The least of exponential numbers over p is each index with probability p.
  noise = exponential(*words(_keys(seed, position, purpose)))
  return most_likely(p / noise)

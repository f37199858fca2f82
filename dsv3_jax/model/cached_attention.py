"""Attention of new tokens against a cache of earlier positions.

An attention stores one array per layer, [B, S, ...]: S positions of B texts.
What a position holds, and how keys and values come from it, is the attention's
own business: see `expand` of `extend`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.linear import dot
from dsv3_jax.model.attention import CHUNK

KEYS = 512  # cache positions that are expanded to keys and values at a time

Cache = Float[Array, "B S *dims"]
Start = Int[Array, " B"]  # position of the first new token of each text
_dot = functools.partial(dot.einsum, preferred_element_type=jnp.float32)
_slice = jax.lax.dynamic_slice_in_dim


def new_positions(start: Start, x: Array) -> Int[Array, "B T"]:
  """Positions [B, T] of new tokens x [B, T, ...] that begin at start [B]."""
  return start[:, None] + jnp.arange(x.shape[1])[None]


def write(cache: Cache, new: Float[Array, "B T *dims"], start: Start) -> Cache:
  """Writes new [B, T, ...] to cache [B, S, ...] from position start [B] on.

  Positions beyond the end of the cache are not written.
  """
  positions, new = new_positions(start, new), new.astype(cache.dtype)
  if positions.size == 1:
    # With one row XLA emits a dynamic-update-slice that copies the cache for
    # every reader; a dummy second row, beyond the end, avoids that.
    beyond = jnp.full_like(positions, cache.shape[1])
    positions = jnp.concatenate([positions, beyond], axis=1)
    new = jnp.concatenate([new, new], axis=1)
  row = jnp.arange(len(cache))[:, None]
  return cache.at[row, positions].set(new, mode="drop")


def attend(
  q: Float[Array, "B N T X"],
  new: Float[Array, "B T *dims"],
  cache: Cache,
  start: Start,
  keys_values: Callable[[jax.Array], Sequence[jax.Array]],
) -> tuple[Float[Array, "B T N V"], Cache]:
  """Writes new positions to a cache and attends to all that are filled.

  `keys_values` maps cache positions [s, ...] to keys [N, s, X] and values
  [N, s, V]; otherwise the arguments are those of `write` and `extend`.
  """

  def expand(block):
    k, v = keys_values(block)
    return k, jnp.swapaxes(v, -1, -2)

  cache = write(cache, new, start)
  return extend(q, cache, start, expand), cache


def extend(
  q: Float[Array, "B N T X"],
  cache: Cache,
  start: Start,
  expand: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> Float[Array, "B T N V"]:
  """Causal attention of new queries to all filled positions of a cache.

  One block of the cache at a time is expanded to keys and values, and merged
  with the softmax of the blocks before (arXiv:2205.14135, section 3.1). Blocks
  behind the last query cost nothing, nor do chunks of queries before a block.

  Args:
    q: already scaled; T is at most `CHUNK` or a multiple of it.
    cache: positions up to start + t are filled for query t.
    start: position of the first query.
    expand: maps s cache positions [s, ...] to keys [N, s, X] and values
      [N, V, s].
  """
  n_queries = q.shape[2]
  if n_queries % min(CHUNK, n_queries):
    raise ValueError(
      f"{n_queries} queries: must be at most {CHUNK} or a multiple of it"
    )

  out = jax.lax.map(lambda args: _extend(*args, expand), (q, cache, start))
  return jnp.moveaxis(out, 3, 1)


def _extend(q, cache, start, expand):
  """`extend` of one sequence: q [N, T, X], cache [S, ...] -> [N, V, T]."""
  (heads, n_queries, _), length = q.shape, cache.shape[0]
  size = min(KEYS, length)
  _, values = jax.eval_shape(expand, cache[:size])
  state = (
    jnp.full_like(q, -jnp.inf, jnp.float32, (heads, n_queries)),
    jnp.zeros_like(q, jnp.float32, (heads, n_queries)),
    jnp.zeros_like(q, jnp.float32, (heads, values.shape[1], n_queries)),
  )

  def block(j, state):
    # The last block may be ragged: it then begins earlier and overlaps the one
    # before, whose positions it masks.
    first = jnp.minimum(j * size, length - size)
    k, v = expand(_slice(cache, first, size, 0))
    return _add_block(state, q, k, v, start, first, j * size)

  end = jnp.minimum(start + n_queries, length)
  state = jax.lax.fori_loop(0, -(-end // size), block, state)
  _, total, out = state
  return (out / total[:, None]).astype(q.dtype)


def _add_block(state, q, k, v, start, first, unseen):
  """Merges a block of keys into the softmax state, chunk by chunk of queries.

  The state is that of `_merge`; q is [N, T, X] from position `start` on, k
  [N, s, X] and v [N, V, s] from `first` on; earlier blocks end at `unseen`.
  """
  n_queries, size = q.shape[1], k.shape[1]
  n = min(CHUNK, n_queries)
  n_chunks = n_queries // n
  key = first + jnp.arange(size)

  def chunk(i, state, masked):
    scores = _dot("NSX,NTX->NST", k, _slice(q, i * n, n, 1))
    if masked:
      query = start + i * n + jnp.arange(n)
      seen = (key[:, None] <= query[None]) & (key >= unseen)[:, None]
      scores = jnp.where(seen[None], scores, -jnp.inf)
    merged = _merge([_slice(a, i * n, n, -1) for a in state], scores, v)
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(a, b, i * n, a.ndim - 1)
      for a, b in zip(state, merged, strict=True)
    )

  before = jnp.maximum(unseen - start, 0) // n  # chunks that see no key
  # Chunks from `full` on see every key of the block, and need no mask.
  end = jnp.maximum(unseen + size - 1 - start, 0)
  full = jnp.minimum(-(-end // n), n_chunks)
  full = jnp.maximum(jnp.where(first < unseen, n_chunks, full), before)
  masked, unmasked = (functools.partial(chunk, masked=m) for m in (True, False))
  state = jax.lax.fori_loop(before, full, masked, state)
  return jax.lax.fori_loop(full, n_chunks, unmasked, state)


def _merge(
  state: Sequence[jax.Array], scores: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Merges keys of scores [N, s, T] and values v [N, V, s] into a softmax.

  The state is the highest score [N, T], the sum of exp(score - highest) [N, T],
  and the sum of values weighted by these [N, V, T].
  """
  top, total, out = state
  new_top = jnp.maximum(top, scores.max(1))
  weights = jnp.exp(scores - new_top[:, None])
  fade = jnp.exp(top - new_top)
  more = _dot("NVS,NST->NVT", v, weights.astype(v.dtype))
  return new_top, fade * total + weights.sum(1), fade[:, None] * out + more

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

from dsv3_jax.model.attention import CHUNK

KEYS = 512  # cache positions that are expanded to keys and values at a time

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_slice = jax.lax.dynamic_slice_in_dim


def new_positions(start: Int[Array, " B"], x: Array) -> Int[Array, "B T"]:
  """Positions [B, T] of new tokens x [B, T, ...] that begin at start [B]."""
  return start[:, None] + jnp.arange(x.shape[1])[None]


def write(
  cache: Float[Array, "B S *dims"],
  new: Float[Array, "B T *dims"],
  start: Int[Array, " B"],
) -> Float[Array, "B S *dims"]:
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
  cache: Float[Array, "B S *dims"],
  start: Int[Array, " B"],
  keys_values: Callable[[jax.Array], Sequence[jax.Array]],
) -> tuple[Float[Array, "B T N V"], Float[Array, "B S *dims"]]:
  """Writes new positions to a cache and attends to all that are filled.

  Args:
    q: as for `extend`.
    new: as for `write`.
    cache: its content before; returned with the new positions.
    start: position of the first query.
    keys_values: maps cache positions [s, ...] to keys [N, s, X] and values
      [N, s, V].
  """

  def expand(block):
    k, v = keys_values(block)
    return k, jnp.swapaxes(v, -1, -2)

  cache = write(cache, new, start)
  return extend(q, cache, start, expand), cache


def extend(
  q: Float[Array, "B N T X"],
  cache: Float[Array, "B S *dims"],
  start: Int[Array, " B"],
  expand: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> Float[Array, "B T N V"]:
  """Causal attention of new queries to all filled positions of a cache.

  One block of the cache at a time is expanded to keys and values, and merged
  with the softmax of the blocks before (arXiv:2205.14135, section 3.1). Blocks
  behind the last query cost nothing, nor do chunks of queries before a block.

  Args:
    q: [B, N, T, X], already scaled; T is at most `CHUNK` or a multiple of it.
    cache: [B, S, ...]; positions up to start + t are filled for query t.
    start: [B] int32, position of the first query.
    expand: maps s cache positions [s, ...] to keys [N, s, X] and values
      [N, V, s].

  Returns:
    [B, T, N, V].
  """
  n_queries = q.shape[2]
  if n_queries % min(CHUNK, n_queries):
    raise ValueError(
      f"{n_queries} queries: must be at most {CHUNK} or a multiple of it"
    )

  def sequence(args):
    return _extend_sequence(*args, expand)

  out = jax.lax.map(sequence, (q, cache, start))
  return jnp.moveaxis(out, 3, 1)


def _extend_sequence(
  q: jax.Array,
  cache: jax.Array,
  start: jax.Array,
  expand: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> jax.Array:
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


def _add_block(
  state: Sequence[jax.Array],
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  start: jax.Array,
  first: jax.Array,
  unseen: jax.Array,
) -> Sequence[jax.Array]:
  """Merges a block of keys into the softmax state, chunk by chunk of queries.

  Args:
    state: as of `_merge`, for all queries.
    q: [N, T, X].
    k: [N, s, X].
    v: [N, V, s].
    start: position of the first query.
    first: position of the first key.
    unseen: the first position that no earlier block had.
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
  masked = functools.partial(chunk, masked=True)
  unmasked = functools.partial(chunk, masked=False)
  state = jax.lax.fori_loop(before, full, masked, state)
  return jax.lax.fori_loop(full, n_chunks, unmasked, state)


def _merge(
  state: Sequence[jax.Array], scores: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Merges more keys into a softmax and its weighted sum of values.

  Args:
    state: the highest score [N, T], the sum of exp(score - highest) [N, T], and
      the sum of values weighted by these [N, V, T].
    scores: [N, s, T] of the new keys.
    v: [N, V, s], their values.
  """
  top, total, out = state
  new_top = jnp.maximum(top, scores.max(1))
  weights = jnp.exp(scores - new_top[:, None])
  fade = jnp.exp(top - new_top)
  more = _dot("NVS,NST->NVT", v, weights.astype(v.dtype))
  return new_top, fade * total + weights.sum(1), fade[:, None] * out + more

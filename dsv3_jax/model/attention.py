"""Causal softmax attention of whole sequences, linear in memory.

One sequence at a time, and in it one chunk of queries at a time, so that scores
stay in cache. Only the log-sum-exp is saved for the backward pass, which makes
the scores again. Softmax is in float32.

Chunks are in a few blocks; those of a block see the keys up to its end. So the
future costs half a block of keys a query, and no more than half a chunk where a
chunk is a block, in sequences up to BLOCKS * CHUNK; and a program does not grow
with the length.

Scores are [keys, queries], so that what belongs to a query lies along the last
dim, and sums for queries are computed as [X, queries]: no product contracts the
leading dims of both its operands. Both are much faster on CPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.linear import dot, quantize
from dsv3_jax.model import remat

CHUNK = 128  # queries that attend together
BLOCKS = 8

_dot = functools.partial(dot.einsum, preferred_element_type=jnp.float32)
_slice = jax.lax.dynamic_slice_in_dim


def _blocks(t: int) -> list[tuple[int, int]]:
  """Starts and ends of blocks of whole chunks; the last may be ragged."""
  size = CHUNK * -(
    -t // (CHUNK * BLOCKS)
  )  # ceil of ceil is ceil of the product
  return [(start, min(start + size, t)) for start in range(0, t, size)]


def _over_chunks(
  chunk: Callable[..., tuple[Any, Any]], carry: Any, start: int, end: int
) -> tuple[Any, Any]:
  """Folds chunk(carry, first query, size) -> (carry, outputs) over a block.

  Outputs are concatenated along their last dim, of queries.
  """
  n, remainder = divmod(end - start, CHUNK)
  outputs = []
  if n == 1:
    carry, output = chunk(carry, start, CHUNK)
    outputs.append(output)
  elif n:
    full_chunk = functools.partial(chunk, n=CHUNK)
    first = start + CHUNK * jnp.arange(n)
    carry, output = jax.lax.scan(full_chunk, carry, first)
    outputs.append(jax.tree.map(_merge_chunks, output))
  if remainder:
    carry, output = chunk(carry, end - remainder, remainder)
    outputs.append(output)
  return carry, _concatenate(outputs)


def _merge_chunks(a: jax.Array) -> jax.Array:
  """[chunks, ..., queries] -> [..., all queries]."""
  moved = jnp.moveaxis(a, 0, -2)
  return moved.reshape(*moved.shape[:-2], -1)


def _concatenate(trees: list[Any]) -> Any:
  """Concatenates the arrays of trees along their last dim."""
  return jax.tree.map(lambda *a: jnp.concatenate(a, -1), *trees)


def _mask(
  scores: jax.Array,
  fill: float,
  start: int,
  first: jax.Array | int,
  segments: jax.Array | None,
) -> jax.Array:
  """Scores [N, S, T] of queries from `first` on: `fill` where a key is later.

  Only keys from `start` on, the block's, can be; the others are not touched,
  but those of another segment, if there are any.
  """
  s, t = scores.shape[1:]
  query = first - start + jnp.arange(t)
  future = jnp.arange(s - start)[:, None] > query[None]
  near = jnp.where(future[None], fill, scores[:, start:])
  scores = scores.at[:, start:].set(near)
  if segments is None:
    return scores
  hidden = segments[:s, None] != _slice(segments, first, t, 0)[None]
  return jnp.where(hidden[None], fill, scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
  q: Float[Array, "B N T X"],
  k: Float[Array, "B N T X"],
  v: Float[Array, "B N T V"],
  segments: Int[Array, "B T"] | None = None,
  e5m6_columns: int = 0,
) -> Float[Array, "B T N V"]:
  """Attention of queries that are already scaled, to keys of their segment.

  With `e5m6_columns` the result, which the backward pass reads too, is rounded
  to E5M6 with a scale for so many columns (section 3.3.3).
  """
  return _attend_fwd(q, k, v, segments, e5m6_columns)[0]


def _attend_fwd(q, k, v, segments, e5m6_columns):
  def sequence(args):
    q, k, v, segments = args  # v is [N, V, S]

    def block(start, end):
      def chunk(carry, first, n):
        q_here = _slice(q, first, n, 1)
        scores = _dot("NSX,NTX->NST", k[:, :end], q_here)
        scores = _mask(scores, -jnp.inf, start, first, segments)
        top = scores.max(1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(1, keepdims=True)
        weights = weights.astype(v.dtype)
        y = _dot("NVS,NST->NVT", v[:, :, :end], weights)
        lse = (top + jnp.log(total))[:, 0]
        return carry, ((y / total).astype(v.dtype), lse)

      return _over_chunks(chunk, None, start, end)[1]

    return _concatenate([block(*span) for span in _blocks(q.shape[1])])

  # Turned outside of the loop: XLA would fold it into the products again.
  args = q, k, jnp.swapaxes(v, 2, 3), segments
  out, lse = jax.lax.map(sequence, args)
  out = jnp.moveaxis(out, 3, 1)
  if e5m6_columns:
    rows = out.reshape(-1, out.shape[2] * out.shape[3])
    out = quantize.e5m6(rows, e5m6_columns).reshape(out.shape)
  out, lse = remat.named((out, lse), "attention")
  return out, (q, k, v, segments, out, lse)


def _attend_bwd(e5m6_columns, residuals, dout):
  del e5m6_columns  # rounding has the gradient of its argument

  def sequence(args):
    q, k, v, segments, lse, dout, mean, k_turned = args

    def block(carry, start, end):
      def chunk(carry, first, n):
        dk, dv = carry
        q_here, dout_here = (_slice(a, first, n, 1) for a in (q, dout))
        lse_here, mean_here = (_slice(a, first, n, 1) for a in (lse, mean))
        scores = _dot("NSX,NTX->NST", k[:, :end], q_here)
        weights = jnp.exp(scores - lse_here[:, None])
        weights = _mask(weights, 0, start, first, segments)
        dweights = _dot("NSV,NTV->NST", v[:, :end], dout_here)
        dscores = weights * (dweights - mean_here[:, None])
        dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
        dq = _dot("NXS,NST->NXT", k_turned[:, :, :end], dscores)
        dk = dk.at[:, :end].add(_dot("NST,NTX->NSX", dscores, q_here))
        dv = dv.at[:, :end].add(_dot("NST,NTV->NSV", weights, dout_here))
        return (dk, dv), dq.astype(q.dtype)

      return _over_chunks(chunk, carry, start, end)

    carry, dq = tuple(jnp.zeros_like(a, jnp.float32) for a in (k, v)), []
    for span in _blocks(q.shape[1]):
      carry, part = block(carry, *span)
      dq.append(part)
    dk, dv = carry
    return _concatenate(dq), dk.astype(k.dtype), dv.astype(v.dtype)

  q, k, v, segments, out, lse = residuals
  # sum_s p dp = sum_v out dout: what the softmax takes off its gradient.
  mean = _dot("BTNV,BTNV->BNT", out, dout)
  dout, k_turned = jnp.swapaxes(dout, 1, 2), jnp.swapaxes(k, 2, 3)
  args = q, k, v, segments, lse, dout, mean, k_turned
  dq, dk, dv = jax.lax.map(sequence, args)
  return jnp.swapaxes(dq, 2, 3), dk, dv, None


attend.defvjp(_attend_fwd, _attend_bwd)

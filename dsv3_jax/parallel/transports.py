"""Transports of expert parallelism: collectives that send rows and add them up.

A transport sends rows of x [M, ...] to their destinations, `dispatch`, and
adds up what returns of them, `combine`; each is the transpose of the other.
With FP8 weights, states sent to the experts and gradients of their outputs
are in FP8, with scales that are powers of two; what returns of either is in
bfloat16 (section 3.3.3). Quantizing received rows again changes nothing, so
the number of hops has no effect.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import varying
from dsv3_jax.linear import quantize
from dsv3_jax.model import remat
from dsv3_jax.parallel.device_mesh import Axes


@dataclasses.dataclass(frozen=True)
class AllGather:
  """Transport of all rows to all devices along some axes."""

  axes: Axes

  def dispatch(self, x: jax.Array, rows: None) -> jax.Array:
    """Gathers the rows of all devices."""
    del rows
    return jax.lax.all_gather(x, self.axes, tiled=True)

  def combine(self, y: jax.Array, rows: None) -> jax.Array:
    """Sums the rows over devices in float32; each receives its own."""
    del rows
    wide = y.astype(jnp.float32)
    return jax.lax.psum_scatter(wide, self.axes, tiled=True).astype(y.dtype)


@flax.struct.dataclass
class Rows:
  """The rows of one round of an exchange."""

  token: jax.Array  # [R, C] int32, tokens for each destination; M: none
  outgoing: jax.Array  # [R] int32, rows for each destination
  incoming: jax.Array  # [R] int32, rows from each source
  n_tokens: int = flax.struct.field(pytree_node=False)  # M


@dataclasses.dataclass(frozen=True)
class AllToAll:
  """Transport of rows to their destinations along some axes of the group."""

  axes: Axes  # exchanged over
  group: Axes  # all that must do as many rounds
  all_to_all: Callable[[jax.Array, jax.Array, Axes], jax.Array]
  n_devices: int  # of a destination: those of a node, or 1
  fanout: int  # most destinations of a token
  buffer_factor: float  # rows of a round, relative to balanced routing

  def dispatch(self, x: jax.Array, rows: Rows) -> jax.Array:
    """Sends rows of x [M, ...] to their destinations: [R * C, ...]."""
    y = x.at[rows.token].get(mode="fill", fill_value=0)
    y = self.all_to_all(y, rows.outgoing, self.axes)
    return y.reshape(-1, x.shape[-1])

  def combine(self, y: jax.Array, rows: Rows) -> jax.Array:
    """Returns rows [R * C, D] to their sources, and adds those of a token.

    They are added in float32 and rounded once.
    """
    y = y.reshape(*rows.token.shape, -1)
    y = self.all_to_all(y, rows.incoming, self.axes)
    x = jnp.zeros_like(y, jnp.float32, shape=(rows.n_tokens, y.shape[-1]))
    return x.at[rows.token].add(y, mode="drop").astype(y.dtype)


def padded_all_to_all(
  rows: jax.Array, counts: jax.Array, axes: Axes
) -> jax.Array:
  """Sends block i of rows [R, C, ...] to device i; returns theirs in order."""
  del counts
  return jax.lax.all_to_all(rows, axes, 0, 0, tiled=True)


def ragged_all_to_all(
  rows: jax.Array, counts: jax.Array, axes: Axes
) -> jax.Array:
  """Sends only the first counts[i] rows of block i; the others arrive as 0."""
  n, size = rows.shape[:2]
  flat = rows.reshape(n * size, *rows.shape[2:])
  starts = size * jnp.arange(n, dtype=jnp.int32)
  offsets = jnp.full_like(starts, size) * jax.lax.axis_index(axes)
  incoming = padded_all_to_all(counts, counts, axes)
  out = jax.lax.ragged_all_to_all(
    flat,
    jnp.zeros_like(flat),
    *varying.same_varying(starts, counts, offsets, incoming),
    axis_name=axes,
  )
  return out.reshape(rows.shape)


# --- with gradients, and in FP8 ---

Transport = AllGather | AllToAll


def _send(
  transport: Transport, tile: int, x: jax.Array, rows: Rows | None
) -> jax.Array:
  """Sends rows, in FP8 if there is a tile."""

  def send(a: jax.Array) -> jax.Array:
    return remat.named(transport.dispatch(a, rows), "sent")

  if not tile:
    return send(x)
  quantized = quantize.quantize(x, (1, tile), "power_of_two")
  return quantize.dequantize(jax.tree.map(send, quantized), x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dispatch(
  transport: Transport, tile: int, x: jax.Array, rows: Rows | None
) -> jax.Array:
  """Sends rows of x [M, ...], in FP8 of a tile (0: not); its gradient combines.

  `rows` is the argument of the transport.
  """
  return _send(transport, tile, x, rows)


def _dispatch_fwd(transport, tile, x, rows):
  return _send(transport, tile, x, rows), rows


def _dispatch_bwd(transport, tile, rows, dy):
  del tile
  return transport.combine(dy, rows), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def combine(
  transport: Transport, tile: int, y: jax.Array, rows: Rows | None
) -> jax.Array:
  """Adds up rows with `transport.combine`; its gradient dispatches in FP8."""
  del tile
  return transport.combine(y, rows)


def _combine_fwd(transport, tile, y, rows):
  del tile
  return transport.combine(y, rows), rows


def _combine_bwd(transport, tile, rows, dx):
  return _send(transport, tile, dx, rows), None


combine.defvjp(_combine_fwd, _combine_bwd)

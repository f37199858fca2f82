"""The three products of a linear layer, in the precision of its weight.

A weight is an array, or an `Fp8Weight` with a copy of it in E4M3. The same
functions take both (section 3.3.2, figure 6):

          contracts  left, in FP8    right, in FP8
  fprop   inputs     x, 1 x 128      W, 128 x 128
  dgrad   outputs    dy, 1 x 128     W, 128 x 128, the same
  wgrad   tokens     x, 128 x 1      dy, 128 x 1

`quantize_rows` makes the left operands of the first two. Those of x are also
saved for `wgrad`, which dequantizes them and makes tiles along the tokens.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import config, varying
from dsv3_jax.linear import dot, quantize, scaled_matmul

CLASSES = ("activation", "gradient")  # tensors whose tiles are counted


@flax.struct.dataclass
class MasterHandle:
  """Differentiable handle of an FP8 weight: carries its cotangent.

  Its values are never read. The cotangent of `counts` is the counts of the
  quantization, not a derivative.
  """

  master: jax.Array
  counts: jax.Array  # [..., 2, 6] f32, `CLASSES` by `quantize.COUNTERS`


@flax.struct.dataclass
class Fp8Weight:
  """A weight, or a stack of them, whose products are in FP8."""

  handle: MasterHandle | None
  codes: jax.Array | None  # of E4M3, uint8 in the shape of the master
  scales: jax.Array | None  # [..., ceil(K / tile), ceil(N / tile)] f32
  precision: config.Precision = flax.struct.field(pytree_node=False)
  dequantized: jax.Array | None = None  # in place of codes and scales

  @property
  def shape(self) -> tuple[int, ...]:
    return (self.codes if self.dequantized is None else self.dequantized).shape


@flax.struct.dataclass
class StackedWeight:
  """The weight of a layer, read from the stack of all layers.

  What reads a part of it, as a loop over experts does, then needs no copy of
  the layer. No gradient reaches the stack; the handle carries it.
  """

  handle: jax.Array | None  # [...] differentiable, its values are never read
  stack: jax.Array  # [L, ...]
  layer: jax.Array  # [] int32

  @property
  def shape(self) -> tuple[int, ...]:
    return self.stack.shape[1:]

  @property
  def dtype(self) -> jnp.dtype:
    return self.stack.dtype

  def __getitem__(self, index: jax.Array) -> jax.Array:
    return self.stack[self.layer, index]


Weight = jax.Array | Fp8Weight | StackedWeight
Rows = jax.Array | quantize.BlockScaled  # [M, K]
Counts = Float[Array, "6"] | None  # of a quantization; None: there was none


def differentiable(w: Weight) -> jax.Array | MasterHandle:
  """The part of a weight that the loss is differentiated with respect to."""
  return w.handle if isinstance(w, Fp8Weight) else w


def without_handle(w: Weight) -> Weight:
  """The part of a weight that a backward pass reads."""
  return w if isinstance(w, jax.Array) else w.replace(handle=None)


def block_size(w: Weight) -> int:
  """Rows and columns of a block of a weight in FP8, else 0."""
  return w.precision.tile if isinstance(w, Fp8Weight) else 0


def _block_scaled(w: Fp8Weight, *shape: int) -> quantize.BlockScaled:
  """The codes and scales of a weight, as matrices of a shape."""
  tile = w.precision.tile, w.precision.tile
  return quantize.BlockScaled(w.codes.reshape(*shape), w.scales, tile)


def _matrix(w: Fp8Weight, n_contracted: int) -> scaled_matmul.Operand:
  """A weight [K, N] as right operand."""
  n = math.prod(w.shape[:n_contracted])
  if w.dequantized is not None:
    return w.dequantized.reshape(n, -1)
  return _block_scaled(w, n, -1)


def with_dequantized(w: Weight) -> Weight:
  """Dequantizes a stack of weights [E, K, ...] once, for many products.

  Does nothing for backends that multiply codes.
  """
  if not isinstance(w, Fp8Weight):
    return w
  if not scaled_matmul.dequantizes(w.precision.backend):
    return w
  dtype = scaled_matmul.dequantized_dtype()
  values = quantize.dequantize(_block_scaled(w, *w.shape[:2], -1), dtype)
  return w.replace(codes=None, scales=None, dequantized=values.reshape(w.shape))


def quantize_rows(
  x: Float[Array, "M K"], w: Weight, scales: str = "", tile_rows: int = 1
) -> tuple[Rows, Counts]:
  """Quantizes x as left operand of a product with a weight; returns counts too.

  The operand is x itself where the weight is not in FP8. Scales are as in
  `quantize.quantize`; those of the weight's recipe if not given.
  """
  if not isinstance(w, Fp8Weight):
    return x, None
  precision = w.precision
  tile = tile_rows, precision.tile
  quantized = quantize.quantize(x, tile, scales or precision.scales)
  counts = quantize.count(x, quantized, precision.counters)
  return quantized.with_single_row_tiles(), counts


def quantize_gradient(
  dy: Float[Array, "M N"], w: Weight, scales: str = ""
) -> tuple[Rows, Counts]:
  """`quantize_rows` of a gradient, whose tiles the recipe may make square."""
  square = isinstance(w, Fp8Weight) and w.precision.gradient_tiles == "blocks"
  return quantize_rows(dy, w, scales, w.precision.tile if square else 1)


def dequantize_rows(
  x: Rows, dtype: jax.typing.DTypeLike
) -> Float[Array, "M K"]:
  """The array that rows stand for."""
  if isinstance(x, quantize.BlockScaled):
    return quantize.dequantize(x, dtype)
  return x


def fprop(x: Rows, w: Weight, n_contracted: int = 1) -> Float[Array, "M N"]:
  """x @ W, [M, K] and [K, N] to [M, N]; f32 in FP8."""
  if not isinstance(w, Fp8Weight):
    return dot.matmul(x, w.reshape(x.shape[1], -1))
  return scaled_matmul.matmul(x, _matrix(w, n_contracted), w.precision.backend)


def dgrad(dy: Rows, w: Weight, n_contracted: int = 1) -> Float[Array, "M K"]:
  """dy @ W.T, [M, N] and [K, N] to [M, K]; f32 in FP8."""
  if not isinstance(w, Fp8Weight):
    return dot.matmul(dy, w.reshape(-1, dy.shape[1]).T)
  matrix = _matrix(w, n_contracted).transpose()
  return scaled_matmul.matmul(dy, matrix, w.precision.backend)


def wgrad(
  x: Rows, dy: Rows, w: Weight, scales: str = ""
) -> Float[Array, "K N"]:
  """x.T @ dy, [M, K] and [M, N] to [K, N] f32; scales as in `quantize_rows`."""
  if not isinstance(w, Fp8Weight):
    # Stated so that no operand is transposed first; autodiff makes dw.T.
    return dot.dot_general(
      x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
  tile, scales = (w.precision.tile, 1), scales or w.precision.scales
  x, dy = (
    quantize.quantize(dequantize_rows(a, jnp.float32), tile, scales)
    for a in (x, dy)
  )
  return scaled_matmul.matmul(x.transpose(), dy, w.precision.backend)


def weight_cotangent(
  w: Weight, dw: Float[Array, "... N"], counts: list[Counts]
) -> Weight:
  """The cotangent of a weight, of its gradient dw and of counts.

  Counts are one of each of `CLASSES`; without FP8 they are not read.
  """
  dw = dw.reshape(w.shape)
  if isinstance(w, StackedWeight):
    return w.replace(handle=dw.astype(w.dtype), stack=None, layer=None)
  if not isinstance(w, Fp8Weight):
    return dw.astype(w.dtype)
  handle = MasterHandle(dw, jnp.stack(counts))
  return w.replace(handle=handle, codes=None, scales=None)


def linear(
  x: Float[Array, "..."],
  w: Weight,
  n_contracted: int = 1,
  *,
  save_input: bool = False,
) -> Float[Array, "..."]:
  """Contracts the last n_contracted dims of x with the first ones of w.

  With `save_input`, x itself is saved for `wgrad` rather than its tiles, where
  something else saves it anyway. Tiles along tokens then have scales that are
  powers of two.
  """
  lead = x.shape[: x.ndim - n_contracted]
  n = math.prod(w.shape[:n_contracted])
  flat, w = varying.same_varying(x.reshape(-1, n), w)
  y = _linear(n_contracted, save_input, flat, w)
  return y.reshape(*lead, *w.shape[n_contracted:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(n_contracted, save_input, x, w):
  return _linear_fwd(n_contracted, save_input, x, w)[0]


def _linear_fwd(n_contracted, save_input, x, w):
  rows, x_counts = quantize_rows(x, w)
  y = fprop(rows, w, n_contracted).astype(x.dtype)
  return y, (x if save_input else rows, without_handle(w), x_counts)


def _linear_bwd(n_contracted, save_input, residuals, dy):
  x, w, x_counts = residuals
  rows, dy_counts = quantize_gradient(dy, w)
  dx = dgrad(rows, w, n_contracted).astype(dy.dtype)
  dw = wgrad(x, dy, w, "power_of_two" if save_input else "")
  return dx, weight_cotangent(w, dw, [x_counts, dy_counts])


_linear.defvjp(_linear_fwd, _linear_bwd)

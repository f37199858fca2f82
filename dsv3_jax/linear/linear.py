"""The three products of a linear layer, in the precision of its weight.

A weight is an array, or an `Fp8` with a copy of it in E4M3. The same functions
use both (section 3.3.2, figure 6):

                   sums over   left, in FP8    right, in FP8
  output           inputs      x, 1 x 128      W, 128 x 128
  input_gradient   outputs     dy, 1 x 128     W, 128 x 128, the same
  weight_gradient  tokens      x, 128 x 1      dy, 128 x 1

`rows` makes the left operands of the first two. Those of x are also what is
kept for the last, which dequantizes them and makes tiles along the tokens.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import config, varying
from dsv3_jax.linear import quantize, scaled_matmul

CLASSES = ("activation", "gradient")  # tensors whose tiles are counted


@flax.struct.dataclass
class Trained:
  """What has a gradient of a weight in FP8; its numbers are never read."""

  master: jax.Array
  counts: jax.Array  # [..., 2, 6] f32, `CLASSES` by `tiles.COUNTED`: the
  # gradient with respect to them is what was counted


@flax.struct.dataclass
class Fp8:
  """A weight, or a stack of them, whose products are in FP8."""

  trained: Trained | None
  bits: jax.Array | None  # of E4M3, uint8 in the shape of the master
  scales: jax.Array | None  # [..., ceil(K / tile), ceil(N / tile)] f32
  how: config.Precision = flax.struct.field(pytree_node=False)
  numbers: jax.Array | None = None  # multiplied out, in the place of the two

  @property
  def shape(self) -> tuple[int, ...]:
    return (self.bits if self.numbers is None else self.numbers).shape


Weight = jax.Array | Fp8
Rows = jax.Array | quantize.Tiled  # [M, K]


def trained(w: Weight) -> jax.Array | Trained:
  """What has a gradient."""
  return w.trained if isinstance(w, Fp8) else w


def untrained(w: Weight) -> Weight:
  """What a backward pass needs of the weight."""
  return w.replace(trained=None) if isinstance(w, Fp8) else w


def tile(w: Weight) -> int:
  """Rows and columns of a block of a weight in FP8, else 0."""
  return w.how.tile if isinstance(w, Fp8) else 0


def _blocks(w: Fp8, n_in: int) -> scaled_matmul.Operand:
  n = math.prod(w.shape[:n_in])
  if w.numbers is not None:
    return w.numbers.reshape(n, -1)
  return quantize.Tiled(w.bits.reshape(n, -1), w.scales, (w.how.tile,) * 2)


def multiplied_out(w: Weight) -> Weight:
  """A stack of weights for use one by one, [E, K, ...].

  Where products multiply operands out first, that is done here, once.
  """
  if not isinstance(w, Fp8) or not scaled_matmul.multiplies_out(w.how.backend):
    return w
  matrices = w.bits.reshape(*w.shape[:2], -1)
  made = quantize.Tiled(matrices, w.scales, (w.how.tile,) * 2)
  numbers = quantize.dequantize(made, scaled_matmul.dtype()).reshape(w.shape)
  return w.replace(bits=None, scales=None, numbers=numbers)


def rows(
  x: jax.Array, w: Weight, scales: str = "", tile_rows: int = 1
) -> tuple[Rows, jax.Array | None]:
  """x [M, K] as left operand of a product with a weight, and what was counted.

  Args:
    x: activations or gradients.
    w: the weight.
    scales: as `tiles.quantize`; the weight's own if not given.
    tile_rows: rows of a tile.
  """
  if not isinstance(w, Fp8):
    return x, None
  made = quantize.quantize(x, (tile_rows, w.how.tile), scales or w.how.scales)
  return made.by_row(), quantize.counts(x, made, w.how.counters)


def gradient_rows(
  dy: jax.Array, w: Weight, scales: str = ""
) -> tuple[Rows, jax.Array | None]:
  """The same of gradients, whose tiles the recipe may make square."""
  square = isinstance(w, Fp8) and w.how.gradient_tiles == "blocks"
  return rows(dy, w, scales, w.how.tile if square else 1)


def numbers(x: Rows, dtype: jax.typing.DTypeLike) -> jax.Array:
  """What rows stand for."""
  return quantize.dequantize(x, dtype) if isinstance(x, quantize.Tiled) else x


def output(x: Rows, w: Weight, n_in: int = 1) -> jax.Array:
  """x @ W, [M, K] and [K, N] to [M, N]; f32 in FP8."""
  if not isinstance(w, Fp8):
    return x @ w.reshape(x.shape[1], -1)
  return scaled_matmul.product(x, _blocks(w, n_in), w.how.backend)


def input_gradient(dy: Rows, w: Weight, n_in: int = 1) -> jax.Array:
  """dy @ W.T, [M, N] and [K, N] to [M, K]; f32 in FP8."""
  if not isinstance(w, Fp8):
    return dy @ w.reshape(-1, dy.shape[1]).T
  blocks = _blocks(w, n_in).transpose()
  return scaled_matmul.product(dy, blocks, w.how.backend)


def weight_gradient(
  x: Rows, dy: Rows, w: Weight, scales: str = ""
) -> jax.Array:
  """x.T @ dy, [M, K] and [M, N] to [K, N] f32.

  Args:
    x: the rows of the first product, or the activations.
    dy: the gradient of the output, or its rows.
    w: the weight.
    scales: as `rows`, of both.
  """
  if not isinstance(w, Fp8):
    # Stated so that no operand is transposed first; autodiff makes dw.T.
    return jax.lax.dot_general(
      x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
  x, dy = (_columns(a, w.how, scales or w.how.scales) for a in (x, dy))
  return scaled_matmul.product(x.transpose(), dy, w.how.backend)


def _columns(x: Rows, how: config.Precision, scales: str) -> quantize.Tiled:
  return quantize.quantize(numbers(x, jnp.float32), (how.tile, 1), scales)


def gradient(
  w: Weight, dw: jax.Array, counted: list[jax.Array | None]
) -> Weight:
  """The cotangent of a weight: its gradient, and what was counted.

  Args:
    w: the weight.
    dw: f32, its elements in order.
    counted: of `CLASSES`.
  """
  dw = dw.reshape(w.shape)
  if not isinstance(w, Fp8):
    return dw.astype(w.dtype)
  return w.replace(
    trained=Trained(dw, jnp.stack(counted)), bits=None, scales=None
  )


def linear(
  x: jax.Array, w: Weight, n_in: int = 1, *, keep_input: bool = False
) -> jax.Array:
  """Contracts the last n_in dims of x with the first of w; the rest follows.

  Args:
    x: activations.
    w: the weight.
    n_in: dims of inputs.
    keep_input: keep x for the weight's gradient rather than its tiles: it is
      kept for something else too. Tiles along tokens have powers of two.
  """
  lead = x.shape[: x.ndim - n_in]
  n = math.prod(w.shape[:n_in])
  leaves, structure = jax.tree.flatten((x.reshape(-1, n), w))
  flat, w = jax.tree.unflatten(structure, varying.alike(*leaves))
  y = _linear(n_in, keep_input, flat, w)
  return y.reshape(*lead, *w.shape[n_in:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(n_in, keep_input, x, w):
  return _linear_fwd(n_in, keep_input, x, w)[0]


def _linear_fwd(n_in, keep_input, x, w):
  left, counted = rows(x, w)
  y = output(left, w, n_in).astype(x.dtype)
  return y, (x if keep_input else left, untrained(w), counted)


def _linear_bwd(n_in, keep_input, residuals, dy):
  x, w, counted = residuals
  left, of_gradient = gradient_rows(dy, w)
  dx = input_gradient(left, w, n_in).astype(dy.dtype)
  dw = weight_gradient(x, dy, w, "power_of_two" if keep_input else "")
  return dx, gradient(w, dw, [counted, of_gradient])


_linear.defvjp(_linear_fwd, _linear_bwd)

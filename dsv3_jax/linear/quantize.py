"""Fine-grained quantization: a scale for each tile (section 3.3.2).

A tile is (rows, columns): (1, 128) for activations and gradients as left
operands, (128, 1) for operands of a weight's gradient, (128, 128) for weights.
Tiles at the far edges may be smaller. Scales are computed from the numbers at
hand, not from earlier steps.

What is not finite stays so: it makes its tile's scale and values NaN or inf.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
OVERFLOW = 464.0  # from here on a cast to E4M3 gives NaN
SCALES = ("float32", "power_of_two")

Tile = tuple[int, int]
Elements = Float[Array, "*stack R C"]  # a matrix, or a stack of them
Tiles = Float[Array, "*stack rows columns"]  # a number for each tile
Codes = UInt8[Array, "*stack R C"]


@flax.struct.dataclass
class BlockScaled:
  """A matrix, or a stack of them, in E4M3 with scales: values * scales.

  The codes are bytes: backends without E4M3 would widen E4M3 numbers before
  they store or send them.
  """

  codes: jax.Array  # [..., R, C] uint8
  scales: jax.Array  # [..., ceil(R / rows), ceil(C / columns)] f32
  tile: Tile = flax.struct.field(pytree_node=False)

  @property
  def values(self) -> jax.Array:
    return jax.lax.bitcast_convert_type(self.codes, E4M3)

  def transpose(self) -> "BlockScaled":
    """The transposed matrix."""
    return BlockScaled(self.codes.T, self.scales.T, self.tile[::-1])

  def with_single_row_tiles(self) -> "BlockScaled":
    """The same numbers in tiles of one row."""
    if self.tile[0] == 1:
      return self
    tall = self.tile[0], 1
    scales = expand_scales(self.scales, tall, self.codes.shape)
    return BlockScaled(self.codes, scales, (1, self.tile[1]))


def magnitude(x: Elements, tile: Tile) -> Tiles:
  """Largest magnitude per tile, [..., ceil(R / rows), ceil(C / columns)]."""
  *stack, n, m = x.shape
  rows, columns = tile
  edges = [(0, 0)] * len(stack) + [(0, -n % rows), (0, -m % columns)]
  if any(after for _, after in edges):
    x = jnp.pad(x, edges)
  x = x.reshape(*stack, -(-n // rows), rows, -(-m // columns), columns)
  return from_ordered(ordered(x).max((-3, -1)))


def ordered(x: jax.Array) -> jax.Array:
  """Magnitudes as int32 in the same order, NaN the largest.

  The maximum of floats may pass over NaN (XLA on CPU).
  """
  magnitude = jnp.abs(x.astype(jnp.float32))
  return jax.lax.bitcast_convert_type(magnitude, jnp.int32)


def from_ordered(bits: jax.Array) -> jax.Array:
  """The magnitudes of `ordered`, f32."""
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def scale(absmax: jax.Array, rounding: str, largest: float) -> jax.Array:
  """The divisor of a tile that makes its largest magnitude `largest`.

  `rounding` is `float32`, or `power_of_two` for the next power of two above. A
  scale follows the magnitudes as far as float32 is normal, since gradients
  shrink as a batch grows; smaller ones, which some devices flush, count as
  zeros, whose scale is 1.
  """
  tiny = jnp.finfo(jnp.float32).tiny
  # Not a division, which the compiler would replace: so all agree on each bit.
  s = jnp.maximum(absmax * jnp.float32(1 / largest), tiny)
  s = jnp.where(absmax < tiny, 1, s)
  if rounding == "float32":
    return s
  bits = jax.lax.bitcast_convert_type(s, jnp.int32)
  up = (bits + 0x7FFFFF) & 0x7F800000  # a mantissa of 0 with the next exponent
  up = jax.lax.bitcast_convert_type(up, jnp.float32)
  return jnp.where(jnp.isfinite(s), up, s)


def expand_scales(
  scales: Tiles, tile: Tile, shape: tuple[int, ...]
) -> Elements:
  """Expands scales of tiles to elements; a tile dim of 1 is not expanded."""
  for axis, size in zip((-2, -1), tile, strict=True):
    if size > 1:
      scales = jnp.repeat(scales, size, axis)
  n, m = shape[-2:]
  return scales[..., :n, :m]


def encode(x: Elements, scales: Elements) -> Codes:
  """Encodes x / scales in E4M3, as bytes; scales are those of elements."""
  scaled = x.astype(jnp.float32) / scales
  values = jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(E4M3)
  return jax.lax.bitcast_convert_type(values, jnp.uint8)


def quantize(x: Elements, tile: Tile, scales: str = "float32") -> BlockScaled:
  """Quantizes to E4M3."""
  per_tile = scale(magnitude(x, tile), scales, E4M3_MAX)
  codes = encode(x, expand_scales(per_tile, tile, x.shape))
  return BlockScaled(codes, per_tile, tile)


def dequantize(x: BlockScaled, dtype: jax.typing.DTypeLike) -> Elements:
  """values * scales, rounded to dtype."""
  scales = expand_scales(x.scales, x.tile, x.codes.shape)
  return (x.values.astype(jnp.float32) * scales).astype(dtype)


_E5M6_LARGEST = (2 - 2**-6) * 2.0**15


def e5m6(x: Float[Array, "M K"], n_columns: int) -> Float[Array, "M K"]:
  """x [M, K] as the format of 12 bits holds it (section 3.3.3).

  Each n_columns of a row share a power of two; six bits of mantissa fit into
  bfloat16, so x keeps its type.
  """
  tile = 1, n_columns
  per_tile = scale(magnitude(x, tile), "power_of_two", _E5M6_LARGEST)
  scales = expand_scales(per_tile, tile, x.shape)
  scaled = x.astype(jnp.float32) / scales
  # Half precision has the exponents; its mantissa is cut by four bits more.
  normal = jax.lax.reduce_precision(scaled, 5, 6)
  step = 2.0**-20  # below the smallest normal number, 2^-14
  subnormal = jnp.round(scaled / step) * step
  held = jnp.where(jnp.abs(scaled) < 2.0**-14, subnormal, normal)
  return (held * scales).astype(x.dtype)


COUNTERS = ("tiles", "not_finite", "zero", "elements", "saturated", "underflow")


def count(
  x: Elements, quantized: BlockScaled, everything: bool
) -> Float[Array, "6"]:
  """Counts what quantization did: `COUNTERS`, [6] f32.

  Tiles in all, not finite and of zeros only; elements in all, too large for the
  format (the cast alone would make NaN of them), and rounded to zero. Unless
  `everything`, only tiles that are not finite, which needs the scales alone.
  """
  if everything:
    scales = expand_scales(quantized.scales, quantized.tile, x.shape)
    tiles = count_tiles(magnitude(x, quantized.tile))
    return jnp.concatenate([tiles, count_elements(x, quantized.codes, scales)])
  bad = (~jnp.isfinite(quantized.scales)).sum().astype(jnp.float32)
  return jnp.zeros_like(bad, shape=len(COUNTERS)).at[1].set(bad)


def count_tiles(absmax: Tiles) -> Float[Array, "3"]:
  """The first three of `COUNTERS`, from the largest magnitude of each tile."""
  total = jnp.full_like(absmax, absmax.size, shape=())
  counts = total, (~jnp.isfinite(absmax)).sum(), (absmax == 0).sum()
  return jnp.stack([n.astype(jnp.float32) for n in counts])


def count_elements(
  x: Elements, codes: Codes, scales: Elements
) -> Float[Array, "3"]:
  """The last three of `COUNTERS`; scales are those of elements."""
  scaled = x.astype(jnp.float32) / scales
  lost = (x != 0) & (codes & 0x7F == 0)
  total = jnp.full_like(scaled, x.size, shape=())
  counts = total, (jnp.abs(scaled) >= OVERFLOW).sum(), lost.sum()
  return jnp.stack([n.astype(jnp.float32) for n in counts])

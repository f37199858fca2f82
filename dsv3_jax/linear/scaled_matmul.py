"""Products of matrices in E4M3 with float32 sums, scaled slice by slice.

  exact        a product for each tile of the contracted dim, whose sum over the
               tile is exact up to float32, scaled as it is added; the reference
  dequantized  both operands dequantized first, then one product
  kernel       `exact` on Hopper GPUs, see `fp8_matmul_hopper.py`; elsewhere
               `dequantized`

All multiply the same quantized numbers; they differ in the order of float32
roundings. `dequantized` rounds operands to bfloat16 on accelerators.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.linear import dot, quantize
from dsv3_jax.linear.quantize import BlockScaled

Operand = BlockScaled | jax.Array  # an array: already dequantized


def matmul(
  a: BlockScaled, b: Operand, backend: str = "auto"
) -> Float[Array, "M N"]:
  """a @ b, [M, K] and [K, N] to [M, N] f32.

  Tiles of a have as many columns as those of b have rows. The backend is one of
  the module's, or `auto` for the fastest that there is.
  """
  if isinstance(b, jax.Array):
    return dequantized(a, b)
  if a.tile[1] != b.tile[0]:
    raise ValueError(f"tiles {a.tile} and {b.tile} cut the sum differently")
  return _function(backend)(a, b)


def dequantizes(backend: str) -> bool:
  """Returns whether operands are dequantized before the product."""
  return _function(backend) is dequantized


def dequantized_dtype() -> jax.typing.DTypeLike:
  """The dtype of dequantized operands; bfloat16 is slow on CPU."""
  on_cpu = jax.default_backend() == "cpu"
  return jnp.float32 if on_cpu else jnp.bfloat16


def exact(a: BlockScaled, b: BlockScaled) -> Float[Array, "M N"]:
  """The reference: scales are applied to sums over one tile."""
  size, k = a.tile[1], a.codes.shape[1]
  shape = a.codes.shape[0], b.codes.shape[1]
  total = jnp.zeros_like(a.scales, shape=shape)
  for i in range(-(-k // size)):
    span = slice(i * size, (i + 1) * size)
    sums = jnp.matmul(
      a.values[:, span].astype(jnp.bfloat16),
      b.values[span].astype(jnp.bfloat16),
      preferred_element_type=jnp.float32,
    )
    rows, columns = a.scales[:, i : i + 1], b.scales[i : i + 1]
    rows = quantize.expand_scales(rows, (a.tile[0], 1), shape)
    columns = quantize.expand_scales(columns, (1, b.tile[1]), shape)
    total = total + sums * rows * columns
  return total


def dequantized(a: BlockScaled, b: Operand) -> Float[Array, "M N"]:
  """One product of the dequantized operands."""
  if isinstance(b, BlockScaled):
    b = quantize.dequantize(b, dequantized_dtype())
  a = quantize.dequantize(a, b.dtype)
  return dot.matmul(a, b, preferred_element_type=jnp.float32)


def kernel(a: BlockScaled, b: BlockScaled) -> Float[Array, "M N"]:
  """The product on tensor cores."""
  from dsv3_jax.linear import fp8_matmul_hopper

  try:
    return fp8_matmul_hopper.blocked(a, b)
  except NotImplementedError:
    return dequantized(a, b)


BACKENDS = {"exact": exact, "dequantized": dequantized, "kernel": kernel}


def _function(backend: str) -> Callable[[BlockScaled, Operand], jax.Array]:
  """The product of a backend; `auto` is what was measured to be fastest."""
  if backend != "auto":
    return BACKENDS[backend]
  on_hopper = False
  if jax.default_backend() == "gpu":
    # Pallas' Mosaic, which the kernel imports, is of use on GPUs alone.
    from dsv3_jax.linear import fp8_matmul_hopper

    on_hopper = fp8_matmul_hopper.supported()
  return kernel if on_hopper else dequantized

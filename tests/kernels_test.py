"""Tests of the kernel by its interpreter, and that it lowers for GPUs."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest
from absl.testing import parameterized
from jax._src.pallas.mosaic_gpu.interpret import params

from dsv3_jax.model import kernels
from dsv3_jax.model import products
from dsv3_jax.model import tiles

INTERPRET = params.InterpretGPUParams()
ROWS, COLUMNS, SQUARE = (1, 128), (128, 1), (128, 128)


def operands(m, k, n, a_tile=ROWS, b_tile=SQUARE):
  a, b = testing.normal(m, k), testing.normal(k, n, seed=1)
  # Scales that differ by slice, row and column.
  a = a * 10.0 ** testing.normal(m, k, seed=2)
  return tiles.quantize(a, a_tile), tiles.quantize(b, b_tile)


class BlockedTest(parameterized.TestCase):

  @parameterized.parameters(
      (1, 128, 128, ROWS, SQUARE),  # a token
      (200, 576, 130, ROWS, SQUARE),  # ragged everywhere
      (129, 130, 257, ROWS, COLUMNS),  # of a weight's gradient
      (256, 256, 256, SQUARE, SQUARE),
      (128, 1, 1, ROWS, SQUARE),
  )
  def test_is_the_reference(self, m, k, n, a_tile, b_tile):
    a, b = operands(m, k, n, a_tile, b_tile)
    found = kernels.blocked(a, b, interpret=INTERPRET)
    # A slice's products are exact, and its sum is of 128 terms; then come two
    # scales and as many additions as slices, each rounded.
    size = np.abs(tiles.dequantize(a, jnp.float32)) @ np.abs(
        tiles.dequantize(b, jnp.float32)
    )
    roundings = 128 + 2 + -(-k // 128)
    difference = np.abs(found - products.exact(a, b))
    self.assertTrue(np.all(difference <= roundings * testing.EPS * size))
    self.assertEqual(found.dtype, jnp.float32)

  def test_what_is_not_finite_stays_where_it_is(self):
    a, b = operands(130, 256, 140, b_tile=COLUMNS)
    a = a.replace(scales=a.scales.at[129, 1].set(np.nan))
    b = b.replace(bits=b.bits.at[3, 7].set(0x7F))
    found = np.isnan(kernels.blocked(a, b, interpret=INTERPRET))
    expected = np.zeros((130, 140), bool)
    expected[129], expected[:, 7] = True, True
    np.testing.assert_array_equal(found, expected)

  @parameterized.parameters((SQUARE,), (COLUMNS,))
  def test_lowers_for_gpus(self, b_tile):
    a, b = operands(200, 576, 130, b_tile=b_tile)
    with mock.patch.object(kernels, "supported", lambda: True):
      traced = jax.jit(kernels.blocked).trace(a, b)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    self.assertIn("mosaic_gpu", text)
    self.assertIn("f8E4M3FN", text)

  def test_says_where_it_cannot_run(self):
    with self.assertRaisesRegex(NotImplementedError, "no Hopper GPU"):
      kernels.blocked(*operands(8, 128, 8))
    with self.assertRaisesRegex(NotImplementedError, r"\(1, 64\).*into 128"):
      kernels.blocked(
          *operands(8, 128, 8, (1, 64), (64, 64)), interpret=INTERPRET
      )
    with self.assertRaisesRegex(NotImplementedError, "nothing to multiply"):
      kernels.blocked(*operands(0, 128, 8), interpret=INTERPRET)


class BackendTest(absltest.TestCase):

  def test_falls_back_to_the_other(self):
    a, b = operands(8, 128, 8)
    np.testing.assert_array_equal(
        products.product(a, b, "kernel"), products.product(a, b, "dequantized")
    )

  def test_is_used_where_it_can_be(self):
    a, b = operands(8, 128, 8)
    with mock.patch.object(kernels, "blocked", lambda a, b: "made"):
      self.assertEqual(products.product(a, b, "kernel"), "made")


if __name__ == "__main__":
  absltest.main()

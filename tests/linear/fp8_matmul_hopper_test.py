"""Tests of the kernel by its interpreter, and that it lowers for GPUs."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest, parameterized
from jax._src.pallas.mosaic_gpu.interpret import params

from dsv3_jax import varying
from dsv3_jax.linear import fp8_matmul_hopper, quantize, scaled_matmul

INTERPRET = params.InterpretGPUParams()
ROWS, COLUMNS, SQUARE = (1, 128), (128, 1), (128, 128)


def operands(m, k, n, a_tile=ROWS, b_tile=SQUARE):
  a, b = testing.normal(m, k), testing.normal(k, n, seed=1)
  # Scales that differ by slice, row and column.
  a = a * 10.0 ** testing.normal(m, k, seed=2)
  return quantize.quantize(a, a_tile), quantize.quantize(b, b_tile)


def lower(a, b, *args, **kwargs):
  """Lowers for a Hopper GPU; returns the text."""
  call = lambda a, b: fp8_matmul_hopper.blocked(a, b, *args, **kwargs)
  with mock.patch.object(fp8_matmul_hopper, "supported", lambda: True):
    traced = jax.jit(call).trace(a, b)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


class BlockedTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 128, 128, ROWS, SQUARE),  # a token
    (200, 576, 130, ROWS, SQUARE, 2),  # ragged everywhere
    (129, 130, 130, ROWS, COLUMNS),  # of a weight's gradient
    (256, 257, 128, SQUARE, SQUARE, 1),  # many tiles of a worker
    (128, 1, 1, ROWS, SQUARE),
  )
  def test_is_the_reference(self, m, k, n, a_tile, b_tile, n_workers=132):
    a, b = operands(m, k, n, a_tile, b_tile)
    with mock.patch.object(fp8_matmul_hopper, "PROCESSORS", n_workers):
      found = fp8_matmul_hopper.blocked(
        a.with_single_row_tiles(), b, interpret=INTERPRET
      )
    # A slice's products are exact, and its sum is of 128 terms; then come two
    # scales and as many additions as slices, each rounded.
    size = np.abs(quantize.dequantize(a, jnp.float32)) @ np.abs(
      quantize.dequantize(b, jnp.float32)
    )
    roundings = 128 + 2 + -(-k // 128)
    difference = np.abs(found - scaled_matmul.exact(a, b))
    self.assertTrue(np.all(difference <= roundings * testing.EPS * size))
    self.assertEqual(found.dtype, jnp.float32)

  def test_square_tiles_are_spread(self):
    a, b = operands(128, 130, 3, SQUARE, SQUARE)
    np.testing.assert_array_equal(
      fp8_matmul_hopper.blocked(a, b, interpret=INTERPRET),
      fp8_matmul_hopper.blocked(
        a.with_single_row_tiles(), b, interpret=INTERPRET
      ),
    )

  def test_rounds_the_sum_alone_to_another_type(self):
    a, b = operands(8, 256, 8)
    whole = fp8_matmul_hopper.blocked(a, b, interpret=INTERPRET)
    found = fp8_matmul_hopper.blocked(a, b, jnp.bfloat16, interpret=INTERPRET)
    np.testing.assert_array_equal(found, whole.astype(jnp.bfloat16))

  def test_zero_is_zero(self):
    a, b = operands(3, 256, 5)
    a = quantize.quantize(jnp.zeros((3, 256)), ROWS)
    found = fp8_matmul_hopper.blocked(a, b, interpret=INTERPRET)
    np.testing.assert_array_equal(found, np.zeros((3, 5)))

  def test_what_is_not_finite_stays_where_it_is(self):
    a, b = operands(130, 130, 7, b_tile=COLUMNS)
    a = a.replace(scales=a.scales.at[129, 1].set(np.nan))
    b = b.replace(codes=b.codes.at[3, 5].set(0x7F))
    found = np.isnan(fp8_matmul_hopper.blocked(a, b, interpret=INTERPRET))
    expected = np.zeros((130, 7), bool)
    expected[129], expected[:, 5] = True, True
    np.testing.assert_array_equal(found, expected)

  @parameterized.parameters((SQUARE,), (COLUMNS,))
  def test_lowers_for_gpus(self, b_tile):
    text = lower(*operands(200, 576, 130, b_tile=b_tile))
    self.assertIn("mosaic_gpu", text)
    self.assertIn("f8E4M3FN", text)

  def test_lowers_otherwise(self):
    pair = operands(256, 128, 128)  # even tiles of rows: two share
    alone = fp8_matmul_hopper.Tuning(paired=False, stages=2, panel=1)
    texts = lower(*pair), lower(*pair, tuning=alone)
    self.assertNotEqual(*texts)
    self.assertIn("tensor<256x128xbf16>", lower(*pair, jnp.bfloat16))

  def test_what_differs_between_devices_is_said_to(self):
    mesh = jax.make_mesh((2,), ("data",))

    def local(x):
      x = x[0]
      w = quantize.quantize(x, SQUARE)
      made = fp8_matmul_hopper.blocked(quantize.quantize(x, ROWS), w)
      self.assertEqual(varying.varying(made), {"data"})
      return made[None]

    def everywhere(x):
      by_device = jax.P("data")
      x = jax.reshard(x, by_device)
      return jax.shard_map(local, out_specs=by_device)(x)

    with (
      mock.patch.object(fp8_matmul_hopper, "supported", lambda: True),
      jax.set_mesh(mesh),
    ):
      jax.eval_shape(everywhere, jnp.zeros((2, 128, 128)))

  @parameterized.parameters(*range(1, 10))
  def test_places_are_all_tiles(self, panel):
    steps = jnp.arange(7 * 3)
    i, j = fp8_matmul_hopper._place(steps, 7, 3, panel)
    self.assertLen(set(zip(i.tolist(), j.tolist(), strict=True)), 21)
    self.assertEqual((i.min(), i.max(), j.min(), j.max()), (0, 6, 0, 2))

  def test_says_where_it_cannot_run(self):
    with self.assertRaisesRegex(NotImplementedError, "no Hopper GPU"):
      fp8_matmul_hopper.blocked(*operands(8, 128, 8))
    interpreted = functools.partial(
      fp8_matmul_hopper.blocked, interpret=INTERPRET
    )
    with self.assertRaisesRegex(NotImplementedError, r"\(1, 64\).*into 128"):
      interpreted(*operands(8, 128, 8, (1, 64), (64, 64)))
    with self.assertRaisesRegex(NotImplementedError, "nothing to multiply"):
      interpreted(*operands(0, 128, 8))
    a, b = operands(8, 128, 8)
    with self.assertRaisesRegex(NotImplementedError, "int8.*bytes of E4M3"):
      interpreted(a, b.replace(codes=b.codes.astype(jnp.int8)))


class BackendTest(absltest.TestCase):
  def test_falls_back_to_the_other(self):
    a, b = operands(8, 128, 8)
    np.testing.assert_array_equal(
      scaled_matmul.matmul(a, b, "kernel"),
      scaled_matmul.matmul(a, b, "dequantized"),
    )

  def test_is_used_where_it_can_be(self):
    a, b = operands(8, 128, 8)
    with mock.patch.object(fp8_matmul_hopper, "blocked", lambda a, b: "made"):
      self.assertEqual(scaled_matmul.matmul(a, b, "kernel"), "made")


if __name__ == "__main__":
  absltest.main()

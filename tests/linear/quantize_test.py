import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.linear import quantize

# Root mean square of the relative error of a mantissa of three bits, in theory:
# steps of 2^-3 in [1, 2), x^2 averaging 7/3 there.
DELTA = 2**-3 / np.sqrt(12 * 7 / 3)


def normal(*shape, seed=0):
  return np.array(testing.normal(*shape, seed=seed))


def numpy_quantize(x, tile, power_of_two=False):
  """Values and scales, tile by tile, in float32."""
  rows, columns = tile
  n, m = -(-x.shape[0] // rows), -(-x.shape[1] // columns)
  values = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
  scales = np.zeros((n, m), np.float32)
  for i in range(n):
    for j in range(m):
      here = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
      largest, tiny = np.abs(x[here]).max(), np.finfo(np.float32).tiny
      s = np.maximum(largest * np.float32(1 / 448), tiny) if largest else 1
      if power_of_two:
        s = np.float32(2.0) ** np.ceil(np.log2(np.float64(s)))
      values[here] = np.clip(x[here] / np.float32(s), -448, 448)
      scales[i, j] = s
  return values, scales


def relative(a, b):
  return np.linalg.norm(np.float64(a) - b) / np.linalg.norm(np.float64(b))


@pytest.mark.fault(
  "F32",
  "zeros, 1e6, denormals, infinity and NaN into FP8",
  "saturates and is counted; non-finite values stay non-finite",
)
class QuantizeTest(parameterized.TestCase):
  def test_the_golden_tile(self):
    x = np.zeros((1, 128), np.float32)
    x[0, :5] = 1.0, -3.3, 0.02, 100, -134.4
    made = quantize.quantize(x, (1, 128))
    np.testing.assert_allclose(made.scales, [[0.3]], rtol=2 * testing.EPS)
    np.testing.assert_array_equal(
      np.float32(made.values[0, :5]), [3.25, -11, 0.0703125, 320, -448]
    )
    np.testing.assert_allclose(
      quantize.dequantize(made, jnp.float32)[0, :5],
      [0.975, -3.3, 0.02109375, 96, -134.4],
      rtol=2 * testing.EPS,
    )
    self.assertEqual(quantize.quantize(x, (1, 128), "power_of_two").scales, 0.5)

  @parameterized.product(
    shape=((3, 128), (128, 128), (200, 576), (1, 1), (130, 7)),
    tile=((1, 128), (128, 1), (128, 128)),
    scales=quantize.SCALES,
  )
  def test_matches_numpy_bit_for_bit(self, shape, tile, scales):
    x = normal(*shape) * np.float32(10) ** (8 * normal(shape[0], 1, seed=1))
    made = jax.jit(quantize.quantize, static_argnums=(1, 2))(x, tile, scales)
    values, per_tile = numpy_quantize(x, tile, scales == "power_of_two")
    np.testing.assert_array_equal(made.scales, per_tile)
    np.testing.assert_array_equal(np.asarray(made.codes), values.view(np.uint8))

  @parameterized.product(
    exponent=(-100, -40, 40),
    tile=((1, 128), (128, 1), (128, 128)),
    scales=quantize.SCALES,
  )
  def test_scales_follow_numbers_of_any_magnitude(self, exponent, tile, scales):
    x = normal(130, 200)
    one = quantize.quantize(x, tile, scales)
    made = quantize.quantize(x * np.float32(2) ** exponent, tile, scales)
    np.testing.assert_array_equal(made.codes, one.codes)
    np.testing.assert_array_equal(made.scales, one.scales * 2.0**exponent)

  def test_576_rows_have_five_scale_rows(self):
    made = quantize.quantize(normal(576, 256), (128, 128))
    self.assertEqual(made.scales.shape, (5, 2))

  def test_the_error_is_that_of_three_bits(self):
    x = normal(256, 256)
    for tile in ((1, 128), (128, 1), (128, 128)):
      back = quantize.dequantize(quantize.quantize(x, tile), jnp.float32)
      self.assertBetween(relative(back, x), 0.9 * DELTA, 1.2 * DELTA)

  def test_outliers_spoil_square_tiles_by_what_theory_says(self):
    # A row so large that all others fall below the smallest normal number,
    # 2^-6, where steps are 2^-9 whatever the number.
    x = normal(128, 128)
    x[5] *= 2.0**16
    others = np.delete(np.arange(128), 5)
    errors = []
    for tile in ((1, 128), (128, 128)):
      made = quantize.quantize(x, tile)
      back = np.asarray(quantize.dequantize(made, jnp.float32))
      errors.append(relative(back[others], x[others]))
    step = 2**-9 * float(quantize.quantize(x, (128, 128)).scales[0, 0])
    predicted = step / np.sqrt(12) / DELTA
    np.testing.assert_allclose(errors[1] / errors[0], predicted, rtol=0.15)
    self.assertGreater(predicted, 5)

  def test_quantizing_again_with_powers_of_two_changes_nothing(self):
    scales = "power_of_two"
    x = normal(64, 300) * 10.0 ** normal(64, 1, seed=1)
    once = quantize.dequantize(
      quantize.quantize(x, (1, 128), scales), jnp.bfloat16
    )
    again = quantize.quantize(once, (1, 128), scales)
    twice = quantize.dequantize(again, jnp.bfloat16)
    np.testing.assert_array_equal(once, twice)

  def test_no_tile_is_needed_for_zeros(self):
    made = quantize.quantize(jnp.zeros((4, 256)), (1, 128))
    np.testing.assert_array_equal(quantize.dequantize(made, jnp.float32), 0)
    np.testing.assert_array_equal(made.scales, 1)
    none = quantize.quantize(jnp.zeros((0, 256)), (1, 128))
    self.assertEqual(none.scales.size, 0)

  @parameterized.product(
    bad=(np.nan, np.inf, -np.inf), scales=quantize.SCALES, tile=(1, 128)
  )
  def test_what_is_not_finite_stays_so(self, bad, scales, tile):
    x = normal(128, 256)
    x[3, 7] = bad
    made = quantize.quantize(x, (tile, 128), scales)
    back = np.asarray(quantize.dequantize(made, jnp.float32))
    self.assertFalse(np.isfinite(back[3, 7]))
    self.assertTrue(np.isfinite(back[:, 128:]).all())
    found = dict(
      zip(
        quantize.COUNTERS, quantize.count(x, made, False).tolist(), strict=True
      )
    )
    self.assertEqual(found["not_finite"], 1)

  def test_denormals_and_large_numbers_survive(self):
    x = np.full((2, 128), 1e-40, np.float32)
    x[1] = 1e30
    made = quantize.quantize(x, (1, 128))
    back = np.asarray(quantize.dequantize(made, jnp.float32))
    np.testing.assert_array_equal(back[0], 0)
    np.testing.assert_allclose(back[1], 1e30, rtol=4 * testing.EPS)

  def test_counts(self):
    x = np.zeros((3, 128), np.float32)
    x[0, :2] = 448, 1e-4  # rounds to zero
    x[1] = 1
    made = quantize.quantize(x, (1, 128))
    found = dict(
      zip(
        quantize.COUNTERS, quantize.count(x, made, True).tolist(), strict=True
      )
    )
    self.assertEqual(
      found,
      {
        "tiles": 3,
        "not_finite": 0,
        "zero": 1,
        "elements": 384,
        "saturated": 0,
        "underflow": 1,
      },
    )
    small = made.replace(scales=made.scales / 2)
    self.assertEqual(quantize.count(x, small, True)[4], 129)


class E5M6Test(parameterized.TestCase):
  def test_keeps_seven_significant_bits(self):
    x = normal(16, 256)
    held = np.asarray(jax.jit(quantize.e5m6, static_argnums=1)(x, 128))
    np.testing.assert_allclose(held, x, rtol=2**-7, atol=1e-6)
    self.assertGreater(relative(held, x), 2**-10)
    # Twelve bits: the mantissa of each has at most six after the first.
    mantissa, _ = np.frexp(held)
    np.testing.assert_array_equal(mantissa * 2**7, np.round(mantissa * 2**7))

  def test_scales_are_powers_of_two_of_each_tile(self):
    x = normal(4, 256)
    held = np.asarray(quantize.e5m6(x, 128))
    for exponent in (-80, -30, 20):
      power = np.float32(2) ** exponent
      np.testing.assert_array_equal(quantize.e5m6(x * power, 128), held * power)

  def test_bfloat16_holds_it(self):
    x = jnp.asarray(normal(4, 256))
    wide = quantize.e5m6(x, 128)
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), wide)

  def test_ends_of_the_range(self):
    largest = np.float32((2 - 2**-6) * 2.0**15)
    x = np.zeros((1, 128), np.float32)
    x[0, :3] = largest, 2.0**-20, 2.0**-22
    np.testing.assert_array_equal(
      quantize.e5m6(x, 128)[0, :3], [largest, 2.0**-20, 0]
    )
    x[0, 0] = np.nan
    self.assertTrue(np.isnan(quantize.e5m6(x, 128)[0, 0]))


if __name__ == "__main__":
  absltest.main()

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.model import rope

# The published extension: 4096 to 163,840 positions, 64 rope dims.
YARN = dict(
  dim=64,
  theta=1e4,
  factor=40.0,
  original_len=4096,
  beta_fast=32.0,
  beta_slow=1.0,
)
YARN_FREQUENCIES = """
  1 0.749894209 0.562341325 0.421696503 0.316227766 0.237137371 0.177827941
  0.133352143 0.1 0.0749894209 0.0562341325 0.0390069266 0.0268793601
  0.0183781462 0.0124479559 0.00833450895 0.0055 0.00356199749 0.0022493653
  0.00137051364 0.000790569415 0.000414990398 0.000177827941 3.33380358e-5
  2.5e-5 1.87473552e-5 1.40585331e-5 1.05424126e-5 7.90569415e-6
  5.92843426e-6 4.44569853e-6 3.33380358e-6
"""


class FrequenciesTest(parameterized.TestCase):
  @parameterized.parameters(2, 8, 64)
  def test_match_the_reference(self, dim):
    actual = rope.frequencies(dim, 1e4)
    expected = reference.frequencies(dim, 1e4)
    self.assertEqual(actual.dtype, np.float32)
    np.testing.assert_allclose(actual, expected, rtol=testing.EPS)

  @parameterized.parameters(rope, reference)
  def test_yarn_golden(self, implementation):
    actual = implementation.yarn_frequencies(**YARN)
    # float32 rounding, and nine digits printed.
    np.testing.assert_allclose(
      actual, np.float64(YARN_FREQUENCIES.split()), rtol=testing.EPS + 5e-9
    )

  def test_yarn_keeps_fast_pairs_and_divides_slow_ones(self):
    ratio = rope.yarn_frequencies(**YARN) / rope.frequencies(64, 1e4)
    np.testing.assert_allclose(ratio[:11], 1, rtol=2 * testing.EPS)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=2 * testing.EPS)
    self.assertTrue(np.all(np.diff(ratio[10:24]) < 0))


class RotateTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.freqs = rope.frequencies(16, 1e4)
    self.rotate = jax.jit(
      lambda x, start: rope.rotate(
        x, rope.angles(start + jnp.arange(x.shape[-2]), self.freqs)
      )
    )

  def test_matches_complex_multiplication(self):
    x = testing.normal(9, 16)
    angle = np.outer(np.arange(9), reference.frequencies(16, 1e4))
    # The angle is rounded to float32: up to 8 radians off by 8 * eps / 2.
    expected = reference.rotate(reference.f64(x), angle)
    testing.assert_close(self.rotate(x, 0), expected, terms=8 + 2)

  def test_position_zero_is_the_identity(self):
    x = testing.normal(1, 16)
    np.testing.assert_array_equal(self.rotate(x, 0), x)

  def test_scores_depend_on_the_distance_alone(self):
    q, k = testing.normal(7, 16), testing.normal(7, 16, seed=1)
    near = self.rotate(q, 0) @ self.rotate(k, 0).T
    far = self.rotate(q, 50) @ self.rotate(k, 50).T
    # Angles reach 56 radians; each is rounded, and two are subtracted.
    testing.assert_close(far, near, terms=2 * 56 + 16)

  def test_half_split_form_on_permuted_weights_gives_the_same_scores(self):
    # The layout that released weights would need for a half-split rotation.
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    angle = np.outer(np.arange(7), reference.frequencies(16, 1e4))

    def half_split(x):
      first, second = np.split(reference.f64(x)[:, order], 2, axis=-1)
      return np.concatenate(
        [
          first * np.cos(angle) - second * np.sin(angle),
          second * np.cos(angle) + first * np.sin(angle),
        ],
        axis=-1,
      )

    q, k = testing.normal(7, 16), testing.normal(7, 16, seed=1)
    actual = self.rotate(q, 0) @ self.rotate(k, 0).T
    expected = half_split(q) @ half_split(k).T
    testing.assert_close(actual, expected, terms=2 * 6 + 16)

  def test_bfloat16_is_rotated_in_float32(self):
    x = jnp.asarray(testing.normal(300, 16), jnp.bfloat16)
    y = self.rotate(x, 0)
    self.assertEqual(y.dtype, jnp.bfloat16)
    full = functools.partial(np.asarray, dtype=np.float64)
    expected = full(self.rotate(x.astype(jnp.float32), 0))
    # One rounding of the result; a bfloat16 angle of 299 radians would be off
    # by a whole radian.
    np.testing.assert_allclose(full(y), expected, rtol=2**-8)


if __name__ == "__main__":
  absltest.main()

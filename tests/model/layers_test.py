import jax
import jax.numpy as jnp
import numpy as np
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.model import layers


class RmsNormTest(parameterized.TestCase):
  @parameterized.parameters(1e-4, 1.0, 1e4)
  def test_matches_the_reference_at_any_scale(self, scale):
    gain, x = testing.normal(33, seed=1), testing.normal(2, 5, 33, scale=scale)
    actual = jax.jit(layers.rms_norm, static_argnums=2)(gain, x, 1e-6)
    expected = reference.rms_norm(*reference.f64((gain, x)), 1e-6)
    testing.assert_close(actual, expected, terms=33)

  def test_zeros_stay_zeros(self):
    def total(x):
      return layers.rms_norm(jnp.ones(8), x, 1e-6).sum()

    value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 8)))
    self.assertEqual(value, 0)
    # d/dx (x * rsqrt(eps)) = 1000 at 0.
    np.testing.assert_allclose(gradient, 1e3, rtol=2 * testing.EPS)

  def test_statistics_of_bfloat16_are_float32(self):
    x = jnp.asarray(testing.normal(4, 1024), jnp.bfloat16)
    y = layers.rms_norm(jnp.ones(1024), x, 1e-6)
    self.assertEqual(y.dtype, jnp.bfloat16)
    expected = reference.rms_norm(1.0, np.asarray(x, np.float64), 1e-6)
    # One rounding to 8 significant bits, 2^-8 of the value at most; a bfloat16
    # mean of 1024 squares would be off by more.
    np.testing.assert_allclose(
      np.asarray(y, np.float64), expected, rtol=2**-8 + 1024 * testing.EPS
    )


if __name__ == "__main__":
  absltest.main()

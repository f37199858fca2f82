import jax
import numpy as np
import reference
import testing
from absl.testing import absltest

from dsv3_jax.model import layers


class SwigluTest(absltest.TestCase):
  def test_matches_the_reference(self):
    p = testing.draw(layers.swiglu_specs(24, 40, 0.1))
    x = testing.normal(2, 3, 24)
    expected = reference.swiglu(*reference.f64((p, x)))
    testing.assert_close(jax.jit(layers.swiglu)(p, x), expected, 24 + 40)

  def test_gradients_match_the_reference(self):
    p = testing.draw(layers.swiglu_specs(5, 7, 0.1))
    x, dy = testing.normal(6, 5), testing.normal(6, 5, seed=1)
    _, vjp = jax.vjp(layers.swiglu, p, x)
    # One expert, chosen by everyone with gate 1, is the same function.
    stacked, x64, dy64 = reference.f64(
      ({n: w[None] for n, w in p.items()}, x, dy)
    )
    dp, dx, _ = reference.expert_ffn_gradients(
      stacked, x64, np.zeros((6, 1), int), np.ones((6, 1)), dy64
    )
    testing.assert_close(vjp(dy), (reference.layer(dp, 0), dx), 5 + 7 + 5 + 6)


if __name__ == "__main__":
  absltest.main()

"""The loss of pairs against float64, and where scores are read."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from dsv3_jax import losses
from dsv3_jax.data.batch import make_batch

# Two rows: two pairs and padding; a pair. The last token is a label alone.
SEGMENTS = np.array(
  [[1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 0, 0], [1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0]]
)
ENDS = np.array([[2, 4, 6, 9], [3, 5, -1, -1]])


def batch():
  rows = np.arange(24).reshape(2, 12) + 8
  supervised = np.zeros((2, 12), bool)
  for row, ends in enumerate(ENDS):
    supervised[row, ends[ends >= 0]] = True
  return make_batch(rows, SEGMENTS, supervised, segment_mask=True)


class PairTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.hidden = rng.normal(size=(2, 11, 6)).astype(np.float32)
    self.params = {"reward": rng.normal(size=(6, 1)).astype(np.float32)}

  def test_scores_are_read_at_the_end_tokens(self):
    data = batch()
    found = losses.segment_scores(
      self.params, self.hidden, data.labels, data.segments
    )
    scores = (self.hidden @ self.params["reward"])[..., 0]
    expected = np.zeros((2, 11))
    expected[0, :4], expected[1, :2] = scores[0, ENDS[0]], scores[1, [3, 5]]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  def test_equals_float64(self):
    data = batch()
    (weights,) = losses.token_weights(data, 0)
    found = losses.pairwise(self.params, self.hidden, data, weights)
    scores = (self.hidden.astype(np.float64) @ self.params["reward"])[..., 0]
    first, second = scores[[0, 0, 1], [2, 6, 3]], scores[[0, 0, 1], [4, 9, 5]]
    expected = np.log1p(np.exp(-(first - second))).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)

  def test_only_end_tokens_have_a_gradient(self):
    data = batch()
    (weights,) = losses.token_weights(data, 0)

    def loss(hidden):
      return losses.pairwise(self.params, hidden, data, weights)

    touched = np.abs(jax.grad(loss)(jnp.asarray(self.hidden))).sum(-1) > 0
    expected = np.zeros((2, 11), bool)
    expected[0, ENDS[0]] = expected[1, [3, 5]] = True
    np.testing.assert_array_equal(touched, expected)


if __name__ == "__main__":
  absltest.main()

"""Batches: labels of token rows."""

import numpy as np
from absl.testing import absltest

from dsv3_jax.data.batch import IGNORE, make_batch


class MakeBatchTest(absltest.TestCase):
  def test_labels_are_the_next_tokens(self):
    data = make_batch(np.array([[5, 6, 7, 8, 9]]))
    np.testing.assert_array_equal(data.tokens, [[5, 6, 7, 8]])
    np.testing.assert_array_equal(data.labels, [[6, 7, 8, 9]])

  def test_padding_is_no_label(self):
    data = make_batch(np.array([[0, 6, 0, 2, 2]]), np.array([[1, 1, 2, 0, 0]]))
    np.testing.assert_array_equal(data.tokens, [[0, 6, 0, 2]])
    np.testing.assert_array_equal(data.labels, [[6, 0, IGNORE, IGNORE]])
    self.assertIsNone(data.segments)

  def test_no_label_is_in_another_segment(self):
    # The second document is a piece that begins without BOS.
    rows, segments = (
      np.array([[0, 6, 1, 7, 8, 9]]),
      np.array([[1] * 3 + [2] * 3]),
    )
    data = make_batch(rows, segments, segment_mask=True)
    np.testing.assert_array_equal(data.tokens, rows[:, :-1])
    np.testing.assert_array_equal(data.labels, [[6, 1, IGNORE, 8, 9]])
    np.testing.assert_array_equal(data.segments, segments[:, :-1])


if __name__ == "__main__":
  absltest.main()

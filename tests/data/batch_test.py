"""Batches: labels of token rows."""

import numpy as np
from absl.testing import absltest

from dsv3_jax.data.batch import IGNORE, make_batch


class MakeBatchTest(absltest.TestCase):
  def test_labels_are_the_next_tokens(self):
    data = make_batch(np.array([[5, 6, 7, 8, 9]]))
    np.testing.assert_array_equal(data.tokens, [[5, 6, 7, 8]])
    np.testing.assert_array_equal(data.labels, [[6, 7, 8, 9]])

  def test_unpredicted_ids_are_tokens_but_no_labels(self):
    data = make_batch(np.array([[0, 6, 2, 0, 9]]), 0, 2)
    np.testing.assert_array_equal(data.tokens, [[0, 6, 2, 0]])
    np.testing.assert_array_equal(data.labels, [[6, IGNORE, IGNORE, 9]])


if __name__ == "__main__":
  absltest.main()

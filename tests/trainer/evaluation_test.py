"""The prompt of samples is the start of the held-out text."""

import numpy as np
from absl.testing import absltest, parameterized

from dsv3_jax.data import tokenizer
from dsv3_jax.trainer import evaluation

BOS, EOS = tokenizer.BOS_ID, tokenizer.EOS_ID


class SamplePromptTest(parameterized.TestCase):
  @parameterized.parameters(
    ([BOS, 11, 12, 13, EOS], 3, [BOS, 11, 12]),
    ([BOS, 11, EOS, BOS, 12], 9, [BOS, 11]),
    ([11, 12, 13], 3, [BOS, 11, 12]),  # the end of a long document
    ([BOS, 11, 12], 1, [BOS]),
    ([], 5, [BOS]),
  )
  def test_starts_the_first_document(self, heldout, most, expected):
    ids = np.array(heldout, np.int32)
    self.assertEqual(evaluation.sample_prompt(ids, most), expected)


if __name__ == "__main__":
  absltest.main()

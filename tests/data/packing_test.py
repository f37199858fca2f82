"""Tests of best-fit packing, and of rows as they are read."""

import pathlib
import pickle
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.data import packing, prepare, tokenizer
from dsv3_jax.data import token_file as token_file_lib


def token_file(path, lengths):
  """A token file of documents BOS, 3, 4, ..."""
  documents = [[0, *range(3, n + 2)] for n in lengths]
  tokens = np.concatenate(documents).astype(np.uint16)
  tokens.tofile(path)
  return token_file_lib.TokenFile(
    path=path,
    corpus_digest="",
    tokenizer_digest="",
    vocab_size=1 << 16,
    fim_rate=0.0,
    split_rate=0.0,
    dtype="uint16",
    n_tokens=len(tokens),
    n_documents=len(lengths),
    text_bytes=len(tokens),
    tokens_digest="",
  )


def naive(lengths, size):
  """Best fit, longest first, with a search of all rows for each piece."""
  room, found = [], {}
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    fits = [(r, row) for row, r in enumerate(room) if r >= lengths[i]]
    if fits:
      found[i] = min(fits)[1]
    else:
      room.append(size)
      found[i] = len(room) - 1
    room[found[i]] -= lengths[i]
  return len(room)


class BestFitTest(parameterized.TestCase):
  def test_golden(self):
    lengths = np.array([4, 8, 1, 4, 2, 1, 6])
    # 8 | 6 + 2 | 4 + 4 | 1 + 1
    found = packing.best_fit(lengths, 8)
    self.assertEqual(len(set(found)), 4)
    self.assertEqual(found[6], found[4])
    self.assertEqual(found[0], found[3])
    self.assertEqual(found[2], found[5])

  @parameterized.product(seed=(0, 1, 2, 3), size=(1, 2, 7, 64), n=(1, 30, 300))
  def test_no_row_overflows_and_none_is_spare(self, seed, size, n):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, size + 1, n)
    found = packing.best_fit(lengths, size)
    filled = np.bincount(found, lengths)
    self.assertLessEqual(filled.max(), size)
    self.assertGreater(filled.min(), 0)
    self.assertLen(filled, naive(lengths.tolist(), size))
    # No two rows would fit into one.
    if n > 1 and len(filled) > 1:
      self.assertGreater(np.sort(filled)[:2].sum(), size)

  def test_a_million_documents(self):
    lengths = np.random.default_rng(0).integers(2, 4097, 1_000_000)
    filled = np.bincount(packing.best_fit(lengths, 4097), lengths)
    # A search of all rows for each would not end: 1e12 of them.
    self.assertLess(1 - filled.mean() / 4097, 0.01)


class PiecesTest(parameterized.TestCase):
  @parameterized.product(n=(2, 3, 8, 9, 10, 16, 17, 18, 100), size=(2, 3, 9))
  def test_each_token_but_the_first_is_a_target_once(self, n, size):
    starts, lengths = packing.cut_documents(np.array([5]), np.array([n]), size)
    targets = [
      i
      for start, length in zip(starts, lengths, strict=True)
      for i in range(start + 1, start + length)
    ]
    self.assertEqual(targets, list(range(6, 5 + n)))
    self.assertBetween(lengths.min(), 2, size)
    self.assertLessEqual(lengths.max(), size)

  def test_only_documents_longer_than_a_row_are_cut(self):
    starts, lengths = packing.cut_documents(
      np.array([0, 9, 17]), np.array([9, 8, 10]), 9
    )
    self.assertEqual(starts.tolist(), [0, 9, 17, 25])
    self.assertEqual(lengths.tolist(), [9, 8, 9, 2])


class RowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

  def rows(self, lengths, seq_len):
    return packing.PackedRows(
      token_file(self.root / "train.bin", lengths), seq_len
    )

  def test_documents_stand_whole_in_rows_with_padding_at_the_end(self):
    read = self.rows([5, 3, 4, 9], 8)
    got = sorted(read[i]["tokens"].tolist() for i in range(len(read)))
    pad = tokenizer.PAD_ID
    self.assertEqual(
      got,
      [
        [0, 3, 4, *[pad] * 6],
        [0, 3, 4, 5, 6, 0, 3, 4, 5],
        [0, 3, 4, 5, 6, 7, 8, 9, 10],
      ],
    )
    self.assertEqual(read.padding, 6 / 27)
    self.assertEqual(read[0]["tokens"].dtype, np.int32)

  def test_segments_are_the_documents_even_of_pieces_without_bos(self):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 60)  # most are longer than a row
    read = self.rows(lengths, 8)
    document = np.repeat(np.arange(60), lengths)
    cut = 0
    for i in range(len(read)):
      row, pieces = read[i], slice(*read._first[i : i + 2])
      spans = zip(read._starts[pieces], read._lengths[pieces], strict=True)
      owner = np.concatenate([document[at : at + n] for at, n in spans])
      tokens, segments = row["tokens"], row["segments"]
      self.assertEqual(segments.dtype, np.int32)
      real = segments > 0
      np.testing.assert_array_equal(real, tokens != tokenizer.PAD_ID)
      np.testing.assert_array_equal(
        segments[real][:, None] == segments[real], owner[:, None] == owner
      )
      cut += (tokens[segments > 1][:1] != tokenizer.BOS_ID).sum()
    self.assertGreater(cut, 10)  # begin behind another document, without BOS

  def test_pickle_holds_no_tokens(self):
    read = self.rows([20_000], 8)
    read[0]
    self.assertIsNone(pickle.loads(pickle.dumps(read))._tokens)
    np.testing.assert_array_equal(
      pickle.loads(pickle.dumps(read))[3]["tokens"], read[3]["tokens"]
    )

  @parameterized.parameters((8, 8, False), (9, 8, True), (2, 1, True))
  def test_less_than_a_row_is_refused(self, n_tokens, seq_len, enough):
    if enough:
      self.assertLen(self.rows([n_tokens], seq_len), 1)
    else:
      with self.assertRaisesRegex(
        ValueError, "seq_len=8: must be at most 7, as .* has 8 tokens"
      ):
        self.rows([n_tokens], seq_len)

  @parameterized.parameters(256, 1024)
  def test_the_novels_waste_less_than_a_hundredth(self, seq_len):
    data = config.Data(seq_len=seq_len)
    prepared = prepare.prepare(data, 2048, self.root / "data")
    self.assertLess(prepared.padding, 0.01)


class HeldoutWindowsTest(parameterized.TestCase):
  @parameterized.product(
    n=(2, 3, 8, 9, 10, 12, 13, 16, 17, 100), seq_len=(1, 2, 3, 7, 8)
  )
  def test_each_target_is_scored_once_with_enough_context(self, n, seq_len):
    tokens = np.arange(n) + 100
    rows, _, mask = packing.heldout_windows(tokens, seq_len)
    self.assertEqual(rows.shape[1], seq_len + 1)
    self.assertEqual(mask.shape, (len(rows), seq_len))
    self.assertEqual(rows.dtype, np.int32)
    scored = rows[:, 1:][mask]
    np.testing.assert_array_equal(scored, tokens[1:])  # in order, each once
    for r, (row, scores) in enumerate(zip(rows, mask, strict=True)):
      self.assertTrue(scores.any())
      there = row[row != tokenizer.PAD_ID]
      np.testing.assert_array_equal(there, np.arange(len(there)) + there[0])
      if r:  # positions before the first scored target
        self.assertGreaterEqual(2 * (1 + scores.argmax()), seq_len)

  def test_padding_is_masked(self):
    rows, segments, mask = packing.heldout_windows(np.array([0, 9, 1]), 5)
    self.assertEqual(rows.tolist(), [[0, 9, 1, 2, 2, 2]])
    self.assertEqual(segments.tolist(), [[1, 1, 1, 0, 0, 0]])
    self.assertEqual(mask.tolist(), [[True, True, False, False, False]])

  def test_segments_go_on_in_the_next_window(self):
    tokens = np.array([0, 9, 1, 0, 8, 7, 6, 5, 1])
    rows, segments, _ = packing.heldout_windows(tokens, 4)
    self.assertEqual(rows[1].tolist(), [1, 0, 8, 7, 6])
    self.assertEqual(
      segments.tolist(), [[1, 1, 1, 2, 2], [1, 2, 2, 2, 2], [2, 2, 2, 2, 2]]
    )

  def test_one_token_is_refused(self):
    with self.assertRaisesRegex(ValueError, "1 tokens, at least 2"):
      packing.heldout_windows(np.zeros(1, np.int32), 4)


if __name__ == "__main__":
  absltest.main()

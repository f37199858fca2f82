"""Order of training rows, and how batches read them."""

import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.data import loader, packing, shuffle, tokenized_corpus
from dsv3_jax.data import token_file as token_file_lib


def token_file(path, n_tokens):
  """A token file of 0, 1, 2, ...; not written where there is no directory."""
  if path.parent.exists():
    np.arange(n_tokens, dtype=np.uint16).tofile(path)
  return token_file_lib.TokenFile(
    path=path,
    corpus_digest="",
    tokenizer_digest="",
    vocab_size=n_tokens,
    fim_rate=0.0,
    split_rate=0.0,
    dtype="uint16",
    n_tokens=n_tokens,
    n_documents=1,
    text_bytes=n_tokens,
    tokens_digest="",
  )


class ShuffleTest(parameterized.TestCase):
  SEQ = 8
  ROWS = 25

  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(directory, "train.bin")
    self.rows = packing.PackedRows(token_file(self.path, 8 * 25 + 1), self.SEQ)

  def drawn(self, ordered, n):
    return [int(ordered[i]["row"]) for i in range(n)]

  def test_rows_overlap_by_one_token(self):
    self.assertLen(self.rows, self.ROWS)
    tokens = np.stack([self.rows[r]["tokens"] for r in range(self.ROWS)])
    self.assertEqual(tokens.dtype, np.int32)
    start = np.arange(self.ROWS)[:, None] * self.SEQ
    np.testing.assert_array_equal(tokens, start + np.arange(self.SEQ + 1))

  def test_every_epoch_has_each_row_once_in_another_order(self):
    ordered = shuffle.shuffle(self.rows, seed=3)
    drawn = np.array(self.drawn(ordered, 4 * self.ROWS)).reshape(4, -1)
    for epoch in drawn:
      self.assertCountEqual(epoch, range(self.ROWS))
    # Equal by chance: 7 in 25! per pair.
    self.assertLen({tuple(epoch) for epoch in [*drawn, range(self.ROWS)]}, 5)

  def test_order_is_a_function_of_the_seed(self):
    n = 3 * self.ROWS
    one, same, other = (
      self.drawn(shuffle.shuffle(self.rows, seed), n) for seed in (5, 5, 6)
    )
    self.assertEqual(one, same)
    self.assertNotEqual(one, other)

  def test_order_is_the_same_in_another_interpreter(self):
    # Hash randomisation or the state of a global generator would differ.
    code = (
      "import pickle, sys; from dsv3_jax.data import shuffle;"
      "rows = shuffle.shuffle(pickle.load(sys.stdin.buffer), 5);"
      "print([int(rows[i]['row']) for i in range(60)])"
    )
    out = subprocess.run(
      [sys.executable, "-c", code],
      input=pickle.dumps(self.rows),
      capture_output=True,
      check=True,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    here = self.drawn(shuffle.shuffle(self.rows, 5), 60)
    self.assertEqual(out.stdout.decode().strip(), str(here))

  @parameterized.parameters(-1, 1 << 32)
  def test_seed_of_more_than_32_bits_is_refused(self, seed):
    with self.assertRaisesRegex(ValueError, f"seed={seed}: must be in 0 to"):
      shuffle.shuffle(self.rows, seed)


class BatchSourceTest(parameterized.TestCase):
  SEQ = 8
  ROWS = 25

  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(directory, "train.bin")
    file = token_file(self.path, self.SEQ * self.ROWS + 1)
    rows = packing.PackedRows(file, self.SEQ)
    domain = tokenized_corpus.Domain("", 1.0, file, rows, file, None)
    self.corpus = tokenized_corpus.TokenizedCorpus(None, (domain,))

  def source(self, batch_size=12, micro_batches=1, seed=0, n_skipped=0):
    run = testing.run(
      f"train.batch_size={batch_size}", f"train.micro_batches={micro_batches}"
    )
    return loader.BatchSource(self.corpus, run, seed, n_skipped)

  def rows_of(self, batch):
    """Indices of the rows of a batch, from their first tokens."""
    return (np.asarray(batch.tokens)[..., 0] // self.SEQ).ravel().tolist()

  def test_batches_are_the_next_rows_of_the_order(self):
    drawn = [int(self.corpus.shuffled(0)[i]["row"]) for i in range(70)]
    source = self.source(10)
    batch = source(6)  # spans two epochs
    self.assertEqual(source.row_ids(6), drawn[60:])
    self.assertEqual(source.positions(6), range(60, 70))
    self.assertEqual(self.rows_of(batch), drawn[60:])
    self.assertEqual(batch.tokens.shape, (1, 10, self.SEQ))
    self.assertEqual(batch.tokens.dtype, np.int32)
    np.testing.assert_array_equal(batch.labels[..., :-1], batch.tokens[..., 1:])

  def test_skipped_rows_are_not_read(self):
    plain, skipping = self.source(6), self.source(6, n_skipped=9)
    read = plain.row_ids(1) + plain.row_ids(2) + plain.row_ids(3)
    self.assertEqual(self.rows_of(skipping(0)), read[3:9])
    self.assertEqual(self.rows_of(skipping(1)), read[9:15])

  def test_batch_larger_than_the_corpus_repeats_rows(self):
    rows = self.rows_of(self.source(2 * self.ROWS)(0))
    np.testing.assert_array_equal(np.bincount(rows), [2] * self.ROWS)

  @parameterized.product(n=(1, 2, 3, 4, 6), micro_batches=(1, 2), step=(0, 5))
  def test_processes_together_read_the_whole_batch(
    self, n, micro_batches, step
  ):
    source = self.source(micro_batches=micro_batches, seed=1)
    whole = source(step)
    together = jax.tree.map(np.zeros_like, whole)
    size = 12 // micro_batches
    for i in range(n):
      columns = list(range(i, size, n))
      part = source(step, columns)
      for got, expected in zip(
        jax.tree.leaves(together), jax.tree.leaves(part), strict=True
      ):
        got[:, columns] = expected
    testing.assert_same(together, whole)

  def test_reading_one_ahead_changes_nothing(self):
    source = self.source(seed=2)
    for steps in ([0, 5, 3], [3], []):
      batches = list(loader.prefetch(source, steps))
      self.assertLen(batches, len(steps))
      for batch, step in zip(batches, steps, strict=True):
        testing.assert_same(batch, source(step))

  def test_segments_are_those_of_the_rows(self):
    run = testing.run("data.segment_mask=true", "train.micro_batches=2")
    rows = [
      {
        "tokens": np.arange(9) + 10 * i,
        "segments": np.array([1] * 3 + [2] * 5 + [0]),
      }
      for i in range(8)
    ]
    source = loader.BatchSource(mock.Mock(shuffled=lambda _: rows), run, 0)
    batch = source(0)
    np.testing.assert_array_equal(
      batch.tokens[:, :, 0] // 10, [range(4), range(4, 8)]
    )
    for segments, labels in zip(
      batch.segments.reshape(8, 8), batch.labels.reshape(8, 8), strict=True
    ):
      np.testing.assert_array_equal(segments, [1] * 3 + [2] * 5)
      np.testing.assert_array_equal(labels < 0, np.isin(range(8), (2, 7)))
    plain = config.override(run, "data.segment_mask=false")
    plain = loader.BatchSource(source.corpus, plain, 0)(0)
    self.assertIsNone(plain.segments)
    self.assertEqual((plain.labels < 0).sum(), 8)  # padding alone

  def test_missing_tokens_raise(self):
    self.path.unlink()
    with self.assertRaises(FileNotFoundError):
      next(loader.prefetch(self.source(), [0]))


class PrefetchTest(absltest.TestCase):
  def test_reads_one_ahead(self):
    asked = []
    steps = (asked.append(i) or i for i in itertools.count())
    read = loader.prefetch(lambda step: -step, steps)
    self.assertEqual(next(read), 0)
    self.assertEqual(asked, [0, 1])
    read.close()

  def test_interpreter_exits_with_an_open_iterator(self):
    code = (
      "from dsv3_jax.data import loader;"
      "read = loader.prefetch(str, [0, 1]); print(next(read))"
    )
    out = subprocess.run(
      [sys.executable, "-c", code],
      capture_output=True,
      check=True,
      timeout=60,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    self.assertEqual((out.stdout, out.stderr), (b"0\n", b""))


if __name__ == "__main__":
  absltest.main()

"""Order of training rows, held-out windows, and the preparation of a run."""

import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.data import corpus, loader, packing, tokenizer
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


class OrderTest(parameterized.TestCase):
  SEQ = 8
  ROWS = 25

  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(directory, "train.bin")
    self.rows = packing.Rows(token_file(self.path, 8 * 25 + 1), self.SEQ)

  def drawn(self, ordered, n):
    return [int(ordered[i]["row"]) for i in range(n)]

  def test_rows_overlap_by_one_token(self):
    self.assertLen(self.rows, self.ROWS)
    tokens = np.stack([self.rows[r]["tokens"] for r in range(self.ROWS)])
    self.assertEqual(tokens.dtype, np.int32)
    start = np.arange(self.ROWS)[:, None] * self.SEQ
    np.testing.assert_array_equal(tokens, start + np.arange(self.SEQ + 1))

  def test_every_epoch_has_each_row_once_in_another_order(self):
    ordered = loader.order(self.rows, seed=3)
    drawn = np.array(self.drawn(ordered, 4 * self.ROWS)).reshape(4, -1)
    for epoch in drawn:
      self.assertCountEqual(epoch, range(self.ROWS))
    # Equal by chance: 7 in 25! per pair.
    self.assertLen({tuple(epoch) for epoch in [*drawn, range(self.ROWS)]}, 5)

  def test_order_is_a_function_of_the_seed(self):
    n = 3 * self.ROWS
    one, same, other = (
      self.drawn(loader.order(self.rows, seed), n) for seed in (5, 5, 6)
    )
    self.assertEqual(one, same)
    self.assertNotEqual(one, other)

  def test_order_is_the_same_in_another_interpreter(self):
    # Hash randomisation or the state of a global generator would differ.
    code = (
      "import pickle, sys; from dsv3_jax.data import stream;"
      "rows = pickle.load(sys.stdin.buffer);"
      "print(stream.batch(stream.order(rows, 5), [7, 42])['row'].tolist())"
    )
    out = subprocess.run(
      [sys.executable, "-c", code],
      input=pickle.dumps(self.rows),
      capture_output=True,
      check=True,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    here = loader.batch(loader.order(self.rows, 5), [7, 42])["row"].tolist()
    self.assertEqual(out.stdout.decode().strip(), str(here))

  @parameterized.parameters(-1, 1 << 32)
  def test_seed_of_more_than_32_bits_is_refused(self, seed):
    with self.assertRaisesRegex(ValueError, f"seed={seed}: must be in 0 to"):
      loader.order(self.rows, seed)

  def test_batch_is_the_next_rows_of_the_order(self):
    ordered = loader.order(self.rows, 0)
    got = loader.batch(ordered, range(60, 70))  # spans two epochs
    self.assertEqual(got["row"].tolist(), self.drawn(ordered, 70)[60:])
    self.assertEqual(got["tokens"].shape, (10, self.SEQ + 1))
    self.assertEqual(got["tokens"].dtype, np.int32)
    np.testing.assert_array_equal(got["tokens"][:, 0], got["row"] * self.SEQ)

  def test_batch_larger_than_the_corpus_repeats_rows(self):
    got = loader.batch(loader.order(self.rows, 0), range(2 * self.ROWS))
    np.testing.assert_array_equal(np.bincount(got["row"]), [2] * self.ROWS)

  @parameterized.product(n=(1, 2, 3, 4, 6, 12), first=(0, 60))
  def test_processes_together_read_the_whole_batch(self, n, first):
    ordered = loader.order(self.rows, 1)
    whole = loader.batch(ordered, range(first, first + 12))
    together = {key: np.zeros_like(value) for key, value in whole.items()}
    for i in range(n):
      part = loader.batch(ordered, range(first + i, first + 12, n))
      for key, value in part.items():
        self.assertLen(value, 12 // n)
        together[key][i::n] = value
    np.testing.assert_array_equal(together["tokens"], whole["tokens"])
    np.testing.assert_array_equal(together["row"], whole["row"])

  def test_iterator_reads_what_it_is_told(self):
    ordered = loader.order(self.rows, 2)
    for indices in ([[0, 1], [5], [80, 2]], [[3]], []):
      read = list(loader.batches(ordered, indices))
      self.assertLen(read, len(indices))
      for got, index in zip(read, indices, strict=True):
        expected = loader.batch(ordered, index)
        np.testing.assert_array_equal(got["tokens"], expected["tokens"])
        np.testing.assert_array_equal(got["row"], expected["row"])

  def test_iterator_reads_one_ahead(self):
    asked = []
    indices = (asked.append(i) or [i] for i in itertools.count())
    read = loader.batches(loader.order(self.rows, 2), indices)
    next(read)
    self.assertEqual(asked, [0, 1])
    read.close()

  def test_iterator_raises_what_reading_raised(self):
    rows = packing.Rows(token_file(self.path, 100), 8)
    self.path.unlink()
    with self.assertRaises(FileNotFoundError):
      next(loader.batches(loader.order(rows, 0), [[0]]))

  def test_interpreter_exits_with_an_open_iterator(self):
    code = (
      "import pickle, sys; from dsv3_jax.data import stream;"
      "rows = pickle.load(sys.stdin.buffer);"
      "read = stream.batches(stream.order(rows, 5), [[0], [1]]); next(read)"
    )
    out = subprocess.run(
      [sys.executable, "-c", code],
      input=pickle.dumps(self.rows),
      capture_output=True,
      check=True,
      timeout=60,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    self.assertEqual(out.stderr, b"")


class HeldoutWindowsTest(parameterized.TestCase):
  @parameterized.product(
    n=(2, 3, 8, 9, 10, 12, 13, 16, 17, 100), seq_len=(1, 2, 3, 7, 8)
  )
  def test_each_target_is_scored_once_with_enough_context(self, n, seq_len):
    tokens = np.arange(n) + 100
    rows, mask = loader.heldout_windows(tokens, seq_len)
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
    rows, mask = loader.heldout_windows(np.array([0, 9, 1]), 5)
    self.assertEqual(rows.tolist(), [[0, 9, 1, 2, 2, 2]])
    self.assertEqual(mask.tolist(), [[True, True, False, False, False]])

  def test_one_token_is_refused(self):
    with self.assertRaisesRegex(ValueError, "1 tokens, at least 2"):
      loader.heldout_windows(np.zeros(1, np.int32), 4)


@pytest.mark.fault("F39")
class PrepareTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    root = self.enter_context(tempfile.TemporaryDirectory())
    self.root = pathlib.Path(root)
    self.directory = self.root / "run" / "data"
    self.text = self.root / "text.txt"
    self.text.write_text("".join(f"Line {i} of it.\n" for i in range(500)))

  def prepare(self, vocab_size=300, **settings):
    settings = {"path": str(self.text), "seq_len": 16} | settings
    return loader.prepare(config.Data(**settings), vocab_size, self.directory)

  def test_default_corpus(self):
    start = time.monotonic()
    prepared = self.prepare(2048, path="", seq_len=256)
    # 1.7 s on two idle cores; six times that on a loaded machine.
    self.assertLess(time.monotonic() - start, 10)
    train, heldout = corpus.split(corpus.documents("", "error"), 0.05)
    self.assertLen(corpus.text_bytes(train), prepared.train_bytes)
    self.assertLen(corpus.text_bytes(heldout), prepared.heldout_bytes)
    (domain,) = prepared.domains
    tokens = domain.heldout_tokens
    self.assertEqual(tokens.dtype, np.int32)
    self.assertEqual((tokens[0], tokens[-1]), (0, 1))
    text = "".join(d.text for d in heldout)
    self.assertEqual(prepared.tokenizer.decode(tokens), text)
    self.assertLess(domain.train.open().max(), 2048)
    self.assertLess(prepared.padding, 0.01)

  def test_held_out_text_does_not_shape_the_vocabulary(self):
    first = self.prepare().digests
    end = self.text.read_text()
    self.text.write_text(end[:-40] + "Q" * 39 + "\n")
    self.directory = self.root / "other"
    second = self.prepare().digests
    self.assertEqual(first["tokenizer"], second["tokenizer"])
    self.assertEqual(first["train_tokens"], second["train_tokens"])
    self.assertNotEqual(first["heldout_tokens"], second["heldout_tokens"])

  def test_second_start_reuses_everything(self):
    first = self.prepare()
    written = {p: p.stat().st_mtime_ns for p in self.directory.iterdir()}
    self.assertLen(written, 5)
    with absltest.mock.patch.object(tokenizer, "train", side_effect=KeyError):
      second = self.prepare()
    self.assertEqual(first.digests, second.digests)
    self.assertEqual(
      written, {p: p.stat().st_mtime_ns for p in self.directory.iterdir()}
    )

  @parameterized.parameters("text", "heldout")
  def test_changed_corpus_is_refused(self, what):
    self.prepare()
    before = {p: p.read_bytes() for p in self.directory.iterdir()}
    settings = {}
    if what == "text":
      self.text.write_text(self.text.read_text().replace("Line 7", "Line 8"))
    else:
      settings = {"heldout_fraction": 0.2}
    with self.assertRaisesRegex(ValueError, "data changed since this run"):
      self.prepare(**settings)
    self.assertEqual(
      before, {p: p.read_bytes() for p in self.directory.iterdir()}
    )

  def test_changed_held_out_text_is_refused(self):
    self.prepare()
    self.text.write_text(self.text.read_text()[:-2] + "!\n")
    with self.assertRaisesRegex(ValueError, "heldout.bin: the data changed"):
      self.prepare()

  def test_start_cut_off_before_the_manifest_begins_again(self):
    self.prepare()
    (self.directory / "train.json").unlink()
    (self.directory / "heldout.json").unlink()
    self.text.write_text("Other text altogether, on many lines.\n" * 50)
    prepared = self.prepare()
    ids = prepared.domains[0].heldout_tokens
    self.assertStartsWith(prepared.tokenizer.decode(ids), "Other text")

  def test_lost_tokenizer_is_made_again(self):
    first = self.prepare()
    (self.directory / "tokenizer.json").unlink()
    self.assertEqual(self.prepare().digests, first.digests)
    self.assertTrue((self.directory / "tokenizer.json").exists())

  def test_small_vocabulary_is_refused(self):
    with self.assertRaisesRegex(ValueError, "vocab_size=100: must be at least"):
      self.prepare(vocab_size=100)

  def test_text_shorter_than_a_row_is_refused(self):
    with self.assertRaisesRegex(ValueError, "seq_len=99999: must be at most"):
      self.prepare(seq_len=99_999)

  def test_bytes_of_jsonl_documents_are_those_of_the_text(self):
    self.text = self.root / "text.jsonl"
    self.text.write_text('{"text": "word \\u00e9 \\n"}\n' * 40)
    prepared = self.prepare(heldout_fraction=0.25)
    one = len("word é \n".encode())
    self.assertEqual(prepared.train_bytes, 30 * one)
    self.assertEqual(prepared.heldout_bytes, 10 * one)
    self.assertEqual(prepared.domains[0].heldout.n_documents, 10)

  def test_deepseek_vocabulary_needs_its_rows(self):
    try:
      tokenizer.deepseek()
    except ValueError as error:
      self.skipTest(str(error))
    with self.assertRaisesRegex(ValueError, "vocab_size=2048: .* 128815"):
      self.prepare(2048, tokenizer="deepseek")
    prepared = self.prepare(129_280, tokenizer="deepseek")
    self.assertEqual(prepared.domains[0].train.dtype, "uint32")


class SegmentTest(absltest.TestCase):
  def test_begin_with_bos(self):
    data = config.Data(seq_len=4, segment_mask=True)
    self.assertEqual(data.segment_start, tokenizer.BOS_ID)
    self.assertIsNone(config.Data(seq_len=4).segment_start)


class DomainsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    root = self.enter_context(tempfile.TemporaryDirectory())
    self.root = pathlib.Path(root)
    self.corpus = self.root / "corpus"
    (self.corpus / "code").mkdir(parents=True)
    for i in range(30):
      text = f"def f{i}(x):\n  return x + {i}\n" * 9
      (self.corpus / "code" / f"{i}.py").write_text(text)
    prose = "".join(f"Line {i} of it.\n" for i in range(900))
    (self.corpus / "prose.txt").write_text(prose)

  def prepare(self, domains="prose.txt=3,code=1", **settings):
    settings = {"path": str(self.corpus), "seq_len": 32} | settings
    data = config.Data(domains=domains, **settings)
    return loader.prepare(data, 320, self.root / "data")

  def test_rows_come_as_often_as_weights_say(self):
    prepared = self.prepare()
    ordered = prepared.order(0)
    code = {
      tuple(prepared.domains[1].rows[i]["tokens"])
      for i in range(len(prepared.domains[1].rows))
    }
    n = 400
    found = [tuple(ordered[i]["tokens"]) in code for i in range(n)]
    self.assertEqual(sum(found), n // 4)
    # A function of the index, in any order of reading.
    again = prepared.order(0)
    for i in (399, 7, 150):
      self.assertEqual(tuple(again[i]["tokens"]) in code, found[i])

  def test_each_has_held_out_text_of_its_own(self):
    prepared = self.prepare()
    prose, code = prepared.domains
    decode = prepared.tokenizer.decode
    self.assertIn("Line 8", decode(prose.heldout_tokens))
    self.assertIn("return x", decode(code.heldout_tokens))
    self.assertNotIn("return x", decode(prose.heldout_tokens))
    n_bytes = prose.heldout.text_bytes + code.heldout.text_bytes
    self.assertEqual(prepared.heldout_bytes, n_bytes)
    self.assertIn("code/train_tokens", prepared.digests)
    self.assertTrue((self.root / "data" / "code" / "train.bin").exists())

  def test_one_may_change_only_with_all_told(self):
    self.prepare()
    (self.corpus / "code" / "3.py").write_text("pass\n")
    with self.assertRaisesRegex(ValueError, "code/.*the data changed since"):
      self.prepare()

  def test_a_missing_one_is_named(self):
    with self.assertRaisesRegex(
      ValueError, "domains: maths not in .*which has code, prose.txt"
    ):
      self.prepare("code=1,maths=2")

  def test_rates_reach_the_training_text_alone(self):
    prepared = self.prepare(fim_rate=1.0)
    begin = prepared.tokenizer.token_to_id(tokenizer.FIM_BEGIN)
    for domain in prepared.domains:
      self.assertIn(begin, domain.train.open())
      self.assertNotIn(begin, domain.heldout_tokens)


if __name__ == "__main__":
  absltest.main()

"""Tokenizing the corpus of a run, opening it, and refusing another one."""

import json
import pathlib
import random
import tempfile

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.data import (
  corpus,
  prepare,
  sources,
  text_files,
  tokenized_corpus,
  tokenizer,
)


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
    return prepare.prepare(config.Data(**settings), vocab_size, self.directory)

  def test_default_corpus(self):
    prepared = self.prepare(2048, path="", seq_len=256)
    train, heldout = corpus.split(text_files.read_documents("", "error"), 0.05)
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

  def test_a_tokenizer_that_changes_texts_is_refused(self):
    facts = json.loads(tokenizer.train(["x"], 300).to_str())
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    facts["normalizer"] = strip
    path = self.root / "lossy.json"
    path.write_text(json.dumps(facts, ensure_ascii=False))
    data = config.Data(path=str(self.text), seq_len=16)
    with self.assertRaisesRegex(ValueError, "stand for .* bytes"):
      prepare.prepare(data, 300, self.directory, path)
    self.assertFalse((self.directory / "train.bin").exists())

  def test_held_out_tokens_cover_their_text(self):
    domain = self.prepare().domains[0]
    manifest = domain.heldout.path.with_suffix(".json")
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"text_bytes": 7}))
    with self.assertRaisesRegex(ValueError, "its text has 7:"):
      tokenized_corpus.open_corpus(
        config.Data(path=str(self.text), seq_len=16), self.directory
      )

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

  def open(self):
    data = config.Data(path=str(self.text), seq_len=16)
    return tokenized_corpus.open_corpus(data, self.directory)

  def test_opening_needs_no_text(self):
    written = self.prepare()
    self.text.unlink()
    opened = self.open()
    self.assertEqual(opened.digests, written.digests)
    for i in (0, 7, 1000):
      np.testing.assert_array_equal(
        opened.shuffled(3)[i]["tokens"], written.shuffled(3)[i]["tokens"]
      )

  @parameterized.parameters("train.json", "train.bin", "heldout.bin")
  def test_opening_names_what_is_missing(self, name):
    self.prepare()
    (self.directory / name).unlink()
    missing = name.replace(".json", ".bin")
    with self.assertRaisesRegex(ValueError, f"{missing}: missing"):
      self.open()

  def test_large_text_is_not_compressed(self):
    data = config.Data(path=str(self.text), seq_len=16)
    self.assertEqual(set(prepare.compression(data)), {"bzip2_bpb", "xz_bpb"})
    self.enter_context(
      absltest.mock.patch.object(prepare, "COMPRESSED_BYTES", 100)
    )
    self.assertEqual(prepare.compression(data), {})

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
    lines = (f'{{"text": "word {i} \\u00e9 \\n"}}\n' for i in range(10, 50))
    self.text.write_text("".join(lines))
    prepared = self.prepare(heldout_fraction=0.25)
    one = len("word 10 é \n".encode())
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
    return prepare.prepare(data, 320, self.root / "data")

  def test_rows_come_as_often_as_weights_say(self):
    prepared = self.prepare()
    ordered = prepared.shuffled(0)
    code = {
      tuple(prepared.domains[1].rows[i]["tokens"])
      for i in range(len(prepared.domains[1].rows))
    }
    n = 400
    found = [tuple(ordered[i]["tokens"]) in code for i in range(n)]
    self.assertEqual(sum(found), n // 4)
    # A function of the index, in any order of reading.
    again = prepared.shuffled(0)
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

  def test_copies_in_two_are_on_one_side(self):
    prose = self.corpus / "prose"
    prose.mkdir()
    for i in range(30):
      text = (self.corpus / "code" / f"{i}.py").read_text()
      (prose / f"copy of {29 - i}").write_text(text)
    (prose / "other").write_text("Line 8 of it.\n")
    data = config.Data(
      path=str(self.corpus), seq_len=32, domains="prose=1,code=1"
    )
    with self.assertLogs(level="WARNING") as log:
      found = sources.load_documents(data)
    self.assertIn("data: 30 of 30 documents are copies", log.output[-1])
    train, heldout = (
      {d.text for documents in found.values() for d in documents[side]}
      for side in (0, 1)
    )
    self.assertNotEmpty(heldout)
    self.assertEmpty(train & heldout)

  def test_rates_reach_the_training_text_alone(self):
    prepared = self.prepare(fim_rate=1.0)
    begin = prepared.tokenizer.token_to_id(tokenizer.FIM_BEGIN)
    for domain in prepared.domains:
      self.assertIn(begin, domain.train.open())
      self.assertNotIn(begin, domain.heldout_tokens)


class CompressionTest(absltest.TestCase):
  def test_default_split_needs_what_was_measured_with_the_tools(self):
    train, heldout = corpus.split(text_files.read_documents("", "error"), 0.05)
    bits = prepare.compression_bits_per_byte(
      corpus.text_bytes(train), corpus.text_bytes(heldout)
    )
    # 0.02: a byte of container more or less is 1e-4, another library version
    # may choose other matches.
    self.assertAlmostEqual(bits["bzip2_bpb"], 1.99, delta=0.02)
    self.assertAlmostEqual(bits["xz_bpb"], 2.21, delta=0.02)

  def test_text_seen_before_is_almost_free_for_xz(self):
    train = random.Random(0).randbytes(20_000)
    bits = prepare.compression_bits_per_byte(train, train)
    # A match has at most 273 bytes and needs less than 5 to say.
    self.assertLess(bits["xz_bpb"], 8 * 5 / 273)


if __name__ == "__main__":
  absltest.main()

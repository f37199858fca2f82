"""Token files: what is in them, when they are reused, when refused."""

import json
import pathlib
import tempfile

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dsv3_jax.data import corpus, token_file, tokenize, tokenizer

DOCUMENTS = [
  corpus.Document("a", "It is a truth.\n\nUniversally acknowledged,\n"),
  corpus.Document("b", "漢字 " * 5),
  corpus.Document("c", "\n"),
]


@pytest.mark.fault(
  "F39",
  "text or tokens missing, truncated, changed since the run began",
  "named at the start",
)
class PackTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = tokenizer.train([d.text for d in DOCUMENTS], 300)

  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(directory, "train.bin")

  def pack(self, documents=tuple(DOCUMENTS), vocab_size=300, tok=None, **how):
    tok = tok or self.tok
    return token_file.write(documents, self.path, tok, vocab_size, **how)

  def test_documents_stand_between_bos_and_eos(self):
    tokens = np.array(self.pack().open())
    starts = np.flatnonzero(tokens == tokenizer.BOS_ID)
    ends = np.flatnonzero(tokens == tokenizer.EOS_ID)
    self.assertLen(starts, len(DOCUMENTS))
    np.testing.assert_array_equal(starts, [0, *ends[:-1] + 1])
    self.assertEqual(ends[-1], len(tokens) - 1)
    texts = [
      self.tok.decode(tokens[start + 1 : end])
      for start, end in zip(starts, ends, strict=True)
    ]
    self.assertEqual(texts, [d.text for d in DOCUMENTS])

  @parameterized.parameters(
    (300, "uint16"), (65_536, "uint16"), (65_537, "uint32")
  )
  def test_dtype_fits_the_vocabulary(self, vocab_size, dtype):
    file = self.pack(vocab_size=vocab_size)
    self.assertEqual(file.dtype, dtype)
    self.assertEqual(file.open().dtype, dtype)
    size = np.dtype(dtype).itemsize * file.n_tokens
    self.assertEqual(self.path.stat().st_size, size)

  def test_manifest_states_counts(self):
    file = self.pack()
    self.assertEqual(file.n_documents, len(DOCUMENTS))
    self.assertEqual(
      file.text_bytes, sum(len(d.text.encode()) for d in DOCUMENTS)
    )
    manifest = json.loads(token_file.manifest_path(self.path).read_text())
    self.assertEqual(manifest["n_tokens"], file.n_tokens)
    self.assertEqual(manifest["corpus_digest"], corpus.digest(DOCUMENTS))
    self.assertNotIn("path", manifest)  # a workdir may move

  def test_no_temporary_file_is_left(self):
    self.pack()
    names = sorted(p.name for p in self.path.parent.iterdir())
    self.assertEqual(names, ["train.bin", "train.json"])

  def test_second_start_does_not_encode(self):
    first = self.pack()
    with absltest.mock.patch.object(tokenize, "encode", side_effect=KeyError):
      self.assertEqual(self.pack(), first)

  @parameterized.named_parameters(
    ("corpus", dict(documents=DOCUMENTS[:2]), "corpus_digest was"),
    ("order", dict(documents=DOCUMENTS[::-1]), "corpus_digest was"),
    ("fim", dict(fim_rate=0.5), "fim_rate was 0.0, is 0.5"),
    ("split", dict(split_rate=0.5), "split_rate was 0.0, is 0.5"),
    ("vocab", dict(vocab_size=301), "vocab_size was 300, is 301"),
    (
      "tokenizer",
      dict(tok=tokenizer.train(["x"], 300)),
      "tokenizer_digest was",
    ),
  )
  def test_change_since_the_run_began_is_refused(self, change, message):
    self.pack()
    before = self.path.read_bytes()
    with self.assertRaisesRegex(
      ValueError, f"train.bin: the data changed since .*{message}"
    ):
      self.pack(**change)
    self.assertEqual(self.path.read_bytes(), before)

  @parameterized.parameters(0, 10, None)
  def test_damaged_tokens_are_packed_again(self, size):
    first = self.pack()
    good = self.path.read_bytes()
    if size is None:
      self.path.unlink()
    else:
      self.path.write_bytes(good[:size] + b"\1" * (size and len(good) - size))
    with self.assertLogs(level="WARNING"):
      self.assertEqual(self.pack(), first)
    self.assertEqual(self.path.read_bytes(), good)

  @parameterized.parameters(1, 10.5, "7", None)
  def test_another_number_of_tokens_than_there_is(self, n):
    self.pack()
    manifest = token_file.manifest_path(self.path)
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"n_tokens": n}))
    with self.assertRaisesRegex(ValueError, f"n_tokens is {n!r}, .* holds"):
      self.pack()

  @parameterized.parameters("", "[]", '{"n_tokens": 3}', "[" * 100_000)
  def test_damaged_manifest_is_refused(self, content):
    self.pack()
    token_file.manifest_path(self.path).write_text(content)
    with self.assertRaisesRegex(ValueError, "train.json: not a manifest"):
      self.pack()

  @pytest.mark.fault("F36")
  def test_id_above_the_vocabulary_leaves_no_file(self):
    encoded = tokenize.encode(DOCUMENTS, self.tok)
    largest = max(max(ids) for _, ids in encoded)
    with self.assertRaisesRegex(
      ValueError, rf"a: token id \d+ at offset \d+; allowed: 0 to {100 - 1}"
    ):
      self.pack(vocab_size=100)
    self.assertEmpty(list(self.path.parent.iterdir()))
    self.pack(vocab_size=int(largest) + 1)


@pytest.mark.fault(
  "F36",
  "token ids outside of the vocabulary, or not integers",
  "exits 2 with file and offset",
)
class CheckIdsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("above", [[0, 1], [10, 3]], "id 10 at offset 2"),
    ("negative", [0, -1], "id -1 at offset 1"),
    ("ignored_label", [-100, 0], "id -100 at offset 0"),
    ("float", [0.0, 1.0], "must be integers, got float64"),
  )
  def test_refused(self, ids, message):
    with self.assertRaisesRegex(ValueError, f"file.npy: .*{message}"):
      token_file.check_ids(np.array(ids), 10, "file.npy")

  @parameterized.parameters("uint16", "int32", "int64")
  def test_accepted(self, dtype):
    token_file.check_ids(np.arange(10, dtype=dtype), 10, "file.npy")
    token_file.check_ids(np.zeros(0, dtype), 10, "file.npy")


if __name__ == "__main__":
  absltest.main()

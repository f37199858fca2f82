"""Conversations and pairs as token files and rows."""

import json
import pathlib
import shutil
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.data import (
  conversation_corpus,
  preferences,
  prepare,
  token_file,
  tokenizer,
)
from dsv3_jax.errors import InputError


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def sums(start, stop):
  return [
    {"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(start, stop)
  ]


def pairs(n):
  return [
    {"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "no"}
    for i in range(n)
  ]


class CorpusTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.tokenizer = cls.folder / "tokenizer.json"
    cls.tok = tokenizer.train(["1+2=3, 4+5=9; the sum is 7"] * 9, 300)
    tokenizer.save(cls.tok, cls.tokenizer)

  def data(self, path, source=config.CONVERSATIONS, **more):
    return config.Data(
      seq_len=24,
      source=source,
      path=str(path),
      segment_mask=True,
      heldout_fraction=0.2,
      **more,
    )

  def prepared(self, data):
    directory = self.folder / self.id()
    shutil.rmtree(directory, ignore_errors=True)
    return prepare.prepare(data, 300, directory, self.tokenizer)

  def test_rows_have_exactly_the_samples_and_their_flags(self):
    path = write(self.folder / "sums.jsonl", sums(0, 40))
    data = self.data(path)
    corpus = self.prepared(data)
    expected, heldout = conversation_corpus.encode(data, self.tokenizer)
    self.assertNotEmpty(heldout)
    (domain,) = corpus.domains
    self.assertLen(
      domain.rows, conversation_corpus.n_rows(data, self.tokenizer)
    )
    found = []
    for i in range(len(domain.rows)):
      row = domain.rows[i]
      for segment in range(1, row["segments"].max() + 1):
        here = row["segments"] == segment
        found.append((row["tokens"][here], row["supervised"][here]))
      self.assertFalse(row["supervised"][row["segments"] == 0].any())

    def as_set(pairs):
      return sorted((tuple(a.tolist()), tuple(b.tolist())) for a, b in pairs)

    self.assertEqual(
      as_set(found), as_set((s.ids, s.supervised) for s in expected)
    )

  def test_files_of_before_are_verified_and_others_refused(self):
    path = write(self.folder / "again.jsonl", sums(0, 40))
    first = self.prepared(self.data(path))
    directory = first.domains[0].train.path.parent
    again = prepare.prepare(self.data(path), 300, directory)
    self.assertEqual(first.digests, again.digests)
    write(path, sums(0, 41))
    with self.assertRaisesRegex(InputError, "the data changed"):
      prepare.prepare(self.data(path, problems=7), 300, directory)

  def test_pretraining_files_have_no_flags(self):
    values = np.array([1, 2], np.uint16)
    file = token_file.TokenFile(
      pathlib.Path(), "", "", 9, 0, 0, "uint16", 2, 1, 2, ""
    )
    ids, supervised = token_file.split_flags(values, file)
    self.assertIs(ids, values)
    self.assertIsNone(supervised)

  def test_copies_of_a_question_are_split_together(self):
    rows = sums(0, 40) * 2
    path = write(self.folder / "copies.jsonl", rows)
    train, heldout = conversation_corpus.read(self.data(path))
    asked = [
      {c.messages[0]["content"] for c in part} for part in (train, heldout)
    ]
    self.assertEmpty(asked[0] & asked[1])
    self.assertLen(train + heldout, 80)

  def test_folder_with_both_parts(self):
    folder = self.folder / "both"
    write(folder / "train.jsonl", sums(0, 5))
    write(folder / "heldout.jsonl", sums(5, 7))
    train, heldout = conversation_corpus.read(self.data(folder))
    self.assertEqual((len(train), len(heldout)), (5, 2))
    write(folder / "heldout.jsonl", sums(4, 7))
    with self.assertRaisesRegex(InputError, r"heldout.jsonl:1: a held-out"):
      conversation_corpus.read(self.data(folder))
    (folder / "heldout.jsonl").unlink()
    with self.assertRaisesRegex(InputError, "cannot be read"):
      conversation_corpus.read(self.data(folder))

  def test_no_held_out_part_is_refused(self):
    path = write(self.folder / "one.jsonl", sums(0, 1))
    with self.assertRaisesRegex(InputError, "leaves none for"):
      conversation_corpus.read(self.data(path))

  def test_all_that_are_longer_than_a_row_are_named(self):
    rows = [*sums(0, 20), {"prompt": "7" * 40, "response": "7"}] * 2
    path = write(self.folder / "long.jsonl", rows)
    with self.assertRaisesRegex(InputError, "long.jsonl:21: .*\n.*:42: ") as e:
      conversation_corpus.encode(self.data(path), self.tokenizer)
    self.assertIn("set data.seq_len=", str(e.exception))

  def test_pairs_stay_in_a_row_and_their_end_tokens_are_read(self):
    path = write(self.folder / "pairs.jsonl", pairs(30))
    data = self.data(path, config.PREFERENCES)
    (domain,) = self.prepared(data).domains
    n = 0
    for i in range(len(domain.rows)):
      row = domain.rows[i]
      segments = row["segments"].max()
      self.assertEqual(segments % 2, 0)
      n += segments // 2
      ends = np.flatnonzero(row["supervised"])
      self.assertLen(ends, segments)
      self.assertTrue((row["tokens"][ends] == tokenizer.EOS_ID).all())
      # The last token of a row is a label only; no score is read there.
      self.assertEqual(row["segments"][-1], 0)
    self.assertEqual(n, len(conversation_corpus.read(data)[0]))


class PreferenceTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"prompt": "a", "chosen": "b"}, "has no rejected"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ({"chosen": "b", "rejected": "c"}, "neither messages nor prompt"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected: .*empty"),
    ({"messages": "a", "chosen": "b", "rejected": "c"}, "must be a list"),
    ([], "must be an object"),
    (
      {
        "messages": [{"role": "assistant", "content": "x"}],
        "chosen": "b",
        "rejected": "c",
      },
      "message 1",
    ),
  )
  def test_wrong_lines_are_named(self, row, problem):
    self.assertRegex("\n".join(preferences.validate(row)), problem)

  def test_good_lines(self):
    for row in pairs(2):
      self.assertEmpty(preferences.validate(row))


if __name__ == "__main__":
  absltest.main()

"""The split of a corpus, and its digest."""

import collections
import random

from absl.testing import absltest, parameterized

from dsv3_jax.data import corpus, text_files


def make(n, size=100):
  """n documents of about `size` bytes."""
  return [
    corpus.Document(f"{i}.txt", f"{i} é " + "word " * (size // 5))
    for i in range(n)
  ]


class SplitTest(parameterized.TestCase):
  def test_default_holds_out_the_end_of_the_second_novel(self):
    documents = text_files.read_documents("", "error")
    train, heldout = corpus.split(documents, 0.05)
    whole = corpus.text_bytes(documents)
    end = corpus.text_bytes(heldout)
    self.assertEqual(corpus.text_bytes(train) + end, whole)
    self.assertEqual(whole[-len(end) - 1 : -len(end)], b"\n")
    # The cut moves forward to a line break, and lines have < 80 bytes.
    self.assertBetween(0.05 * len(whole) - len(end), -1, 80)
    self.assertEqual([d.name for d in heldout], [documents[1].name])

  @parameterized.parameters(0.01, 0.05, 0.3, 0.5)
  def test_few_documents_lose_nothing_and_keep_the_share(self, share):
    for n in (1, 2, 3, corpus.WHOLE_DOCUMENTS - 1):
      documents = make(n, size=1000)
      train, heldout = corpus.split(documents, share)
      whole = corpus.text_bytes(documents)
      end = corpus.text_bytes(heldout)
      self.assertEqual(corpus.text_bytes(train) + end, whole)
      # No line breaks in these: at most rounding and one character off.
      self.assertAlmostEqual(len(end), share * len(whole), delta=1.5)

  def test_cut_is_never_inside_a_character(self):
    for n in range(40, 60):
      documents = [corpus.Document("a", "é漢😀" * n)]
      train, heldout = corpus.split(documents, 0.1)
      self.assertEqual(train[0].text + heldout[0].text, documents[0].text)

  def test_cut_at_a_line_break_keeps_half_of_the_share(self):
    # The break is the last byte: going there would hold out nothing.
    text = "a" * 1000 + "\n"
    _, heldout = corpus.split([corpus.Document("a", text)], 0.1)
    self.assertLen(heldout[0].text, 100)
    text = "a" * 920 + "\n" + "b" * 79
    _, heldout = corpus.split([corpus.Document("a", text)], 0.1)
    self.assertEqual(heldout[0].text, "b" * 79)

  @parameterized.parameters(0.05, 0.1, 0.5)
  def test_many_documents_are_held_out_whole(self, share):
    documents = make(200)
    train, heldout = corpus.split(documents, share)
    self.assertCountEqual(train + heldout, documents)
    # Documents of nearly one size: the share is filled up to the last one.
    size = len(corpus.text_bytes(heldout))
    whole = len(corpus.text_bytes(documents))
    self.assertBetween(share * whole - size, 0, 120)

  def test_held_out_documents_do_not_depend_on_order(self):
    documents = make(50)
    shuffled = random.Random(0).sample(documents, 50)
    self.assertNotEqual(documents, shuffled)
    for one, other in zip(
      corpus.split(documents, 0.1), corpus.split(shuffled, 0.1), strict=True
    ):
      self.assertEqual(set(one), set(other))

  def test_held_out_documents_depend_on_content(self):
    documents = make(100)
    changed = [corpus.Document(d.name, d.text + "!") for d in documents]
    names = [
      {d.name for d in corpus.split(docs, 0.1)[1]}
      for docs in (documents, changed)
    ]
    # 10 of 100 drawn twice: equal with probability 1 / C(100, 10) ~ 6e-14.
    self.assertNotEqual(*names)

  @parameterized.parameters(1, 2, 5)
  def test_copies_are_on_one_side_whatever_their_names(self, n):
    # Few documents of one text each are cut, many are held out whole.
    for n_texts in (7 // n + 1, 40):
      texts = [d.text for d in make(n_texts)]
      documents = [
        corpus.Document(f"{i} of {text[:9]}", text)
        for i in range(n)
        for text in texts
      ]
      if n > 1:
        with self.assertLogs(level="WARNING") as log:
          train, heldout = corpus.split(documents, 0.3)
        told = f"{(n - 1) * n_texts} of {n * n_texts} documents are copies"
        self.assertIn(told, log.output[0])
      else:
        train, heldout = corpus.split(documents, 0.3)
      self.assertEqual(
        len(corpus.text_bytes(train)) + len(corpus.text_bytes(heldout)),
        len(corpus.text_bytes(documents)),
      )
      self.assertEmpty({d.text for d in train} & {d.text for d in heldout})
      for part in (train, heldout):
        times = collections.Counter(d.text for d in part)
        self.assertEqual(set(times.values()), {n})
      share = len(corpus.text_bytes(heldout))
      share /= len(corpus.text_bytes(documents))
      self.assertBetween(share, 0.3 - 1 / n_texts, 0.3 + n / 1000)

  def test_copies_alone_are_refused(self):
    documents = [corpus.Document(str(i), "the same") for i in range(20)]
    with self.assertRaisesRegex(ValueError, "19 of them copies .* to train on"):
      corpus.split(documents, 0.1)

  def test_huge_document_is_trained_on(self):
    documents = [*make(30), corpus.Document("huge", "x" * 100_000)]
    train, heldout = corpus.split(documents, 0.02)
    self.assertIn(documents[-1], train)
    self.assertNotEmpty(heldout)

  def test_share_below_every_document_holds_out_one(self):
    train, heldout = corpus.split(make(20), 0.001)
    self.assertLen(heldout, 1)
    self.assertLen(train, 19)

  @parameterized.parameters(("a", 0.05), ("ab", 0.01), ("text\n\n\n\n\n", 0.4))
  def test_part_without_text_is_refused(self, text, share):
    with self.assertRaisesRegex(
      ValueError, f"data.heldout_fraction={share}.*nothing"
    ):
      corpus.split([corpus.Document("a", text)], share)


class DigestTest(absltest.TestCase):
  def test_digest_separates_what_concatenation_does_not(self):
    variants = [
      [corpus.Document("a", "bc")],
      [corpus.Document("ab", "c")],
      [corpus.Document("a", "b"), corpus.Document("", "c")],
      [corpus.Document("a", "bd")],
    ]
    self.assertLen({corpus.digest(documents) for documents in variants}, 4)
    self.assertEqual(
      corpus.digest(variants[0]), corpus.digest([corpus.Document("a", "bc")])
    )


if __name__ == "__main__":
  absltest.main()

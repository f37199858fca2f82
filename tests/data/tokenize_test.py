"""Tests of how documents become ids: in order, filled in, split."""

import re

import numpy as np
from absl.testing import absltest, parameterized

from dsv3_jax.data import corpus, tokenize, tokenizer

TEXT = "if x:\n  y = f(x).\n\n  # 漢字, naïve\nreturn [y]\r\n"
DOCUMENTS = [
  corpus.Document(str(i), f"{TEXT[i % 9 :]} number {i}!\n") for i in range(2000)
]


def ids_of(documents, tok, **how):
  return [ids for _, ids in tokenize.encode(documents, tok, **how)]


class EncodeTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = tokenizer.train([d.text for d in DOCUMENTS], 400)

  def test_cutting_long_texts_changes_no_id(self):
    rng = np.random.default_rng(0)
    parts = [
      "a",
      "Z",
      "\n",
      "\r",
      " ",
      "\t",
      ".",
      "7",
      "漢",
      "é",
      "\u0301",
      "'",
    ]
    text = "".join(rng.choice(parts, size=20_000))
    tok = tokenizer.train([text], 600)  # has merges of such strings
    document = corpus.Document("x", text)
    ((_, whole),) = tokenize.encode([document], tok)
    with absltest.mock.patch.object(tokenize, "_PIECE_CHARACTERS", 1):
      ((_, cut),) = tokenize.encode([document], tok)
      self.assertGreater(len(list(tokenize._pieces(text))), 200)
    np.testing.assert_array_equal(cut, whole)

  def test_many_documents_keep_their_order(self):
    documents = [corpus.Document(str(i), f"number {i}") for i in range(200)]
    encoded = list(tokenize.encode(documents, self.tok))
    self.assertEqual([name for name, _ in encoded], [d.name for d in documents])
    texts = [self.tok.decode(ids[1:-1]) for _, ids in encoded]
    self.assertEqual(texts, [d.text for d in documents])

  def told(self, ids):
    """The text of a document told out of order, put in order again."""
    special = [
      self.tok.token_to_id(name)
      for name in (tokenizer.FIM_BEGIN, tokenizer.FIM_HOLE, tokenizer.FIM_END)
    ]
    self.assertEqual((ids[0], ids[1]), (tokenizer.BOS_ID, special[0]))
    self.assertEqual(ids[-1], tokenizer.EOS_ID)
    hole, end = (int(np.flatnonzero(ids == i)[0]) for i in special[1:])
    self.assertEqual([int((ids == i).sum()) for i in special], [1, 1, 1])
    # Bytes of a character may be apart, so ids are joined before decoding.
    prefix, suffix, middle = ids[2:hole], ids[hole + 1 : end], ids[end + 1 : -1]
    return self.tok.decode(np.concatenate([prefix, middle, suffix]))

  def test_filling_in_can_be_undone(self):
    encoded = ids_of(DOCUMENTS[:200], self.tok, fim_rate=1)
    for document, ids in zip(DOCUMENTS, encoded, strict=False):
      self.assertEqual(self.told(ids), document.text)

  @parameterized.parameters(0.0, 0.1, 0.5)
  def test_a_share_of_the_documents_is_filled_in(self, rate):
    begin = self.tok.token_to_id(tokenizer.FIM_BEGIN)
    encoded = ids_of(DOCUMENTS, self.tok, fim_rate=rate)
    n = sum(ids[1] == begin for ids in encoded)
    # Five standard deviations of a binomial.
    mean = rate * len(DOCUMENTS)
    spread = 5 * (mean * (1 - rate)) ** 0.5
    self.assertBetween(n, mean - spread, mean + spread)
    plain = ids_of(DOCUMENTS, self.tok)
    for ids, expected in zip(encoded, plain, strict=True):
      if ids[1] != begin:
        np.testing.assert_array_equal(ids, expected)

  def test_cuts_are_anywhere(self):
    document = "abcdefgh"
    tok = tokenizer.train([document], 270)
    hole = tok.token_to_id(tokenizer.FIM_HOLE)
    many = [corpus.Document(str(i), document) for i in range(900)]
    lengths = set()
    for ids in ids_of(many, tok, fim_rate=1):
      lengths.add(len(tok.decode(ids[2 : list(ids).index(hole)])))
    self.assertEqual(lengths, set(range(9)))

  @parameterized.parameters({"fim_rate": 0.5}, {"split_rate": 0.5})
  def test_a_document_is_told_the_same_among_others(self, **how):
    whole = ids_of(DOCUMENTS[:100], self.tok, **how)
    for i in (0, 63, 64, 99):
      (alone,) = ids_of(DOCUMENTS[i : i + 1], self.tok, **how)
      np.testing.assert_array_equal(alone, whole[i])

  def test_tokens_of_punctuation_and_line_breaks_are_halved(self):
    halves = tokenize._halves(self.tok)
    self.assertNotEmpty(halves)
    for i, ids in halves.items():
      text = self.tok.decode([i])
      self.assertRegex(text, re.compile(r"[^\w\s][\r\n]+$"))
      self.assertEqual(self.tok.decode(ids), text)
      self.assertGreaterEqual(len(ids), 2)
    # No other token ends so.
    for i in set(self.tok.get_vocab().values()) - set(halves):
      text = self.tok.decode([i])
      self.assertNotRegex(text, re.compile(r"^ ?[.,:!\])]+[\r\n]+$"))

  @parameterized.parameters("trained", "deepseek")
  def test_halves_have_the_bytes_of_the_token(self, name):
    characters = [
      chr(c) for c in (*range(0x2010, 0x2028), *range(0x3000, 0x3020))
    ]
    texts = [f"x {c}\n\ny{c}\r\n{c}\n" for c in characters]
    if name == "trained":
      tok = tokenizer.train(texts * 4, 420)
    else:
      try:
        tok = tokenizer.deepseek()
      except ValueError as error:
        self.skipTest(str(error))
    halves = tokenize._halves(tok)
    for i, ids in halves.items():
      joined = "".join(map(tok.id_to_token, ids))
      self.assertEqual(joined, tok.id_to_token(i))
    begun = [i for i in halves if "\ufffd" in tok.decode([i])]
    self.assertNotEmpty(begun)  # begin inside of a character
    documents = [corpus.Document(str(i), t) for i, t in enumerate(texts)]
    split = ids_of(documents, tok, split_rate=1)
    self.assertEqual([tok.decode(ids) for ids in split], texts)
    self.assertFalse(np.isin(np.concatenate(split), list(halves)).any())

  def test_a_share_of_them_is_split(self):
    joined = list(tokenize._halves(self.tok))
    plain = np.concatenate(ids_of(DOCUMENTS, self.tok))
    n = int(np.isin(plain, joined).sum())
    found = np.concatenate(ids_of(DOCUMENTS, self.tok, split_rate=0.3))
    left = int(np.isin(found, joined).sum())
    spread = 5 * (0.3 * 0.7 * n) ** 0.5
    self.assertBetween(n - left, 0.3 * n - spread, 0.3 * n + spread)
    self.assertEqual(self.tok.decode(found), self.tok.decode(plain))
    whole = np.concatenate(ids_of(DOCUMENTS, self.tok, split_rate=1))
    self.assertFalse(np.isin(whole, joined).any())


if __name__ == "__main__":
  absltest.main()

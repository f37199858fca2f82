"""Documents as token ids, with two random changes (section 4.1).

Fill-in-the-middle: a fraction of the documents is rearranged to

  BOS fim_begin prefix fim_hole suffix fim_end middle EOS

so that a model learns to write what stands between two texts.

Splitting: a fraction of the tokens that merge punctuation with line breaks
becomes two, so that prompts ending before a line break are in distribution.

Both are functions of a document's name and text alone: they do not depend on
other documents, nor on the order of all.
"""

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
from absl import logging
from tokenizers import decoders

from dsv3_jax.data import corpus, tokenizer

_GROUP_DOCUMENTS = 64  # encoded together, on all cores
_PIECE_CHARACTERS = 1 << 18
# No pre-token spans a line break and a letter behind it, so a cut there
# changes no id.
_PIECE_END = re.compile(r"(?<=\n)(?=[A-Za-z])")
# A token that ends with line breaks, in the alphabet of ByteLevel, which has a
# character for each byte: Ċ is LF, č is CR.
_MERGED = re.compile(r"(.*[^Ċč])([Ċč]+)", re.DOTALL)

Segment = str | int  # text, or the id of a special token


def encode(
  documents: Sequence[corpus.Document],
  tok: tokenizers.Tokenizer,
  *,
  fim_rate: float = 0.0,
  split_rate: float = 0.0,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, ids) for each document, from BOS to EOS.

  Rearranges a fraction `fim_rate` of the documents, and splits a fraction
  `split_rate` of the tokens with line breaks.
  """
  halves = _halves(tok) if split_rate else {}
  for first in range(0, len(documents), _GROUP_DOCUMENTS):
    group = documents[first : first + _GROUP_DOCUMENTS]
    rngs = [_generator(document) for document in group]
    all_segments = [
      list(_segments(document.text, fim_rate, tok, rng))
      for document, rng in zip(group, rngs, strict=True)
    ]
    texts = [s for s in itertools.chain(*all_segments) if isinstance(s, str)]
    encodings = iter(tok.encode_batch_fast(texts, add_special_tokens=False))
    for document, segments, rng in zip(group, all_segments, rngs, strict=True):
      ids = [
        next(encodings).ids if isinstance(segment, str) else [segment]
        for segment in segments
      ]
      ids = np.fromiter(itertools.chain.from_iterable(ids), np.int64)
      yield document.name, _split(ids, halves, split_rate, rng)


def _generator(document: corpus.Document) -> np.random.Generator:
  """Seeds a random generator with a document's name and text."""
  digest = hashlib.sha256(corpus.digest([document]).encode()).digest()
  return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _segments(
  text: str,
  fim_rate: float,
  tok: tokenizers.Tokenizer,
  rng: np.random.Generator,
) -> Iterator[Segment]:
  """Yields the texts and special tokens of a document, perhaps rearranged."""
  yield tokenizer.BOS_ID
  if rng.random() < fim_rate:
    # Two positions between characters, each as likely as any other.
    a, b = sorted(rng.integers(0, len(text) + 1, 2))
    for special, excerpt in (
      (tokenizer.FIM_BEGIN, text[:a]),
      (tokenizer.FIM_HOLE, text[b:]),
      (tokenizer.FIM_END, text[a:b]),
    ):
      yield tok.token_to_id(special)
      yield from _pieces(excerpt)
  else:
    yield from _pieces(text)
  yield tokenizer.EOS_ID


def _pieces(text: str) -> Iterator[str]:
  """Cuts a long text where that changes no id: bounded memory, more cores."""
  start = 0
  while cut := _PIECE_END.search(text, start + _PIECE_CHARACTERS):
    yield text[start : cut.start()]
    start = cut.start()
  yield text[start:]


def _halves(tok: tokenizers.Tokenizer) -> dict[int, np.ndarray]:
  """Maps each token of punctuation and line breaks to the ids of its halves.

  The halves have the bytes of the token: where it begins inside of a character,
  so does the first half.
  """
  decode, model, halves = decoders.ByteLevel().decode, tok.model, {}
  for token, i in tok.get_vocab().items():
    match = _MERGED.fullmatch(token)
    # A part of a character decodes to U+FFFD, which is a symbol.
    if match and _is_punctuation(decode([match[1]]).removeprefix(" ")):
      pieces = itertools.chain(*map(model.tokenize, match.groups()))
      halves[i] = np.array([piece.id for piece in pieces])
  if not halves:
    logging.warning(
      "data.split_rate: no token of the vocabulary joins punctuation and line"
      " breaks, so none is split"
    )
  return halves


def _is_punctuation(text: str) -> bool:
  """Returns whether a text is of punctuation and symbols, and not empty."""
  categories = {unicodedata.category(character)[0] for character in text}
  return bool(categories) and categories <= {"P", "S"}


def _split(
  ids: np.ndarray,
  halves: dict[int, np.ndarray],
  rate: float,
  rng: np.random.Generator,
) -> np.ndarray:
  """Replaces a random fraction of the ids that have halves by these."""
  if not halves:
    return ids
  candidates = np.flatnonzero(np.isin(ids, list(halves)))
  chosen = candidates[rng.random(len(candidates)) < rate]
  runs, start = [], 0
  for at in chosen:
    runs += [ids[start:at], halves[int(ids[at])]]
    start = at + 1
  return np.concatenate([*runs, ids[start:]])

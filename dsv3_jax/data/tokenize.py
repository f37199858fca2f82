"""Documents as token ids, with the report's two random changes (section 4.1).

Fill-in-the-middle: a share of the documents is told out of order, so that a
model learns to write what stands between two texts,

  BOS fim_begin prefix fim_hole suffix fim_end middle EOS

Splitting: a share of the tokens that join punctuation with line breaks becomes
two, so that a prompt which ends before its line break is nothing new.

Both are functions of a document's name and text alone, so neither other
documents nor the order of all matters.
"""

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers

from dsv3_jax.data import corpus, tokenizer

_GROUP_DOCUMENTS = 64  # encoded together, on all cores
_PIECE_CHARACTERS = 1 << 18
# No pre-token spans a line break and a letter behind it, so a cut there
# changes no id.
_PIECE_END = re.compile(r"(?<=\n)(?=[A-Za-z])")
_JOINED = re.compile(r"(.*[^\r\n])([\r\n]+)", re.DOTALL)

Part = str | int  # text, or a token that no text can spell


def encode(
  documents: Sequence[corpus.Document],
  tok: tokenizers.Tokenizer,
  *,
  fim_rate: float = 0.0,
  split_rate: float = 0.0,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, ids) for each document, from BOS to EOS.

  Args:
    documents: in corpus order.
    tok: the tokenizer.
    fim_rate: share of the documents that are told out of order.
    split_rate: share of the tokens with line breaks that are split.
  """
  halves = _halves(tok) if split_rate else {}
  for first in range(0, len(documents), _GROUP_DOCUMENTS):
    group = documents[first : first + _GROUP_DOCUMENTS]
    draws = [_generator(document) for document in group]
    all_parts = [
      list(_parts(document.text, fim_rate, tok, draw))
      for document, draw in zip(group, draws, strict=True)
    ]
    texts = [p for parts in all_parts for p in parts if isinstance(p, str)]
    encodings = iter(tok.encode_batch_fast(texts, add_special_tokens=False))
    for document, parts, draw in zip(group, all_parts, draws, strict=True):
      ids = [
        next(encodings).ids if isinstance(part, str) else [part]
        for part in parts
      ]
      joined = np.fromiter(itertools.chain.from_iterable(ids), np.int64)
      yield document.name, _split(joined, halves, split_rate, draw)


def _generator(document: corpus.Document) -> np.random.Generator:
  digest = hashlib.sha256(corpus.digest([document]).encode()).digest()
  return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _parts(
  text: str,
  fim_rate: float,
  tok: tokenizers.Tokenizer,
  draw: np.random.Generator,
) -> Iterator[Part]:
  """A document in the order in which it is told."""
  yield tokenizer.BOS_ID
  if draw.random() < fim_rate:
    # Two places between characters, each as likely as any other.
    a, b = sorted(draw.integers(0, len(text) + 1, 2))
    for special, part in (
      (tokenizer.FIM_BEGIN, text[:a]),
      (tokenizer.FIM_HOLE, text[b:]),
      (tokenizer.FIM_END, text[a:b]),
    ):
      yield tok.token_to_id(special)
      yield from _pieces(part)
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
  """For each token of punctuation and line breaks, the ids of both apart."""
  found = {}
  for i in tok.get_vocab().values():
    text = tok.decode([i], skip_special_tokens=True)
    match = _JOINED.fullmatch(text)
    if match and _is_punctuation(match[1].removeprefix(" ")):
      ids = [
        tok.encode(half, add_special_tokens=False).ids
        for half in match.groups()
      ]
      found[i] = np.array(sum(ids, []))
  return found


def _is_punctuation(text: str) -> bool:
  """Whether a text is of punctuation and symbols, and not empty."""
  kinds = {unicodedata.category(character)[0] for character in text}
  return bool(kinds) and kinds <= {"P", "S"}


def _split(
  ids: np.ndarray,
  halves: dict[int, np.ndarray],
  rate: float,
  draw: np.random.Generator,
) -> np.ndarray:
  """The ids, a share of those that have halves in two."""
  if not halves:
    return ids
  joined = np.flatnonzero(np.isin(ids, list(halves)))
  chosen = joined[draw.random(len(joined)) < rate]
  parts, start = [], 0
  for at in chosen:
    parts += [ids[start:at], halves[int(ids[at])]]
    start = at + 1
  return np.concatenate([*parts, ids[start:]])

"""Documents of a corpus: their split into training and held-out, and digest."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence

from dsv3_jax.errors import InputError

WHOLE_DOCUMENTS = 20  # from so many on, documents are held out whole
_LINE_BREAK_BYTES = 4096  # how far a cut may move to end on a line break


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, its unique name in the corpus, and the domain it belongs to."""

  name: str  # file, or file:line of a .jsonl
  text: str
  domain: str = ""  # one of data.domains; "" where these are not set


def split(
  documents: Sequence[Document], heldout_fraction: float
) -> tuple[list[Document], list[Document]]:
  """Splits documents into training and held-out ones.

  A corpus of at least `WHOLE_DOCUMENTS` documents holds out whole ones: in the
  order of a hash of name and text, each that still fits into the fraction. A
  smaller corpus holds out the last bytes of all its text, see `_cut`.
  The fraction, in (0, 1), is of the UTF-8 bytes. Raises InputError if one of
  the two would have no text.
  """
  split_fn = _split_whole if len(documents) >= WHOLE_DOCUMENTS else _split_end
  train, heldout = split_fn(documents, heldout_fraction)
  if not train or not heldout:
    n_bytes = len(text_bytes(documents))
    raise InputError(
      f"data.heldout_fraction={heldout_fraction}: of {n_bytes} bytes of text in"
      f" {len(documents)} documents this leaves nothing to"
      f" {'evaluate' if train else 'train'} on; choose another fraction or add"
      " text"
    )
  return train, heldout


def _split_whole(
  documents: Sequence[Document], heldout_fraction: float
) -> tuple[list[Document], list[Document]]:
  """Holds out whole documents, at least one."""
  sizes = [len(document.text.encode()) for document in documents]
  budget = heldout_fraction * sum(sizes)
  order = sorted(range(len(sizes)), key=lambda i: digest([documents[i]]))
  chosen = set()
  for i in order:
    if sizes[i] <= budget:
      chosen.add(i)
      budget -= sizes[i]
  if not chosen:  # no document is that small: take the smallest
    chosen.add(min(order, key=lambda i: sizes[i]))
  train = [d for i, d in enumerate(documents) if i not in chosen]
  return train, [documents[i] for i in sorted(chosen)]


def _split_end(
  documents: Sequence[Document], heldout_fraction: float
) -> tuple[list[Document], list[Document]]:
  """Holds out the end of the text."""
  total = len(text_bytes(documents))
  remaining = total - round(heldout_fraction * total)  # bytes to train on
  train, heldout = [], []
  for document in documents:
    raw = document.text.encode()
    inside = 0 < remaining < len(raw)
    at = _cut(raw, remaining) if inside else max(0, remaining)
    for documents_of, piece in ((train, raw[:at]), (heldout, raw[at:])):
      if piece.strip():
        piece = dataclasses.replace(document, text=piece.decode())
        documents_of.append(piece)
    remaining -= len(raw)
  return train, heldout


def _cut(raw: bytes, at: int) -> int:
  """Returns where to cut a text near byte `at`.

  After the first line break at or after it, if that is at most
  `_LINE_BREAK_BYTES` and half of what follows away; else at the next character.
  """
  near = min(_LINE_BREAK_BYTES, (len(raw) - at) // 2)
  line_break = raw.find(b"\n", at, at + near)
  if line_break >= 0:
    return line_break + 1
  while at < len(raw) and raw[at] & 0xC0 == 0x80:  # inside a UTF-8 character
    at += 1
  return at


def text_bytes(documents: Sequence[Document]) -> bytes:
  """Concatenates the text of all documents, in UTF-8."""
  return b"".join(document.text.encode() for document in documents)


def digest(documents: Sequence[Document]) -> str:
  """Returns the sha256 of all names and texts, in order."""
  result = hashlib.sha256()
  for document in documents:
    for value in (os.fsencode(document.name), document.text.encode()):
      result.update(len(value).to_bytes(8, "big") + value)
  return result.hexdigest()

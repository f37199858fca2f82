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
  documents: Sequence[Document], heldout: float
) -> tuple[list[Document], list[Document]]:
  """Splits documents into those to train on and those held out.

  A corpus of at least `WHOLE_DOCUMENTS` documents holds out whole ones: in the
  order of a hash of name and text, each that still fits into the share. A
  smaller one holds out the last bytes of all its text, cut as `_cut` says.

  Args:
    documents: in corpus order.
    heldout: share of the UTF-8 bytes, in (0, 1).

  Raises:
    InputError: a part would have no text.
  """
  whole = len(documents) >= WHOLE_DOCUMENTS
  train, held = (_split_whole if whole else _split_end)(documents, heldout)
  if not train or not held:
    n_bytes = len(text_bytes(documents))
    raise InputError(
      f"data.heldout_fraction={heldout}: of {n_bytes} bytes of text in"
      f" {len(documents)} documents this leaves nothing to"
      f" {'evaluate' if train else 'train'} on; choose another share or add"
      " text"
    )
  return train, held


def _split_whole(
  documents: Sequence[Document], heldout: float
) -> tuple[list[Document], list[Document]]:
  sizes = [len(document.text.encode()) for document in documents]
  left = heldout * sum(sizes)
  keys = [digest([document]) for document in documents]
  order = sorted(range(len(documents)), key=lambda i: keys[i])
  chosen = set()
  for i in order:
    if sizes[i] <= left:
      chosen.add(i)
      left -= sizes[i]
  if not chosen:  # no document is that small: the one nearest to it
    chosen.add(min(order, key=lambda i: sizes[i]))
  train = [d for i, d in enumerate(documents) if i not in chosen]
  return train, [documents[i] for i in sorted(chosen)]


def _split_end(
  documents: Sequence[Document], heldout: float
) -> tuple[list[Document], list[Document]]:
  total = len(text_bytes(documents))
  left = total - round(heldout * total)  # bytes to train on
  train, held = [], []
  for document in documents:
    raw = document.text.encode()
    at = _cut(raw, left) if 0 < left < len(raw) else max(0, left)
    for part, piece in ((train, raw[:at]), (held, raw[at:])):
      if piece.strip():
        part.append(Document(document.name, piece.decode()))
    left -= len(raw)
  return train, held


def _cut(raw: bytes, at: int) -> int:
  """Where to cut a text near byte `at`.

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
  """The text of all documents, one after the other, in UTF-8."""
  return b"".join(document.text.encode() for document in documents)


def digest(documents: Sequence[Document]) -> str:
  """The sha256 of all names and texts, in order."""
  result = hashlib.sha256()
  for document in documents:
    for part in (os.fsencode(document.name), document.text.encode()):
      result.update(len(part).to_bytes(8, "big") + part)
  return result.hexdigest()

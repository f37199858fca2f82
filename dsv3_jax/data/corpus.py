"""Documents of a corpus: their split into training and held-out, and digest."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence

from absl import logging

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
  documents: Sequence[Document],
  heldout_fraction: float,
  trained_bytes: dict[str, int] | None = None,
) -> tuple[list[Document], list[Document]]:
  """Splits documents into training and held-out ones.

  A corpus of at least `WHOLE_DOCUMENTS` documents holds out whole ones: in the
  order of a hash of name and text, each that still fits into the fraction. A
  smaller corpus holds out the last bytes of all its text, see `_cut`. Copies of
  a text are split like it, whatever their names; the log counts them.

  Args:
    documents: of a domain.
    heldout_fraction: in (0, 1), of the UTF-8 bytes.
    trained_bytes: for each text of the domains before, which are split in the
      same way, how many of its bytes are trained on; receives those of this
      one.

  Raises:
    InputError: one of the two would have no text.
  """
  trained_bytes = {} if trained_bytes is None else trained_bytes
  n_known = len(trained_bytes)
  copies: dict[str, list[Document]] = {}
  for document in documents:
    copies.setdefault(document.text, []).append(document)
  choose = _choose_whole if len(documents) >= WHOLE_DOCUMENTS else _choose_end
  for text, n_bytes in choose(copies, heldout_fraction, trained_bytes).items():
    trained_bytes.setdefault(text, n_bytes)
  n_copies = len(documents) - len(trained_bytes) + n_known
  if n_copies:
    logging.warning(
      "data: %d of %d documents are copies of others; each is trained on or"
      " held out like the first",
      n_copies,
      len(documents),
    )
  train, heldout = [], []
  for document in documents:
    raw = document.text.encode()
    at = trained_bytes[document.text]
    if at in (0, len(raw)):
      (train if at else heldout).append(document)
      continue
    for documents_of, piece in ((train, raw[:at]), (heldout, raw[at:])):
      if piece.strip():
        piece = dataclasses.replace(document, text=piece.decode())
        documents_of.append(piece)
  if not train or not heldout:
    n_bytes = len(text_bytes(documents))
    raise InputError(
      f"data.heldout_fraction={heldout_fraction}: of {n_bytes} bytes of text in"
      f" {len(documents)} documents, {n_copies} of them copies of others, this"
      f" leaves nothing to {'evaluate' if train else 'train'} on; choose"
      " another fraction or add text"
    )
  return train, heldout


def _choose_whole(
  copies: Mapping[str, Sequence[Document]],
  heldout_fraction: float,
  known: Mapping[str, int],
) -> dict[str, int]:
  """Holds out whole texts, at least one; returns the bytes to train on."""
  sizes = {text: len(text.encode()) for text in copies}
  total = {text: sizes[text] * len(copies[text]) for text in copies}
  budget = heldout_fraction * sum(total.values())
  budget -= sum(total[text] for text in copies if known.get(text) == 0)
  order = sorted(
    copies.keys() - known.keys(),
    key=lambda text: min(digest([document]) for document in copies[text]),
  )
  heldout = {text for text in copies if known.get(text) == 0}
  for text in order:
    if total[text] <= budget:
      heldout.add(text)
      budget -= total[text]
  if order and not heldout:  # no text is that small: take the smallest
    heldout.add(min(order, key=lambda text: total[text]))
  return {text: 0 if text in heldout else sizes[text] for text in copies}


def _choose_end(
  copies: Mapping[str, Sequence[Document]],
  heldout_fraction: float,
  known: Mapping[str, int],
) -> dict[str, int]:
  """Holds out the end of the text; returns the bytes to train on."""
  del known
  total = sum(len(text.encode()) * len(copies[text]) for text in copies)
  remaining = total - round(heldout_fraction * total)  # bytes to train on
  trained = {}
  for text, documents in copies.items():
    raw, n = text.encode(), len(documents)
    at = min(max(0, remaining // n), len(raw))
    trained[text] = _cut(raw, at) if 0 < at < len(raw) else at
    remaining -= n * len(raw)
  return trained


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

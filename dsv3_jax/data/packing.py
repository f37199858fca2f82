"""Rows of a fixed length: packed documents to train on, windows to evaluate.

A document longer than a row is cut into rows that overlap by a token, so that
each token but its first is a target once. Its last piece and the shorter
documents are packed by best fit, the longest first, each into the fullest row
that has room for it (section 4.1, arXiv:2404.10830). The end of a row is
padding. The segment of a token is the place of its document in the row, from 1
on; that of padding is 0.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax.data import token_file, tokenizer
from dsv3_jax.errors import InputError

ARRAYS = "tokens", "segments", "supervised"  # of a row, [seq_len + 1] each


def cut_documents(
  starts: np.ndarray, lengths: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts documents into pieces of at most `size` tokens.

  Takes the first token and length of each document, both [N]; returns those of
  the pieces, both [P].
  """
  step = max(size - 1, 1)
  n = np.where(lengths <= size, 1, -(-(lengths - 1) // step))
  document = np.repeat(np.arange(len(lengths)), n)
  index = np.arange(len(document)) - np.repeat(np.cumsum(n) - n, n)
  offset = index * step
  return starts[document] + offset, np.minimum(lengths[document] - offset, size)


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
  """Assigns pieces of these lengths to rows of `size` tokens; returns [P]."""
  rows = np.empty(len(lengths), np.int64)
  full = lengths == size
  rows[full] = np.arange(full.sum())
  n_rows = int(full.sum())
  rooms: list[int] = []  # free tokens of rows, ascending, each number once
  with_room: dict[int, list[int]] = {}  # rows by their free tokens
  shorter = np.flatnonzero(~full)
  for i in shorter[np.argsort(-lengths[shorter], kind="stable")]:
    length = int(lengths[i])
    at = bisect.bisect_left(rooms, length)
    if at == len(rooms):
      row, room, n_rows = n_rows, size, n_rows + 1
    else:
      room = rooms[at]
      row = with_room[room].pop()
      if not with_room[room]:
        del with_room[room], rooms[at]
    rows[i], room = row, room - length
    if room:
      if room not in with_room:
        bisect.insort(rooms, room)
      with_room.setdefault(room, []).append(row)
  return rows


def n_rows(lengths: Sequence[int], size: int) -> int:
  """Returns the number of rows of `size` tokens that pieces are packed into."""
  return int(best_fit(np.asarray(lengths), size).max()) + 1


class PackedRows:
  """The rows of T + 1 tokens of a token file, as a source of grain.

  The first read opens the tokens; pickling leaves them out.
  """

  def __init__(self, file: token_file.TokenFile, seq_len: int, group: int = 1):
    """Packs the documents of a file.

    With supervision they are samples, which are never cut; `group` of them
    stay together, and then a token of the row stays free (`config.Data.room`).
    Raises InputError if the file has no more tokens than a row.
    """
    if file.n_tokens <= seq_len and not file.supervised:
      raise InputError(
        f"data.seq_len={seq_len}: must be at most {file.n_tokens - 1}, as"
        f" {file.path} has {file.n_tokens} tokens and a row is seq_len + 1;"
        " lower it or add text"
      )
    self._file, self._tokens = file, None
    self.seq_len, self.group = seq_len, group
    size = seq_len + 2 - group
    # No text can spell BOS: it begins a document and is nowhere else.
    begins = np.flatnonzero(file.open() == tokenizer.BOS_ID)[::group]
    lengths = np.diff(begins, append=file.n_tokens)
    starts, lengths = cut_documents(begins, lengths, size)
    row = best_fit(lengths, size)
    order = np.argsort(row, kind="stable")
    self._starts, self._lengths = starts[order], lengths[order]
    n = int(row.max()) + 1
    self._first = np.searchsorted(row[order], np.arange(n + 1))

  def __len__(self) -> int:
    return len(self._first) - 1

  @property
  def padding(self) -> float:
    """Fraction of padding in all rows."""
    return 1 - self._lengths.sum() / (len(self) * (self.seq_len + 1))

  def __getitem__(self, row: int) -> dict[str, Any]:
    if self._tokens is None:
      self._tokens = self._file.open()
    pieces = slice(self._first[row], self._first[row + 1])
    spans = zip(self._starts[pieces], self._lengths[pieces], strict=True)
    packed = np.concatenate([self._tokens[i : i + n] for i, n in spans])
    packed, supervised = token_file.split_flags(packed, self._file)
    tokens = np.full(self.seq_len + 1, tokenizer.PAD_ID, np.int32)
    tokens[: len(packed)] = packed
    segments = np.zeros_like(tokens)
    if supervised is None:
      lengths = self._lengths[pieces]
      numbers = np.arange(1, len(lengths) + 1).repeat(lengths)
    else:
      numbers = (packed == tokenizer.BOS_ID).cumsum()
    segments[: len(packed)] = numbers
    item = {"tokens": tokens, "segments": segments, "row": np.int64(row)}
    if supervised is not None:
      padding = len(tokens) - len(packed)
      item["supervised"] = np.pad(supervised, (0, padding))
    return item

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_tokens": None}

  def __repr__(self) -> str:
    return f"PackedRows({str(self._file.path)!r}, seq_len={self.seq_len})"


def heldout_windows(
  tokens: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts held-out tokens [n] into windows that score each but the first once.

  Windows advance by half of `seq_len`; each scores the targets that no window
  before it did, so that all but those of the first have at least half a window
  of context. The first token, BOS, is context only.

  Returns:
    rows [R, seq_len + 1] int32, padded with PAD; their segments, the same
    shape: documents counted from 1, and 0 for padding; and mask [R, seq_len]
    bool: whether target rows[:, 1:] is scored.
  """
  n_targets = len(tokens) - 1
  if n_targets < 1:
    raise InputError(f"held-out text: {len(tokens)} tokens, at least 2 needed")
  stride = max(1, seq_len // 2)
  n_rows = 1 + max(0, -(-(n_targets - seq_len) // stride))
  index = np.arange(n_rows)[:, None] * stride + np.arange(seq_len + 1)
  inside = index <= n_targets
  index = np.minimum(index, n_targets)
  rows = np.where(inside, tokens[index], tokenizer.PAD_ID)
  documents = (tokens == tokenizer.BOS_ID).cumsum(dtype=np.int32)
  segments = np.where(inside, documents[index], 0)
  new = np.arange(seq_len) >= seq_len - stride
  mask = inside[:, 1:] & new
  mask[0] = inside[0, 1:]
  return rows.astype(np.int32), segments, mask

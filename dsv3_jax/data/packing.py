"""Rows of a fixed length: packed documents to train on, windows to evaluate.

Section 4.1.
A document longer than a row is cut into rows that overlap by a token, so that
each token but its first is a target once. What is left of it and the shorter
documents are packed by best fit, the longest first, each into the fullest row
that has room for it (arXiv:2404.10830). The rest of a row is padding.
"""

import bisect
from typing import Any

import numpy as np

from dsv3_jax.data import token_file, tokenizer
from dsv3_jax.errors import InputError


def pieces(
  starts: np.ndarray, lengths: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Documents cut to `size` tokens at most: first tokens and lengths."""
  step = max(size - 1, 1)
  n = np.where(lengths <= size, 1, -(-(lengths - 1) // step))
  document = np.repeat(np.arange(len(lengths)), n)
  index = np.arange(len(document)) - np.repeat(np.cumsum(n) - n, n)
  offset = index * step
  return starts[document] + offset, np.minimum(lengths[document] - offset, size)


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
  """The row of each piece; rows have room for `size` tokens."""
  rows = np.empty(len(lengths), np.int64)
  full = lengths == size
  rows[full] = np.arange(full.sum())
  n_rows = int(full.sum())
  rooms: list[int] = []  # sizes of the room left in rows, rising, each once
  with_room: dict[int, list[int]] = {}
  rest = np.flatnonzero(~full)
  for i in rest[np.argsort(-lengths[rest], kind="stable")]:
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


class Rows:
  """A token file as grain reads it, in rows of T + 1 tokens.

  The tokens are opened by the first read and are not pickled.
  """

  def __init__(self, file: token_file.TokenFile, seq_len: int):
    if file.n_tokens <= seq_len:
      raise InputError(
        f"data.seq_len={seq_len}: must be at most {file.n_tokens - 1}, as"
        f" {file.path} has {file.n_tokens} tokens and a row is seq_len + 1;"
        " lower it or add text"
      )
    self._file, self._seq_len, self._tokens = file, seq_len, None
    # No text can spell BOS: it begins a document and is nowhere else.
    begins = np.flatnonzero(file.open() == tokenizer.BOS_ID)
    lengths = np.diff(begins, append=file.n_tokens)
    starts, lengths = pieces(begins, lengths, seq_len + 1)
    row = best_fit(lengths, seq_len + 1)
    order = np.argsort(row, kind="stable")
    self._starts, self._lengths = starts[order], lengths[order]
    n = int(row.max()) + 1
    self._first = np.searchsorted(row[order], np.arange(n + 1))

  def __len__(self) -> int:
    return len(self._first) - 1

  @property
  def padding(self) -> float:
    """Share of all rows' tokens that are padding."""
    return 1 - self._lengths.sum() / (len(self) * (self._seq_len + 1))

  def __getitem__(self, row: int) -> dict[str, Any]:
    if self._tokens is None:
      self._tokens = self._file.open()
    here = slice(self._first[row], self._first[row + 1])
    parts = [
      self._tokens[start : start + length]
      for start, length in zip(
        self._starts[here], self._lengths[here], strict=True
      )
    ]
    tokens = np.full(self._seq_len + 1, tokenizer.PAD_ID, np.int32)
    joined = np.concatenate(parts)
    tokens[: len(joined)] = joined
    return {"tokens": tokens, "row": np.int64(row)}

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_tokens": None}

  def __repr__(self) -> str:
    return f"Rows({str(self._file.path)!r}, seq_len={self._seq_len})"


def heldout_windows(
  tokens: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
  """Windows in which each held-out token but the first is a target once.

  They advance by half of `seq_len`; each scores the targets that no window
  before it did, so all but those of the first have half a window of context or
  more. The first token, BOS, is context only.

  Args:
    tokens: [n] token ids.
    seq_len: T.

  Returns:
    rows [R, T + 1] int32, padded with PAD, and mask [R, T] bool: whether
    target rows[:, 1:] is scored.

  Raises:
    InputError: there are no two tokens.
  """
  n_targets = len(tokens) - 1
  if n_targets < 1:
    raise InputError(f"held-out text: {len(tokens)} tokens, at least 2 needed")
  stride = max(1, seq_len // 2)
  n_rows = 1 + max(0, -(-(n_targets - seq_len) // stride))
  index = np.arange(n_rows)[:, None] * stride + np.arange(seq_len + 1)
  there = index <= n_targets
  rows = np.where(there, tokens[np.minimum(index, n_targets)], tokenizer.PAD_ID)
  new = np.arange(seq_len) >= seq_len - stride
  mask = there[:, 1:] & new
  mask[0] = there[0, 1:]
  return rows.astype(np.int32), mask

"""Rows of tokens: in a fixed random order to train on, as windows to evaluate.

The n-th row of a run is a function of (seed, n) alone: no state to save, and
the same with any batch size and number of processes and threads.
"""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
import tokenizers

from dsv3_jax import config
from dsv3_jax.data import corpus
from dsv3_jax.data import packing
from dsv3_jax.data import tokenizer


class Rows:
  """A token file as grain reads it: row r is tokens[r * T : r * T + T + 1].

  Rows overlap by one: each token but the first is a target once an epoch.
  The file is opened by the first read, not before, and not pickled.
  """

  def __init__(self, file: packing.TokenFile, seq_len: int):
    if file.n_tokens <= seq_len:
      raise ValueError(
          f"data.seq_len={seq_len}: must be at most {file.n_tokens - 1}, as"
          f" {file.path} has {file.n_tokens} tokens and a row is seq_len + 1;"
          " lower it or add text"
      )
    self._file = file
    self._seq_len = seq_len
    self._tokens = None

  def __len__(self) -> int:
    return (self._file.n_tokens - 1) // self._seq_len

  def __getitem__(self, row: int) -> dict[str, Any]:
    if self._tokens is None:
      self._tokens = self._file.open()
    start = row * self._seq_len
    tokens = self._tokens[start : start + self._seq_len + 1]
    return {"tokens": tokens.astype(np.int32), "row": np.int64(row)}

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_tokens": None}

  def __repr__(self) -> str:
    return f"Rows({str(self._file.path)!r}, seq_len={self._seq_len})"


def order(rows: Rows, seed: int) -> grain.MapDataset:
  """All rows, shuffled anew each epoch, without end; read by index.

  Raises:
    ValueError: the seed is not one of 32 bits.
  """
  if not 0 <= seed < 1 << 32:
    raise ValueError(f"seed={seed}: must be in 0 to {(1 << 32) - 1}")
  return grain.MapDataset.source(rows).seed(seed).shuffle().repeat()


def batch(
    ordered: grain.MapDataset, index: Sequence[int]
) -> dict[str, np.ndarray]:
  """Some rows of an order.

  Args:
    ordered: from `order`.
    index: which, from 0; beyond an epoch too.

  Returns:
    `tokens` [B, T + 1] int32, and `row` [B] int64: which rows they are.
  """
  rows = [ordered[i] for i in index]
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def batches(
    ordered: grain.MapDataset, indices: Iterable[Sequence[int]]
) -> Iterator[dict[str, np.ndarray]]:
  """`batch` of each of the indices, one read ahead in a thread."""
  # Not grain's own prefetch: its thread aborts an interpreter that exits.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = None
    for index in indices:
      ready, ahead = ahead, pool.submit(batch, ordered, index)
      if ready:
        yield ready.result()
    if ahead:
      yield ahead.result()


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
    ValueError: there are no two tokens.
  """
  n_targets = len(tokens) - 1
  if n_targets < 1:
    raise ValueError(f"held-out text: {len(tokens)} tokens, at least 2 needed")
  stride = max(1, seq_len // 2)
  n_rows = 1 + max(0, -(-(n_targets - seq_len) // stride))
  index = np.arange(n_rows)[:, None] * stride + np.arange(seq_len + 1)
  there = index <= n_targets
  rows = np.where(there, tokens[np.minimum(index, n_targets)], tokenizer.PAD_ID)
  new = np.arange(seq_len) >= seq_len - stride
  mask = there[:, 1:] & new
  mask[0] = there[0, 1:]
  return rows.astype(np.int32), mask


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """The data of a run, ready to be read."""

  tokenizer: tokenizers.Tokenizer
  train: packing.TokenFile
  rows: Rows  # of train
  heldout: packing.TokenFile
  heldout_tokens: np.ndarray  # [n] int32

  @property
  def train_bytes(self) -> int:
    """UTF-8 bytes of the text trained on."""
    return self.train.text_bytes

  @property
  def heldout_bytes(self) -> int:
    """UTF-8 bytes of the text held out, which bits per byte divide by."""
    return self.heldout.text_bytes

  @property
  def digests(self) -> dict[str, str]:
    """The sha256 of all that decides what a step reads, but the seed."""
    return {
        "train_text": self.train.corpus_digest,
        "heldout_text": self.heldout.corpus_digest,
        "tokenizer": self.train.tokenizer_digest,
        "train_tokens": self.train.tokens_digest,
        "heldout_tokens": self.heldout.tokens_digest,
    }


def prepare(
    data: config.Data, vocab_size: int, directory: pathlib.Path
) -> Prepared:
  """Reads the corpus, and makes or reuses its tokenizer and token files.

  Args:
    data: what to read and how.
    vocab_size: of the model.
    directory: keeps tokenizer.json, train.bin and heldout.bin; of one run.

  Raises:
    ValueError: the text or the vocabulary does not do, or the text is no
      longer that of `directory`.
  """
  documents = corpus.documents(data.path, data.on_bad_text)
  train, heldout = corpus.split(documents, data.heldout)
  directory.mkdir(parents=True, exist_ok=True)
  train_path = directory / "train.bin"
  tok_path = directory / "tokenizer.json"
  # The manifest comes after the tokenizer: without it, that may be of a start
  # that was cut off, on other text.
  begun = packing.manifest_path(train_path).exists()
  if data.tokenizer == "deepseek":
    tok = tokenizer.deepseek()
  elif begun and tok_path.exists():
    tok = tokenizer.load(tok_path)
  else:
    tok = tokenizer.train((d.text for d in train), vocab_size)
  tokenizer.check_fits(tok, vocab_size)
  if not (begun and tok_path.exists()):
    tokenizer.save(tok, tok_path)
  train_file = packing.pack(train, train_path, tok, vocab_size)
  rows = Rows(train_file, data.seq_len)
  heldout_file = packing.pack(
      heldout, directory / "heldout.bin", tok, vocab_size
  )
  return Prepared(
      tokenizer=tok,
      train=train_file,
      rows=rows,
      heldout=heldout_file,
      heldout_tokens=np.asarray(heldout_file.open(), np.int32),
  )

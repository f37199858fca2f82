"""Rows of tokens: in a fixed random order to train on, as windows to evaluate.

The n-th row of a run is a function of (seed, n) alone: no state to save, and
the same with any batch size and number of processes and threads.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import grain
import numpy as np
import tokenizers

from dsv3_jax import config
from dsv3_jax.data import corpus, packing, token_file, tokenizer
from dsv3_jax.errors import InputError


def order(rows: packing.Rows, seed: int) -> grain.MapDataset:
  """All rows, shuffled anew each epoch, without end; read by index.

  Raises:
    InputError: the seed is not one of 32 bits.
  """
  if not 0 <= seed < 1 << 32:
    raise InputError(f"seed={seed}: must be in 0 to {(1 << 32) - 1}")
  return grain.MapDataset.source(rows).seed(seed).shuffle().repeat()


def mixture(
  sources: Sequence[packing.Rows], weights: Sequence[float], seed: int
) -> grain.MapDataset:
  """Rows of several sources, each in an `order`, as often as weights say."""
  if len(sources) == 1:
    return order(sources[0], seed)
  orders = [order(rows, (seed + i) % 2**32) for i, rows in enumerate(sources)]
  return grain.MapDataset.mix(orders, list(weights))


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


@dataclasses.dataclass(frozen=True, eq=False)
class Domain:
  """A kind of text, ready to be read."""

  name: str  # "" where all text is one
  weight: float
  train: token_file.TokenFile
  rows: packing.Rows  # of train
  heldout: token_file.TokenFile
  heldout_tokens: np.ndarray  # [n] int32


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """The data of a run, ready to be read."""

  tokenizer: tokenizers.Tokenizer
  domains: tuple[Domain, ...]

  def order(self, seed: int) -> grain.MapDataset:
    """The rows of a run, see `mixture`."""
    rows = [domain.rows for domain in self.domains]
    return mixture(rows, [domain.weight for domain in self.domains], seed)

  @property
  def n_tokens(self) -> int:
    """Tokens trained on."""
    return sum(domain.train.n_tokens for domain in self.domains)

  @property
  def train_bytes(self) -> int:
    """UTF-8 bytes of the text trained on."""
    return sum(domain.train.text_bytes for domain in self.domains)

  @property
  def heldout_bytes(self) -> int:
    """UTF-8 bytes of the text held out, which bits per byte divide by."""
    return sum(domain.heldout.text_bytes for domain in self.domains)

  @property
  def padding(self) -> float:
    """Share of padding in the rows of all domains."""
    n = [len(domain.rows) for domain in self.domains]
    shares = [domain.rows.padding for domain in self.domains]
    return float(np.average(shares, weights=n))

  @property
  def digests(self) -> dict[str, str]:
    """The sha256 of all that decides what a step reads, but the seed."""
    found = {"tokenizer": self.domains[0].train.tokenizer_digest}
    for domain in self.domains:
      lead = f"{domain.name}/" if domain.name else ""
      found |= {
        f"{lead}train_text": domain.train.corpus_digest,
        f"{lead}heldout_text": domain.heldout.corpus_digest,
        f"{lead}train_tokens": domain.train.tokens_digest,
        f"{lead}heldout_tokens": domain.heldout.tokens_digest,
      }
    return found


def texts(
  data: config.Data,
) -> dict[str, tuple[list[corpus.Document], list[corpus.Document]]]:
  """Documents to train on and those held out, by domain.

  Raises:
    InputError: the text does not do, or a domain is missing.
  """
  root = os.path.expanduser(data.path)
  paths = {name: os.path.join(root, name) for name in data.weights}
  missing = [name for name, path in paths.items() if not os.path.exists(path)]
  if missing:
    there = sorted(os.listdir(root)) if os.path.isdir(root) else []
    raise InputError(
      f"data.domains: {', '.join(missing)} not in data.path={data.path!r},"
      f" which {'has ' + ', '.join(there) if there else 'is no such folder'};"
      " scripts/prepare_data.py makes such a corpus"
    )
  return {
    name: corpus.split(
      corpus.documents(path, data.on_decode_error), data.heldout_fraction
    )
    for name, path in (paths or {"": data.path}).items()
  }


def prepare(
  data: config.Data,
  vocab_size: int,
  directory: pathlib.Path,
  learned: pathlib.Path | None = None,
) -> Prepared:
  """Reads the corpus, and makes or reuses its tokenizer and token files.

  Args:
    data: what to read and how.
    vocab_size: of the model.
    directory: keeps tokenizer.json, and train.bin and heldout.bin of each
      domain in a folder of its name; of one run.
    learned: a tokenizer.json to use instead of one trained on the text.

  Raises:
    InputError: the text or the vocabulary does not do, or the text is no
      longer that of `directory`.
  """
  parts = texts(data)
  directory.mkdir(parents=True, exist_ok=True)
  tok = _tokenizer(data, parts, vocab_size, directory, learned)
  rates = {"fim_rate": data.fim_rate, "split_rate": data.split_rate}
  domains = []
  for name, (train, heldout) in parts.items():
    folder = directory / name
    folder.mkdir(exist_ok=True, parents=True)
    train_file = token_file.pack(
      train, folder / "train.bin", tok, vocab_size, **rates
    )
    rows = packing.Rows(train_file, data.seq_len)
    file = token_file.pack(heldout, folder / "heldout.bin", tok, vocab_size)
    domains.append(
      Domain(
        name,
        data.weights.get(name, 1.0),
        train_file,
        rows,
        file,
        np.asarray(file.open(), np.int32),
      )
    )
  return Prepared(tok, tuple(domains))


def _tokenizer(
  data: config.Data,
  parts: Mapping[str, tuple[list[corpus.Document], list[corpus.Document]]],
  vocab_size: int,
  directory: pathlib.Path,
  learned: pathlib.Path | None,
) -> tokenizers.Tokenizer:
  """The released one, that of the directory, or one learned on text."""
  path = directory / "tokenizer.json"
  # The manifest comes after the tokenizer: without it, that may be of a start
  # that was cut off, on other text.
  first = directory / next(iter(parts)) / "train.bin"
  begun = token_file.manifest_path(first).exists() and path.exists()
  if data.tokenizer == "deepseek":
    tok = tokenizer.deepseek()
  elif begun:
    tok = tokenizer.load(path)
  elif learned:
    tok = tokenizer.load(learned)
  else:
    train = (d.text for documents, _ in parts.values() for d in documents)
    tok = tokenizer.train(train, vocab_size)
  tokenizer.check_fits(tok, vocab_size)
  if not begun:
    tokenizer.save(tok, path)
  return tok

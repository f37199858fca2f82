"""The tokenized corpus of a run, as processes open it from the workdir."""

import dataclasses
import functools
import pathlib

import grain
import numpy as np
import tokenizers

from dsv3_jax import config
from dsv3_jax.data import packing, shuffle, token_file, tokenizer

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Domain:
  """The token files of a domain, and its weight in the mixture."""

  name: str  # "" if there is only one
  weight: float
  train: token_file.TokenFile
  rows: packing.PackedRows  # of `train`
  heldout: token_file.TokenFile
  heldout_tokens: np.ndarray  # [n] int32

  @functools.cached_property
  def heldout_rows(self) -> packing.PackedRows:
    """Packed rows of the held-out samples of conversations."""
    return packing.PackedRows(self.heldout, self.rows.seq_len, self.rows.group)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedCorpus:
  """Tokenizer and domains of a run."""

  tokenizer: tokenizers.Tokenizer
  domains: tuple[Domain, ...]

  def shuffled(self, seed: int) -> grain.MapDataset:
    """Returns the rows of a run in the order in which it reads them."""
    rows = [domain.rows for domain in self.domains]
    return shuffle.mix(rows, [domain.weight for domain in self.domains], seed)

  @property
  def n_tokens(self) -> int:
    """Number of training tokens."""
    return sum(domain.train.n_tokens for domain in self.domains)

  @property
  def train_bytes(self) -> int:
    """UTF-8 bytes of the training text."""
    return sum(domain.train.text_bytes for domain in self.domains)

  @property
  def heldout_bytes(self) -> int:
    """UTF-8 bytes of the held-out text, which bits per byte divide by."""
    return sum(domain.heldout.text_bytes for domain in self.domains)

  @property
  def padding(self) -> float:
    """Fraction of padding in the rows of all domains."""
    n = [len(domain.rows) for domain in self.domains]
    fractions = [domain.rows.padding for domain in self.domains]
    return float(np.average(fractions, weights=n))

  @property
  def digests(self) -> dict[str, str]:
    """The sha256 of all that, with the seed, decides what a step reads."""
    digests = {"tokenizer": self.domains[0].train.tokenizer_digest}
    for domain in self.domains:
      prefix = f"{domain.name}/" if domain.name else ""
      digests |= {
        f"{prefix}train_text": domain.train.corpus_digest,
        f"{prefix}heldout_text": domain.heldout.corpus_digest,
        f"{prefix}train_tokens": domain.train.tokens_digest,
        f"{prefix}heldout_tokens": domain.heldout.tokens_digest,
      }
    return digests


def open_corpus(data: config.Data, directory: pathlib.Path) -> TokenizedCorpus:
  """Opens what `prepare.prepare` has written to a directory; reads no text.

  Raises InputError if a file is missing, or no longer than a row, or if the
  held-out tokens do not stand for all bytes of their text.
  """
  tok, domains = tokenizer.load(directory / TOKENIZER), []
  for name, weight in (data.domain_weights or {"": 1.0}).items():
    train = token_file.open_file(directory / name / "train.bin")
    heldout = token_file.open_file(directory / name / "heldout.bin")
    rows = packing.PackedRows(train, data.seq_len, data.group)
    tokens, _ = token_file.split_flags(heldout.open(), heldout)
    tokens = np.asarray(tokens, np.int32)
    lengths = tokenizer.byte_lengths(tok, heldout.vocab_size)
    covered, path = int(lengths[tokens].sum()), str(heldout.path)
    tokenizer.check_covers(covered, heldout.text_bytes, path)
    domains.append(Domain(name, weight, train, rows, heldout, tokens))
  return TokenizedCorpus(tok, tuple(domains))

"""Flat files of token ids, and the manifests that say what they were made of.

Documents follow each other, each from BOS to EOS. So do samples of
conversations, whose answers are flagged: the highest bit of their ids is set.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from absl import logging

from dsv3_jax import io
from dsv3_jax.data import conversations, corpus, tokenize, tokenizer
from dsv3_jax.errors import InputError

FLAG = np.uint32(1 << 31)  # of a token with loss, in files with supervision


@dataclasses.dataclass(frozen=True)
class TokenFile:
  """A file of token ids; its manifest holds all fields but the path."""

  path: pathlib.Path
  corpus_digest: str  # of the documents
  tokenizer_digest: str
  vocab_size: int
  fim_rate: float
  split_rate: float
  dtype: str
  n_tokens: int
  n_documents: int
  text_bytes: int
  tokens_digest: str
  supervised: bool = False  # only the flagged tokens are trained on

  def open(self) -> np.memmap:
    """Maps the token ids [n_tokens], with their flags, into memory."""
    return np.memmap(self.path, self.dtype, "r", shape=(self.n_tokens,))


def split_flags(
  values: np.ndarray, file: TokenFile
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the ids of values read from a file, and which are supervised.

  The latter is None where the file has no flags: every token is trained on.
  """
  if not file.supervised:
    return values, None
  return values & ~FLAG, values >= FLAG


def write(
  documents: Sequence[corpus.Document],
  path: pathlib.Path,
  tok: tokenizers.Tokenizer,
  vocab_size: int,
  *,
  fim_rate: float = 0.0,
  split_rate: float = 0.0,
) -> TokenFile:
  """Writes the documents' tokens to `path`, or verifies what is there.

  A file stays if, by its manifest, the same documents, tokenizer and rates (see
  `tokenize.encode`) made it and its bytes have their digest; it is written
  again if they do not.

  Raises:
    InputError: the file was made from other documents, tokenizer or rates, an
      id is not below `vocab_size`, or the ids do not stand for all bytes.
  """
  rates = {"fim_rate": fim_rate, "split_rate": split_rate}
  inputs = rates | {
    "corpus_digest": corpus.digest(documents),
    "tokenizer_digest": tokenizer.digest(tok),
    "vocab_size": vocab_size,
    "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
    "n_documents": len(documents),
    "text_bytes": sum(len(d.text.encode()) for d in documents),
  }
  if known := _verified(path, inputs):
    return known
  n_tokens, digest = 0, hashlib.sha256()
  lengths, covered = tokenizer.byte_lengths(tok, vocab_size), 0
  with io.atomic_write(path, "wb") as file:
    for name, ids in tokenize.encode(documents, tok, **rates):
      check_ids(ids, vocab_size, name)
      raw = ids.astype(inputs["dtype"]).tobytes()
      n_tokens += len(ids)
      covered += int(lengths[ids].sum())
      digest.update(raw)
      file.write(raw)
    tokenizer.check_covers(covered, inputs["text_bytes"], str(path))
  inputs |= {"n_tokens": n_tokens, "tokens_digest": digest.hexdigest()}
  return _write_manifest(TokenFile(path=path, **inputs))


def write_samples(
  samples: Sequence[conversations.Sample],
  path: pathlib.Path,
  tok: tokenizers.Tokenizer,
  vocab_size: int,
) -> TokenFile:
  """Writes the tokens of samples, answers flagged, or verifies what is there.

  Raises InputError as `write` does.
  """
  ids = np.concatenate([sample.ids for sample in samples])
  flags = np.concatenate([sample.supervised for sample in samples])
  check_ids(ids, vocab_size, str(path))
  raw = (ids.astype(np.uint32) | flags * FLAG).tobytes()
  digest = hashlib.sha256(raw).hexdigest()
  inputs = {
    "corpus_digest": digest,
    "tokenizer_digest": tokenizer.digest(tok),
    "vocab_size": vocab_size,
    "fim_rate": 0.0,
    "split_rate": 0.0,
    "dtype": "uint32",
    "n_documents": len(samples),
    "text_bytes": int(tokenizer.byte_lengths(tok, vocab_size)[ids].sum()),
    "supervised": True,
  }
  if known := _verified(path, inputs):
    return known
  with io.atomic_write(path, "wb") as file:
    file.write(raw)
  inputs |= {"n_tokens": len(ids), "tokens_digest": digest}
  return _write_manifest(TokenFile(path=path, **inputs))


def _verified(path: pathlib.Path, inputs: dict[str, Any]) -> TokenFile | None:
  """Returns the file at `path` if these inputs made it; None to write it.

  Raises InputError if other inputs made it.
  """
  known = _manifest(path)
  if known is not None:
    changes = [
      f"{key} was {getattr(known, key)}, is {value}"
      for key, value in inputs.items()
      if getattr(known, key) != value
    ]
    if changes:
      raise InputError(
        f"{path}: the data changed since this run began"
        f" ({'; '.join(changes)}); restore it, or start in another workdir"
      )
    if path.is_file() and io.file_sha256(path) == known.tokens_digest:
      _refuse_size(path, known)
      return known
    logging.warning("%s: missing or damaged, tokenizing again", path)
  return None


def _write_manifest(file: TokenFile) -> TokenFile:
  manifest = dataclasses.asdict(file)
  del manifest["path"]
  io.write_json(manifest_path(file.path), manifest)
  return file


def open_file(path: pathlib.Path) -> TokenFile:
  """Opens what `write` has written; InputError if it is missing or cut off."""
  known = _manifest(path)
  if known is None or not path.is_file():
    raise InputError(f"{path}: missing; rerun the command to prepare the data")
  _refuse_size(path, known)
  return known


def manifest_path(path: pathlib.Path) -> pathlib.Path:
  """Returns the path of a token file's manifest."""
  return path.with_suffix(".json")


def _manifest(path: pathlib.Path) -> TokenFile | None:
  """Returns the token file that the manifest describes, if there is one."""
  manifest = manifest_path(path)
  if not manifest.exists():
    return None
  try:
    return TokenFile(path=path, **json.loads(manifest.read_text()))
  except (ValueError, TypeError, RecursionError) as error:
    raise InputError(
      f"{manifest}: not a manifest of tokens ({error}); remove"
      f" {path.parent} to prepare the data again"
    ) from error


def _refuse_size(path: pathlib.Path, known: TokenFile) -> None:
  n_tokens = path.stat().st_size // np.dtype(known.dtype).itemsize
  if known.n_tokens != n_tokens or not isinstance(known.n_tokens, int):
    raise InputError(
      f"{manifest_path(path)}: n_tokens is {known.n_tokens!r}, {path} holds"
      f" {n_tokens}; remove {path.parent} to prepare the data again"
    )


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
  """Raises InputError if ids of any shape are not in [0, vocab_size).

  The message names the first of them, and the document or file `where` it is.
  """
  if ids.dtype.kind not in "iu":
    raise InputError(f"{where}: token ids must be integers, got {ids.dtype}")
  bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
  if bad.size:
    raise InputError(
      f"{where}: token id {ids.flat[bad[0]]} at offset {bad[0]}; allowed:"
      f" 0 to {vocab_size - 1}"
    )

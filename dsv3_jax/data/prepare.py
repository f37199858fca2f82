"""Tokenizes the corpus of a run into its workdir, or verifies what is there."""

import bz2
import contextlib
import lzma
import pathlib
from collections.abc import Callable, Mapping

import tokenizers

from dsv3_jax import config
from dsv3_jax.data import (
  conversation_corpus,
  corpus,
  sources,
  token_file,
  tokenized_corpus,
  tokenizer,
)
from dsv3_jax.errors import InputError

# A context that shows a person what its block does, and for how long.
Waiting = Callable[[str], contextlib.AbstractContextManager]

COMPRESSED_BYTES = 1 << 23  # most text that is compressed: some seconds
COMPRESSORS = {  # by the name of their bits per byte
  "bzip2_bpb": lambda raw: bz2.compress(raw, 9),
  "xz_bpb": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
}


def prepare(
  data: config.Data,
  vocab_size: int,
  directory: pathlib.Path,
  tokenizer_file: pathlib.Path | None = None,
  waiting: Waiting = contextlib.nullcontext,
) -> tokenized_corpus.TokenizedCorpus:
  """Reads the corpus, and writes or verifies its tokenizer and token files.

  Only one process may do this at a time; others then open what it wrote with
  `tokenized_corpus.open_corpus`.

  The directory, of one run, holds tokenizer.json and, in a folder for each
  domain, train.bin and heldout.bin. No tokenizer is trained if a tokenizer_file
  is given. `waiting` shows what is being done.

  Raises:
    InputError: the corpus is empty, undecodable, or changed since `directory`
      was written; or the vocabulary does not fit the model.
  """
  directory.mkdir(parents=True, exist_ok=True)
  if data.supervised:
    with waiting("reading the conversations"):
      _prepare_conversations(data, vocab_size, directory, tokenizer_file)
    return tokenized_corpus.open_corpus(data, directory)
  with waiting("reading the text"):
    documents = sources.load_documents(data)
  with waiting("learning a vocabulary"):
    tok = _tokenizer(data, documents, vocab_size, directory, tokenizer_file)
  rates = {"fim_rate": data.fim_rate, "split_rate": data.split_rate}
  for name, (train, heldout) in documents.items():
    folder = directory / name
    folder.mkdir(exist_ok=True, parents=True)
    with waiting(f"tokenizing {name}".rstrip()):
      token_file.write(train, folder / "train.bin", tok, vocab_size, **rates)
      token_file.write(heldout, folder / "heldout.bin", tok, vocab_size)
  return tokenized_corpus.open_corpus(data, directory)


def _prepare_conversations(
  data: config.Data,
  vocab_size: int,
  directory: pathlib.Path,
  tokenizer_file: pathlib.Path | None,
) -> None:
  """Writes or verifies tokenizer and token files of conversations."""
  path = directory / tokenized_corpus.TOKENIZER
  if tokenizer_file is None and not path.exists():
    raise InputError(
      f"data.source={data.source}: needs --init_from, a run whose vocabulary"
      " and parameters to begin with"
    )
  if not path.exists():
    tokenizer.save(tokenizer.load(tokenizer_file), path)
  tokenizer.check_fits(tokenizer.load(path), vocab_size)
  source = tokenizer_file or path  # as the samples were encoded before
  conversation_corpus.prepare(data, vocab_size, directory, source)


def _tokenizer(
  data: config.Data,
  documents: Mapping[str, sources.Split],
  vocab_size: int,
  directory: pathlib.Path,
  tokenizer_file: pathlib.Path | None,
) -> tokenizers.Tokenizer:
  """Returns the released tokenizer, the directory's, the given or a new one."""
  path = directory / tokenized_corpus.TOKENIZER
  # The manifest comes after the tokenizer: without it, that may be of a start
  # that was cut off, on other text.
  first = directory / next(iter(documents)) / "train.bin"
  begun = token_file.manifest_path(first).exists() and path.exists()
  if data.tokenizer == "deepseek":
    tok = tokenizer.deepseek()
  elif begun:
    tok = tokenizer.load(path)
  elif tokenizer_file:
    tok = tokenizer.load(tokenizer_file)
  else:
    texts = (d.text for train, _ in documents.values() for d in train)
    tok = tokenizer.train(texts, vocab_size)
  tokenizer.check_fits(tok, vocab_size)
  if not begun:
    tokenizer.save(tok, path)
  return tok


def compression(data: config.Data) -> dict[str, float]:
  """Returns bits per held-out byte of general compressors, for comparison.

  There are none for a corpus that would take more than some seconds.
  """
  if data.supervised:
    return {}
  documents = sources.load_documents(data)
  train, heldout = (
    [corpus.text_bytes(part) for part in parts]
    for parts in zip(*documents.values(), strict=True)
  )
  if sum(map(len, train)) > COMPRESSED_BYTES:
    return {}
  return compression_bits_per_byte(b"".join(train), b"".join(heldout))


def compression_bits_per_byte(train: bytes, heldout: bytes) -> dict[str, float]:
  """Measures bits per held-out byte of `bzip2 -9` and `xz -9e`.

  That is by how much the compressed size of `train` grows once `heldout`
  follows it: figures to compare a model's bits per byte with.
  """
  return {
    name: 8 * (len(run(train + heldout)) - len(run(train))) / len(heldout)
    for name, run in COMPRESSORS.items()
  }

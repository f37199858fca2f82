"""Conversations of a run: held-out split, samples, and their token files."""

import functools
import hashlib
import json
import math
import pathlib

from absl import logging

from dsv3_jax import config
from dsv3_jax.data import (
  chat,
  conversations,
  packing,
  tasks,
  token_file,
  tokenizer,
)
from dsv3_jax.data.conversations import Conversation, Sample
from dsv3_jax.errors import InputError

PARTS = "train", "heldout"  # and names of the files in a folder of both


TASK_SEED = 0  # of problems: those held out are the same in all runs


@functools.lru_cache(maxsize=1)
def split_tasks(data: config.Data) -> tasks.Split:
  """Draws the problems of `data.path`, tasks with settings; logs their counts.

  Raises InputError as `tasks.parse` and `tasks.split` do.
  """
  n_heldout = math.ceil(data.problems * data.heldout_fraction)
  result = tasks.split(
    tasks.parse(data.path), TASK_SEED, data.problems, n_heldout
  )
  for name, counts in result.counts.items():
    logging.info("task %s: problems %s", name, dict(counts))
  return result


def read(data: config.Data) -> list[list[Conversation]]:
  """Returns the conversations to train on, and the held-out ones.

  Raises InputError as `split_tasks` and `read_files` do.
  """
  if not data.path:
    raise InputError("data.path: the file of conversations is missing")
  if data.source == config.TASKS:
    drawn = split_tasks(data)
    return [
      [
        Conversation(row["messages"], f"{row['task']}[{row['index']}]")
        for row in tasks.rows(part)
      ]
      for part in (drawn.train, drawn.heldout)
    ]
  path = pathlib.Path(data.path).expanduser()
  return read_files(path, data.heldout_fraction)


def read_files(
  path: pathlib.Path, heldout_fraction: float
) -> list[list[Conversation]]:
  """Reads conversations, split into those to train on and the held-out ones.

  A folder has train.jsonl and heldout.jsonl. A file is split by a hash of what
  comes before the last answer, so that a question is never in both parts.

  Raises:
    InputError: a file is missing or wrong, a part would be empty, or a held-out
      question is trained on.
  """
  if path.is_dir():
    parts = [conversations.read(path / f"{name}.jsonl") for name in PARTS]
  else:
    parts = [[], []]
    for conversation in conversations.read(path):
      digest = hashlib.sha256(_question(conversation).encode()).digest()
      share = int.from_bytes(digest[:8], "big") / 2**64
      parts[share < heldout_fraction].append(conversation)
  if not all(parts):
    n, empty = sum(map(len, parts)), PARTS[not parts[1]]
    raise InputError(
      f"{path}: data.heldout_fraction={heldout_fraction:g} of its {n}"
      f" conversations leaves no {empty} ones; set another fraction, or give a"
      " folder with train.jsonl and heldout.jsonl"
    )
  trained = set(map(_question, parts[0]))
  both = [c.where for c in parts[1] if _question(c) in trained]
  if both:
    raise InputError(
      f"{both[0]}: a held-out question that is trained on too, as are"
      f" {len(both) - 1} others; remove them from one of the files"
    )
  return parts


def _question(conversation: Conversation) -> str:
  return json.dumps(conversation.messages[:-1], sort_keys=True)


@functools.lru_cache(maxsize=1)
def encode(
  data: config.Data, tokenizer_file: pathlib.Path
) -> list[list[Sample]]:
  """Returns the samples of both parts, no longer than a row.

  Raises:
    InputError: as `read`, or a conversation cannot be encoded or is longer than
      a row; lists the first of them with their lines.
  """
  tok, template = tokenizer.load(tokenizer_file), chat.find(data.template)
  return [
    conversations.all_samples(tok, part, template, data.seq_len + 1)
    for part in read(data)
  ]


def n_rows(data: config.Data, tokenizer_file: pathlib.Path) -> int:
  """Returns the number of rows that the training samples are packed into."""
  train, _ = encode(data, tokenizer_file)
  return packing.n_rows([len(s.ids) for s in train], data.seq_len + 1)


def prepare(
  data: config.Data,
  vocab_size: int,
  directory: pathlib.Path,
  tokenizer_file: pathlib.Path,
) -> None:
  """Writes or verifies train.bin and heldout.bin, samples with flags.

  Raises InputError as `encode` and `token_file.write_samples` do.
  """
  tok = tokenizer.load(tokenizer_file)
  for name, samples in zip(PARTS, encode(data, tokenizer_file), strict=True):
    path = directory / f"{name}.bin"
    token_file.write_samples(samples, path, tok, vocab_size)

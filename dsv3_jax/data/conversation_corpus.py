"""Conversations of a run: held-out split, samples, and their token files."""

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from dsv3_jax import config
from dsv3_jax.data import (
  chat,
  conversations,
  packing,
  preferences,
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


def read(data: config.Data) -> list[list[Any]]:
  """Returns what to train on and what is held out: conversations, or pairs.

  A file is split by a hash of what comes before the last answer, so that a
  question is never in both parts. A folder has train.jsonl and heldout.jsonl.

  Raises:
    InputError: a file is missing or wrong, a part would be empty, or a held-out
      question is trained on; or as `split_tasks`.
  """
  if not data.path:
    raise InputError(f"data.path: the {data.source} are missing")
  if data.source == config.TASKS:
    drawn = split_tasks(data)
    return [_as_conversations(part) for part in (drawn.train, drawn.heldout)]
  path = pathlib.Path(data.path).expanduser()
  read_file = READERS[data.source]
  if path.is_dir():
    parts = [read_file(path / f"{name}.jsonl") for name in PARTS]
  else:
    parts = _split(read_file(path), data.heldout_fraction)
  if not all(parts):
    n, empty = sum(map(len, parts)), PARTS[not parts[1]]
    raise InputError(
      f"{path}: data.heldout_fraction={data.heldout_fraction:g} of its"
      f" {n} {data.source} leaves none for {empty}; set another fraction, or"
      " give a folder with train.jsonl and heldout.jsonl"
    )
  trained = set(map(_question, parts[0]))
  if both := [item for item in parts[1] if _question(item) in trained]:
    raise InputError(
      f"{_first(both[0]).where}: a held-out question that is trained on too, as"
      f" are {len(both) - 1} others; remove them from one of the files"
    )
  return parts


def _split(items: Sequence[Any], fraction: float) -> list[list[Any]]:
  """Splits by a hash of the question; at least one question is held out."""
  shares = {}
  for question in map(_question, items):
    digest = hashlib.sha256(question.encode()).digest()
    shares[question] = int.from_bytes(digest[:8], "big") / 2**64
  most = max(fraction, min(shares.values()))
  parts: list[list[Any]] = [[], []]
  for item in items:
    parts[shares[_question(item)] <= most].append(item)
  return parts


READERS = {
  config.CONVERSATIONS: conversations.read,
  config.PREFERENCES: preferences.read,
}


def _as_conversations(problems: Sequence[tasks.Problem]) -> list[Conversation]:
  return [
    Conversation(row["messages"], f"{row['task']}[{row['index']}]")
    for row in tasks.rows(problems)
  ]


def _first(item: Any) -> Conversation:
  """Returns a conversation, or the first one of a pair."""
  return item if isinstance(item, Conversation) else item[0]


def _question(item: Any) -> str:
  return json.dumps(_first(item).messages[:-1], sort_keys=True)


@functools.lru_cache(maxsize=1)
def encode(
  data: config.Data, tokenizer_file: pathlib.Path
) -> list[list[Sample]]:
  """Returns the samples of both parts; pairs of preferences one after another.

  Raises:
    InputError: as `read`, or a conversation cannot be encoded or is longer than
      a row; lists the first of them with their lines.
  """
  tok, template = tokenizer.load(tokenizer_file), chat.find(data.template)
  parts = read(data)
  if data.source == config.PREFERENCES:
    return [
      preferences.all_samples(tok, part, template, data.room) for part in parts
    ]
  return [
    conversations.all_samples(tok, part, template, data.room) for part in parts
  ]


def n_rows(data: config.Data, tokenizer_file: pathlib.Path) -> int:
  """Returns the number of rows that the training samples are packed into."""
  train, _ = encode(data, tokenizer_file)
  lengths = np.reshape([len(sample.ids) for sample in train], (-1, data.group))
  return packing.n_rows(lengths.sum(1), data.room)


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

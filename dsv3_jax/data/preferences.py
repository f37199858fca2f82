"""Pairs of answers to one question, of which the first one is preferred.

A file has one pair a line, either

  {"messages": [...], "chosen": TEXT, "rejected": TEXT}
  {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}

where the messages are the conversation up to the two answers.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers

from dsv3_jax.data import chat, conversations
from dsv3_jax.data.conversations import Conversation, Sample
from dsv3_jax.errors import InputError

ANSWERS = "chosen", "rejected"


def read(path: pathlib.Path) -> list[tuple[Conversation, Conversation]]:
  """Reads a file of pairs; skips blank lines.

  Raises:
    InputError: it cannot be read, is empty, or has lines that are no pair;
      lists the first problems with their lines.
  """
  pairs = []
  for at, row in conversations.read_rows(path, validate):
    chosen, rejected = _conversations(row)
    pair = conversations.parse(chosen, at), conversations.parse(rejected, at)
    pairs.append(pair)
  if not pairs:
    raise InputError(f"{path}: has no pair; a line has {', '.join(ANSWERS)}")
  return pairs


def validate(row: Any) -> list[str]:
  """Lists what is wrong with a line of a file of pairs."""
  if not isinstance(row, Mapping):
    return [f"must be an object, not {type(row).__name__}"]
  if missing := [name for name in ANSWERS if name not in row]:
    return [f"has no {' and no '.join(missing)}"]
  if row["chosen"] == row["rejected"]:
    return ["chosen and rejected are the same"]
  if "messages" in row and not isinstance(row["messages"], list):
    return ["messages: must be a list"]
  if "messages" not in row and "prompt" not in row:
    return ["has neither messages nor prompt"]
  problems = [
    f"{name}: {problem}"
    for name, conversation in zip(ANSWERS, _conversations(row), strict=True)
    for problem in conversations.validate(conversation)
  ]
  return problems


def _conversations(row: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the two conversations of a pair, as `conversations` reads them."""
  messages = row.get("messages")
  if messages is None:
    messages = [{"role": "user", "content": row["prompt"]}]
  return [
    {"messages": [*messages, {"role": "assistant", "content": row[name]}]}
    for name in ANSWERS
  ]


def all_samples(
  tok: tokenizers.Tokenizer,
  pairs: Iterable[tuple[Conversation, Conversation]],
  template: chat.ChatTemplate,
  longest: int,
) -> list[Sample]:
  """Encodes pairs, the chosen answer first.

  Raises:
    InputError: a pair cannot be encoded, or has more than `longest` tokens;
      lists the first problems with their lines.
  """
  result, problems = [], []
  for pair in pairs:
    try:
      new = [end_sample(tok, one, template) for one in pair]
      conversations.check_length(sum(len(s.ids) for s in new), longest)
      result += new
    except InputError as error:
      problems.append(f"{pair[0].where}: {error}")
  conversations.raise_first(problems)
  return result


def end_sample(
  tok: tokenizers.Tokenizer,
  conversation: Conversation,
  template: chat.ChatTemplate,
) -> Sample:
  """Encodes a conversation; only the end token of its last answer is flagged.

  That token's state is what a reward model reads its score from.
  """
  last = conversations.samples(tok, conversation, template)[-1]
  return Sample(last.ids, np.arange(len(last.ids)) == len(last.ids) - 1)

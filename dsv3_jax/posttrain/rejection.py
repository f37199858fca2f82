"""Rejection sampling: many answers to a question, of which good ones are kept.

The answers become conversations to fine-tune on (sections 5.1 and 5.2.1). Each
answer that is refused is counted under the first rule that it breaks.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsv3_jax.data import conversations, tasks
from dsv3_jax.errors import InputError
from dsv3_jax.infer import engine, generate
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.posttrain.rewards import reward

# Rules besides the minimums, which come between the second and the third.
UNENDED, EMPTY, DUPLICATE, ENOUGH = "unended", "empty", "duplicate", "enough"
_MAX_SEED = 2**32


@dataclasses.dataclass(frozen=True)
class Question:
  """Messages up to an answer, and the answer that is known to be right."""

  messages: Sequence[Mapping[str, str]]
  reference: str

  @property
  def prompt(self) -> str:
    """The text of the last message, which rewards read."""
    return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Rules:
  """Conditions of an answer that is kept."""

  minimums: Mapping[str, float]  # by name of a reward
  keep: int = 1  # most answers to a question


@dataclasses.dataclass(frozen=True)
class Kept:
  """Rows for `conversations.write`, and what became of all answers."""

  rows: list[dict[str, Any]]
  # "kept", and those refused by rule: UNENDED ..., "below NAME", "NAME: error".
  counts: collections.Counter[str]
  solved: int  # questions with at least one row


def from_conversations(
  read: Iterable[conversations.Conversation],
) -> list[Question]:
  """Returns the question of each conversation's last answer."""
  return [
    Question(one.messages[:-1], one.messages[-1]["content"]) for one in read
  ]


def from_problems(problems: Iterable[tasks.Problem]) -> list[Question]:
  """Returns a question for each problem of a task."""
  return [
    Question([{"role": "user", "content": problem.prompt}], problem.answer)
    for problem in problems
  ]


def answer(
  generator: generate.Generator,
  questions: Sequence[Question],
  n: int,
  settings: Mapping[str, Any],
) -> list[list[generate.GeneratedText]]:
  """Generates n answers to each question.

  Answer j to question i has the seed `seed` + i * n + j. `settings` are those
  of a `GenerationRequest`. Raises InputError if a question cannot be served.
  """
  first = settings.get("seed", 0)
  texts = [[generate.GeneratedText() for _ in range(n)] for _ in questions]
  requests = (
    GenerationRequest(
      question.messages, **{**settings, "seed": (first + i * n + j) % _MAX_SEED}
    )
    for i, question in enumerate(questions)
    for j in range(n)
  )
  for chunk in generator.stream(requests):
    texts[chunk.index // n][chunk.index % n].add(chunk)
  return texts


def select(
  questions: Sequence[Question],
  texts: Sequence[Sequence[generate.GeneratedText]],
  functions: Mapping[str, reward.RewardFunction],
  rules: Rules,
) -> Kept:
  """Keeps answers that end, are not empty and reach all minimums.

  A reward that failed refuses its answer under the name of the error, not as a
  bad answer. Of equal answers to a question one is kept, and at most `keep`.

  Raises:
    InputError: a rule names no reward, or a reward cannot work here.
  """
  validate(functions, rules)
  triples = [
    (question.prompt, text.text, question.reference)
    for question, answers in zip(questions, texts, strict=True)
    for text in answers
  ]
  scored = iter(reward.score_all(functions, triples).rewards)
  rows, counts, solved = [], collections.Counter(), 0
  for question, answers in zip(questions, texts, strict=True):
    kept: list[str] = []
    for text in answers:
      result = next(scored)
      refused = _refuse(text, result, rules, kept)
      counts[refused or "kept"] += 1
      if not refused:
        kept.append(text.text)
        message = conversations.parse_answer(text.text)
        row = {"messages": [*question.messages, message]}
        scores = {name: result.parts[name] for name in functions}
        rows.append(row | {"reference": question.reference, "rewards": scores})
    solved += bool(kept)
  return Kept(rows, counts, solved)


def validate(
  functions: Mapping[str, reward.RewardFunction], rules: Rules
) -> None:
  """Raises InputError if a rule is out of range or names no reward."""
  if unknown := [name for name in rules.minimums if name not in functions]:
    raise InputError(
      f"rewards: {', '.join(unknown)}: must be of {', '.join(functions)}"
    )
  if rules.keep < 1:
    raise InputError(f"keep={rules.keep}: must be at least 1")


def _refuse(
  text: generate.GeneratedText,
  result: reward.Reward,
  rules: Rules,
  kept: Sequence[str],
) -> str:
  """Returns the first rule that refuses an answer, or ""."""
  if text.finish_reason != engine.STOP:
    return UNENDED
  if not conversations.parse_answer(text.text)["content"].strip():
    return EMPTY
  for name, least in rules.minimums.items():
    if math.isnan(value := result.parts[name]):
      return f"{name}: error"
    if value < least:
      return f"below {name}"
  if text.text in kept:
    return DUPLICATE
  return ENOUGH if len(kept) >= rules.keep else ""

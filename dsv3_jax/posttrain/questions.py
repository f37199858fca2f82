"""Questions of reinforcement learning: their order, and their room in rows."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import tokenizers

from dsv3_jax.data import chat, loader, tasks, token_file, tokenizer
from dsv3_jax.errors import raise_problems


@dataclasses.dataclass(frozen=True)
class Questions:
  """Problems to train on, in an order that depends on the seed alone."""

  problems: Sequence[tasks.Problem]
  tok: tokenizers.Tokenizer
  template: chat.ChatTemplate
  seed: int

  def draw(self, iteration: int, n: int) -> list[tasks.Problem]:
    """Returns the n problems of an iteration; each comes once an epoch."""
    size, first = len(self.problems), iteration * n
    return [
      self.problems[_order(self.seed, at // size, size)[at % size]]
      for at in range(first, first + n)
    ]

  def encode(self, problem: tasks.Problem) -> list[int]:
    """Returns the prompt in token ids, up to where the answer begins."""
    message = {"role": "user", "content": problem.prompt}
    return chat.encode(self.tok, [message], template=self.template)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(size)


def check_room(source: loader.BatchSource) -> None:
  """Raises InputError if a question or its right answer has no room."""
  run, n = source.run, source.run.grpo.answer_tokens
  file = source.corpus.domains[0].train
  ids, supervised = token_file.split_flags(file.open(), file)
  edges = np.flatnonzero(np.diff(supervised, prepend=False, append=False))
  starts, ends = edges.reshape(-1, 2).T
  longest = int((starts - np.flatnonzero(ids == tokenizer.BOS_ID)).max())
  answers, problems = ends - starts, []
  if longest + n > run.data.room:
    problems.append(
      f"grpo.answer_tokens={n}: after a question of {longest} tokens needs"
      f" data.seq_len={longest + n - 1}, which is {run.data.seq_len}"
    )
  if too_long := int((answers > n).sum()):
    problems.append(
      f"grpo.answer_tokens={n}: {too_long:,} of {len(answers):,} right answers"
      f" are longer, up to {answers.max()} tokens with their end token, so that"
      " no answer can get their reward"
    )
  raise_problems(problems)

"""Rewards by their names in settings and flags, such as exact=1,format=0.1."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from dsv3_jax.data import conversations, tasks
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.posttrain.rewards import REWARDS, reward

# Besides those of REWARDS: the text of the right answer, the score of a task,
# and a coin, the control that nothing can be learned from.
EXACT, TASK, RANDOM = "exact", "task", "random"
NAMES = (EXACT, TASK, RANDOM, *REWARDS)


def parse(text: str) -> dict[str, float]:
  """Returns numbers by name of reward, 1 where none is given.

  Raises:
    InputError: a name or a number is wrong; lists all of them.
  """
  numbers, problems = {}, []
  for part in text.split(","):
    name, equals, value = part.strip().partition("=")
    try:
      numbers[name] = float(value) if equals else 1.0
    except ValueError:
      problems.append(f"rewards: {part}: must be NAME=NUMBER")
    if name not in NAMES:
      problems.append(f"rewards: {part}: must be one of {', '.join(NAMES)}")
  raise_problems(problems)
  return numbers


def exact(prompt: str, answer: str, reference: str) -> reward.Reward:
  """Returns 1 for the text of the reference but for space around it, else 0."""
  del prompt
  content = conversations.parse_answer(answer)["content"]
  return reward.Reward(float(content.strip() == reference.strip()))


def of_tasks(
  named: Iterable[tasks.Task], problems: Iterable[tasks.Problem]
) -> reward.RewardFunction:
  """Returns the reward of tasks: the score of the task's own scorer."""
  by_task = {task.name: task for task in named}
  by_text = {(p.prompt, p.answer): p for p in problems}

  def score(prompt: str, answer: str, reference: str) -> reward.Reward:
    problem = by_text[prompt, reference]
    return reward.Reward(by_task[problem.task].lenient_score(problem, answer))

  return score


def coin(prompt: str, answer: str, reference: str) -> reward.Reward:
  """Returns 0 or 1 by a hash of question and answer: a control."""
  digest = hashlib.sha256(f"{prompt}\0{answer}".encode()).digest()
  return reward.Reward(float(digest[0] & 1))


# Those that need no more than texts.
PLAIN: Mapping[str, reward.RewardFunction] = {EXACT: exact, RANDOM: coin}


def make(
  names: Iterable[str],
  named: Sequence[tasks.Task],
  problems: Sequence[tasks.Problem],
) -> dict[str, reward.RewardFunction]:
  """Makes rewards of tasks by their names.

  Raises:
    InputError: one needs more than a text, or cannot work on this machine.
  """
  own = {**PLAIN, TASK: of_tasks(named, problems)}
  if refused := [name for name in names if name in ("judge", "model", "code")]:
    raise InputError(
      f"grpo.rewards: {', '.join(refused)}: not with tasks; use exact, task,"
      " correctness, format or language"
    )
  return {name: own[name] if name in own else REWARDS[name]() for name in names}

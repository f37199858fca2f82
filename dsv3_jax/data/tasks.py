"""Problems with answers that can be checked: the tasks of reasoning-gym.

Tasks are given as text, with settings of each, such as

  chain_sum:max_terms=2:max_digits=2:prompt=short:n=9000,number_sorting

where `prompt` and `n`, the number of problems to train on, are ours.

A problem is a pure function of its task, the seed, the split and its index: the
package draws it from one number, and no two seeds or splits share numbers.
Small tasks repeat problems all the same, so `split` also compares prompts.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from dsv3_jax.config import fields
from dsv3_jax.data import conversations
from dsv3_jax.errors import InputError, raise_problems

PACKAGE = "reasoning-gym==0.1.25"
SPLITS = ("train", "heldout")
# Some tasks seed generators that take 32 bits.
MAX_SEED = 2**11
MAX_PROBLEMS = 2**20  # of a split
_OWN = ("seed", "size")  # settings of the package that a split decides
_PROMPT, _N = "prompt", "n"
_REFUSED = {
  "acre": "makes all of its problems before the first, which takes hours",
  "composite": "is made of others; name these",
} | dict.fromkeys(
  (
    "intermediate_integration",
    "isomorphic_strings",
    "knight_swap",
    "polynomial_multiplication",
    "ransom_note",
  ),
  "draws problems by Python's hash of texts: they differ between processes",
)


def _short_chain_sum(entry: Mapping[str, Any]) -> str:
  return f"{entry['metadata']['expression'].replace(' ', '')}="


def _short_number_sorting(entry: Mapping[str, Any]) -> str:
  metadata = entry["metadata"]
  return f"{metadata['direction']}: {', '.join(metadata['original_numbers'])}"


def _short_base_conversion(entry: Mapping[str, Any]) -> str:
  metadata = entry["metadata"]
  bases = f"{metadata['source_base']} to {metadata['target_base']}"
  return f"{metadata['source_repr']}, {bases}"


def _short_number_filtering(entry: Mapping[str, Any]) -> str:
  metadata = entry["metadata"]
  operation = metadata["operation"].replace("_", " ")
  numbers = ", ".join(metadata["original_numbers"])
  return f"{operation} {metadata['filter_value']}: {numbers}"


def _short_gcd(entry: Mapping[str, Any]) -> str:
  return f"gcd {', '.join(map(str, entry['metadata']['numbers']))}"


# Prompts for small models, of the tasks that have one: what is asked, without
# the sentences around it. Answers and scores stay those of the task.
SHORT_PROMPTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
  "chain_sum": _short_chain_sum,
  "number_sorting": _short_number_sorting,
  "base_conversion": _short_base_conversion,
  "number_filtering": _short_number_filtering,
  "gcd": _short_gcd,
}


@dataclasses.dataclass(frozen=True)
class Problem:
  """A prompt and its answer."""

  task: str
  index: int  # in its split
  prompt: str
  answer: str
  # What the package says about it, for its scorer.
  entry: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Task:
  """A task of reasoning-gym with its settings."""

  name: str
  settings: tuple[tuple[str, Any], ...] = ()
  prompt: str = "full"  # or "short"
  n: int | None = None  # problems drawn to train on; None: as of the others

  def problem(self, seed: int, split: str, index: int) -> Problem:
    """Returns a problem, which is the same in every call.

    Raises:
      InputError: the seed or the index is out of range, or the task states no
        answers.
    """
    if not 0 <= seed < MAX_SEED:
      raise InputError(f"seed={seed}: must be in [0, {MAX_SEED})")
    if not 0 <= index < MAX_PROBLEMS:
      raise InputError(f"index={index}: must be in [0, {MAX_PROBLEMS:,})")
    entry = self._dataset(seed, split)[index]
    if not isinstance(entry["answer"], str):
      raise InputError(
        "has problems with several right answers, and states none to train on"
      )
    if self.prompt == "short":
      prompt = SHORT_PROMPTS[self.name](entry)
    else:
      prompt = entry["question"].strip()
    return Problem(self.name, index, prompt, entry["answer"], entry)

  def strict_score(self, problem: Problem, text: str) -> float:
    """Returns 1 for a text that is the answer but for space around it, or 0."""
    return float(text.strip() == problem.answer.strip())

  def lenient_score(self, problem: Problem, text: str) -> float:
    """Returns the score of the task itself, 0 to 1, of the answer in a text.

    The answer is what follows the reasoning, or what is inside the last pair of
    <answer> tags there. Tasks may give a part of 1 to wrong answers.
    """
    content = conversations.parse_answer(text)["content"]
    tagged = _package().utils.extract_answer(content)
    answer = content.strip() if tagged is None else tagged
    return float(
      self._dataset(0, SPLITS[0]).score_answer(answer, problem.entry)
    )

  def _dataset(self, seed: int, split: str) -> Any:
    first = (seed * len(SPLITS) + SPLITS.index(split)) * MAX_PROBLEMS
    return _make_dataset(self.name, self.settings, first)


@functools.lru_cache(maxsize=32)
def _make_dataset(
  name: str, settings: tuple[tuple[str, Any], ...], first: int
) -> Any:
  """Makes the dataset that draws problem i from the number `first` + i."""
  return _package().create_dataset(
    name, **dict(settings), seed=first, size=MAX_PROBLEMS
  )


def parse(text: str) -> list[Task]:
  """Returns the tasks of a text, `name:setting=value:...,name`.

  Raises:
    InputError: a task, a setting or a value is not known; lists all problems.
      Or the package is not installed.
  """
  tasks, problems = [], []
  for part in text.split(","):
    name, *assignments = part.strip().split(":")
    task, wrong = _parse_task(name, assignments)
    if name in [task.name for task in tasks]:
      wrong.append("is there twice")
    problems += [f"tasks: {name}: {problem}" for problem in wrong]
    tasks.append(task)
  raise_problems(problems)
  return tasks


def _parse_task(
  name: str, assignments: Sequence[str]
) -> tuple[Task, list[str]]:
  datasets = _package().factory.DATASETS
  if name in _REFUSED:
    return Task(name), [_REFUSED[name]]
  if name not in datasets:
    hint = fields.nearest(name, datasets) or f"; there are {len(datasets)}"
    return Task(name), [f"is no task of {PACKAGE}{hint}"]
  known = {
    field.name: field.type
    for field in dataclasses.fields(datasets[name][1])
    if field.name not in _OWN
  }
  settings, prompt, n, problems = {}, "full", None, []
  for assignment in assignments:
    key, equals, value = assignment.partition("=")
    if not equals:
      problems.append(f"{assignment!r}: must be setting=value")
    elif key == _PROMPT:
      prompt = value
      allowed = ("full", "short") if name in SHORT_PROMPTS else ("full",)
      problems += fields.unknown(_PROMPT, value, allowed)
    elif key == _N:
      n = int(value) if value.isascii() and value.isdigit() else 0
      if not 0 < n <= MAX_PROBLEMS:
        problems.append(f"{_N}={value!r}: must be 1 to {MAX_PROBLEMS:,}")
    elif key not in known:
      problems += fields.unknown("setting", key, [_PROMPT, _N, *known])
    elif known[key] not in _READERS:
      problems.append(f"{key}: cannot be set, it is no number, truth or text")
    else:
      try:
        settings[key] = _READERS[known[key]](value)
      except ValueError:
        problems.append(f"{key}={value!r}: must be {known[key].__name__}")
  task = Task(name, tuple(settings.items()), prompt, n)
  return task, problems or _validate_settings(task)


def _validate_settings(task: Task) -> list[str]:
  """Lists what the package says against a task and its settings."""
  given = ", ".join(f"{key}={value}" for key, value in task.settings)
  try:
    task.problem(0, SPLITS[0], 0)
  except InputError as error:
    return [str(error)]
  except (AssertionError, ValueError, TypeError) as error:
    return [f"{given or 'its settings'}: {error or 'the package refuses it'}"]
  return []


def _read_bool(text: str) -> bool:
  if text not in ("true", "false"):
    raise ValueError
  return text == "true"


_READERS = {int: int, float: float, bool: _read_bool, str: str}


@dataclasses.dataclass(frozen=True)
class Split:
  """Problems to train on and to evaluate on, without a prompt in both."""

  train: list[Problem]
  heldout: list[Problem]
  # By task: problems of `train` and `heldout`; how many of `train` repeat an
  # earlier prompt; and how many were drawn and left out, as their prompt is
  # held out (`train_held_out`) or was there before (`heldout_repeated`).
  counts: Mapping[str, Mapping[str, int]]


def split(
  tasks: Iterable[Task], seed: int, n_train: int, n_heldout: int
) -> Split:
  """Draws problems of each task, of which the tasks take turns.

  A held-out prompt is evaluated once, and left out of training. Others may come
  again there: a small task has fewer problems than are drawn.

  Args:
    tasks: the tasks, of different names.
    seed: seed of all problems.
    n_train: problems drawn to train on for each task without an `n`.
    n_heldout: problems drawn to evaluate on for each task.

  Raises:
    InputError: a task has no problem left to train on.
  """
  train, heldout, counts = [], [], {}
  for task in tasks:
    n = task.n or n_train
    drawn = [task.problem(seed, "heldout", i) for i in range(n_heldout)]
    heldout.append(_distinct(drawn))
    unseen = {problem.prompt for problem in drawn}
    drawn = [task.problem(seed, "train", i) for i in range(n)]
    train.append([problem for problem in drawn if problem.prompt not in unseen])
    if n and not train[-1]:
      raise InputError(
        f"tasks: {task.name}: all of its {n} problems are held out; evaluate on"
        " fewer, or choose settings with more problems"
      )
    counts[task.name] = {
      "train": len(train[-1]),
      "train_repeated": len(train[-1]) - len(_distinct(train[-1])),
      "train_held_out": n - len(train[-1]),
      "heldout": len(heldout[-1]),
      "heldout_repeated": n_heldout - len(heldout[-1]),
    }
  return Split(_take_turns(train), _take_turns(heldout), counts)


def _distinct(problems: Iterable[Problem]) -> list[Problem]:
  """Returns the first problem of each prompt."""
  first: dict[str, Problem] = {}
  for problem in problems:
    first.setdefault(problem.prompt, problem)
  return list(first.values())


def _take_turns(lists: Sequence[Sequence[Problem]]) -> list[Problem]:
  """Returns one problem of each list, then the next of each, to their ends."""
  longest = max(map(len, lists), default=0)
  return [each[i] for i in range(longest) for each in lists if i < len(each)]


def rows(problems: Iterable[Problem]) -> list[dict[str, Any]]:
  """Returns problems as lines for `conversations.write`."""
  return [
    {
      "messages": [
        {"role": "user", "content": problem.prompt},
        {"role": "assistant", "content": problem.answer},
      ],
      "task": problem.task,
      "index": problem.index,
    }
    for problem in problems
  ]


@functools.cache
def _package() -> ModuleType:
  """Imports reasoning-gym; raises InputError where it is not installed."""
  try:
    import reasoning_gym
    import reasoning_gym.utils
  except ImportError as error:
    raise InputError(
      f"tasks: need a package that is not installed ({error}); run: pip install"
      f" {PACKAGE}; its dependency pycosat needs a C compiler"
    ) from error
  return reasoning_gym

r"""Rejection sampling: writes answers that pass rewards, to fine-tune on.

  python -m experiments.sample --workdir=runs/sft \\
      --reject=chain_sum:max_terms=2:n=500 --rewards=exact=1 --out=good.jsonl

The questions are a file of conversations, whose last answers are taken to be
right, or tasks of the package reasoning-gym. --rewards names rewards, each with
what an answer must reach: exact (1 for the text of the right answer), task (the
score of the task, which can be too kind) and those of `posttrain.rewards`, such
as correctness=1,language=0.9. --out is a file that
`experiments.sft --data` reads; beside it, .counts.json says how many answers
were refused, and by which rule. Questions of --exclude, a file of
conversations, are not asked, so that what is held out elsewhere stays so.

With --system_prompt, --out has the two types of samples of section 5.1: each
question with its right answer, and the system prompt, the question and the
answer that passed. The model is asked without the system prompt.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from dsv3_jax import io
from dsv3_jax.data import conversations, tasks
from dsv3_jax.errors import InputError
from dsv3_jax.infer import generate
from dsv3_jax.posttrain import rejection, sample_types
from dsv3_jax.posttrain.rewards import REWARDS, by_name, reward

# Flags that mean nothing without --reject.
FLAGS = (
  "answers rewards keep language reward_model allow_code exclude system_prompt"
).split()
_PROBLEMS, _SEED = 1000, 1  # of a task without n; other ones than those of SFT


class Args(Protocol):
  """Flags that rejection sampling reads."""

  reject: str
  exclude: str
  system_prompt: str
  answers: int
  rewards: str
  keep: int
  out: str
  seed: int
  allow_code: bool
  language: str
  reward_model: str


def validate(args: Args) -> Iterator[str]:
  """Yields the problems of the flags."""
  if not args.out:
    yield "--reject: needs --out, the file of the answers that pass"
  elif not os.path.isdir(pathlib.Path(args.out).parent):
    yield f"--out={args.out}: there is no such folder"
  elif os.path.exists(args.out):
    yield f"--out={args.out}: is there already; take another name"
  if args.exclude and not os.path.isfile(args.exclude):
    yield f"--exclude={args.exclude}: there is no such file"
  for name in ("answers", "keep"):
    if (value := getattr(args, name)) < 1:
      yield f"--{name}={value}: must be at least 1"
  minimums = {}
  try:
    minimums = by_name.parse(args.rewards)
  except InputError as error:
    yield from (f"--{line}" for line in str(error).splitlines())
  if ("model" in minimums) != bool(args.reward_model):
    yield "--rewards=model and --reward_model: one needs the other"


def _questions(
  args: Args,
) -> tuple[list[rejection.Question], dict[str, reward.RewardFunction]]:
  """Returns the questions, and the reward of their tasks if they have one."""
  if os.path.exists(args.reject):
    read = conversations.read(pathlib.Path(args.reject))
    return rejection.from_conversations(read), dict(by_name.PLAIN)
  named = tasks.parse(args.reject)
  problems = tasks.split(named, _SEED, _PROBLEMS, 0).train
  score = by_name.of_tasks(named, problems)
  functions = {**by_name.PLAIN, by_name.TASK: score}
  return rejection.from_problems(problems), functions


def exclude(
  questions: list[rejection.Question], path: str
) -> list[rejection.Question]:
  """Leaves out questions that a file of conversations has; "" is no file.

  Raises InputError if the file cannot be read, or no question is left.
  """
  if not path:
    return questions
  read = conversations.read(pathlib.Path(path))
  held_out = {one.prompt for one in rejection.from_conversations(read)}
  left = [one for one in questions if one.prompt not in held_out]
  if not left:
    raise InputError(
      f"--exclude={path}: has all of the {len(questions)} questions; ask more,"
      " or exclude fewer"
    )
  return left


def _functions(
  args: Args,
  generator: generate.Generator,
  minimums: Mapping[str, float],
  functions: Mapping[str, reward.RewardFunction],
) -> dict[str, reward.RewardFunction]:
  """Makes the rewards that --rewards names."""
  result = {}
  for name in minimums:
    if name == by_name.TASK and name not in functions:
      raise InputError(
        f"--rewards={name}: --reject names no tasks but a file; use correctness"
      )
    if name in functions:
      result[name] = functions[name]
    else:
      result[name] = REWARDS[name](**_OPTIONS.get(name, _none)(args, generator))
  return result


def _none(args: Args, generator: generate.Generator) -> dict[str, Any]:
  del args, generator
  return {}


def format_options(args: Args, generator: generate.Generator) -> dict[str, Any]:
  """Returns how the model's template writes reasoning."""
  del args
  template = generator.defaults.template
  if template is None or template.reasoning is None:
    return {"thinking": False}
  begin, _ = template.reasoning
  thinking = bool(template.always_thinks or template.thinking)
  # Without a beginning of its own, the template has written <think> before.
  return {"thinking": thinking, "opened": thinking and not begin}


# Arguments of rewards that are made with more than their defaults.
_OPTIONS = {
  "code": lambda args, generator: {"allow_code": args.allow_code},
  "format": format_options,
  "language": lambda args, generator: {"target": args.language},
  "model": lambda args, generator: {"folder": args.reward_model},
  "judge": lambda args, generator: {"generator": generator},
}


def write(
  generator: generate.Generator, args: Args, settings: Mapping[str, Any]
) -> None:
  """Samples answers to all questions, and writes those that pass.

  Raises:
    InputError: the questions cannot be read or served, a reward is wrong, or
      no answer passed.
  """
  minimums = by_name.parse(args.rewards)
  drawn, functions = _questions(args)
  questions = exclude(drawn, args.exclude)
  for one in questions if args.system_prompt else ():
    if one.messages[0]["role"] == "system":
      raise InputError(
        "--system_prompt: a question has a system prompt already,"
        f" {one.messages[0]['content']!r:.60}; remove it from --reject"
      )
  functions = _functions(args, generator, minimums, functions)
  rules = rejection.Rules(minimums, args.keep)
  rejection.validate(functions, rules)
  texts = rejection.answer(generator, questions, args.answers, settings)
  kept = rejection.select(questions, texts, functions, rules)
  figures = {
    "excluded": len(drawn) - len(questions),
    "questions": len(questions),
    "solved": kept.solved,
    "answers": len(questions) * args.answers,
    **dict(kept.counts.most_common()),
  }
  for name, count in figures.items():
    print(f"{name:24} {count:,}")
  out = pathlib.Path(args.out)
  io.write_json(out.with_suffix(".counts.json"), figures)
  if not kept.rows:
    raise InputError(f"--out={out}: no answer passed; nothing is written")
  rows = kept.rows
  if args.system_prompt:
    rows = sample_types.of_answers(rows, args.system_prompt)
  conversations.write(out, rows)

r"""Post-training in one command: experts, samples, a student, a mixed RL stage.

  python -m experiments.posttrain --init_from=runs/demo --workdir=runs/chain
  python -m experiments.posttrain --init_from=runs/demo --workdir=runs/try \
      --quick

The chain of section 5.1. Each task of --tasks is a domain with an expert, which
is fine-tuned and then trained with GRPO. The experts answer questions, and what
is right makes the two types of samples: a question with its original answer,
and a system prompt, the question and the expert's answer. One student is
fine-tuned on these, and trained with GRPO on all tasks. Each model answers the
same held-out problems, greedily, none of which is in any training.

Every stage is a command of its own, printed before it runs. The same command
again resumes the stage that was under way and skips those before, which
stages.json lists. At the end, a table and results.json have the scores.
"""

import dataclasses
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsv3_jax import config, io
from dsv3_jax.errors import raise_problems
from dsv3_jax.posttrain import chain
from dsv3_jax.trainer import exit_codes, preemption, workdir
from experiments import cli, flag_parser
from experiments.flag_parser import flag

CHAIN, STAGES, RESULTS = "chain.json", "stages.json", "results.json"
# (arguments of Python) -> exit code.
Run = Callable[[Sequence[str]], int]


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags of the program."""

  workdir: str = flag("", "folder of the chain, with one for each stage")
  init_from: str = flag(
    "", "pre-trained run that experts and student begin with"
  )
  variant: str = flag(
    "tiny",
    f"recipes of the stages: {', '.join(chain.RECIPES)}",
    choices=tuple(chain.RECIPES),
  )
  tasks: str = flag(
    "", "domains, NAME:setting=value,...; default: sums, sorting, filtering"
  )
  seed: int = flag(0, "random seed of all stages", low=0)
  quick: bool = flag(False, "a chain of minutes, to try it")
  epochs: float | None = flag(
    None, "passes of an expert over its problems; default: the variant's"
  )
  student_epochs: float | None = flag(
    None, "passes of the student over all samples; default: the variant's"
  )
  iterations: int | None = flag(
    None, "iterations of each GRPO; default: the variant's", low=1
  )
  answers: int | None = flag(
    None, "answers to a question of the samples; default: the variant's", low=1
  )
  set_sft: tuple[str, ...] = flag(
    (), "a setting of fine-tuning, such as train.batch_size=8", repeated=True
  )
  set_grpo: tuple[str, ...] = flag(
    (), "a setting of GRPO, such as grpo.kl=k3", repeated=True
  )

  @property
  def chain(self) -> chain.Chain:
    """The chain that the flags ask for."""
    recipe = chain.RECIPES[self.variant]
    if self.quick:
      recipe = chain.quick(recipe)
    given = {
      name: value
      for name in ("epochs", "student_epochs", "iterations", "answers")
      if (value := getattr(self, name)) is not None
    }
    return chain.Chain(
      pathlib.Path(self.workdir),
      self.init_from,
      self.tasks or (chain.QUICK_TASKS if self.quick else chain.TASKS),
      dataclasses.replace(recipe, **given),
      self.seed,
      self.set_sft,
      self.set_grpo,
      self.quick,
    )

  def validate(self) -> Iterator[str]:
    """Yields the problems of the flags alone."""
    if not self.init_from:
      yield (
        "--init_from is missing: the pre-trained run that experts and student"
        " begin with, such as that of ./scripts/demo.sh, runs/demo"
      )
    if not self.workdir:
      yield "--workdir is missing: the folder that the chain writes to"
    for name in ("epochs", "student_epochs"):
      value = getattr(self, name)
      if value is not None and not 0 < value < math.inf:
        yield f"--{name}={value:g}: must be above 0"
      elif value is not None and self.quick:
        yield f"--{name}={value:g}: not with --quick, which counts tokens"


def read(argv: Sequence[str]) -> Args:
  """Reads the flags, and what they name.

  Raises:
    InputError: flags, tasks, settings or folders are wrong; lists all problems.
  """
  args, problems = flag_parser.read(Args, argv)
  problems += args.chain.validate()
  if args.workdir:
    folder = pathlib.Path(args.workdir)
    problems += _validate_workdir(folder, _identity(args))
  raise_problems(problems)
  return args


def _identity(args: Args) -> dict[str, Any]:
  """Returns what makes a chain another one, for chain.json."""
  whole = args.chain
  values = dataclasses.asdict(whole) | {
    "init_from": pathlib.Path(args.init_from).resolve()
  }
  del values["workdir"]
  return {name: str(value) for name, value in io.flatten(values).items()}


def _validate_workdir(
  folder: pathlib.Path, identity: dict[str, Any]
) -> Iterator[str]:
  """Yields why a folder cannot hold this chain."""
  if not os.path.isdir(folder):  # False for a name that is too long
    if os.path.exists(folder):
      yield f"--workdir={folder}: is a file; take a folder"
    return
  path = folder / CHAIN
  if path.exists():
    if changes := config.diff(io.read_json_object(path), identity):
      yield (
        f"--workdir={folder} belongs to another chain; take another folder or"
        " the old flags (there -> here):\n  " + "\n  ".join(changes)
      )
  elif others := sorted(
    one.name
    for one in folder.iterdir()
    if one.suffix not in workdir.LOGS
    and one.name != workdir.LOCK
    and not one.name.startswith(".")
  ):
    yield (
      f"--workdir={folder}: holds no chain but other things, such as"
      f" {others[0]}; take a new or an empty folder"
    )


class Processes:
  """Runs commands one at a time; a signal is passed on, and ends the chain.

  A command gets a process group of its own, so that a terminal does not send
  it the signal a second time, after which it would not save.
  """

  def __init__(self, keep_open: Sequence[int] = ()):
    """Prepares to run; `keep_open` are descriptors that commands inherit."""
    self._keep_open = keep_open
    self._process: subprocess.Popen[bytes] | None = None
    self._signals: list[int] = []

  def __enter__(self) -> "Processes":
    self._old = {
      number: signal.signal(number, self._receive)
      for number in preemption.SIGNALS
    }
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _receive(self, number: int, _: object) -> None:
    self._signals.append(number)
    if self._process:
      self._process.send_signal(number)

  def run(self, arguments: Sequence[str]) -> int:
    """Runs Python and returns its exit code, that of a signal below 0.

    Raises PreemptedError if a signal came, before or meanwhile.
    """
    if not self._signals:
      self._process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        process_group=0,
        pass_fds=self._keep_open,
      )
      for number in self._signals:  # before there was a process
        self._process.send_signal(number)
      code = self._process.wait()
      self._process = None
    if self._signals:
      name = signal.Signals(self._signals[0]).name
      raise exit_codes.PreemptedError(
        f"{name}: the chain ends; {workdir.rerun('resume', own_process=True)}"
      )
    return code


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Formats scores, a line for each stage and task."""
  lines = [("stage", "task", "strict", "lenient", "tokens", "time")]
  for row in rows:
    minutes, seconds = divmod(round(row["seconds"]), 60)
    lines.append(
      (
        *(row["stage"], row["task"]),
        *(f"{row[name]:.1%}" for name in ("strict", "lenient")),
        *(f"{row['tokens']:,}", f"{minutes}:{seconds:02}"),
      )
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i < 2 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )


def _run_stage(
  stage: chain.Stage, records: dict[str, Any], path: pathlib.Path, run: Run
) -> int:
  """Runs a stage and writes how it ended; returns its exit code."""
  if stage.before:
    stage.before()
  print(f"$ {shlex.join(['python', *stage.command])}", flush=True)
  start, code = time.time(), exit_codes.PREEMPTED
  try:
    code = run(stage.command)
  finally:
    earlier = records.get(stage.name, {"seconds": 0.0})["seconds"]
    seconds = earlier + time.time() - start
    records[stage.name] = {"seconds": seconds, "done": code == exit_codes.OK}
    io.write_json(path, records)
  return code


def run_chain(whole: chain.Chain, run: Run) -> int:
  """Runs the stages that are not done; returns the exit code.

  A stage is done if stages.json says so and its output is there.
  """
  whole.write_questions()
  path, rows = whole.workdir / STAGES, []
  records = io.read_json_object(path) if path.exists() else {}
  stages = whole.stages()
  for i, stage in enumerate(stages, 1):
    done = records.get(stage.name, {}).get("done") and stage.out.exists()
    at = f"[{i}/{len(stages)}] {stage.name}"
    print(f"{at}: done before" if done else at, flush=True)
    if not done and (code := _run_stage(stage, records, path, run)):
      again = "the same command again resumes"
      print(f"{stage.name}: ended with code {code}; {again}", file=sys.stderr)
      return exit_codes.INTERNAL if code < 0 else code
    if stage.asked:
      new = whole.scores(stage)
      for row in new:
        row["seconds"] = records[row["stage"]]["seconds"]
      print(table(new), flush=True)
      rows += new
  io.write_json(whole.workdir / RESULTS, whole.results(rows))
  print(f"\n{table(rows)}\n{whole.workdir / RESULTS} has these figures")
  return exit_codes.OK


def execute(args: Args) -> int:
  """Runs the chain in its folder, which is locked meanwhile."""
  whole = args.chain
  folder = whole.workdir
  folder.mkdir(parents=True, exist_ok=True)
  # A command shares the lock: where this process is killed and a command lives
  # on, no second chain begins beside it.
  with workdir.lock(folder) as lock, Processes([lock]) as processes:
    if not (folder / CHAIN).exists():
      io.write_json(folder / CHAIN, _identity(args))
    return run_chain(whole, processes.run)


def main() -> None:
  """Runs the program from the command line."""
  cli.run_main(
    lambda: execute(read(sys.argv)), lambda: flag_parser.help_text(Args)
  )


if __name__ == "__main__":
  main()

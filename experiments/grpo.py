r"""Reinforcement learning with GRPO (arXiv:2412.19437, section 5.2.2).

  python -m experiments.grpo --init_from=runs/sft --workdir=runs/grpo \
      --tasks=chain_sum:max_terms=2:max_digits=2,number_sorting

The policy is the model of --init_from, a fine-tuned run. In each iteration it
answers questions of the tasks, of the package reasoning-gym, several times; the
answers are scored, and those better than others to the same question become
more likely. Rewards and objective are settings, grpo.*, see --list_settings
and docs/objectives.md. The variant sets optimizer and schedule, not the model.

With --quick, 5 iterations of 4 questions, to see that all works.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from absl import flags, logging

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.data import tasks
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.infer.engine_options import validate_options
from dsv3_jax.interop import open_run
from dsv3_jax.posttrain import grpo, objectives
from dsv3_jax.posttrain.rewards import by_name
from dsv3_jax.trainer import run_args, trainer
from experiments import cli

_TASKS = flags.DEFINE_string("tasks", "", "tasks with settings, NAME,NAME,...")
_ITERATIONS = flags.DEFINE_integer(
  "iterations", None, "rounds of answers; default: the variant's"
)
_QUICK = flags.DEFINE_bool("quick", False, "a run of a minute, to try it")


def configure(
  variant: str, run: config.Run, settings: Sequence[str]
) -> config.Run:
  """Returns the run of the flags: the model and template of --init_from.

  Raises:
    InputError: a flag or setting is missing or wrong, or the source is no run.
  """
  source = flags.FLAGS.init_from
  problems = [
    *["--init_from is missing: the run whose model begins"] * (not source),
    *["--tasks is missing: what to ask, such as chain_sum"]
    * (not _TASKS.value),
  ]
  if _ITERATIONS.value is not None and _ITERATIONS.value < 1:
    problems.append(f"--iterations={_ITERATIONS.value}: must be at least 1")
  raise_problems(problems)
  base = open_run.run_from_config(open_run.read_config(pathlib.Path(source)))
  quick = "grpo.prompts=4 train.batch_size=4 evaluate.answers=20".split()
  run = config.override(
    base,
    *presets.GRPO[variant],
    *(quick if _QUICK.value else ()),
    f"data.source={config.TASKS}",
    f"data.path={_TASKS.value}",
  )
  run = cli.override(run, settings)
  tasks.parse(run.data.path)
  by_name.parse(run.grpo.rewards)
  if not run.grpo.prompts:
    problems.append("--set: grpo.prompts=0: must be at least 1")
  problems += validate_options(run.model, grpo.engine_options(run))
  raise_problems(problems)
  if any(one.startswith("train.tokens=") for one in settings):
    return run
  n = _ITERATIONS.value or presets.GRPO_ITERATIONS[variant]
  if _QUICK.value and not _ITERATIONS.value:
    n = 5
  steps = n * run.grpo.updates
  return config.override(run, f"train.tokens={steps * run.tokens_per_step}")


def execute(command: run_args.RunArgs) -> None:
  """Trains the policy."""
  if command.workdir is None:
    raise InputError("--workdir is missing: the folder that the run writes to")
  for note in objectives.notes(command.run.grpo):
    logging.warning("%s", note)
  cli.start_jax(command)
  trainer.fit(dataclasses.replace(command, open_batches=grpo.PolicyBatches))


def main() -> None:
  """Runs the program from the command line."""
  variants = {
    name: config.override(presets.TINY, *settings)
    for name, settings in presets.GRPO.items()
  }
  cli.main(variants, execute, configure)


if __name__ == "__main__":
  main()

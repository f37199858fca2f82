r"""Compares training in FP8 with training in BF16 (arXiv:2412.19437, app. B.1).

  python -m experiments.fp8 --variant=tiny --workdir=runs/fp8 [--seeds=3] \
      [--arms=bf16,fp8,again,blocks,fp32]

Trains the same run from the same weights on the same batches in each precision,
seed by seed, in folders such as bf16-0 of the workdir. Prints, draws (loss.png)
and writes (comparison.json) how far the loss is from that in BF16. The report
expects less than 0.25 %, of losses smoothed with an average of weight 0.9.

  bf16    the baseline
  fp8     fine-grained: tiles of 1 x 128, blocks of 128 x 128 for weights
  blocks  gradients of activations in blocks too, which the report found to
          diverge (appendix B.2)
  again   BF16 with sums in another order, in twice as many micro-batches: the
          same mathematics, so what two runs differ by without any reason
  fp32    float32
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import flags

from dsv3_jax import config, io
from dsv3_jax.config import presets
from dsv3_jax.errors import raise_problems
from dsv3_jax.report import plots, render
from dsv3_jax.trainer import metrics_writer, run_args, trainer
from experiments import cli

ARMS = {
  "bf16": ("precision.recipe=bf16",),
  "fp8": ("precision.recipe=fp8", "precision.gradient_tiles=rows"),
  "blocks": ("precision.recipe=fp8", "precision.gradient_tiles=blocks"),
  "again": ("precision.recipe=bf16",),
  "fp32": ("precision.recipe=fp32",),
}
BASELINE = "bf16"
SMOOTHING = 0.9  # weight of the past, as in the report's curves
BAR = 0.0025  # largest relative gap, appendix B.1

_ARMS = flags.DEFINE_list(
  "arms", ["bf16", "fp8", "again"], f"arms to train, of {', '.join(ARMS)}"
)
_SEEDS = flags.DEFINE_integer(
  "seeds", 3, "runs of each arm; their seeds start at --seed"
)

Losses = dict[str, np.ndarray]  # [seeds, steps] by arm


def smoothed(losses: np.ndarray) -> np.ndarray:
  """The exponential moving average over the last dim, with bias correction."""
  total, weight, out = 0.0, 0.0, []
  for loss in np.moveaxis(losses, -1, 0):
    total = SMOOTHING * total + (1 - SMOOTHING) * loss
    weight = SMOOTHING * weight + (1 - SMOOTHING)
    out.append(total / weight)
  return np.stack(out, -1)


def gaps(losses: Losses) -> Losses:
  """Relative differences of smoothed losses to the baseline's."""
  base = smoothed(losses[BASELINE])
  return {
    arm: smoothed(loss) / base - 1
    for arm, loss in losses.items()
    if arm != BASELINE
  }


def compare(losses: Losses, warmup: int) -> dict[str, dict[str, float]]:
  """Computes the largest gaps of each arm after warm-up, and the last one.

  `gap` is that of the mean over seeds, `worst_seed` that of the worst seed. A
  loss that is not finite makes them NaN.
  """
  return {
    arm: {
      "gap": float(np.abs(gap.mean(0)[warmup:]).max()),
      "worst_seed": float(np.abs(gap[:, warmup:]).max()),
      "last": float(gap[:, -1].mean()),
    }
    for arm, gap in gaps(losses).items()
  }


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
  """The comparison as text."""
  lines = [f"{'gap to ' + BASELINE:16}{'mean of seeds':>14}{'one seed':>10}"]
  for arm, row in rows.items():
    within = row["gap"] < BAR
    lines.append(
      f"{arm:16}{row['gap']:>14.3%}{row['worst_seed']:>10.3%}"
      f"  {'within' if within else 'NOT within'} {BAR:.2%}"
    )
  return "\n".join(lines)


def _problems(
  run: config.Run, arms: Sequence[str], seed: int, stop: int
) -> list[str]:
  problems = [
    f"--arms={arm}: one of {', '.join(ARMS)}" for arm in arms if arm not in ARMS
  ]
  if BASELINE not in arms:
    problems.append(f"--arms: needs {BASELINE}, the baseline of the others")
  if not 1 <= _SEEDS.value <= 2**32 - seed:
    problems.append(f"--seeds={_SEEDS.value}: must be at least 1")
  if stop <= run.warmup_steps:
    problems.append(
      f"--steps={stop}: must be more than the"
      f" {run.warmup_steps} steps of the warm-up"
    )
  return problems


def execute(command: run_args.RunArgs) -> None:
  """Trains all arms and compares them."""
  arms = list(dict.fromkeys(_ARMS.value))
  problems = _problems(command.run, arms, command.seed, command.stop)
  if command.workdir is None:
    problems.append("--workdir is missing: the folder of all runs")
  raise_problems(problems)
  runs = _runs(command, arms)
  cli.start_jax(command)
  for _, one in runs:
    trainer.fit(one)
    jax.clear_caches()
  if jax.process_index() == 0:
    _write(command, _losses(runs))


def _runs(
  command: run_args.RunArgs, arms: Sequence[str]
) -> list[tuple[str, run_args.RunArgs]]:
  """An arm and a command for each seed and arm."""
  runs = []
  for seed in range(command.seed, command.seed + _SEEDS.value):
    for arm in arms:
      run, workdir = _run(command.run, arm), command.workdir / f"{arm}-{seed}"
      one = dataclasses.replace(command, run=run, seed=seed, workdir=workdir)
      runs.append((arm, one))
  return runs


def _run(run: config.Run, arm: str) -> config.Run:
  n = run.train.micro_batches * (2 if arm == "again" else 1)
  return config.override(
    run, *ARMS[arm], f"train.micro_batches={n}", "evaluate.sample_tokens=0"
  )


def _losses(runs: Sequence[tuple[str, run_args.RunArgs]]) -> Losses:
  """Next-token losses of all steps; NaN where one was not finite."""
  by_arm: dict[str, list[np.ndarray]] = {}
  for arm, one in runs:
    rows = metrics_writer.read(one.workdir / metrics_writer.METRICS)
    loss = [row["main_loss"] for row in rows if "main_loss" in row]
    # As many as asked for: the run may have gone further before.
    by_arm.setdefault(arm, []).append(np.array(loss[: one.stop], float))
  return {arm: np.stack(losses) for arm, losses in by_arm.items()}


def _write(command: run_args.RunArgs, losses: Losses) -> None:
  """The comparison: on screen, as numbers and as a picture."""
  warmup = command.run.warmup_steps
  rows = compare(losses, warmup)
  print(table(rows))
  result = {"seeds": _SEEDS.value, "steps": command.stop}
  result |= {"warmup_steps": warmup, "arms": rows}
  path = command.workdir / "comparison.json"
  io.write_json(path, metrics_writer.to_json(result))
  length, done = command.run.data.seq_len, range(1, command.stop + 1)
  draw = functools.partial(
    plots.gaps,
    x=[command.run.rows_before(step) * length for step in done],
    curves={arm: smoothed(loss) for arm, loss in losses.items()},
    gaps=gaps(losses),
    bar=BAR,
    warmup=warmup,
  )
  (command.workdir / "loss.png").write_bytes(render.png(draw, 5.2))


def main() -> None:
  """Runs the program from the command line."""
  cli.main(presets.PRESETS, execute)


if __name__ == "__main__":
  main()

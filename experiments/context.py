r"""Extends the context of a small model; evaluates needles in haystacks.

  python -m experiments.context --variant=tiny --workdir=runs/context \
      [--lengths=2048,8192] [--questions=4]

Pre-trains on short texts, then extends the context with YaRN in phases, each
from the parameters of the one before (arXiv:2412.19437, section 4.3), in
folders of the workdir. Then facts are hidden in prompts of all lengths, at all
depths, and asked for. Prints and draws (needles.png, and in the last run's
report) the fraction of right answers:

  short         the pre-trained model, without any extension
  YaRN          the same parameters with YaRN's frequencies and temperature,
                trained no further
  to 2048, ...  after each phase
  without YaRN  trained on the same long texts, on the frequencies of the short
                ones (--without_yarn)
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import flags

from dsv3_jax import config, io
from dsv3_jax.config import presets
from dsv3_jax.data import tokenizer
from dsv3_jax.errors import raise_problems
from dsv3_jax.evals import hidden, needles
from dsv3_jax.interop import open_run
from dsv3_jax.parallel import layout_check
from dsv3_jax.report import page, plots, render
from dsv3_jax.trainer import distributed, metrics_writer, run_args, trainer
from experiments import cli

DEPTHS = tuple(np.linspace(0, 1, 11).tolist())
TOKENS_AT_ONCE = 1 << 15  # of prompts

_TINY = f"""
  vocab_size=2048 d_model=128 n_layers=3 dense_ffn_dim=256 init_std=0.045
  attention.n_heads=4 attention.q_rank=64 moe.ffn_dim=64
  router.bias_speed=0.003 data.heldout_fraction=0.01
  train.tokens=2457600 train.batch_size=16 optim.peak_lr=3e-3
  schedule.warmup_until={50 / 600} schedule.constant_until=0.8
  checkpoint.every=1000 evaluate.every=1000 evaluate.sample_tokens=0
"""
VARIANTS = {"tiny": config.override(presets.TINY, *_TINY.split())}
# Recipe of an extension.
PHASE_TOKENS, PHASE_LR, WARMUP_STEPS = 491_520, 1e-3, 5

_LENGTHS = flags.DEFINE_list(
  "lengths", ["2048", "8192"], "context lengths of the phases, in tokens"
)
_QUESTIONS = flags.DEFINE_integer(
  "questions", 4, "questions for each length and depth"
)
_WITHOUT = flags.DEFINE_bool(
  "without_yarn", False, "also train the phases without YaRN"
)


@dataclasses.dataclass(frozen=True)
class ContextPhase:
  """A training run at one context length."""

  name: str  # of the folder
  label: str
  run: config.Run
  start: str  # the phase whose parameters it begins with; "": none


def with_yarn(run: config.Run, longest: int) -> config.Run:
  """The run with YaRN frequencies for contexts of up to `longest` tokens."""
  short = run.data.seq_len
  return config.override(
    run,
    f"model.attention.yarn.factor={longest / short:g}",
    f"model.attention.yarn.original_len={short}",
  )


def phases(
  run: config.Run, lengths: Sequence[int], without_yarn: bool
) -> list[ContextPhase]:
  """Pre-training, and a phase for each length.

  All have the same YaRN, and go on with the last lambda and gamma.
  """
  planned = [ContextPhase("short", "short", run, "")]
  series = [("yarn", "", with_yarn(run, lengths[-1]))]
  if without_yarn:
    series.append(("plain", ", without YaRN", run))
  for lead, suffix, base in series:
    start = "short"
    for length in lengths:
      rows = max(PHASE_TOKENS // length, 1)
      size = max(run.train.batch_size * run.data.seq_len // length, 2)
      steps = rows // size
      longer = config.override(
        base,
        f"data.seq_len={length}",
        f"train.batch_size={size}",
        f"train.tokens={steps * size * length}",
        f"optim.peak_lr={PHASE_LR}",
        f"schedule.warmup_until={WARMUP_STEPS / max(steps, WARMUP_STEPS)}",
        "schedule.constant_until=0.5",
        *cli.end_values(run),
      )
      name = f"{lead}-{length}"
      planned.append(ContextPhase(name, f"to {length}{suffix}", longer, start))
      start = name
  return planned


def _problems(command: run_args.RunArgs) -> tuple[list[int], list[str]]:
  """The lengths asked for, and the problems of the command."""
  problems = []
  if command.workdir is None:
    problems.append("--workdir is missing: the folder of all runs")
  if command.processes.count > 1:
    problems.append("--processes: this experiment needs a single process")
  if command.init_from:
    problems.append("--init_from: this experiment trains from the start")
  if command.run.data.path:
    problems.append("--set: data.path: this experiment writes its own texts")
  if command.stop != command.run.total_steps:
    problems.append("--steps: phases end where their token budgets do")
  if _QUESTIONS.value < 1:
    problems.append(f"--questions={_QUESTIONS.value}: must be at least 1")
  short, lengths = command.run.data.seq_len, []
  for text in _LENGTHS.value:
    if not text.isdecimal() or int(text) <= (lengths or [short])[-1]:
      problems.append(
        f"--lengths={','.join(_LENGTHS.value)}: expected rising numbers of"
        f" tokens above the {short} of pre-training"
      )
      break
    lengths.append(int(text))
  if not _LENGTHS.value:
    problems.append("--lengths: needs at least one")
  return lengths, problems


def execute(command: run_args.RunArgs) -> None:
  """Trains all phases, then evaluates."""
  lengths, problems = _problems(command)
  planned = [] if problems else phases(command.run, lengths, _WITHOUT.value)
  for phase in planned:
    problems += layout_check.validate(phase.run, command.mesh)
  raise_problems(dict.fromkeys(problems))
  cli.start_jax(command)
  done = []
  for phase in planned:
    text = write_texts(phase.run, command.workdir, command.seed)
    run = config.override(phase.run, f"data.path={text}")
    one = dataclasses.replace(
      command,
      run=run,
      workdir=command.workdir / phase.name,
      stop=run.total_steps,
      init_from=command.workdir / phase.start if phase.start else None,
    )
    trainer.fit(one)
    jax.clear_caches()
    done.append(dataclasses.replace(phase, run=run))
  _evaluate(command, done, lengths)


def write_texts(
  run: config.Run, folder: pathlib.Path, seed: int
) -> pathlib.Path:
  """Writes texts as long as the run's rows, enough for one epoch.

  A file that exists is used as it is. Returns its path.
  """
  length = run.data.seq_len
  path = folder / f"texts-{length}.jsonl"
  if path.exists():
    return path
  with_heldout = 1 + 2 * run.data.heldout_fraction
  n = round(run.train.tokens / length * with_heldout) + 20
  rng = np.random.default_rng([seed, length])
  longest = length - needles.SPARE
  texts = (needles.training_text(rng, longest) for _ in range(n))
  folder.mkdir(parents=True, exist_ok=True)
  with io.atomic_write(path) as file:
    file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
  return path


def _models(
  command: run_args.RunArgs, done: Sequence[ContextPhase], longest: int
) -> Iterator[tuple[str, hidden.EvalModel]]:
  """Yields label and model of each phase, and the short one with YaRN."""
  mesh = distributed.mesh(command.mesh)
  for phase in done:
    folder = command.workdir / phase.name
    parts = open_run.load_newest_params(folder, phase.run, mesh)
    yield phase.label, hidden.EvalModel(*parts, phase.run, mesh)
    if not phase.start:
      yarn = with_yarn(phase.run, longest)
      yield "YaRN, not trained", hidden.EvalModel(*parts, yarn, mesh)


def _evaluate(
  command: run_args.RunArgs,
  done: Sequence[ContextPhase],
  lengths: Sequence[int],
) -> None:
  """Prints, writes and draws the grids of all models."""
  short = command.run.data.seq_len
  tested = [short]
  while tested[-1] * 2 < lengths[-1]:
    tested.append(tested[-1] * 2)
  tested = sorted({*tested, *lengths})
  folder = command.workdir / done[0].name / "data"
  tok = tokenizer.load(folder / "tokenizer.json")
  grids = {}
  print(f"{'right answers, %':28}" + "".join(f"{n:>8,}" for n in tested))
  for label, model in _models(command, done, lengths[-1]):
    n = _QUESTIONS.value
    grid = needles.grid(model, tok, tested, DEPTHS, n, TOKENS_AT_ONCE)
    grids[label] = grid.tolist()
    shares = "".join(f"{share:>8.1%}" for share in grid.mean(1))
    print(f"{label:28}{shares}", flush=True)
  axes = {"lengths": tested, "depths": DEPTHS}
  result = axes | {"prompts": _QUESTIONS.value, "right": grids}
  last = [phase for phase in done if phase.name.startswith("yarn")][-1]
  for path in (command.workdir, command.workdir / last.name):
    io.write_json(path / "needles.json", metrics_writer.to_json(result))
  draw = functools.partial(plots.needles, right=grids, **axes)
  height = plots.needles_height_in(len(grids))
  (command.workdir / "needles.png").write_bytes(render.png(draw, height))
  print(page.write(command.workdir / last.name))


def main() -> None:
  """Runs the program from the command line."""
  cli.main(VARIANTS, execute)


if __name__ == "__main__":
  main()

"""Speed of training, prefill and decoding, next to `transformers`.

  python -m scripts.bench --what=train,prefill,decode --shape=S --json
  python -m scripts.bench --what=decode --shape=S --against=transformers
  python -m scripts.bench --what=train --shape=S --precision=fp8 --against=bf16

Prints one line a metric. All is without MTP and on random token ids.

`train`: steps of AdamW with gradient clipping; in float32, or each side in a
precision of its own (FP8 is emulated on CPU). `prefill`: reads a prompt of 2048
tokens for the logits of its last one. `decode`: reads prompts of 128 tokens and
writes 128 more behind each, always the most likely one: a prompt alone, and 16
at the same time; only what is written counts as tokens, all of the time does.
These two are in float32.

With `--against` the two sides take turns, round by round, each in a process of
its own that sleeps while the other one runs; the ratio is that of neighbouring
rounds, so that a machine which slows down for a while slows both. Every batch
of every `--what` has processes of its own.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.plan import flops
from experiments import allocator, cli
from experiments.flag_parser import flag
from scripts.bench import worker as worker_lib

WHAT = ("train", "prefill", "decode")
SHAPES = ("S", "M", "tiny")
PRECISIONS = ("fp32", "bf16", "fp8")
RIVALS = ("transformers", *PRECISIONS)
ROUND_S = 4.0  # about as long is a round; it is of whole steps
PREFILL = 2048  # tokens of the prompt that is only read
PROMPT, NEW = 128, 128  # tokens of `decode`
BATCHES = (1, 16)  # of `decode`
OURS = "dsv3_jax"
Results = dict[str, dict[str, Any]]  # answers of workers by their name
OVERRIDES = ("mtp.depth=0",)  # transformers is without MTP
# Keeps freed memory: getting it back from the system costs torch page faults.
RIVAL_ENV = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": "100000000000",
  "MALLOC_TOP_PAD_": "67108864",
}


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  what: tuple[str, ...] = flag(
    ("train",), f"any of {', '.join(WHAT)}", choices=WHAT
  )
  shape: str = flag("S", "preset that gives model and batch", choices=SHAPES)
  json: bool = flag(False, "print one JSON object a line")
  precision: str = flag("fp32", "precision of this package", choices=PRECISIONS)
  against: str | None = flag(
    None, "another program, or this one in another precision", choices=RIVALS
  )
  baseline_python: str | None = flag(
    None,
    "interpreter that has torch and transformers; default: this one",
    old_name="rival_python",
  )
  rounds: int = flag(5, "rounds of each", low=1)

  def validate(self) -> Iterator[str]:
    """Yields what is wrong with the flags."""
    if not self.what:
      yield f"--what=: must name at least one of {', '.join(WHAT)}"
    fixed = [what for what in WHAT[1:] if what in self.what]
    for name in ("precision", "against"):
      value = getattr(self, name)
      if fixed and value in set(PRECISIONS) - {"fp32"}:
        yield f"--{name}={value}: {' and '.join(fixed)}: in float32 only"
    if self.against == self.precision:
      yield f"--against={self.against}: that is the --precision of ours"
    if self.against == "transformers":
      yield from self._baseline_problems()
    elif self.baseline_python:
      yield "--baseline_python: does nothing without --against=transformers"

  def _baseline_problems(self) -> Iterator[str]:
    if self.precision != "fp32":
      yield "--precision: transformers is in float32; compare to fp32"
    python = self.python
    imports = [python, "-c", "import torch, transformers"]
    if python is None:
      yield f"--baseline_python={self.baseline_python}: no such program"
    elif subprocess.run(imports, capture_output=True, check=False).returncode:
      yield (
        f"--baseline_python={python}: cannot import torch and transformers;"
        " give an interpreter that can"
      )
    if not shutil.which(os.environ.get("CXX", "g++")):
      yield "--against=transformers: torch.compile needs a C++ compiler, g++"

  @property
  def python(self) -> str | None:
    """The path of the interpreter of the baseline; None: there is none."""
    return shutil.which(self.baseline_python or sys.executable)


@dataclasses.dataclass(frozen=True)
class Load:
  """Work of one step of a worker."""

  what: str  # of `WHAT`
  batch: int  # texts of a step
  prompt: int  # tokens of each text that are read
  new: int = 0  # tokens that are written behind them, one after the other

  @property
  def seq(self) -> int:
    """Tokens of a text at the end."""
    return self.prompt + self.new

  @property
  def tokens(self) -> int:
    """Tokens of a step: those written, or else those read."""
    return self.batch * (self.new or self.prompt)

  def flops(self, model: config.Model) -> int:
    """Matmul FLOPs of a step; recomputation is not counted.

    The backward pass computes two products for each one of the forward pass.
    The last token that is written is not read any more.
    """
    if self.what == "train":
      return self.batch * 3 * flops.forward_flops(model, self.seq, self.seq)
    n_logits = max(1, self.new)
    n_tokens = self.prompt + n_logits - 1
    return self.batch * flops.forward_flops(model, n_tokens, n_logits)


def loads(what: str, cfg: config.Run) -> list[Load]:
  """Returns the loads that `--what` measures, in order."""
  if what == "train":
    return [Load(what, cfg.train.batch_size, cfg.data.seq_len)]
  if what == "prefill":
    return [Load(what, 1, PREFILL)]
  return [Load(what, batch, PROMPT, NEW) for batch in BATCHES]


def take_turns(
  workers: dict[str, subprocess.Popen],
  jobs: dict[str, dict[str, Any]],
  n_rounds: int,
) -> Results:
  """Sends each worker its job, one after the other, then lets them take turns.

  Returns each worker's answer to the job, with "rounds": its answers to
  the rounds, each with the "steps" that the round had.
  """
  results = {
    name: worker_lib.ask(worker, jobs[name]) | {"rounds": []}
    for name, worker in workers.items()
  }
  for _ in range(n_rounds):
    for name, worker in workers.items():
      steps = max(1, round(ROUND_S / results[name]["step_s"]))
      answer = worker_lib.ask(worker, {"steps": steps})
      results[name]["rounds"].append(answer | {"steps": steps})
  return results


@dataclasses.dataclass(frozen=True)
class Side:
  """A program that is compared."""

  python: str = sys.executable
  precision: str = "fp32"
  module: str = ""  # its worker; "": ours
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of theirs


def job(shape: str, load: Load, settings: Sequence[str]) -> dict[str, Any]:
  """Builds the first message to a worker; prompts depend on their number."""
  cfg = config.override(presets.PRESETS[shape], *settings)
  rng = np.random.default_rng(0)
  prompts = rng.integers(cfg.model.vocab_size, size=(load.batch, load.prompt))
  return {
    "shape": shape,
    "set": settings,
    "settings": config.flatten(cfg),
    "what": load.what,
    "prompts": [] if load.what == "train" else prompts.tolist(),
    "new": load.new,
  }


def measure(
  shape: str, load: Load, sides: dict[str, Side], n_rounds: int
) -> Results:
  """Starts a worker for each side; see `take_turns`."""
  root = str(pathlib.Path(__file__).resolve().parents[2])
  module = "against_jax" if load.what == "train" else "decode"
  ours = f"scripts.bench.{module}"
  # Only a training step allocates much once it is compiled.
  memory = allocator.mimalloc(keep_freed=load.what == "train")
  jobs, workers = {}, {}
  with contextlib.ExitStack() as stack:
    for name, side in sides.items():
      settings = *OVERRIDES, f"precision.recipe={side.precision}"
      jobs[name] = job(shape, load, settings)
      command = [side.python, "-m", side.module or ours]
      env = side.env if side.module else memory
      worker = worker_lib.start(command, env, root)
      workers[name] = stack.enter_context(worker)
    return take_turns(workers, jobs, n_rounds)


def _sides(args: Args) -> dict[str, Side]:
  """Returns the sides that the flags compare; ours first."""
  sides = {OURS: Side(precision=args.precision)}
  rival = args.against
  if rival == "transformers":
    python = os.path.abspath(args.python)
    module = "scripts.bench.against_transformers"
    sides[rival] = Side(python, module=module, env=RIVAL_ENV)
  elif rival:
    sides[rival] = Side(precision=rival)
  return sides


def _tokens_per_s(load: Load, result: dict[str, Any]) -> list[float]:
  rounds = result["rounds"]
  return [round(load.tokens * r["steps"] / r["seconds"], 1) for r in rounds]


def _idle_cpu(result: dict[str, Any]) -> float:
  """Processors that a worker kept busy while it waited for its turns."""
  rounds = result["rounds"]
  cpu_s = sum(r["idle_cpu_s"] for r in rounds)
  return round(cpu_s / sum(r["idle_s"] for r in rounds), 3)


def report(
  model: config.Model, shape: str, load: Load, results: Results
) -> Iterator[dict[str, Any]]:
  """Yields a metric each: ours, then the rival and the ratio if there is one.

  The peak is the fastest float32 matmul that any worker did in any round;
  `mfu` is the share of it that the model's own FLOPs took.
  """
  peak = max(r["peak_gflops"] for x in results.values() for r in x["rounds"])
  flops = load.flops(model) / load.tokens
  speeds = {name: _tokens_per_s(load, x) for name, x in results.items()}
  for name, result in results.items():
    tokens_per_s = statistics.median(speeds[name])
    yield {
      "what": load.what if name == OURS else f"{load.what}_{name}",
      "shape": shape,
      "batch": load.batch,
      "seq": load.seq,
      "tokens_per_s": tokens_per_s,
      "mfu": round(tokens_per_s * flops / (peak * 1e9), 4),
      "peak_gflops": round(peak, 1),
      "peak_rss_mib": round(result["rounds"][-1]["peak_rss_mib"]),
      "compile_s": round(result["compile_s"], 1),
      "rounds": speeds[name],
      "version": result["version"],
    }
  for name in results.keys() - {OURS}:
    ratios = [a / b for a, b in zip(speeds[OURS], speeds[name], strict=True)]
    yield {
      "what": f"{load.what}_ratio_to_{name}",
      "shape": shape,
      "batch": load.batch,
      "min": round(min(ratios), 3),
      "median": round(statistics.median(ratios), 3),
      "max": round(max(ratios), 3),
      "rounds": [round(ratio, 3) for ratio in ratios],
      "idle_cpu": {side: _idle_cpu(x) for side, x in results.items()},
    }


def _show(metric: dict[str, Any], as_json: bool) -> str:
  if as_json:
    return json.dumps(metric)
  return "  ".join(f"{name}={value}" for name, value in metric.items())


def execute(args: Args) -> int:
  """Measures and prints; returns the exit code."""
  cfg = config.override(presets.PRESETS[args.shape], *OVERRIDES)
  for load in [load for what in args.what for load in loads(what, cfg)]:
    try:
      results = measure(args.shape, load, _sides(args), args.rounds)
    except RuntimeError as error:
      print(f"error: {error}", file=sys.stderr)
      return cli.INTERNAL
    for metric in report(cfg.model, args.shape, load, results):
      print(_show(metric, args.json), flush=True)
  return cli.OK


def run() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)

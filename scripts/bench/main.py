"""Speed of training, prefill and decoding, next to other programs.

  python -m scripts.bench --what=train,prefill,decode --shape=S --json
  python -m scripts.bench --what=decode --shape=S --against=transformers
  python -m scripts.bench --what=decode --workdir=DIR --against=llama.cpp
  python -m scripts.bench --what=train --shape=S --precision=fp8 --against=bf16
  python -m scripts.bench --what=decode --shape=S --compare=FILE

Prints one line a metric; what it is doing is on standard error. All is without
MTP and on random token ids.

`train`: steps of AdamW with gradient clipping; in float32, or each side in a
precision of its own (FP8 is emulated on CPU). `prefill`: reads a prompt of 2048
tokens for the logits of its last one. `decode`: reads prompts of 128 tokens and
writes 128 more behind each, always the most likely one: a prompt alone, and 16
at the same time; only what is written counts as tokens, all of the time does.
These two are in float32, of random parameters or those of a run.

With `--against` the two sides take turns, round by round, each in a process of
its own that sleeps while the other one runs; the ratio is that of neighbouring
rounds, so that a machine which slows down for a while slows both. Every batch
of every `--what` has processes of its own.

With `--compare` the metrics are those of FILE, which holds lines of `--json`;
each is called slower, faster or within noise. The exit code is 1 if one of this
package, or a ratio, is slower by more than its noise.
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
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.errors import raise_problems
from dsv3_jax.interop import open_run
from dsv3_jax.trainer.terminal import Terminal
from experiments import allocator, cli
from experiments.flag_parser import flag
from scripts.bench import compare, gguf_file, turns
from scripts.bench import worker as worker_lib
from scripts.bench.load import WHAT, Load, job, loads
from scripts.bench.turns import Results

SHAPES = ("S", "M", "tiny")
PRECISIONS = ("fp32", "bf16", "fp8")
# Modules that the interpreter of another program must have.
IMPORTS = {
  "transformers": "torch, transformers",
  "llama.cpp": "xllamacpp, numpy",
}
RIVALS = (*IMPORTS, *PRECISIONS)
BATCHES = ("1", "16")
OURS = "dsv3_jax"
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
  shape: str | None = flag(
    None, f"preset of model and batch; default: {SHAPES[0]}", choices=SHAPES
  )
  workdir: str | None = flag(
    None, "run whose model and parameters read and write, instead of a shape"
  )
  batch: tuple[str, ...] = flag(
    BATCHES, "how many texts `decode` writes at the same time"
  )
  json: bool = flag(False, "print one JSON object a line")
  precision: str = flag("fp32", "precision of this package", choices=PRECISIONS)
  against: str | None = flag(
    None, "another program, or this one in another precision", choices=RIVALS
  )
  baseline_python: str | None = flag(
    None,
    "interpreter of the other program, with its modules; default: this one",
    old_name="rival_python",
  )
  rounds: int = flag(5, "rounds of each", low=1)
  compare: str | None = flag(None, "lines of --json of an earlier run")

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
    for batch in self.batch:
      if not (batch.isdecimal() and int(batch)):
        yield f"--batch={batch}: must be whole numbers of at least 1"
    if self.batch != BATCHES and "decode" not in self.what:
      yield "--batch: of --what=decode only; training has its shape's"
    if self.workdir:
      yield from self._workdir_problems()
    if self.compare and self.rounds < compare.MIN_ROUNDS:
      yield (
        f"--rounds={self.rounds}: at least {compare.MIN_ROUNDS} say how large"
        " the noise is, for --compare"
      )
    if self.against in IMPORTS:
      yield from self._baseline_problems()
    elif self.baseline_python:
      yield f"--baseline_python: of --against={' and '.join(IMPORTS)} only"

  def _workdir_problems(self) -> Iterator[str]:
    if self.shape:
      yield "--workdir: gives the model, as --shape does; give one of them"
    if "train" in self.what:
      yield "--workdir: train is of a --shape; take --what=prefill,decode"
    if self.against == "transformers":
      yield "--workdir: transformers draws random parameters; use --shape"

  def _baseline_problems(self) -> Iterator[str]:
    name, python = self.against, self.python
    if self.precision != "fp32":
      yield f"--precision: {name} is in float32; compare to fp32"
    imports = [python, "-c", f"import {IMPORTS[name]}"]
    if python is None:
      yield f"--baseline_python={self.baseline_python}: no such program"
    elif subprocess.run(imports, capture_output=True, check=False).returncode:
      modules = IMPORTS[name].replace(",", " and")
      yield (
        f"--baseline_python={python}: cannot import {modules};"
        " give an interpreter that can"
      )
    if name == "llama.cpp" and "train" in self.what:
      yield "--against=llama.cpp: does not train; take --what=prefill,decode"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if name == "transformers" and not compiler:
      yield "--against=transformers: torch.compile needs a C++ compiler, g++"

  @property
  def python(self) -> str | None:
    """The path of the interpreter of the baseline; None: there is none."""
    return shutil.which(self.baseline_python or sys.executable)

  @property
  def name(self) -> str:
    """The shape, or the workdir, whose model is measured."""
    return self.workdir or self.shape or SHAPES[0]

  def settings(self) -> list[str]:
    """Returns what differs from the shape: all settings of a workdir's run.

    Raises:
      InputError: the workdir holds no run.
    """
    if not self.workdir:
      return [*OVERRIDES]
    saved = open_run.read_config(pathlib.Path(self.workdir))
    flat = config.flatten(open_run.run_from_config(saved))
    return [*(f"{path}={value}" for path, value in flat.items()), *OVERRIDES]


@dataclasses.dataclass(frozen=True)
class Side:
  """A program that is compared."""

  python: str = sys.executable
  precision: str = "fp32"
  module: str = ""  # its worker; "": ours
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of theirs
  gguf: str = ""  # file that it reads


Sides = dict[str, Side]


def measure(args: Args, load: Load, sides: Sides, lines: Terminal) -> Results:
  """Starts a worker for each side; see `turns.take_turns`."""
  root = str(pathlib.Path(__file__).resolve().parents[2])
  module = "against_jax" if load.what == "train" else "decode"
  ours = f"scripts.bench.{module}"
  # Only a training step allocates much once it is compiled.
  memory = allocator.mimalloc(keep_freed=load.what == "train")
  workdir = os.path.abspath(args.workdir) if args.workdir else None
  jobs, workers = {}, {}
  with contextlib.ExitStack() as stack:
    for name, side in sides.items():
      settings = [*args.settings(), f"precision.recipe={side.precision}"]
      jobs[name] = job(args.shape or SHAPES[0], load, settings)
      jobs[name] |= {"workdir": workdir, "gguf": side.gguf}
      command = [side.python, "-m", side.module or ours]
      env = side.env if side.module else memory
      worker = worker_lib.start(command, env, root)
      workers[name] = stack.enter_context(worker)
    return turns.take_turns(workers, jobs, args.rounds, lines)


def _sides(args: Args, model: config.Model, folder: pathlib.Path) -> Sides:
  """Returns the sides that the flags compare, ours first.

  What the other one reads is written into a folder.
  """
  sides = {OURS: Side(precision=args.precision)}
  rival = args.against
  if rival == "transformers":
    python = os.path.abspath(args.python)
    module = "scripts.bench.against_transformers"
    sides[rival] = Side(python, module=module, env=RIVAL_ENV)
  elif rival == "llama.cpp":
    path = folder / "model.gguf"
    gguf_file.write(path, args.workdir, model)
    python = os.path.abspath(args.python)
    module = "scripts.bench.against_llama"
    sides[rival] = Side(python, module=module, gguf=str(path))
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
  `mfu` is the share of it that the model's own FLOPs took. `spread` is from
  the slowest to the fastest round, relative to the median.
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
      "spread": compare.spread(speeds[name]),
      "version": result["version"],
      "cpu": compare.cpu(),
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
      "spread": compare.spread(ratios),
      "idle_cpu": {side: _idle_cpu(x) for side, x in results.items()},
    }


def _show(metric: dict[str, Any], as_json: bool) -> str:
  if as_json:
    return json.dumps(metric)
  return "  ".join(f"{name}={value}" for name, value in metric.items())


def _measurements(
  args: Args, model: config.Model, todo: Sequence[Load], lines: Terminal
) -> Iterator[dict[str, Any]]:
  """Measures one load after the other, and yields its metrics."""
  with tempfile.TemporaryDirectory() as folder:
    sides = _sides(args, model, pathlib.Path(folder))
    for i, load in enumerate(todo, 1):
      lines.print(
        f"{load.what} {i}/{len(todo)}, {args.name}, batch {load.batch} of"
        f" {load.seq} tokens: {' and '.join(sides)}, {args.rounds} rounds of"
        f" about {turns.ROUND_S:g} s each"
      )
      results = measure(args, load, sides, lines)
      for metric in report(model, args.name, load, results):
        yield metric | {"precision": args.precision}


def _names(what: str, rival: str | None) -> list[str]:
  """Returns the names of a load's metrics: ours, the rival's, the ratio."""
  if not rival:
    return [what]
  return [what, f"{what}_{rival}", f"{what}_ratio_to_{rival}"]


def _read_earlier(args: Args, todo: Sequence[Load]) -> compare.Earlier:
  """Reads --compare; raises InputError if a metric to be measured is absent."""
  if not args.compare:
    return {}
  earlier = compare.read(pathlib.Path(args.compare))
  wanted = [
    (name, args.name, load.batch, args.precision)
    for load in todo
    for name in _names(load.what, args.against)
  ]
  raise_problems(list(compare.missing(args.compare, earlier, wanted)))
  return earlier


def execute(args: Args) -> int:
  """Measures and prints; returns the exit code."""
  shape = presets.PRESETS[args.shape or SHAPES[0]]
  cfg = config.override(shape, *args.settings())
  batches = [int(batch) for batch in args.batch]
  todo = [load for what in args.what for load in loads(what, cfg, batches)]
  earlier, slower = _read_earlier(args, todo), []
  with contextlib.closing(Terminal(None, sys.stderr)) as lines:
    try:
      for metric in _measurements(args, cfg.model, todo, lines):
        print(_show(metric, args.json), flush=True)
        if not (old := earlier.get(compare.key(metric))):
          continue
        for warning in compare.warnings(args.compare, old, metric):
          lines.print(f"warning: {warning}")
        verdict = compare.compare(old, metric)
        print(_show(verdict, args.json), flush=True)
        if compare.is_regression(verdict, WHAT):
          slower.append(compare.describe(compare.key(metric)))
    except RuntimeError as error:
      print(f"error: {error}", file=sys.stderr)
      return cli.INTERNAL
  if slower:
    print(
      f"slower than in {args.compare}: {'; '.join(slower)}", file=sys.stderr
    )
  return compare.SLOWER if slower else cli.OK


def run() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)

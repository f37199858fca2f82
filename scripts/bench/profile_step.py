"""Profile of a training step by named scope.

  python -m scripts.bench.profile_step [--shape=S] [--png=FILE] [--json]

Traces steps of `scripts.bench --what=train` with the profiler, and adds up how
long the devices spent in the operations of each scope: in matrix products, with
the speed that these reached, and in all else. A line a scope and pass, the
longest first; times are of a step, summed over devices. On CPU only: there a
trace names every operation of the compiled program.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from matplotlib.figure import Figure

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.report import render
from experiments import cli
from experiments.flag_parser import flag
from scripts.bench import against_jax, main

STEPS = 2  # traced
WARM_UP = 2
# Of several scopes around an operation, the first one here counts.
SCOPES = ("router", "experts", "shared", "dense", "loss", "embed", "optimizer")

_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s})\]])([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\(?\w+\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  shape: str = flag(
    "S", "preset that gives model and batch", choices=main.SHAPES
  )
  png: str = flag("", "also draw the table to this file")
  json: bool = flag(False, "print one JSON object a line")


@dataclasses.dataclass(frozen=True)
class Operation:
  """An instruction of a compiled program."""

  text: str  # behind its name
  scope: str  # op_name of its metadata
  calls: str | None  # the computation of a fusion


@dataclasses.dataclass
class Line:
  """Time of the operations of a scope, in one pass."""

  scope: str
  backward: bool
  product_ms: float = 0.0
  other_ms: float = 0.0
  flops: float = 0.0

  @property
  def ms(self) -> float:
    return self.product_ms + self.other_ms


class Program:
  """The operations of a compiled program, from its text."""

  def __init__(self, text: str):
    self.operations: dict[str, Operation] = {}
    self._bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
      if line.endswith("{") and " -> " in line:
        name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        body = self._bodies.setdefault(name, [])
      elif match := _NAME.match(line):
        name, rest = match.groups()
        scope = re.search(r'op_name="([^"]*)"', rest)
        calls = re.search(r"calls=%?([\w.\-]+)", rest)
        self.operations[name] = Operation(
          rest, scope[1] if scope else "", calls[1] if calls else None
        )
        body.append(name)

  def flops(self, name: str) -> int:
    """Returns the FLOPs of the matrix products in an operation."""
    operation = self.operations[name]
    if operation.calls:
      return sum(map(self.flops, self._bodies.get(operation.calls, ())))
    opcode = _OPCODE.search(operation.text)
    if not opcode or opcode[1] != "dot":
      return 0
    left = re.search(r"dot\([^%]*%([\w.\-]+)", operation.text)
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.text)
    if not left or not dims:
      return 0
    shape = _dims(self.operations[left[1]].text)
    contracted = math.prod(shape[int(i)] for i in dims[1].split(",") if i)
    return 2 * math.prod(_dims(operation.text)) * contracted


def _dims(text: str) -> list[int]:
  match = _SHAPE.match(text)
  return [int(n) for n in match[1].split(",") if n] if match else []


def self_times(events: Iterable[tuple[float, float, str]]) -> dict[str, float]:
  """Sums the times of the events of a thread by name, without those inside.

  Args:
    events: start, end and name of each.
  """
  times: dict[str, float] = collections.defaultdict(float)
  around: list[tuple[float, str]] = []
  for start, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
    while around and around[-1][0] <= start:
      around.pop()
    if around:
      times[around[-1][1]] -= end - start
    times[name] += end - start
    around.append((end, name))
  return times


def _traced(folder: str) -> tuple[dict[str, float], dict[str, int]]:
  """Returns nanoseconds and number of the events in a trace, by name."""
  path = next(pathlib.Path(folder).rglob("*.xplane.pb"))
  data = jax.profiler.ProfileData.from_file(str(path))
  times: dict[str, float] = collections.Counter()
  counts: dict[str, int] = collections.Counter()
  for plane in data.planes:
    for thread in plane.lines:
      if not thread.name.startswith("tf_XLA"):
        continue
      events = [
        (e.start_ns, e.start_ns + e.duration_ns, e.name)
        for e in thread.events
        if not e.name.startswith("end:")
      ]
      for name, ns in self_times(events).items():
        times[name] += ns
      counts.update(name for *_, name in events)
  return times, counts


def scope_of(op_name: str, scopes: Iterable[str]) -> tuple[str, bool]:
  """Returns the scope of an operation, and whether its pass is backward."""
  words = set(re.findall(r"[A-Za-z_]\w*", op_name))
  scope = next((name for name in scopes if name in words), "other")
  return scope, "transpose(" in op_name


def table(
  program: Program,
  times: dict[str, float],
  counts: dict[str, int],
  scopes: Iterable[str],
) -> list[Line]:
  """Adds up a trace of `STEPS` steps, the longest line first."""
  lines: dict[tuple[str, bool], Line] = {}
  scopes = tuple(scopes)
  for name, ns in times.items():
    if name not in program.operations:
      continue
    key = scope_of(program.operations[name].scope, scopes)
    line = lines.setdefault(key, Line(*key))
    ms = ns / 1e6 / STEPS
    if flops := program.flops(name):
      line.product_ms += ms
      line.flops += flops * counts[name] / STEPS
    else:
      line.other_ms += ms
  return sorted(lines.values(), key=lambda line: -line.ms)


def measure(run: config.Run) -> list[Line]:
  """Compiles and traces the training step of a run."""
  step, program = against_jax.training(run)
  for _ in range(WARM_UP):
    step()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(STEPS):
        step()
    times, counts = _traced(folder)
  scopes = (*SCOPES, run.model.attention.type)
  return table(Program(program()), times, counts, scopes)


def _rows(lines: list[Line]) -> Iterator[dict[str, Any]]:
  total = sum(line.ms for line in lines)
  for line in lines:
    gflops = line.flops / line.product_ms / 1e6 if line.product_ms else 0.0
    yield {
      "scope": line.scope,
      "pass": "backward" if line.backward else "forward",
      "ms": round(line.ms, 1),
      "share": round(line.ms / total, 4),
      "product_ms": round(line.product_ms, 1),
      "gflops": round(gflops, 1),
      "other_ms": round(line.other_ms, 1),
    }


def _draw(figure: Figure, lines: list[Line]) -> None:
  axes = figure.subplots()
  total = sum(line.ms for line in lines) / 100
  names = [
    f"{line.scope}, {'backward' if line.backward else 'forward'}"
    for line in lines
  ]
  products = [line.product_ms / total for line in lines]
  others = [line.other_ms / total for line in lines]
  axes.barh(names, products, label="matrix products")
  axes.barh(names, others, left=products, label="all else")
  axes.invert_yaxis()
  axes.set_xlabel("% of a training step")
  axes.legend(frameon=False, loc="lower right")


def execute(args: Args) -> int:
  """Measures, prints and draws; returns the exit code."""
  jax.config.update("jax_num_cpu_devices", against_jax.cores())
  run = config.override(presets.PRESETS[args.shape], *main.OVERRIDES)
  lines = measure(run)
  rows = list(_rows(lines))
  if args.json:
    for row in rows:
      print(json.dumps(row))
  else:
    print("| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
      print("| " + " | ".join(map(str, row.values())) + " |")
  if args.png:
    height = 1.0 + 0.28 * len(lines)
    image = render.png(lambda figure: _draw(figure, lines), height)
    pathlib.Path(args.png).write_bytes(image)
  return cli.OK


if __name__ == "__main__":
  cli.run_script(execute, Args)

"""Growth of time and memory with the sizes of model, batch and text.

  python -m scripts.bench.growth --what=train,decode --rows=growth.jsonl
      [--dims=layers,width] [--png=FILE]

From a small model on, one size at a time is doubled three times. The four
processes of a size take turns, round by round. Each point is a line of --rows,
so that the same command again measures only what is missing. Printed is the
exponent of each size: the slope of least squares through the logarithms of the
upper half, of the seconds of a step (with the least and the greatest of all
rounds), of its FLOPs and of its memory, without that of imported modules.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError
from dsv3_jax.report import axes as axes_lib
from dsv3_jax.report import render
from dsv3_jax.trainer.terminal import Terminal
from experiments import allocator, cli
from experiments.flag_parser import flag
from scripts.bench import turns
from scripts.bench import worker as worker_lib
from scripts.bench.load import Load, job

ROUND_S = 1.0
COLUMNS, ROW_IN = 3, 1.9  # of the picture
BASE = {
  "layers": 4,
  "width": 128,
  "experts": 16,
  "batch": 8,
  "sequence": 256,
  "devices": 0,  # as many as there are cores
}
# Of decode a text is read at the start, and then written up to `cache`.
DECODE = BASE | {"batch": 1, "sequence": 16, "cache": 128}
GROWTH = {
  "train": {
    "layers": (2, 4, 8, 16),
    "width": (64, 128, 256, 512),
    "experts": (8, 16, 32, 64),
    "sequence": (128, 256, 512, 1024),
    "batch": (4, 8, 16, 32),
    "devices": (1, 2, 4, 8),
  },
  "decode": {
    "layers": (2, 4, 8, 16),
    "width": (64, 128, 256, 512),
    "experts": (8, 16, 32, 64),
    "batch": (1, 4, 16, 64),
    "cache": (128, 256, 512, 1024),
  },
}
DIMS = tuple(dict.fromkeys(dim for dims in GROWTH.values() for dim in dims))
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  what: tuple[str, ...] = flag(("train",), "what grows", choices=tuple(GROWTH))
  dims: tuple[str, ...] = flag(DIMS, "sizes that are doubled", choices=DIMS)
  rows: str = flag("growth.jsonl", "file of points, read and appended to")
  rounds: int = flag(3, "rounds of each point", low=1)
  png: str | None = flag(None, "picture of all points of --rows")


def settings(sizes: Mapping[str, int]) -> list[str]:
  """Returns the settings of a model; everything in it has the width's scale."""
  width = sizes["width"]
  return [
    "mtp.depth=0",
    "vocab_size=2048",
    f"n_layers={sizes['layers']}",
    f"d_model={width}",
    f"dense_ffn_dim={4 * width}",
    f"attention.n_heads={width // 32}",
    f"attention.q_rank={width // 2}",
    f"attention.kv_rank={width // 4}",
    f"moe.ffn_dim={width // 2}",
    f"router.n_experts={sizes['experts']}",
    f"train.batch_size={sizes['batch']}",
    f"data.seq_len={sizes['sequence']}",
  ]


def make_load(what: str, sizes: Mapping[str, int]) -> Load:
  """Returns the load of a step."""
  batch, sequence = sizes["batch"], sizes["sequence"]
  new = sizes["cache"] - sequence if what == "decode" else 0
  return Load(what, batch, sequence, new)


def grow(what: str, dim: str) -> Iterator[tuple[int, dict[str, int]]]:
  """Yields the values of a size, each with the sizes of its point."""
  base = DECODE if what == "decode" else BASE
  for value in GROWTH[what][dim]:
    yield value, base | {dim: value}


def measure(what: str, dim: str, n_rounds: int, lines: Terminal) -> list[Row]:
  """Measures the points of one size."""
  root = str(pathlib.Path(__file__).resolve().parents[2])
  module = {"train": "against_jax", "decode": "decode"}[what]
  command = [sys.executable, "-m", f"scripts.bench.{module}"]
  memory = allocator.mimalloc(keep_freed=False)
  workers, jobs, rows = {}, {}, {}
  with contextlib.ExitStack() as stack:
    for value, sizes in grow(what, dim):
      load, name = make_load(what, sizes), f"{what} {dim}={value}"
      jobs[name] = job("S", load, settings(sizes)) | {"reset_peak": True}
      env = memory
      if n := sizes["devices"]:
        env = memory | {"JAX_NUM_CPU_DEVICES": str(n)}
      workers[name] = stack.enter_context(worker_lib.start(command, env, root))
      model = config.override(presets.S, *settings(sizes)).model
      rows[name] = {"what": what, "dim": dim, "value": value}
      rows[name] |= {"tokens": load.tokens, "flops": load.flops(model)}
    results = turns.take_turns(workers, jobs, n_rounds, lines, ROUND_S)
  for name, result in results.items():
    rounds = result["rounds"]
    peak_mib = max(r["peak_rss_mib"] for r in rounds)
    rows[name] |= {
      "seconds": [r["seconds"] / r["steps"] for r in rounds],
      "memory_mib": peak_mib - result["import_rss_mib"],
    }
  return list(rows.values())


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
  """Returns the slope of log y over log x in the upper half, 3 points at least.

  Below, what does not grow hides what does.
  """
  n = max(3, len(x) // 2)
  slope, _ = np.polyfit(np.log(x[-n:]), np.log(y[-n:]), 1)
  return float(slope)


def summarize(points: Sequence[Row]) -> dict[str, Any]:
  """Returns the exponents of the points of a size, in its order.

  `seconds` is the median of the rounds, `low` and `high` the extremes.
  """
  x = [point["value"] for point in points]
  rounds = zip(*(point["seconds"] for point in points), strict=True)
  slopes = [exponent(x, seconds) for seconds in rounds]
  return {
    "seconds": statistics.median(slopes),
    "low": min(slopes),
    "high": max(slopes),
    "flops": exponent(x, [point["flops"] for point in points]),
    "memory": exponent(x, [point["memory_mib"] for point in points]),
  }


def by_dim(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
  """Returns the points of each size that has all of its own, in order."""
  found = {(r["what"], r["dim"], r["value"]): r for r in rows}
  result = {}
  for what, dims in GROWTH.items():
    for dim, values in dims.items():
      points = [found.get((what, dim, value)) for value in values]
      if all(points):
        result[what, dim] = points
  return result


def table(rows: Sequence[Row]) -> str:
  """Returns the exponents as a table in Markdown."""
  lines = [
    "| | values | tokens/s | time | FLOPs | memory, MiB | memory |",
    "|---|---|---|---|---|---|---|",
  ]
  for (what, dim), points in by_dim(rows).items():
    found = summarize(points)
    speeds = [p["tokens"] / statistics.median(p["seconds"]) for p in points]
    lines.append(
      f"| {what}, {dim} | {points[0]['value']} to {points[-1]['value']}"
      f" | {speeds[0]:,.0f} to {speeds[-1]:,.0f}"
      f" | {found['seconds']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
      f" | {found['flops']:.2f}"
      f" | {points[0]['memory_mib']:.0f} to {points[-1]['memory_mib']:.0f}"
      f" | {found['memory']:.2f} |"
    )
  return "\n".join(lines)


def draw(figure: Figure, rows: Sequence[Row]) -> None:
  """Draws time, FLOPs and memory of each size, as multiples of the first."""
  panels = by_dim(rows)
  n_rows = -(-len(panels) // COLUMNS)
  grid = figure.subplots(n_rows, COLUMNS, squeeze=False).flat
  for axes, ((what, dim), points) in zip(grid, panels.items(), strict=False):
    x = [point["value"] for point in points]
    curves = {
      "time of a step": [statistics.median(p["seconds"]) for p in points],
      "memory": [point["memory_mib"] for point in points],
      "FLOPs": [point["flops"] for point in points],
    }
    for (label, y), style in zip(
      curves.items(), ("o-", "s-", "--"), strict=True
    ):
      first = axes is figure.axes[0]
      multiples = [value / y[0] for value in y]
      axes.plot(x, multiples, style, markersize=3, label=label if first else "")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(x, [f"{value:,}" for value in x])
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g x"))
    axes.set_title(f"{what}: {dim}")
    axes.grid(True, axis="y")
  for axes in list(figure.axes)[len(panels) :]:
    axes.remove()
  axes_lib.legend(figure)


def read(path: pathlib.Path) -> list[Row]:
  """Reads the points of a file, none if there is no file.

  Raises:
    InputError: it holds something else.
  """
  if not path.exists():
    return []
  try:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_dim(rows)
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise InputError(f"--rows={path}: holds other lines than points") from error
  return rows


def execute(args: Args) -> None:
  """Measures what is missing, then prints the table and draws the picture."""
  path = pathlib.Path(args.rows)
  rows = read(path)
  todo = [
    (what, dim)
    for what in args.what
    for dim in args.dims
    if dim in GROWTH[what] and (what, dim) not in by_dim(rows)
  ]
  with contextlib.closing(Terminal(None, sys.stderr)) as lines:
    for what, dim in todo:
      points = measure(what, dim, args.rounds, lines)
      rows += points
      with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(point) + "\n" for point in points)
  print(table(rows))
  if args.png:
    height_in = ROW_IN * -(-len(by_dim(rows)) // COLUMNS)
    picture = render.png(functools.partial(draw, rows=rows), height_in)
    pathlib.Path(args.png).write_bytes(picture)


def main() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)


if __name__ == "__main__":
  main()

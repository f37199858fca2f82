r"""Operations, makespan and peak activations of a pipeline schedule.

  python -m scripts.schedule --schedule=dualpipe --ranks=8 --microbatches=20 \
      [--times=F=1,B=2,W=1,FB=3] [--comm=0] [--png=FILE] [--json]

Prints the schedule as it runs, time downwards and a column a rank, or one JSON
object.
"""

import bisect
import dataclasses
import json
import pathlib
from collections.abc import Iterator

from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.parallel.pipeline import schedules, simulate, tick_table
from dsv3_jax.parallel.pipeline.schedules import Schedule
from dsv3_jax.report import schedule_plot
from experiments import cli
from experiments.flag_parser import flag

TIMES = ("F", "B", "W", "FB")


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags; each is checked alone by its type, together by `validate`."""

  schedule: str = flag("dualpipe", f"one of {', '.join(schedules.SCHEDULES)}")
  ranks: int = flag(8, "pipeline ranks")
  microbatches: int = flag(20, "micro-batches of a step, both directions")
  times: str = flag("", "such as F=1,B=2,W=1,FB=3; B includes W, FB is a pair")
  comm: float = flag(0.0, "time to send a result from rank to rank")
  png: str = flag("", "file to draw the schedule into")
  json: bool = flag(False, "print JSON")

  def validate(self) -> Iterator[str]:
    """Yields what is wrong with the flags."""
    yield from schedules.validate(self.schedule, self.ranks, self.microbatches)
    try:
      self.durations()
    except InputError as error:
      yield from str(error).splitlines()
    path = pathlib.Path(self.png)
    if self.png and not (path.parent.is_dir() and path.suffix == ".png"):
      yield f"--png={path}: must be a .png file in a folder that exists"

  def durations(self) -> simulate.Times:
    """The duration of each operation, as `times` and `comm` give it.

    Raises:
      InputError: an operation is unknown, or its duration is no number.
    """
    durations, problems = {"comm": self.comm}, []
    for part in filter(None, self.times.split(",")):
      name, _, value = part.partition("=")
      if name not in TIMES:
        problems.append(f"--times={part}: must be one of {', '.join(TIMES)}")
        continue
      try:
        durations[name] = float(value)
      except ValueError:
        problems.append(f"--times={part}: expected a number")
    try:
      times = simulate.Times(**durations)
    except InputError as error:
      problems += str(error).splitlines()
    raise_problems(problems)
    return times


def _exact(time: float) -> float:
  """Without the rounding errors of a sum."""
  return round(time, 9)


def as_json(schedule: Schedule, timeline: simulate.Timeline) -> str:
  """One object; its lists have an entry a rank."""
  return json.dumps(
    {
      "ops": schedule.names(),
      "makespan": _exact(timeline.makespan),
      "idle": [_exact(time) for time in timeline.idle],
      "peak_activations": timeline.peak_activations,
    }
  )


def _label(cell: schedules.Cell) -> str:
  return "&".join(f"{o.kind}{o.direction}:{o.micro_batch}" for o in cell)


def as_text(
  schedule: Schedule, timeline: simulate.Timeline, times: simulate.Times
) -> str:
  """A table of time and ranks, and its totals."""
  lines = [
    f"{schedule.name}: {schedule.n_ranks} ranks,"
    f" {schedule.n_micro} micro-batches; kind, direction : micro-batch",
    "",
    *_table(schedule, timeline),
    "",
    *_ranks(schedule, timeline),
    "",
    *_totals(schedule, timeline, times),
  ]
  return "\n".join(line.rstrip() for line in lines)


def _table(schedule: Schedule, timeline: simulate.Timeline) -> Iterator[str]:
  """A line for each time at which a cell starts or a rank falls idle."""
  cells = [
    (rank, _exact(start), _exact(end), _label(cell))
    for rank, start, end, cell in timeline.cells(schedule)
  ]
  edges = {time for _, start, end, _ in cells for time in (start, end)}
  *moments, _ = sorted(edges)
  rows = [["."] * schedule.n_ranks for _ in moments]
  for rank, start, end, label in cells:
    first = bisect.bisect_left(moments, start)
    for i in range(first, bisect.bisect_left(moments, end)):
      rows[i][rank] = label if i == first else "|"
  heads = [f"rank {rank}" for rank in range(schedule.n_ranks)]
  width = 2 + max(map(len, [*heads, *(label for *_, label in cells)]))
  for moment, row in zip(["time", *moments], [heads, *rows], strict=True):
    at = moment if moment == "time" else f"{moment:g}"
    yield f"{at:>7}  " + "".join(f"{entry:{width}}" for entry in row)


def _ranks(schedule: Schedule, timeline: simulate.Timeline) -> Iterator[str]:
  yield f"{'rank':>7}  {'stages':8}{'idle':>8}{'peak activations':>18}"
  for rank, stages in enumerate(schedule.stages):
    held = ", ".join(map(str, stages))
    idle, peak = _exact(timeline.idle[rank]), timeline.peak_activations[rank]
    yield f"{rank:7}  {held:8}{idle:8g}{peak:18}"


def _totals(
  schedule: Schedule, timeline: simulate.Timeline, times: simulate.Times
) -> Iterator[str]:
  formula = simulate.bubble(schedule.name, schedule.n_ranks, times)
  idle, makespan = max(timeline.idle), timeline.makespan
  yield (
    f"makespan {makespan:g}, of which a rank is idle {_exact(idle):g} at most"
    f" ({idle / makespan:.1%})"
  )
  yield f"bubble by the formula, without communication: {_exact(formula):g}"
  yield f"{len(tick_table.to_ticks(schedule))} ticks in lock-step"


def execute(args: Args) -> None:
  """Prints, and draws, the schedule."""
  schedule = schedules.SCHEDULES[args.schedule](args.ranks, args.microbatches)
  times = args.durations()
  timeline = simulate.simulate(schedule, times)
  if args.png:
    pathlib.Path(args.png).write_bytes(schedule_plot.png(schedule, timeline))
  if args.json:
    print(as_json(schedule, timeline))
  else:
    print(as_text(schedule, timeline, times))


def main() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)


if __name__ == "__main__":
  main()

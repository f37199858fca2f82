r"""What a pipeline schedule does, how long it takes and what it keeps.

  python -m scripts.schedule --schedule=dualpipe --ranks=8 --microbatches=20 \
      [--times=F=1,B=2,W=1,FB=3] [--comm=0] [--png=FILE] [--json]

Prints the schedule as it runs, time downwards and a column a rank, or one JSON
object.
"""

import bisect
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from dsv3_jax.config import fields
from dsv3_jax.errors import InputError
from dsv3_jax.parallel.pipeline import schedules, simulate, tick_table
from dsv3_jax.report import schedule_plot

TIMES = ("F", "B", "W", "FB")


@dataclasses.dataclass(frozen=True)
class Command:
  """A command line that was found good."""

  schedule: schedules.Schedule
  times: simulate.Times
  png: pathlib.Path | None
  json: bool


# --- what is printed ---


def _exact(time: float) -> float:
  """Without the rounding errors of a sum."""
  return round(time, 9)


def as_json(schedule: schedules.Schedule, timeline: simulate.Timeline) -> str:
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
  schedule: schedules.Schedule,
  timeline: simulate.Timeline,
  times: simulate.Times,
) -> str:
  """A table of time and ranks, and what it comes to."""
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


def _table(
  schedule: schedules.Schedule, timeline: simulate.Timeline
) -> Iterator[str]:
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


def _ranks(
  schedule: schedules.Schedule, timeline: simulate.Timeline
) -> Iterator[str]:
  yield f"{'rank':>7}  {'stages':8}{'idle':>8}{'peak activations':>18}"
  for rank, stages in enumerate(schedule.stages):
    held = ", ".join(map(str, stages))
    idle, peak = _exact(timeline.idle[rank]), timeline.peak_activations[rank]
    yield f"{rank:7}  {held:8}{idle:8g}{peak:18}"


def _totals(
  schedule: schedules.Schedule,
  timeline: simulate.Timeline,
  times: simulate.Times,
) -> Iterator[str]:
  formula = simulate.bubble(schedule.name, schedule.n_ranks, times)
  idle, makespan = max(timeline.idle), timeline.makespan
  yield (
    f"makespan {makespan:g}, of which a rank is idle {_exact(idle):g} at most"
    f" ({idle / makespan:.1%})"
  )
  yield f"bubble by the formula, without communication: {_exact(formula):g}"
  yield f"{len(tick_table.to_ticks(schedule))} ticks in lock-step"


# --- the command ---


def _flags() -> flags.FlagValues:
  """Of this command only, whoever imports it; numbers are checked later."""
  known = flags.FlagValues()
  for name, default, told in (
    ("schedule", "dualpipe", f"one of {', '.join(schedules.SCHEDULES)}"),
    ("ranks", "8", "pipeline ranks"),
    ("microbatches", "20", "of a step, over both directions"),
    ("times", "", "such as F=1,B=2,W=1,FB=3; B includes W, FB is a pair"),
    ("comm", "0", "time that a result takes from rank to rank"),
    ("png", "", "file to draw the schedule into"),
  ):
    flags.DEFINE_string(name, default, told, flag_values=known)
  for name, told in (("json", "print JSON"), ("help", "show this help")):
    flags.DEFINE_boolean(name, False, told, flag_values=known)
  return known


def _unread(known: flags.FlagValues, rest: Sequence[str]) -> Iterator[str]:
  for text in rest:
    name = text.lstrip("-").partition("=")[0]
    if text.startswith("-"):
      yield f"unknown flag {text!r}{fields.nearest(name, known)}"
    else:
      yield f"stray argument {text!r}: settings are --flag=value"


def _number(text: str, kind: type, what: str, problems: list[str]):
  """A number, or None and a problem more."""
  try:
    return kind(text)
  except ValueError:
    whole = "a whole number" if kind is int else "a number"
    problems.append(f"{what}: expected {whole}")


def _times(
  known: flags.FlagValues, problems: list[str]
) -> simulate.Times | None:
  """The times asked for, or None and more problems."""
  found, n_before = {}, len(problems)
  for part in filter(None, known.times.split(",")):
    name, _, value = part.partition("=")
    if name not in TIMES:
      problems.append(f"--times={part}: must be one of {', '.join(TIMES)}")
    else:
      found[name] = _number(value, float, f"--times={part}", problems)
  found["comm"] = _number(known.comm, float, f"--comm={known.comm}", problems)
  found = {name: n for name, n in found.items() if n is not None}
  try:
    times = simulate.Times(**found)
  except InputError as error:
    problems += str(error).splitlines()
  return None if len(problems) > n_before else times


def _schedule(
  known: flags.FlagValues, problems: list[str]
) -> schedules.Schedule | None:
  """The schedule asked for, or None and more problems."""
  sizes = [
    _number(known[flag].value, int, f"--{flag}={known[flag].value}", problems)
    for flag in ("ranks", "microbatches")
  ]
  if None in sizes:
    if known.schedule not in schedules.SCHEDULES:
      problems += schedules.validate(known.schedule, 1, 1)
    return None
  more = schedules.validate(known.schedule, *sizes)
  problems += more
  return None if more else schedules.SCHEDULES[known.schedule](*sizes)


def parse(argv: Sequence[str]) -> Command | None:
  """The command, or None if it was only for help.

  Raises:
    InputError: with all that is wrong, a line each.
  """
  known = _flags()
  try:
    _, *rest = known(list(argv), known_only=True)
  except flags.Error as error:
    raise InputError(str(error)) from error
  if known.help:
    print(__doc__, known.get_help(), sep="\n")
    return None
  problems = list(_unread(known, rest))
  schedule, times = _schedule(known, problems), _times(known, problems)
  png = pathlib.Path(known.png) if known.png else None
  if png and not (png.parent.is_dir() and png.suffix == ".png"):
    problems.append(f"--png={png}: must be a .png file in a folder that exists")
  if problems:
    raise InputError("\n".join(problems))
  return Command(schedule, times, png, known.json)


def main(argv: Sequence[str]) -> int:
  """Prints, and draws, what is asked for; returns the exit code."""
  try:
    command = parse(argv)
  except InputError as error:
    for line in str(error).splitlines():
      print(f"error: {line}", file=sys.stderr)
    return 2
  if command:
    schedule = command.schedule
    timeline = simulate.simulate(schedule, command.times)
    if command.png:
      command.png.write_bytes(schedule_plot.png(schedule, timeline))
    if command.json:
      print(as_json(schedule, timeline))
    else:
      print(as_text(schedule, timeline, command.times))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

"""The picture of a pipeline schedule: ranks downwards, time to the right.

In the manner of figure 5 of arXiv:2412.19437, micro-batches as numbers.
"""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle

from dsv3_jax.parallel.pipeline import schedules, simulate
from dsv3_jax.report import axes as axes_lib
from dsv3_jax.report import render

OP_NAMES = {
  "F": "forward",
  "B": "backward",
  "I": "input gradient",
  "W": "weight gradient",
}
ROW_IN = 0.42  # from rank to rank
THICK = 0.9  # of a cell, in rows
CELL_IN = 0.2  # width of the shortest operation, as long as there is room
WIDEST_IN = 40.0
LABELS_IN = 1.2  # left of the cells
POINTS = 72  # an inch

Colour = tuple[float, float, float]


def png(schedule: schedules.Schedule, timeline: simulate.Timeline) -> bytes:
  """Renders the picture as PNG bytes."""
  shortest = min(end - start for _, start, end, _ in timeline.cells(schedule))
  width_in = LABELS_IN + CELL_IN * timeline.makespan / shortest
  width_in = min(max(width_in, render.WIDTH_IN), WIDEST_IN)
  unit_in = (width_in - LABELS_IN) / timeline.makespan
  return render.png(
    lambda figure: _draw(figure, schedule, timeline, unit_in),
    1.5 + ROW_IN * schedule.n_ranks,
    width_in,
  )


def _draw(
  figure: Figure,
  schedule: schedules.Schedule,
  timeline: simulate.Timeline,
  unit_in: float,
) -> None:
  axes = figure.subplots()
  edge = {"edgecolor": matplotlib.rcParams["figure.facecolor"], "lw": 0.8}
  for rank, start, end, cell in timeline.cells(schedule):
    top, height, width = rank - THICK / 2, THICK / len(cell), end - start
    for i, op in enumerate(cell):
      y, (fill, ink) = top + i * height, _colours(op)
      axes.add_patch(Rectangle((start, y), width, height, fc=fill, **edge))
      at = start + width / 2, y + height / 2
      _number(axes, op.micro_batch, at, width * unit_in, color=ink)
    if len(cell) == 2:
      axes.add_patch(Rectangle((start, top), width, THICK, **_pair_edge()))
  _frame(axes, schedule, timeline)
  _legend(figure, schedule)


def _number(
  axes: Axes, n: int, at: tuple[float, float], width_in: float, color: Colour
) -> None:
  size = min(7.0, width_in * POINTS / (0.7 * len(str(n))))
  if size > 3:  # smaller ones cannot be read
    text = {"ha": "center", "va": "center_baseline", "fontsize": size}
    axes.text(*at, str(n), color=color, **text)


def _pair_edge() -> dict[str, Any]:
  """The look of the frame around a pair."""
  ink = matplotlib.rcParams["text.color"]
  return {"fill": False, "ec": ink, "lw": 1.2, "zorder": 3}


def _colours(op: schedules.Op) -> tuple[Colour, Colour]:
  """Colours of an operation and of its number: a hue per kind, pale one way."""
  settings = matplotlib.rcParams
  series = settings["axes.prop_cycle"].by_key()["color"]
  hue = to_rgb(series[list(OP_NAMES).index(op.kind)])
  paper, ink = (
    to_rgb(settings[name]) for name in ("figure.facecolor", "text.color")
  )
  if op.direction == 0:
    return hue, paper
  pale = tuple(0.35 * a + 0.65 * b for a, b in zip(hue, paper, strict=True))
  return pale, ink


def _frame(
  axes: Axes, schedule: schedules.Schedule, timeline: simulate.Timeline
) -> None:
  """All around the cells."""
  labels = [
    f"rank {rank}  [{', '.join(map(str, stages))}]"
    for rank, stages in enumerate(schedule.stages)
  ]
  axes.set_xlim(0, timeline.makespan)
  axes.set_ylim(schedule.n_ranks - 0.5, -0.5)
  axes.set_yticks(range(schedule.n_ranks), labels)
  axes.tick_params(axis="y", length=0)
  axes_lib.set_ticks(axes.xaxis, 12)
  axes.set_xlabel("time")
  axes.set_title(
    f"{schedule.name}: {schedule.n_ranks} ranks [their stages],"
    f" {schedule.n_micro} micro-batches; makespan {timeline.makespan:g},"
    f" idle at most {max(timeline.idle):g}",
    loc="left",
  )


def _legend(figure: Figure, schedule: schedules.Schedule) -> None:
  """A patch a kind and direction, for the kinds that there are."""
  kinds = {op.kind for cell in schedule.cells[0] for op in cell}
  directions = range(len(schedule.streams))
  entries = {
    name: tuple(
      Patch(fc=_colours(schedules.Op(kind, direction, 0))[0])
      for direction in directions
    )
    for kind, name in OP_NAMES.items()
    if kind in kinds
  }
  title = None
  if len(directions) > 1:
    entries["overlapped"] = (Patch(**_pair_edge()),)
    title = "direction 0 dark, direction 1 pale"
  figure.legend(
    entries.values(),
    entries.keys(),
    handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    loc="outside lower center",
    ncols=len(entries),
    columnspacing=1.4,
    title=title,
  )

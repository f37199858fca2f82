"""Simulates a schedule: makespan, idle time and peak activations of ranks."""

import dataclasses
from collections.abc import Iterator

from dsv3_jax.config import fields
from dsv3_jax.errors import raise_problems
from dsv3_jax.parallel.pipeline import schedule_check, schedules, tick_table


@fields.checked
class Times:
  """Time of a stage for one micro-batch, in any unit.

  The time of an input gradient, I, is B - W.
  """

  F: float = fields.number(1.0, above=0)  # forward
  B: float = fields.number(2.0, above=0)  # backward, with W
  W: float = fields.number(1.0, above=0)  # weight gradients
  FB: float = fields.number(3.0, above=0)  # F and B that overlap
  comm: float = fields.number(0.0, low=0)  # a result from rank to rank

  def validate(self) -> Iterator[str]:
    """Lists violated relations between the times."""
    if self.W >= self.B:
      yield f"Times.W={self.W!r}: must be below B={self.B!r}, which includes it"

  def of(self, cell: schedules.Cell) -> float:
    """Returns the time of a cell."""
    if len(cell) == 2:
      return self.FB
    (op,) = cell
    return self.B - self.W if op.kind == "I" else getattr(self, op.kind)


@dataclasses.dataclass(frozen=True)
class Timeline:
  """A simulated step; times in the unit of `Times`."""

  starts: tuple[tuple[float, ...], ...]  # [rank][cell]
  ends: tuple[tuple[float, ...], ...]
  idle: tuple[float, ...]  # [rank]
  makespan: float
  peak_activations: tuple[int, ...]  # [rank], micro-batches of a stage

  def cells(
    self, schedule: schedules.Schedule
  ) -> Iterator[tuple[int, float, float, schedules.Cell]]:
    """Lists rank, start, end and operations of every cell."""
    for rank, rows in enumerate(
      zip(self.starts, self.ends, schedule.cells, strict=True)
    ):
      for start, end, cell in zip(*rows, strict=True):
        yield rank, start, end, cell


def simulate(
  schedule: schedules.Schedule, times: Times | None = None
) -> Timeline:
  """Runs the cells of every rank in order, each as early as its inputs allow.

  Both operations of an overlapped pair wait for the inputs of both.
  Communication takes time but keeps no rank busy.
  """
  times = times or Times()
  starts = schedule_check.start_ticks(schedule, times.of, times.comm)
  spent = [[times.of(cell) for cell in cells] for cells in schedule.cells]
  ends = tuple(
    tuple(start + s for start, s in zip(*rank, strict=True))
    for rank in zip(starts, spent, strict=True)
  )
  makespan = max(rank[-1] for rank in ends)
  return Timeline(
    starts=starts,
    ends=ends,
    idle=tuple(makespan - sum(rank) for rank in spent),
    makespan=makespan,
    peak_activations=tuple(map(_peak, schedule.cells)),
  )


def lockstep_makespan(
  schedule: schedules.Schedule, times: Times | None = None
) -> float:
  """Returns the time of a step if each tick lasts as long as its longest cell.

  The executor runs this way: all ranks synchronize at the end of a tick. Every
  tick but the last sends its results to the next one.
  """
  times = times or Times()
  ticks = tick_table.to_ticks(schedule)
  spent = (max(map(times.of, filter(None, cells))) for cells in ticks)
  return sum(spent) + times.comm * (len(ticks) - 1)


def _peak(cells: tuple[schedules.Cell, ...]) -> int:
  """Counts the most micro-batches between their F and their B or I at once."""
  live, peak = 0, 0
  for cell in cells:
    for op in cell:
      live += {"F": 1, "B": -1, "I": -1, "W": 0}[op.kind]
      peak = max(peak, live)
  return peak


def bubble(name: str, n_ranks: int, times: Times | None = None) -> float:
  """Returns the longest idle time of a rank by formula, communication free.

  Implements table 2 of arXiv:2412.19437. The formula of `zb1p` assumes that W
  takes no longer than F and I, and at least one micro-batch for each rank; the
  formulas of DualPipe assume equal F, I and W, and FB between B and F + B.
  Simulate other times.

  Raises:
    InputError: no such schedule, or not on so many ranks.
  """
  n_micro = 4 * n_ranks  # enough for every schedule
  raise_problems(schedules.validate(name, n_ranks, n_micro))
  times = times or Times()
  n_stages = 2 * n_ranks if name == "dualpipev" else n_ranks
  if name == "1f1b":
    return (n_stages - 1) * (times.F + times.B)
  if name == "zb1p":
    return (n_stages - 1) * (times.F + times.B - 2 * times.W)
  return (n_stages / 2 - 1) * (times.FB + times.B - 3 * times.W)

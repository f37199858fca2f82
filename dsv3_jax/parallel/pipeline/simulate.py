"""How long a schedule takes, how long its ranks are idle, what they keep."""

import dataclasses
from collections.abc import Iterator

from dsv3_jax.config import fields
from dsv3_jax.errors import InputError
from dsv3_jax.parallel.pipeline import lockstep, schedules


@fields.checked
class Times:
  """How long a stage works on a micro-batch, in any unit.

  An input gradient, I, is what a backward pass does without W.
  """

  F: float = fields.number(1.0, above=0)  # forward
  B: float = fields.number(2.0, above=0)  # backward, with W
  W: float = fields.number(1.0, above=0)  # weight gradients
  FB: float = fields.number(3.0, above=0)  # F and B that overlap
  comm: float = fields.number(0.0, low=0)  # a result from rank to rank

  def relations(self) -> Iterator[str]:
    """What must hold between the times."""
    if self.W >= self.B:
      yield f"Times.W={self.W!r}: must be below B={self.B!r}, which includes it"

  def of(self, cell: schedules.Cell) -> float:
    """Of a cell."""
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
    """Rank, start, end and operations of every cell."""
    for rank, rows in enumerate(
      zip(self.starts, self.ends, schedule.cells, strict=True)
    ):
      for start, end, cell in zip(*rows, strict=True):
        yield rank, start, end, cell


def simulate(
  schedule: schedules.Schedule, times: Times | None = None
) -> Timeline:
  """Runs the cells of every rank in order, each as early as it can.

  An operation waits for what it needs, both of a pair for what either needs.
  Communication takes time but keeps no rank busy.
  """
  times = times or Times()
  starts = schedules.start_ticks(schedule, times.of, times.comm)
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
  """How long a step takes where each tick lasts as long as its longest cell.

  That is how the executor runs: all ranks meet at the end of a tick. A result
  travels from each tick to the next, the last one is for no other rank.
  """
  times = times or Times()
  ticks = lockstep.to_ticks(schedule)
  spent = (max(map(times.of, filter(None, cells))) for cells in ticks)
  return sum(spent) + times.comm * (len(ticks) - 1)


def _peak(cells: tuple[schedules.Cell, ...]) -> int:
  """Most micro-batches between their F and their B or I at once."""
  live, peak = 0, 0
  for cell in cells:
    for op in cell:
      live += {"F": 1, "B": -1, "I": -1, "W": 0}[op.kind]
      peak = max(peak, live)
  return peak


def bubble(name: str, n_ranks: int, times: Times | None = None) -> float:
  """Idle time of the rank that waits most, by formula, communication free.

  Table 2 of arXiv:2412.19437. Other times than these need a simulation: `zb1p`
  supposes that W takes no longer than F and I, and a micro-batch for each rank;
  DualPipe that F, I and W take equally long, and FB from B to F + B.

  Raises:
    InputError: no such schedule, or not on so many ranks.
  """
  n_micro = 4 * n_ranks  # enough for every schedule
  if found := schedules.validate(name, n_ranks, n_micro):
    raise InputError("\n".join(found))
  times = times or Times()
  n_stages = 2 * n_ranks if name == "dualpipev" else n_ranks
  if name == "1f1b":
    return (n_stages - 1) * (times.F + times.B)
  if name == "zb1p":
    return (n_stages - 1) * (times.F + times.B - 2 * times.W)
  return (n_stages / 2 - 1) * (times.FB + times.B - 3 * times.W)

"""Checks that a schedule is complete and cannot deadlock; start times."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator

from dsv3_jax.parallel.pipeline.schedules import Cell, Op, Schedule


def _raise_if(problems: Iterable[str]) -> None:
  if text := "\n".join(problems):
    raise ValueError(text)


def check(schedule: Schedule) -> None:
  """Proves that a schedule runs every operation of a step once.

  Raises:
    ValueError: an operation is missing, repeated, out of order, or waits
      forever; one line for each.
  """
  _raise_if(_stage_problems(schedule))
  _raise_if(
    f"{schedule.name}, rank {rank}: {line}"
    for rank in range(schedule.n_ranks)
    for line in _rank_problems(schedule, rank)
  )
  start_ticks(schedule)


def _stage_problems(schedule: Schedule) -> Iterator[str]:
  times = collections.Counter(
    (schedule.streams[direction], stage)
    for stages in schedule.stages
    for direction, stage in enumerate(stages)
  )
  for stream in set(schedule.streams):
    for stage in range(schedule.n_stages):
      if times[stream, stage] != 1:
        yield (
          f"{schedule.name}: stage {stage} of stream {stream} is on"
          f" {times[stream, stage]} ranks"
        )


def _rank_problems(schedule: Schedule, rank: int) -> Iterator[str]:
  """Lists invalid cells of a rank, and missing or repeated operations."""
  cells = schedule.cells[rank]
  for index, cell in enumerate(cells):
    if "".join(op.kind for op in cell) not in ("F", "B", "I", "W", "FB"):
      yield f"cell {index} must be one operation, or F and B: {cell}"
  ops = list(itertools.chain(*cells))
  directions = range(len(schedule.streams))
  expected = set(itertools.product(directions, range(schedule.n_per_stream)))
  for kinds in ("F", "BI"):
    times = collections.Counter(op[1:] for op in ops if op.kind in kinds)
    for key in sorted(expected | times.keys()):
      if times[key] != (key in expected):
        kind = " or ".join(kinds)
        yield f"{kind} of {_describe(*key)} is there {times[key]} times"
  yield from _order_problems(ops)


def _order_problems(ops: list[Op]) -> Iterator[str]:
  """Describes the first W that does not follow the order of the I."""
  inputs = [op[1:] for op in ops if op.kind == "I"]
  weights = [op[1:] for op in ops if op.kind == "W"]
  for i, keys in enumerate(itertools.zip_longest(inputs, weights)):
    if keys[0] != keys[1]:
      a, b = (_describe(*key) if key else "missing" for key in keys)
      yield f"W number {i} is {b}, where I number {i} is {a}"
      return


def _describe(direction: int, micro_batch: int) -> str:
  return f"micro-batch {micro_batch} in direction {direction}"


def _one_tick(cell: Cell) -> float:
  del cell
  return 1


def start_ticks(
  schedule: Schedule,
  duration: Callable[[Cell], float] = _one_tick,
  comm: float = 0,
) -> tuple[tuple[float, ...], ...]:
  """Starts every cell in order, as early as its inputs allow.

  Args:
    schedule: cells of all ranks.
    duration: of a cell.
    comm: time that a result takes from one rank to another.

  Returns:
    Start times by rank and cell.

  Raises:
    ValueError: ranks wait for each other; with the operations that wait.
  """
  finished = {}  # result: its rank and time
  starts = [[] for _ in schedule.cells]
  clocks = [0] * schedule.n_ranks
  remaining = [collections.deque(cells) for cells in schedule.cells]

  def run(rank: int) -> bool:
    """Runs the next cell of a rank if its inputs exist."""
    needed = {n for op in remaining[rank][0] for n in schedule.needs(rank, op)}
    if not needed <= finished.keys():
      return False
    arrivals = [
      time + (comm if source != rank else 0)
      for source, time in map(finished.get, needed)
    ]
    starts[rank].append(max(clocks[rank], *arrivals, 0))
    cell = remaining[rank].popleft()
    clocks[rank] = starts[rank][-1] + duration(cell)
    for op in cell:
      finished[schedule.result(rank, op)] = rank, clocks[rank]
    return True

  ranks = range(schedule.n_ranks)
  while any([remaining[rank] and run(rank) for rank in ranks]):
    pass
  _raise_if(
    f"{schedule.name}, rank {rank}: {op.kind} of {_describe(*op[1:])} waits"
    f" forever for {need.kind} on stage {need.stage}"
    for rank in ranks
    if remaining[rank]
    for op in remaining[rank][0]
    for need in schedule.needs(rank, op)
    if need not in finished
  )
  return tuple(map(tuple, starts))

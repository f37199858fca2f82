"""Pipeline schedules as data: which rank does what, in which order.

A schedule is written as a program: lines of a number of repeats and the names
of operations, numbered by direction. `F` is a forward pass, `B` a full backward
pass, `I` one for the input gradient only, `W` the weight gradient that the
oldest such `I` left; `&` joins two operations that overlap.

  1f1b       one forward, one backward
  zb1p       the same, with weight gradients put off into the bubble
             (arXiv:2401.10241, H1)
  dualpipe   micro-batches enter at both ends; a rank holds a stage for each
             direction (arXiv:2412.19437, section 3.2.1)
  dualpipev  its first half of ranks: a V, on which direction 1 is the way back
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from dsv3_jax.config import fields


class Op(NamedTuple):
  """What a rank does with one micro-batch."""

  kind: str  # F, B, I or W
  direction: int
  micro_batch: int  # counted within its direction

  @property
  def name(self) -> str:
    return self.kind if self.kind == "W" else f"{self.kind}{self.direction}"


Cell = tuple[Op, ...]  # one operation, or a forward and a backward one
Program = Iterable[tuple[int, str]]  # repeats, names of cells


class Result(NamedTuple):
  """What an operation makes for others; no two operations make the same."""

  kind: str  # F: activations, B: their gradients, W: gradients of weights
  stream: int
  stage: int
  micro_batch: int


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The operations of every rank for one step."""

  name: str
  n_micro: int  # micro-batches of a step, over all streams
  streams: tuple[int, ...]  # [direction] the micro-batches that go this way
  stages: tuple[tuple[int, ...], ...]  # [rank][direction]
  cells: tuple[tuple[Cell, ...], ...]  # [rank], in order

  @property
  def n_ranks(self) -> int:
    return len(self.stages)

  @functools.cached_property
  def n_stages(self) -> int:
    return 1 + max(itertools.chain(*self.stages))

  @property
  def n_per_stream(self) -> int:
    return self.n_micro // len(set(self.streams))

  @functools.cached_property
  def places(self) -> dict[tuple[int, int], tuple[int, int]]:
    """Rank and direction by stream and stage."""
    return {
      (self.streams[direction], stage): (rank, direction)
      for rank, stages in enumerate(self.stages)
      for direction, stage in enumerate(stages)
    }

  def names(self) -> list[list[str]]:
    """The cells of every rank, such as `F0&B1`."""
    return [
      ["&".join(op.name for op in cell) for cell in cells]
      for cells in self.cells
    ]

  def result(self, rank: int, op: Op) -> Result:
    """What an operation of a rank makes."""
    kind = "B" if op.kind == "I" else op.kind
    stage = self.stages[rank][op.direction]
    return Result(kind, self.streams[op.direction], stage, op.micro_batch)

  def received(self, rank: int, op: Op) -> Result | None:
    """What the stage before, or backwards after it, makes for an operation."""
    made = self.result(rank, op)
    step = {"F": -1, "B": 1, "W": self.n_stages}[made.kind]
    if not 0 <= made.stage + step < self.n_stages:
      return None
    return made._replace(stage=made.stage + step)

  def receiver(self, rank: int, op: Op) -> tuple[int, int] | None:
    """The rank, and direction there, that what an operation makes goes to."""
    made = self.result(rank, op)
    step = {"F": 1, "B": -1, "W": self.n_stages}[made.kind]
    return self.places.get((made.stream, made.stage + step))

  def needs(self, rank: int, op: Op) -> Iterator[Result]:
    """All that must be made before an operation starts."""
    made = self.result(rank, op)
    if made.kind != "F":
      yield made._replace(kind="F" if made.kind == "B" else "B")
    if received := self.received(rank, op):
      yield received


# --- programs ---


def _cells(program: Program, swap: int = 0) -> tuple[Cell, ...]:
  """Writes a program out, its micro-batches numbered.

  Args:
    program: repeats and names of cells.
    swap: 1 if direction 0 of the program is direction 1 of the schedule.
  """
  counts = collections.defaultdict(itertools.count)
  deferred = collections.deque()

  def op(name):
    if name == "W":
      return Op("W", *deferred.popleft())
    kind, direction = name[0], int(name[1]) ^ swap
    which = direction, next(counts[kind == "F", direction])
    if kind == "I":
      deferred.append(which)
    return Op(kind, *which)

  return tuple(
    tuple(map(op, names.split("&")))
    for repeats, line in program
    for _ in range(repeats)
    for names in line.split()
  )


def _1f1b_program(rank: int, n_ranks: int, n_micro: int) -> Program:
  ahead = min(n_ranks - 1 - rank, n_micro)
  return (
    (ahead, "F0"),
    (n_micro - ahead, "F0 B0"),
    (ahead, "B0"),
  )


def _zb1p_program(rank: int, n_ranks: int, n_micro: int) -> Program:
  # A weight gradient is put off by as many micro-batches as there are ranks
  # before: what a rank saves in activations by 1F1B, it spends on these.
  ahead = min(n_ranks - 1 - rank, n_micro)
  put_off = min(rank, n_micro - ahead)
  return (
    (ahead, "F0"),
    (put_off, "F0 I0"),
    (n_micro - ahead - put_off, "F0 I0 W"),
    (ahead, "I0 W"),
    (put_off, "W"),
  )


def _dualpipe_program(rank: int, half: int, n_micro: int) -> Program:
  """Of a rank in the first half of ranks; n_micro in each direction."""
  inner = half - 1 - rank  # ranks between this one and the middle
  own = rank + 1
  # In the middle the first pair would have to wait for its forward half.
  split = 1 if inner == 0 else 0
  return (
    (2 * inner, "F0"),
    (own, "F0 F1"),
    (inner, "I1 W F1"),
    (split, "F0 B1 F1&B0"),
    (n_micro - 2 * half + own - split, "F0&B1 F1&B0"),
    (inner, "B1 F1&B0"),
    (own // 2, "B1 B0"),
    (own % 2, "B1 I0"),
    (own // 2, "I1 I0"),
    (inner, "W I0"),
    (own, "W"),
  )


# --- schedules ---


def one_f_one_b(n_ranks: int, n_micro: int) -> Schedule:
  """One forward, one backward."""
  return _one_way("1f1b", n_ranks, n_micro, _1f1b_program)


def zb1p(n_ranks: int, n_micro: int) -> Schedule:
  """1F1B with weight gradients put off into the bubble."""
  return _one_way("zb1p", n_ranks, n_micro, _zb1p_program)


def _one_way(
  name: str, n_ranks: int, n_micro: int, program: Callable[..., Program]
) -> Schedule:
  _refuse(validate(name, n_ranks, n_micro))
  ranks = range(n_ranks)
  return Schedule(
    name=name,
    n_micro=n_micro,
    streams=(0,),
    stages=tuple((rank,) for rank in ranks),
    cells=tuple(_cells(program(rank, n_ranks, n_micro)) for rank in ranks),
  )


def dualpipe(n_ranks: int, n_micro: int) -> Schedule:
  """Half of the micro-batches enters at each end.

  Every stage is on two ranks, whose gradients of its weights are to be added.
  """
  _refuse(validate("dualpipe", n_ranks, n_micro))
  mirror = range(n_ranks - 1, -1, -1)
  half = n_ranks // 2
  program = functools.partial(
    _dualpipe_program, half=half, n_micro=n_micro // 2
  )
  return Schedule(
    name="dualpipe",
    n_micro=n_micro,
    streams=(0, 1),
    stages=tuple(enumerate(mirror)),
    cells=(
      *(_cells(program(rank)) for rank in range(half)),
      *(_cells(program(rank), swap=1) for rank in mirror[half:]),
    ),
  )


def dualpipev(n_ranks: int, n_micro: int) -> Schedule:
  """All micro-batches go there in direction 0, and back in direction 1."""
  _refuse(validate("dualpipev", n_ranks, n_micro))
  ranks = range(n_ranks)
  return Schedule(
    name="dualpipev",
    n_micro=n_micro,
    streams=(0, 0),
    stages=tuple((rank, 2 * n_ranks - 1 - rank) for rank in ranks),
    cells=tuple(
      _cells(_dualpipe_program(rank, n_ranks, n_micro)) for rank in ranks
    ),
  )


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
  "1f1b": one_f_one_b,
  "zb1p": zb1p,
  "dualpipe": dualpipe,
  "dualpipev": dualpipev,
}


# --- what is refused ---


def _refuse(lines: Iterable[str]) -> None:
  if text := "\n".join(lines):
    raise ValueError(text)


def _size_problem(what: str, n: int, low: int, step: int) -> list[str]:
  """Unless n is low, low + step, low + 2 step ...: what is, near n."""
  if n >= low and (n - low) % step == 0:
    return []
  below = n - (n - low) % step
  near = f"{below} or {below + step}" if n >= low else f"{low}"
  even = "even and " if step == 2 else ""
  return [f"{what}: must be {even}at least {low}; use {near}"]


def validate(
  name: str, n_ranks: int, n_micro: int, n_layers: int | None = None
) -> list[str]:
  """What is wrong with the size of a schedule, a line each, and what is not.

  Args:
    name: of the schedule.
    n_ranks: pipeline ranks.
    n_micro: micro-batches of a step, over both directions.
    n_layers: of the model, where it is known.
  """
  if name not in SCHEDULES:
    hint = fields.nearest(name, SCHEDULES)
    return [f"schedule {name!r}: one of {', '.join(SCHEDULES)}{hint}"]
  step = 2 if name == "dualpipe" else 1  # one for each direction
  found = _size_problem(f"{name}: {n_ranks} ranks", n_ranks, step, step)
  low = 2 * max(n_ranks, step) if name.startswith("dualpipe") else 1
  found += _size_problem(
    f"{name} on {n_ranks} ranks: {n_micro} micro-batches", n_micro, low, step
  )
  stages_of_rank = 2 if name == "dualpipev" else 1
  n_stages = stages_of_rank * n_ranks
  if n_layers is not None and n_layers < n_stages:
    most = n_layers // stages_of_rank // step * step
    fewer = f", or at most {most} ranks" if most > 0 else ""
    found.append(
      f"{name} on {n_ranks} ranks: {n_layers} layers are too few for"
      f" {n_stages} stages; use at least {n_stages} layers{fewer}"
    )
  return found


# --- what holds ---


def check(schedule: Schedule) -> None:
  """Proves that a schedule does a step: all of it, once, without a deadlock.

  Raises:
    ValueError: it does not; with the operations, a line each.
  """
  _refuse(_stage_problems(schedule))
  _refuse(
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
  """Operations that are missing, too many or not in their place."""
  cells = schedule.cells[rank]
  for turn, cell in enumerate(cells):
    if "".join(op.kind for op in cell) not in ("F", "B", "I", "W", "FB"):
      yield f"cell {turn} must be one operation, or F and B: {cell}"
  ops = list(itertools.chain(*cells))
  directions = range(len(schedule.streams))
  due = set(itertools.product(directions, range(schedule.n_per_stream)))
  for kinds in ("F", "BI"):
    times = collections.Counter(op[1:] for op in ops if op.kind in kinds)
    for which in sorted(due | times.keys()):
      if times[which] != (which in due):
        kind = " or ".join(kinds)
        yield f"{kind} of {_told(*which)} is there {times[which]} times"
  left = [op[1:] for op in ops if op.kind == "I"]
  done = [op[1:] for op in ops if op.kind == "W"]
  for i, (a, b) in enumerate(itertools.zip_longest(left, done)):
    if a != b:
      a, b = (_told(*which) if which else "missing" for which in (a, b))
      yield f"W number {i} is {b}, where I number {i} is {a}"
      return


def _told(direction: int, micro_batch: int) -> str:
  return f"micro-batch {micro_batch} in direction {direction}"


def start_ticks(
  schedule: Schedule,
  duration: Callable[[Cell], float] = lambda _: 1,
  comm: float = 0,
) -> tuple[tuple[float, ...], ...]:
  """When each cell starts: in order, as early as what it needs allows.

  Args:
    schedule: what is run.
    duration: of a cell.
    comm: time that a result takes from one rank to another.

  Returns:
    Times by rank and cell.

  Raises:
    ValueError: ranks wait for each other; with what they wait for.
  """
  made = {}  # result: its rank and time
  found = [[] for _ in schedule.cells]
  clocks = [0] * schedule.n_ranks
  todo = [collections.deque(cells) for cells in schedule.cells]

  def run(rank):
    """Runs the next cell of a rank, if it can."""
    needed = {n for op in todo[rank][0] for n in schedule.needs(rank, op)}
    if not needed <= made.keys():
      return False
    there = [
      time + (comm if source != rank else 0)
      for source, time in map(made.get, needed)
    ]
    found[rank].append(max(clocks[rank], *there, 0))
    cell = todo[rank].popleft()
    clocks[rank] = found[rank][-1] + duration(cell)
    for op in cell:
      made[schedule.result(rank, op)] = rank, clocks[rank]
    return True

  ranks = range(schedule.n_ranks)
  while any([todo[rank] and run(rank) for rank in ranks]):
    pass
  _refuse(
    f"{schedule.name}, rank {rank}: {op.kind} of {_told(*op[1:])} waits"
    f" forever for {need.kind} on stage {need.stage}"
    for rank in ranks
    if todo[rank]
    for op in todo[rank][0]
    for need in schedule.needs(rank, op)
    if need not in made
  )
  return tuple(map(tuple, found))

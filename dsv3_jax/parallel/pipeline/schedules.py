"""Pipeline schedules as data: the operations of every rank, in order.

A schedule is written as a program of (repeats, names of operations numbered by
direction). `F` is a forward pass, `B` a full backward pass, `I` a backward pass
for the input gradient only, `W` the weight gradient that belongs to the oldest
`I` without one; `&` joins two operations that overlap.

  1f1b       one forward, one backward
  zb1p       1F1B with weight gradients deferred into the bubble
             (arXiv:2401.10241, ZB-H1)
  dualpipe   micro-batches enter at both ends; a rank holds a stage for each
             direction (arXiv:2412.19437, section 3.2.1)
  dualpipev  the first half of DualPipe's ranks; micro-batches travel there in
             direction 0 and back in direction 1, a V
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from dsv3_jax.config import fields


class Op(NamedTuple):
  """An operation of a rank on one micro-batch."""

  kind: str  # F, B, I or W
  direction: int
  micro_batch: int  # counted within its direction

  @property
  def name(self) -> str:
    """Name in a program; W has no direction there."""
    return self.kind if self.kind == "W" else f"{self.kind}{self.direction}"


Cell = tuple[Op, ...]  # one operation, or a forward and a backward one
Program = Iterable[tuple[int, str]]  # repeats, names of cells


class Result(NamedTuple):
  """The result of an operation; unique in a schedule."""

  kind: str  # F: activations, B: their gradients, W: gradients of weights
  stream: int
  stage: int
  micro_batch: int


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The operations of every rank for one step."""

  name: str
  n_micro: int  # micro-batches of a step, over all streams
  streams: tuple[int, ...]  # [direction] which micro-batches travel this way
  stages: tuple[tuple[int, ...], ...]  # [rank][direction]
  cells: tuple[tuple[Cell, ...], ...]  # [rank], in order

  @property
  def n_ranks(self) -> int:
    """Number of pipeline ranks."""
    return len(self.stages)

  @functools.cached_property
  def n_stages(self) -> int:
    """Number of stages that the layers are divided into."""
    return 1 + max(itertools.chain(*self.stages))

  @property
  def n_per_stream(self) -> int:
    """Number of micro-batches of each stream."""
    return self.n_micro // len(set(self.streams))

  @functools.cached_property
  def locations(self) -> dict[tuple[int, int], tuple[int, int]]:
    """Maps (stream, stage) to (rank, direction)."""
    return {
      (self.streams[direction], stage): (rank, direction)
      for rank, stages in enumerate(self.stages)
      for direction, stage in enumerate(stages)
    }

  def names(self) -> list[list[str]]:
    """Names the cells of every rank, such as `F0&B1`."""
    return [
      ["&".join(op.name for op in cell) for cell in cells]
      for cells in self.cells
    ]

  def result(self, rank: int, op: Op) -> Result:
    """Returns the result of an operation of a rank."""
    kind = "B" if op.kind == "I" else op.kind
    stage = self.stages[rank][op.direction]
    return Result(kind, self.streams[op.direction], stage, op.micro_batch)

  def received(self, rank: int, op: Op) -> Result | None:
    """Returns the result of a neighbouring stage that an operation needs."""
    result = self.result(rank, op)
    step = {"F": -1, "B": 1, "W": self.n_stages}[result.kind]
    if not 0 <= result.stage + step < self.n_stages:
      return None
    return result._replace(stage=result.stage + step)

  def receiver(self, rank: int, op: Op) -> tuple[int, int] | None:
    """Returns the (rank, direction) that needs the result of an operation."""
    result = self.result(rank, op)
    step = {"F": 1, "B": -1, "W": self.n_stages}[result.kind]
    return self.locations.get((result.stream, result.stage + step))

  def needs(self, rank: int, op: Op) -> Iterator[Result]:
    """Lists the results that an operation needs, of its own rank first."""
    result = self.result(rank, op)
    if result.kind != "F":
      yield result._replace(kind="F" if result.kind == "B" else "B")
    if received := self.received(rank, op):
      yield received


# --- programs ---


def _cells(program: Program, swap: int = 0) -> tuple[Cell, ...]:
  """Expands a program and numbers its micro-batches.

  Args:
    program: repeats and names of cells.
    swap: 1 if direction 0 of the program is direction 1 of the schedule.
  """
  counts = collections.defaultdict(itertools.count)
  deferred = collections.deque()

  def op(name: str) -> Op:
    if name == "W":
      return Op("W", *deferred.popleft())
    kind, direction = name[0], int(name[1]) ^ swap
    key = direction, next(counts[kind == "F", direction])
    if kind == "I":
      deferred.append(key)
    return Op(kind, *key)

  return tuple(
    tuple(map(op, names.split("&")))
    for repeats, line in program
    for _ in range(repeats)
    for names in line.split()
  )


def _1f1b_program(rank: int, n_ranks: int, n_micro: int) -> Program:
  ahead = min(n_ranks - 1 - rank, n_micro)
  return ((ahead, "F0"), (n_micro - ahead, "F0 B0"), (ahead, "B0"))


def _zb1p_program(rank: int, n_ranks: int, n_micro: int) -> Program:
  # A weight gradient is deferred by as many micro-batches as there are ranks
  # before: the memory that 1F1B saves in activations is spent on these.
  ahead = min(n_ranks - 1 - rank, n_micro)
  deferred = min(rank, n_micro - ahead)
  return (
    (ahead, "F0"),
    (deferred, "F0 I0"),
    (n_micro - ahead - deferred, "F0 I0 W"),
    (ahead, "I0 W"),
    (deferred, "W"),
  )


def _dualpipe_program(rank: int, half: int, n_micro: int) -> Program:
  """Returns the program of a rank in the first half.

  Args:
    rank: below `half`.
    half: number of ranks in the half.
    n_micro: micro-batches in each direction.
  """
  inner = half - 1 - rank  # ranks between this one and the middle
  outer = rank + 1
  # In the middle the first pair would have to wait for its forward half.
  split = 1 if inner == 0 else 0
  return (
    (2 * inner, "F0"),
    (outer, "F0 F1"),
    (inner, "I1 W F1"),
    (split, "F0 B1 F1&B0"),
    (n_micro - 2 * half + outer - split, "F0&B1 F1&B0"),
    (inner, "B1 F1&B0"),
    (outer // 2, "B1 B0"),
    (outer % 2, "B1 I0"),
    (outer // 2, "I1 I0"),
    (inner, "W I0"),
    (outer, "W"),
  )


# --- schedules ---


def one_f_one_b(n_ranks: int, n_micro: int) -> Schedule:
  """Builds 1F1B: one forward, one backward."""
  return _one_way("1f1b", n_ranks, n_micro, _1f1b_program)


def zb1p(n_ranks: int, n_micro: int) -> Schedule:
  """Builds ZB1P: 1F1B with weight gradients deferred into the bubble."""
  return _one_way("zb1p", n_ranks, n_micro, _zb1p_program)


def _one_way(
  name: str, n_ranks: int, n_micro: int, program: Callable[..., Program]
) -> Schedule:
  _require_valid(name, n_ranks, n_micro)
  ranks = range(n_ranks)
  return Schedule(
    name=name,
    n_micro=n_micro,
    streams=(0,),
    stages=tuple((rank,) for rank in ranks),
    cells=tuple(_cells(program(rank, n_ranks, n_micro)) for rank in ranks),
  )


def dualpipe(n_ranks: int, n_micro: int) -> Schedule:
  """Builds DualPipe: half of the micro-batches enter at each end.

  Every stage is on two ranks; the caller adds the weight gradients of both.
  """
  _require_valid("dualpipe", n_ranks, n_micro)
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
  """Builds DualPipeV: micro-batches return in direction 1 of the same ranks."""
  _require_valid("dualpipev", n_ranks, n_micro)
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


# --- sizes ---


def _require_valid(name: str, n_ranks: int, n_micro: int) -> None:
  if problems := validate(name, n_ranks, n_micro):
    raise ValueError("\n".join(problems))


def _validate_size(label: str, n: int, low: int, step: int) -> list[str]:
  """Requires n to be one of low, low + step, low + 2 step ..."""
  if n >= low and (n - low) % step == 0:
    return []
  below = n - (n - low) % step
  near = f"{below} or {below + step}" if n >= low else f"{low}"
  even = "even and " if step == 2 else ""
  return [f"{label}: must be {even}at least {low}; use {near}"]


def validate(
  name: str, n_ranks: int, n_micro: int, n_layers: int | None = None
) -> list[str]:
  """Lists the problems of a schedule's size, with sizes that are valid.

  Args:
    name: of the schedule.
    n_ranks: pipeline ranks.
    n_micro: micro-batches of a step, over both directions.
    n_layers: of the model, if it is known.
  """
  if name not in SCHEDULES:
    hint = fields.nearest(name, SCHEDULES)
    return [f"schedule {name!r}: one of {', '.join(SCHEDULES)}{hint}"]
  step = 2 if name == "dualpipe" else 1  # one for each direction
  problems = _validate_size(f"{name}: {n_ranks} ranks", n_ranks, step, step)
  low = 2 * max(n_ranks, step) if name.startswith("dualpipe") else 1
  problems += _validate_size(
    f"{name} on {n_ranks} ranks: {n_micro} micro-batches", n_micro, low, step
  )
  stages_of_rank = 2 if name == "dualpipev" else 1
  n_stages = stages_of_rank * n_ranks
  if n_layers is not None and n_layers < n_stages:
    most = n_layers // stages_of_rank // step * step
    fewer = f", or at most {most} ranks" if most > 0 else ""
    problems.append(
      f"{name} on {n_ranks} ranks: {n_layers} layers are too few for"
      f" {n_stages} stages; use at least {n_stages} layers{fewer}"
    )
  return problems

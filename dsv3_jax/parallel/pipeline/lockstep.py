"""The form of a schedule that one scan over ticks runs on all ranks.

In a tick a rank does one cell or none; what it makes can be used, on any rank,
from the next tick on.
"""

import dataclasses
import itertools

from dsv3_jax.parallel.pipeline import schedules

# A slot by direction and micro-batch, of every rank.
Buffer = tuple[dict[tuple[int, int], int], ...]


def to_ticks(
  schedule: schedules.Schedule,
) -> tuple[tuple[schedules.Cell | None, ...], ...]:
  """The cells of all ranks in lock-step, every one as early as possible.

  Returns:
    A cell, or None for an idle rank, by tick and rank.
  """
  at = schedules.start_ticks(schedule)
  n_ticks = 1 + max(itertools.chain(*at))
  table = [[None] * schedule.n_ranks for _ in range(n_ticks)]
  for rank, cells in enumerate(schedule.cells):
    for tick, cell in zip(at[rank], cells, strict=True):
      table[tick][rank] = cell
  return tuple(map(tuple, table))


@dataclasses.dataclass(frozen=True)
class Slots:
  """Where a rank keeps what is needed later; one pool for all directions.

  A slot is written again in a later tick than the last one that reads it. What
  arrives in a tick may be read in the same one.
  """

  inputs: Buffer  # of F, from the tick after another stage made them
  residuals: Buffer  # from F to B or I
  gradients: Buffer  # of B or I, as inputs; of the last stage, from its F on
  deferred: Buffer  # what W needs, from I


def assign_slots(schedule: schedules.Schedule) -> Slots:
  """The fewest slots; as many residuals as activations at their peak."""
  at = schedules.start_ticks(schedule)
  ops = [
    (rank, tick, op)
    for rank, cells in enumerate(schedule.cells)
    for tick, cell in zip(at[rank], cells, strict=True)
    for op in cell
  ]
  made = {schedule.result(rank, op): tick for rank, tick, op in ops}
  names = [field.name for field in dataclasses.fields(Slots)]
  lives = {name: [{} for _ in schedule.cells] for name in names}
  for rank, tick, op in ops:
    received = schedule.received(rank, op)
    if received:
      name = "inputs" if op.kind == "F" else "gradients"
      lives[name][rank][op[1:]] = made[received] + 1, tick
    if op.kind != "F":
      name = "deferred" if op.kind == "W" else "residuals"
      kept, *_ = schedule.needs(rank, op)
      lives[name][rank][op[1:]] = made[kept], tick
    if op.kind in "BI" and not received:  # the loss makes it, in F's own tick
      lives["gradients"][rank][op[1:]] = lives["residuals"][rank][op[1:]]
  return Slots(**{name: tuple(map(_assign, lives[name])) for name in names})


def _assign(
  lives: dict[tuple[int, int], tuple[int, int]],
) -> dict[tuple[int, int], int]:
  """A slot for each life, from its first to its last tick."""
  slot_of, last_ticks = {}, []
  for which, (first, last) in sorted(lives.items(), key=lambda life: life[1]):
    free = (slot for slot, end in enumerate(last_ticks) if end < first)
    slot = next(free, len(last_ticks))
    last_ticks[slot : slot + 1] = [last]
    slot_of[which] = slot
  return slot_of


def n_slots(buffer: Buffer) -> tuple[int, ...]:
  """How many slots of a buffer each rank uses."""
  return tuple(len(set(slot_of.values())) for slot_of in buffer)

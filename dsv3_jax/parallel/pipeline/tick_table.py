"""Tick table: for each (tick, rank), the operations and their buffer slots.

All ranks run in lock-step: in a tick a rank runs one cell or none, and any rank
can use its results from the next tick on. The executor scans over the table.
"""

import dataclasses
import itertools
from typing import Any

import flax.struct
import jax
import numpy as np

from dsv3_jax.parallel.pipeline import schedule_check, schedules

# For each rank, the slot of each (direction, micro-batch).
Buffer = tuple[dict[tuple[int, int], int], ...]
Ticks = tuple[tuple[schedules.Cell | None, ...], ...]

# Where an array that a rank receives comes from: a number of ranks ahead, or
# the rank's own loss.
SOURCES = (-1, 1, 0, "loss")


def to_ticks(schedule: schedules.Schedule) -> Ticks:
  """Runs every cell in the earliest tick that its inputs allow.

  Returns:
    For each tick and rank a cell, or None if the rank is idle.

  Raises:
    ValueError: the schedule lacks or repeats an operation, or waits forever.
  """
  schedule_check.check(schedule)
  starts = schedule_check.start_ticks(schedule)
  n_ticks = 1 + max(itertools.chain(*starts))
  table = [[None] * schedule.n_ranks for _ in range(n_ticks)]
  for rank, cells in enumerate(schedule.cells):
    for tick, cell in zip(starts[rank], cells, strict=True):
      table[tick][rank] = cell
  return tuple(map(tuple, table))


# --- slots ---


@dataclasses.dataclass(frozen=True)
class Slots:
  """Buffer slots of a rank; both directions share one pool.

  A slot is written again in a later tick than the last one that reads it. An
  array that arrives in a tick may be read in the same tick.
  """

  inputs: Buffer  # of F, from the tick after another stage computed them
  residuals: Buffer  # from F to B or I
  gradients: Buffer  # of B or I, as inputs; on the last stage, from its F on
  wgrad: Buffer  # what W needs, from I


def assign_slots(schedule: schedules.Schedule) -> Slots:
  """Assigns the fewest slots that hold all arrays while they are needed."""
  starts = schedule_check.start_ticks(schedule)
  ops = [
    (rank, tick, op)
    for rank, cells in enumerate(schedule.cells)
    for tick, cell in zip(starts[rank], cells, strict=True)
    for op in cell
  ]
  tick_of = {schedule.result(rank, op): tick for rank, tick, op in ops}
  names = [field.name for field in dataclasses.fields(Slots)]
  lifetimes = {name: [{} for _ in schedule.cells] for name in names}
  for rank, tick, op in ops:
    received = schedule.received(rank, op)
    if received:
      name = "inputs" if op.kind == "F" else "gradients"
      lifetimes[name][rank][op[1:]] = tick_of[received] + 1, tick
    if op.kind != "F":
      name = "wgrad" if op.kind == "W" else "residuals"
      saved, *_ = schedule.needs(rank, op)
      lifetimes[name][rank][op[1:]] = tick_of[saved], tick
    if op.kind in "BI" and not received:  # from the loss, in F's own tick
      residuals = lifetimes["residuals"][rank]
      lifetimes["gradients"][rank][op[1:]] = residuals[op[1:]]
  return Slots(**{name: tuple(map(_assign, lifetimes[name])) for name in names})


def _assign(
  lifetimes: dict[tuple[int, int], tuple[int, int]],
) -> dict[tuple[int, int], int]:
  """Assigns a slot to each lifetime (first tick, last tick)."""
  slot_of, last_ticks = {}, []
  for key, (first, last) in sorted(lifetimes.items(), key=lambda item: item[1]):
    free = (slot for slot, end in enumerate(last_ticks) if end < first)
    slot = next(free, len(last_ticks))
    last_ticks[slot : slot + 1] = [last]
    slot_of[key] = slot
  return slot_of


def n_slots(buffer: Buffer) -> tuple[int, ...]:
  """Counts the slots of a buffer that each rank uses."""
  return tuple(len(set(slot_of.values())) for slot_of in buffer)


# --- the table ---


@flax.struct.dataclass
class EncodedOp:
  """One operation of a rank as int32 numbers; all are 0 if it is not active."""

  active: Any
  stage: Any
  direction: Any
  micro_batch: Any  # index in the batch
  input_slot: Any  # of the input, or of the gradient of the output
  residual_slot: Any  # of what the forward pass saves
  wgrad_slot: Any  # of what the input gradient saves for the weight gradient


@flax.struct.dataclass
class TickOps:
  """The operations of a rank in a tick, and the slots of what it receives.

  The slots are in the order of `SOURCES`: of the rank before, the rank after,
  the other stage of the same rank, and the loss. An array that nothing reads
  goes to a slot beyond the last one.
  """

  forward: EncodedOp
  backward: EncodedOp  # input gradient
  weight: EncodedOp  # weight gradient, also that of a full backward pass
  overlapped: Any  # 1: forward and backward pass run in one loop
  input_slots: tuple[Any, ...]
  gradient_slots: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class TickTable:
  """The operations of all ticks and ranks, and the sizes of the buffers."""

  ops: TickOps  # [tick, rank]
  n_input_slots: int
  n_gradient_slots: int
  n_residual_slots: int
  n_wgrad_slots: int  # with one that full backward passes use and W never reads


def build_tick_table(schedule: schedules.Schedule) -> TickTable:
  """Encodes the lock-step form of a schedule as int32 arrays [tick, rank]."""
  slots = assign_slots(schedule)
  sizes = {
    field.name: max(n_slots(getattr(slots, field.name)))
    for field in dataclasses.fields(slots)
  }
  rows = []
  for cells in to_ticks(schedule):
    received = _received_slots(schedule, cells, slots)
    encoded = [
      {op.kind: _encode(schedule, slots, sizes, rank, op) for op in cell or ()}
      for rank, cell in enumerate(cells)
    ]
    rows.append(
      [_tick_ops(*args, sizes) for args in zip(encoded, received, strict=True)]
    )
  return TickTable(
    ops=jax.tree.map(_stack, *[jax.tree.map(_stack, *ranks) for ranks in rows]),
    n_input_slots=sizes["inputs"],
    n_gradient_slots=sizes["gradients"],
    n_residual_slots=sizes["residuals"],
    n_wgrad_slots=sizes["wgrad"] + 1,
  )


def _stack(*leaves: Any) -> np.ndarray:
  return np.stack([np.asarray(leaf, np.int32) for leaf in leaves])


def _encode(
  schedule: schedules.Schedule,
  slots: Slots,
  sizes: dict[str, int],
  rank: int,
  op: schedules.Op,
) -> EncodedOp:
  key, stream = op[1:], schedule.streams[op.direction]
  incoming = slots.inputs if op.kind == "F" else slots.gradients
  return EncodedOp(
    active=1,
    stage=schedule.stages[rank][op.direction],
    direction=op.direction,
    micro_batch=stream * schedule.n_per_stream + op.micro_batch,
    input_slot=incoming[rank].get(key, 0),
    residual_slot=slots.residuals[rank][key],
    wgrad_slot=slots.wgrad[rank].get(key, sizes["wgrad"]),
  )


def _tick_ops(
  ops: dict[str, EncodedOp],
  received: dict[tuple[str, Any], int],
  sizes: dict[str, int],
) -> TickOps:
  """Combines what a rank computes and receives in a tick."""
  idle = EncodedOp(*[0] * 7)
  full = ops.get("B", idle)
  return TickOps(
    forward=ops.get("F", idle),
    backward=ops.get("I", full),
    weight=ops.get("W", full),
    overlapped=int(len(ops) == 2),
    input_slots=tuple(received.get(("F", s), sizes["inputs"]) for s in SOURCES),
    gradient_slots=tuple(
      received.get(("B", s), sizes["gradients"]) for s in SOURCES
    ),
  )


def _received_slots(
  schedule: schedules.Schedule,
  cells: tuple[schedules.Cell | None, ...],
  slots: Slots,
) -> list[dict[tuple[str, Any], int]]:
  """Lists, for each rank, the slot of each (kind, source) that it receives."""
  received = [{} for _ in cells]
  for rank, cell in enumerate(cells):
    for op in cell or ():
      kind = schedule.result(rank, op).kind
      if receiver := schedule.receiver(rank, op):
        to, direction = receiver
        incoming = slots.inputs if kind == "F" else slots.gradients
        slot = incoming[to][direction, op.micro_batch]
        received[to][kind, rank - to] = slot
      elif kind == "F":
        received[rank]["B", "loss"] = slots.gradients[rank][op[1:]]
  return received

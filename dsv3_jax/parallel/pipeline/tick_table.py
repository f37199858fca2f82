"""A schedule in numbers: what a rank does in a tick, with which slots."""

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

from dsv3_jax.parallel.pipeline import lockstep, schedules

SOURCES = (-1, 1, 0, "loss")  # of what arrives: steps along the ranks


@flax.struct.dataclass
class EncodedOp:
  """One operation of a rank; all int32. `on` 0: none, and the rest is 0."""

  on: Any
  stage: Any
  direction: Any
  micro_batch: Any  # in the batch
  arrived: Any  # slot of the input, or of the gradient of the output
  kept: Any  # slot of what forward keeps
  deferred: Any  # slot of what the input gradient leaves


@flax.struct.dataclass
class TickOps:
  """What a rank does in a tick, and where it puts what arrives at its end.

  Slots by where it comes from: the rank before, the rank after, this rank's
  other stage, its loss. A slot beyond the last one takes what is for no one.
  """

  forward: EncodedOp
  backward: EncodedOp  # input gradient
  weight: EncodedOp  # weight gradient, also of a full backward
  pair: Any  # 1: forward and backward overlap
  inputs: tuple[Any, ...]
  gradients: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class TickTable:
  """Turns of all ticks and ranks, [tick, rank], and the sizes of buffers."""

  turns: TickOps
  inputs: int
  gradients: int
  kept: int
  deferred: int  # one more than W ever needs: a full backward passes through it


def build_tick_table(schedule: schedules.Schedule) -> TickTable:
  """The lock-step form of a schedule in numbers."""
  slots = lockstep.assign_slots(schedule)
  size = {
    field.name: max(lockstep.n_slots(getattr(slots, field.name)))
    for field in dataclasses.fields(slots)
  }
  idle = EncodedOp(*[0] * 7)

  def task(rank, op):
    which, stage = op[1:], schedule.stages[rank][op.direction]
    stream = schedule.streams[op.direction]
    waiting = slots.inputs if op.kind == "F" else slots.gradients
    return EncodedOp(
      on=1,
      stage=stage,
      direction=op.direction,
      micro_batch=stream * schedule.n_per_stream + op.micro_batch,
      arrived=waiting[rank].get(which, 0),
      kept=slots.residuals[rank][which],
      deferred=slots.deferred[rank].get(which, size["deferred"]),
    )

  def turn(rank, cell, arriving):
    by_kind = {op.kind: task(rank, op) for op in cell}
    full = by_kind.get("B", idle)

    def places(kind, none):
      return tuple(arriving.get((kind, source), none) for source in SOURCES)

    return TickOps(
      forward=by_kind.get("F", idle),
      backward=by_kind.get("I", full),
      weight=by_kind.get("W", full),
      pair=int(len(cell) == 2),
      inputs=places("F", size["inputs"]),
      gradients=places("B", size["gradients"]),
    )

  rows = [
    [
      turn(rank, cells[rank] or (), arriving)
      for rank, arriving in enumerate(_arrivals(schedule, cells, slots))
    ]
    for cells in lockstep.to_ticks(schedule)
  ]
  stack = lambda *turns: np.stack([np.asarray(t, np.int32) for t in turns])
  return TickTable(
    turns=jax.tree.map(stack, *[jax.tree.map(stack, *ranks) for ranks in rows]),
    inputs=size["inputs"],
    gradients=size["gradients"],
    kept=size["residuals"],
    deferred=size["deferred"] + 1,
  )


def _arrivals(schedule, cells, slots) -> list[dict[tuple[str, Any], int]]:
  """For each rank: slots by kind and source of what a tick's cells make."""
  found = [{} for _ in cells]
  for rank, cell in enumerate(cells):
    for op in cell or ():
      kind = schedule.result(rank, op).kind
      receiver = schedule.receiver(rank, op)
      if receiver:
        to, direction = receiver
        waiting = slots.inputs if kind == "F" else slots.gradients
        which = direction, op.micro_batch
        found[to][kind, rank - to] = waiting[to][which]
      elif kind == "F":
        found[rank]["B", "loss"] = slots.gradients[rank][op[1:]]
  return found

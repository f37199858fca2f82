"""Queue of requests, and the batch slots of those that are being generated."""

import collections
import dataclasses

from dsv3_jax.infer import trace
from dsv3_jax.infer.request import GenerationRequest


@dataclasses.dataclass
class Active:
  """A request in a slot."""

  index: int
  request: GenerationRequest
  slot: int
  n_generated: int = 0  # without tokens of a step that is still running
  recorder: trace.Recorder | None = None  # None: no trace is asked for


class Scheduler:
  """Assigns waiting requests to free slots, in order of arrival."""

  def __init__(self, n_slots: int, n_shards: int):
    """Starts with all slots free; each shard has an equal part of them."""
    self.slots_per_shard = n_slots // n_shards
    self.active: dict[int, Active] = {}  # by slot
    self.waiting = collections.deque[tuple[int, GenerationRequest]]()
    self.free = list(range(n_slots))[::-1]  # slots that no request has

  def admit(self, n: int) -> dict[int, Active]:
    """Gives slots to waiting requests, at most n a shard.

    The keys are rows of a batch with n rows for each shard.
    """
    admitted, rows = {}, {}
    for slot in self.free[::-1]:
      shard = slot // self.slots_per_shard
      row = rows.setdefault(shard, shard * n)
      if self.waiting and row < (shard + 1) * n:
        self.free.remove(slot)
        active = Active(*self.waiting.popleft(), slot=slot)
        self.active[slot] = admitted[row] = active
        rows[shard] += 1
    return admitted

  def release(self, slot: int) -> None:
    """Frees the slot of a finished request."""
    del self.active[slot]
    self.free.append(slot)

  def cancel(self, index: int) -> None:
    """Removes a request, waiting or active; no error if there is none."""
    waiting = (pair for pair in self.waiting if pair[0] != index)
    self.waiting = collections.deque(waiting)
    for slot, active in list(self.active.items()):
      if active.index == index:
        self.release(slot)

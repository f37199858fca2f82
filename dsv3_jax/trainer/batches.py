"""Which data the steps of a run read."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import grain
import jax

from dsv3_jax import config, train
from dsv3_jax.data import loader, tokenizer
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.parallel import device_mesh


@dataclasses.dataclass(frozen=True)
class Feed:
  """A function of seed and step, and of how much was left out before."""

  data: loader.Prepared
  run: config.Run
  seed: int
  left_out: int = 0  # sequences, see train.spike_skip

  @functools.cached_property
  def _order(self) -> grain.MapDataset:
    return self.data.order(self.seed)

  def sequences(self, step: int) -> range:
    """Places in the order of the run that a step reads, from 0."""
    first = self.run.rows_before(step) + self.left_out
    return range(first, first + self.run.phase(step).batch_size)

  def ids(self, step: int) -> list[int]:
    """Rows of the data that are at these places."""
    return loader.batch(self._order, self.sequences(step))["row"].tolist()

  def batches(
    self, first_step: int, mesh: jax.sharding.Mesh
  ) -> Iterator[Batch]:
    """Batches [A, B, T] of optimizer steps from first_step on.

    A process reads the rows of its own devices.
    """
    run, n_rows = self.run, self.run.train.micro_batch_size
    columns = device_mesh.local_rows(n_rows, mesh)
    unpredicted = [tokenizer.PAD_ID]
    if run.data.segment_mask:
      unpredicted.append(run.data.segment_start)

    def own(step):
      starts = self.sequences(step)[::n_rows]
      return [start + column for start in starts for column in columns]

    steps = map(own, itertools.count(first_step))
    for rows in loader.batches(self._order, steps):
      tokens = rows["tokens"].reshape(-1, len(columns), run.data.seq_len + 1)
      batch = make_batch(tokens, *unpredicted)
      yield train.place(batch, n_rows, mesh)

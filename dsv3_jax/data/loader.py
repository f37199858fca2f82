"""Batches of a run: rows of the corpus, read by step, one batch ahead."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import grain
import numpy as np

from dsv3_jax import config
from dsv3_jax.data import packing, tokenized_corpus
from dsv3_jax.data.batch import Batch, make_batch

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class BatchSource:
  """Batches of a run as a function of the step."""

  corpus: tokenized_corpus.TokenizedCorpus
  run: config.Run
  seed: int
  n_skipped: int = 0  # rows left out before, see train.spike_skip

  @functools.cached_property
  def _rows(self) -> grain.MapDataset:
    return self.corpus.shuffled(self.seed)

  def positions(self, step: int) -> range:
    """Returns the positions in the shuffled rows that a step reads."""
    first = self.run.rows_before(step) + self.n_skipped
    return range(first, first + self.run.batch_phase(step).batch_size)

  def row_ids(self, step: int) -> list[int]:
    """Returns which rows of the corpus a step reads."""
    return [int(self._rows[i]["row"]) for i in self.positions(step)]

  def __call__(self, step: int, columns: Sequence[int] | None = None) -> Batch:
    """Reads the batch [A, B', T] of a step, counted from 0.

    It has B' columns, which are rows of each micro-batch; all by default.
    """
    data, n_rows = self.run.data, self.run.train.micro_batch_size
    columns = range(n_rows) if columns is None else columns
    rows = [
      self._rows[start + column]
      for start in self.positions(step)[::n_rows]
      for column in columns
    ]
    shape = -1, len(columns), data.seq_len + 1
    ids, *masks = (
      np.reshape([row[name] for row in rows], shape)
      for name in packing.ARRAYS
      if name in rows[0]
    )
    return make_batch(ids, *masks, segment_mask=data.segment_mask)


def prefetch(read: Callable[[int], T], steps: Iterable[int]) -> Iterator[T]:
  """Yields `read(step)` of each step; a thread reads one ahead."""
  # Not grain's own prefetch: its thread aborts an interpreter that exits.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = None
    for step in steps:
      ready, ahead = ahead, pool.submit(read, step)
      if ready:
        yield ready.result()
    if ahead:
      yield ahead.result()

"""Batches of a run on the devices of a mesh."""

import functools
import itertools
from collections.abc import Iterator

import jax

from dsv3_jax.data import loader
from dsv3_jax.data.batch import Batch
from dsv3_jax.parallel import device_mesh


def global_batches(
  source: loader.BatchSource, first_step: int, mesh: jax.sharding.Mesh
) -> Iterator[Batch]:
  """Yields the batches [A, B, T] of optimizer steps from first_step on.

  Each process reads the rows of its own devices.
  """
  n_rows = source.run.train.micro_batch_size
  read = functools.partial(source, columns=device_mesh.local_rows(n_rows, mesh))
  for batch in loader.prefetch(read, itertools.count(first_step)):
    yield device_mesh.make_global_batch(batch, n_rows, mesh, dim=1)

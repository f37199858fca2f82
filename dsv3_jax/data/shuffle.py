"""Endless random orders of rows, and mixtures of them; read by index.

The n-th row is a function of (seed, n) alone: there is no state to save, and it
is the same with any batch size and number of processes and threads.
"""

from collections.abc import Sequence

import grain

from dsv3_jax.data import packing
from dsv3_jax.errors import InputError


def shuffle(rows: packing.PackedRows, seed: int) -> grain.MapDataset:
  """Orders all rows at random, anew each epoch, without end."""
  if not 0 <= seed < 1 << 32:
    raise InputError(f"seed={seed}: must be in 0 to {(1 << 32) - 1}")
  return grain.MapDataset.source(rows).seed(seed).shuffle().repeat()


def mix(
  domains: Sequence[packing.PackedRows], weights: Sequence[float], seed: int
) -> grain.MapDataset:
  """Interleaves the shuffled rows of domains, as often as the weights say."""
  if len(domains) == 1:
    return shuffle(domains[0], seed)
  seeds = [(seed + i) % 2**32 for i in range(len(domains))]
  shuffled = map(shuffle, domains, seeds)
  return grain.MapDataset.mix(list(shuffled), list(weights))

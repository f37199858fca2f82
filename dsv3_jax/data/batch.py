"""A training batch: token ids, their next-token labels, and IGNORE."""

import flax.struct
import jax
import numpy as np

IGNORE = -100  # a label without loss


@flax.struct.dataclass
class Batch:
  """Token ids and the token after each of them."""

  tokens: jax.Array  # [..., T] int32
  labels: jax.Array  # [..., T] int32, the next token, or IGNORE
  # [..., T] int32, which attention stays inside of; None: a row is one segment
  segments: jax.Array | None = None


def segment_ids(
  tokens: jax.Array | np.ndarray, start: int | None
) -> jax.Array | np.ndarray | None:
  """Segments [..., T] of tokens, each beginning with `start`; None without."""
  if start is None:
    return None
  return (tokens == start).cumsum(-1, dtype=np.int32)


def make_batch(
  rows: np.ndarray, *unpredicted: int, segment_start: int | None = None
) -> Batch:
  """Splits rows [..., T + 1] of consecutive token ids into tokens and labels.

  Labels that are `unpredicted`, such as padding, become IGNORE. `segment_start`
  is the id that begins a segment, if attention stays inside one.
  """
  rows = np.asarray(rows, np.int32)
  labels = rows[..., 1:]
  for i in unpredicted:
    labels = np.where(labels == i, IGNORE, labels)
  tokens = rows[..., :-1]
  return Batch(tokens, labels, segment_ids(tokens, segment_start))

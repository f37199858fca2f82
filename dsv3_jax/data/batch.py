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


def make_batch(rows: np.ndarray, *unpredicted: int) -> Batch:
  """Splits rows [..., T + 1] of consecutive token ids into tokens and labels.

  Args:
    rows: token ids, each below the model's vocabulary size.
    *unpredicted: ids whose labels become IGNORE, such as padding.
  """
  rows = np.asarray(rows, np.int32)
  labels = rows[..., 1:]
  for i in unpredicted:
    labels = np.where(labels == i, IGNORE, labels)
  return Batch(rows[..., :-1], labels)

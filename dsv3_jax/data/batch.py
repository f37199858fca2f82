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
  # [..., T] bool, False for padding, at the end of rows; None: there is none
  valid: jax.Array | None = None


def make_batch(
  rows: np.ndarray,
  segments: np.ndarray | None = None,
  supervised: np.ndarray | None = None,
  *,
  segment_mask: bool = False,
) -> Batch:
  """Splits rows [..., T + 1] of consecutive token ids into tokens and labels.

  `segments`, of the same shape, are those of the rows of `packing.PackedRows`:
  labels that are padding become IGNORE. With `segment_mask` attention stays
  inside a segment, and so do labels: one in another segment becomes IGNORE.
  `supervised`, of the same shape, is False for tokens that are no label, such
  as those of prompts.
  """
  rows = np.asarray(rows, np.int32)
  tokens, labels = rows[..., :-1], rows[..., 1:]
  if segments is None:
    return Batch(tokens, labels)
  segments = np.asarray(segments, np.int32)
  here, there = segments[..., :-1], segments[..., 1:]
  ignored = there == 0
  if segment_mask:
    ignored |= there != here
  if supervised is not None:
    ignored |= ~supervised[..., 1:]
  labels = np.where(ignored, IGNORE, labels)
  return Batch(tokens, labels, here if segment_mask else None, here != 0)

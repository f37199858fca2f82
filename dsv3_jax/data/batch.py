"""A training batch: token ids, their next-token labels, and IGNORE."""

from typing import Any, Protocol

import flax.struct
import jax
import numpy as np

IGNORE = -100  # a label without loss


class Objective(Protocol):
  """A main loss of a batch; hashable, since programs are compiled for it."""

  metrics: tuple[str, ...]  # names of what it returns besides the loss

  def __call__(
    self, hidden: jax.Array, head: jax.Array, data: "Batch"
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns loss and metrics of final states [B, T, D] and the head [D, C].

    They are sums over the tokens of `data`, which has dims [B, T]: those of all
    micro-batches and devices are added.
    """


@flax.struct.dataclass
class Batch:
  """Token ids and the token after each of them."""

  tokens: jax.Array  # [..., T] int32
  labels: jax.Array  # [..., T] int32, the next token, or IGNORE
  # [..., T] int32, which attention stays inside of; None: a row is one segment
  segments: jax.Array | None = None
  # [..., T] bool, False for padding, at the end of rows; None: there is none
  valid: jax.Array | None = None
  # [..., T, n_routers, K] int32, experts that the routers take, those of MoE
  # layers, then of MTP modules; a token whose first one is -1, or all tokens
  # with None, have those that the routers choose
  routes: jax.Array | None = None
  # Inputs of `objective`, arrays [..., T, *]
  targets: Any = None
  # The main loss; None: cross-entropy of the labels, or of a reward model
  objective: Objective | None = flax.struct.field(
    pytree_node=False, default=None
  )


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

"""Scores of a reward model: pairs ranked right, and scores of samples."""

import jax
import numpy as np

from dsv3_jax import losses
from dsv3_jax.data import packing
from dsv3_jax.data.batch import make_batch
from dsv3_jax.evals import hidden


def _scores(params, out, labels, segments):
  """Scores of the segments of rows, [b, T]."""
  return losses.segment_scores(params, out.hidden, labels, segments)


def segment_scores(
  model: hidden.EvalModel,
  tokens: np.ndarray,
  segments: np.ndarray,
  supervised: np.ndarray,
) -> np.ndarray:
  """Returns scores of the segments of rows, [R, T].

  Takes rows of T + 1 tokens, as of `packing.PackedRows`.
  """
  batch = make_batch(tokens, segments, supervised, segment_mask=True)
  parts = hidden.map_hidden(
    model,
    _scores,
    batch.tokens,
    batch.labels,
    batch.segments,
    batch_size=model.run.evaluate.batch_size,
    segments=batch.segments,
    per_row=True,
  )
  rows = [np.asarray(jax.device_get(part)) for part in parts]
  return np.concatenate(rows)[: len(tokens)]


def heldout(
  model: hidden.EvalModel, rows: packing.PackedRows
) -> dict[str, float]:
  """Returns loss and accuracy of held-out pairs.

  `heldout_accuracy` is the share of pairs whose chosen answer has the higher
  score; equal scores are wrong.
  """
  items = [rows[i] for i in range(len(rows))]
  arrays = [np.stack([item[key] for item in items]) for key in packing.ARRAYS]
  scores = segment_scores(model, *arrays)
  n_pairs = arrays[1].max(1, keepdims=True) // 2
  n = scores.shape[1] // 2 * 2
  margin = scores[:, 0:n:2] - scores[:, 1:n:2]
  margin = margin[np.arange(margin.shape[1]) < n_pairs].astype(np.float64)
  return {
    "heldout_loss": float(np.logaddexp(0, -margin).mean()),
    "heldout_accuracy": float((margin > 0).mean()),
  }

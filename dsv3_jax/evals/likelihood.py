"""Likelihood of held-out text: loss and bits per byte."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from dsv3_jax import losses
from dsv3_jax.data.batch import IGNORE, Batch
from dsv3_jax.evals import hidden as hidden_lib


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Likelihood of a text under a model."""

  nats: float  # sum of -log p over the targets
  n_targets: int
  n_bytes: int  # of the text in UTF-8

  def row(self, suffix: str) -> dict[str, float]:
    """Returns the loss per token, and bits per byte of the text, as metrics."""
    return {
      f"heldout_loss{suffix}": self.nats / self.n_targets,
      f"heldout_bpb{suffix}": self.nats / math.log(2) / self.n_bytes,
    }


def _nll(params, out, labels, mask):
  """Sums -log p over the labels [B, T] that the mask selects."""
  states = out.hidden.reshape(-1, out.hidden.shape[-1])
  labels, mask = labels.reshape(-1), mask.reshape(-1)
  return losses.cross_entropy(states, params["head"], labels, mask)


def heldout(
  model: hidden_lib.EvalModel, batch: Batch, mask: np.ndarray, n_bytes: int
) -> Likelihood:
  """Computes the likelihood of a text from its windows.

  Args:
    model: to evaluate.
    batch: [R, T], its windows.
    mask: [R, T] bool, labels to score; those that are IGNORE are not.
    n_bytes: UTF-8 bytes of the text that the scored targets spell.
  """
  size = model.run.evaluate.batch_size
  mask = mask & (batch.labels != IGNORE)
  data = batch.tokens, batch.labels, mask.astype(np.float32)
  sums = hidden_lib.map_hidden(
    model, _nll, *data, batch_size=size, segments=batch.segments
  )
  return Likelihood(float(sum(sums)), int(mask.sum()), n_bytes)


def metrics(domains: Mapping[str, Likelihood]) -> dict[str, float]:
  """Returns metrics of all domains together, then of each one by name."""
  columns = zip(*map(dataclasses.astuple, domains.values()), strict=True)
  row = Likelihood(*map(sum, columns)).row("")
  for name, likelihood in domains.items():
    if name:
      row |= likelihood.row(f"/{name}")
  return row

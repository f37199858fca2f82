"""Likelihood of held-out text: loss and bits per byte."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax import losses
from dsv3_jax import schema
from dsv3_jax.model import precision
from dsv3_jax.model import transformer


@functools.partial(jax.jit, static_argnames="run")
def _nll(params, bias, tokens, labels, mask, run):
  """Sum of -log p over the labels that the mask selects, [B, T] each."""
  params = precision.compute_params(params, run.precision.recipe)
  main = config.override(run.model, "mtp.depth=0")
  out = transformer.forward(params, bias[: main.n_routers], tokens, main)
  return losses.cross_entropy(
      out.hidden.reshape(-1, main.d_model),
      params["head"],
      labels.reshape(-1),
      mask.reshape(-1),
  )


def heldout(
    params: schema.Params,
    bias: jax.Array,
    rows: np.ndarray,
    mask: np.ndarray,
    n_bytes: int,
    run: config.Run,
) -> dict[str, float]:
  """Loss a token, and sum of -log2 p over the text's UTF-8 bytes.

  Args:
    params: parameters of the model; MTP modules are not used.
    bias: [n_routers, E] f32.
    rows: [R, T + 1] int32 windows.
    mask: [R, T] bool, targets to score.
    n_bytes: UTF-8 bytes of the text that the scored targets spell.
    run: the configuration.
  """
  size = min(run.evaluate.batch_size, len(rows))
  padding = -len(rows) % size
  rows = np.pad(rows, ((0, padding), (0, 0)))
  weight = np.pad(mask, ((0, padding), (0, 0))).astype(np.float32)
  total = jnp.zeros((), jnp.float32)
  for i in range(0, len(rows), size):
    part, here = rows[i : i + size], weight[i : i + size]
    total += _nll(params, bias, part[:, :-1], part[:, 1:], here, run)
  nats = float(total)
  return {
      "heldout_loss": nats / int(mask.sum()),
      "heldout_bpb": nats / math.log(2) / n_bytes,
  }

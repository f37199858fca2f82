"""Loads that `scripts.bench` measures: their tokens, FLOPs and prompts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.plan import flops

WHAT = ("train", "prefill", "decode")
PREFILL = 2048  # tokens of the prompt that is only read
PROMPT, NEW = 128, 128  # tokens of `decode`


@dataclasses.dataclass(frozen=True)
class Load:
  """Work of one step of a worker."""

  what: str  # of `WHAT`
  batch: int  # texts of a step
  prompt: int  # tokens of each text that are read
  new: int = 0  # tokens that are written behind them, one after the other

  @property
  def seq(self) -> int:
    """Tokens of a text at the end."""
    return self.prompt + self.new

  @property
  def tokens(self) -> int:
    """Tokens of a step: those written, or else those read."""
    return self.batch * (self.new or self.prompt)

  def flops(self, model: config.Model) -> int:
    """Matmul FLOPs of a step; recomputation is not counted.

    The backward pass computes two products for each one of the forward pass.
    The last token that is written is not read any more.
    """
    if self.what == "train":
      return self.batch * 3 * flops.forward_flops(model, self.seq, self.seq)
    n_logits = max(1, self.new)
    n_tokens = self.prompt + n_logits - 1
    return self.batch * flops.forward_flops(model, n_tokens, n_logits)


def loads(
  what: str, cfg: config.Run, batches: Sequence[int] = (1, 16)
) -> list[Load]:
  """Returns the loads that `--what` measures, in order."""
  if what == "train":
    return [Load(what, cfg.train.batch_size, cfg.data.seq_len)]
  if what == "prefill":
    return [Load(what, 1, PREFILL)]
  return [Load(what, batch, PROMPT, NEW) for batch in batches]


def job(shape: str, load: Load, settings: Sequence[str]) -> dict[str, Any]:
  """Builds the first message to a worker; prompts depend on their number."""
  cfg = config.override(presets.PRESETS[shape], *settings)
  rng = np.random.default_rng(0)
  prompts = rng.integers(cfg.model.vocab_size, size=(load.batch, load.prompt))
  return {
    "shape": shape,
    "set": settings,
    "settings": config.flatten(cfg),
    "what": load.what,
    "prompts": [] if load.what == "train" else prompts.tolist(),
    "new": load.new,
  }

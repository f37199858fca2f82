"""Batches of rollouts: packed rows, and the inputs of the objective."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.data import packing, tokenizer
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.posttrain import objectives, routes
from dsv3_jax.posttrain.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class PackedRollouts:
  """Places of rollouts in rows of T + 1 tokens."""

  rows: np.ndarray  # [N], row of each rollout
  starts: np.ndarray  # [N], its first position there
  shape: tuple[int, int]  # of the rows, T + 1


def pack(rollouts: Sequence[Rollout], n_rows: int, size: int) -> PackedRollouts:
  """Packs rollouts into rows of `size` tokens, at least n_rows of them.

  Where these are too few their number is doubled, so that few programs are
  compiled, and no rollout is left out.
  """
  lengths = np.array([len(one) for one in rollouts])
  rows = packing.best_fit(lengths, size)
  used = int(rows.max()) + 1
  while n_rows < used:
    n_rows *= 2
  starts = np.zeros_like(rows)
  filled = np.zeros(used, np.int64)
  for i, row in enumerate(rows):
    starts[i] = filled[row]
    filled[row] += lengths[i]
  return PackedRollouts(rows, starts, (n_rows, size))


def make(
  rollouts: Sequence[Rollout],
  advantages: np.ndarray,
  counted: np.ndarray,
  run: config.Run,
) -> Batch:
  """Makes the batch [R, T] of an update; what is scored comes later.

  Args:
    rollouts: N of them.
    advantages: [N] f64.
    counted: [N] bool, False for answers that have no part in loss and
      denominator.
    run: the configuration.
  """
  settings, train = run.grpo, run.train
  size = run.data.seq_len + 1
  packed = pack(rollouts, train.batch_size, size)
  tokens = np.full(packed.shape, tokenizer.PAD_ID, np.int32)
  segments = np.zeros(packed.shape, np.int32)
  supervised = np.zeros(packed.shape, bool)
  samples = np.full(packed.shape, -1)  # index of the rollout at a place
  positions = np.zeros(packed.shape, np.int64)  # of the place in it
  # Of the label that a position predicts.
  names = "advantages", "weights", "token_share", "sampler_logprobs"
  values = {name: np.zeros(packed.shape, np.float32) for name in names}
  lengths = np.array([len(one.answer) for one in rollouts])
  weights = objectives.token_weights(
    lengths, counted, settings.aggregation, settings.answer_tokens
  )
  share = counted / max(lengths.sum(where=counted), 1)
  if settings.replay_mask and rollouts[0].kept is not None:
    n_bytes = rollouts[0].kept.shape[-1]
    values["kept"] = np.zeros((*packed.shape, n_bytes), np.uint8)
  for i, one in enumerate(rollouts):
    row, start = packed.rows[i], packed.starts[i]
    whole = slice(start, start + len(one))
    begin = start + len(one.prompt)
    tokens[row, whole] = np.concatenate([one.prompt, one.answer])
    segments[row, whole] = segments[row].max() + 1
    supervised[row, begin : whole.stop] = True
    samples[row, whole] = i
    positions[row, whole] = np.arange(len(one))
    at = slice(begin - 1, whole.stop - 1)
    values["sampler_logprobs"][row, at] = one.logprobs
    values["advantages"][row, at] = advantages[i]
    values["weights"][row, at] = weights[i]
    values["token_share"][row, at] = share[i]
    if "kept" in values:
      values["kept"][row, at] = one.kept
  batch = make_batch(tokens, segments, supervised, segment_mask=True)
  targets = {name: a[:, :-1] for name, a in values.items()}
  for name in ("old_logprobs", "ref_logprobs"):
    targets[name] = targets["sampler_logprobs"]
  replayed = None
  if settings.replay_routes:
    places = samples[:, :-1], positions[:, :-1]
    replayed = _routes(rollouts, batch.tokens, *places, run.model)
  return batch.replace(targets=targets, routes=replayed)


def _routes(
  rollouts: Sequence[Rollout],
  tokens: np.ndarray,
  samples: np.ndarray,
  positions: np.ndarray,
  model: config.Model,
) -> np.ndarray:
  """Puts the experts that the sampler chose at their tokens [R, T].

  The last token of a rollout, which the sampler did not read, has none, and in
  rows of their own length is not there either. Raises ValueError as `routes`.
  """
  lengths = [len(one.routes) for one in rollouts]
  experts = np.concatenate([one.routes for one in rollouts])
  missing = model.n_routers - experts.shape[1]  # a sampler without MTP modules
  experts = np.pad(
    experts, [(0, 0), (0, missing), (0, 0)], constant_values=routes.ABSENT
  )
  known = routes.Routes(
    np.repeat(np.arange(len(rollouts)), lengths),
    np.concatenate([np.arange(n) for n in lengths]),
    np.concatenate([one.route_tokens for one in rollouts]),
    experts,
  )
  placed, keys = routes.pack(known, samples, positions)
  last = np.array(lengths)[samples]
  required = (samples >= 0) & (positions < last)
  n_experts, n_moe = model.router.n_experts, model.n_moe_layers
  routes.validate(placed, keys, tokens, required, n_experts, n_moe)
  return placed


def split(batch: Batch, n_rows: int) -> Batch:
  """Splits rows [R, T, ...] into micro-batches [A, n_rows, T, ...]."""
  return jax.tree.map(lambda a: a.reshape(-1, n_rows, *a.shape[1:]), batch)

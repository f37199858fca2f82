"""Objective of GRPO (eq. 26-28): advantages, clipped policy term, divergence.

The loss of a batch is -sum_t w_t (policy_t - beta kl_t) over the tokens of its
answers. All normalisation is in the weights w_t (`token_weights`), which the
host makes of the whole global batch: the one denominator of policy and KL.
docs/objectives.md says what the gradient of each choice is.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dsv3_jax import config, losses
from dsv3_jax.config.grpo import TRAINER
from dsv3_jax.data.batch import IGNORE, Batch
from dsv3_jax.linear import dot

# A log ratio above counts as this in `exp`: e^40 squared is finite in float32,
# and a token of probability e^-40 is never drawn.
_LARGEST_LOG = 40.0
# What the gradient of an estimator of the KL divergence is on average.
EXACT, INERT, BIASED = "exact", "inert", "biased"


def _mean(values: np.ndarray, valid: np.ndarray, axis: int | None = -1):
  """Means of the valid values; that of equal ones is exactly their value."""
  n = valid.sum(axis, keepdims=True)
  mean = values.sum(axis, keepdims=True, where=valid) / np.maximum(n, 1)
  low = values.min(axis, keepdims=True, where=valid, initial=np.inf)
  high = values.max(axis, keepdims=True, where=valid, initial=-np.inf)
  return np.where(n > 0, np.clip(mean, low, high), np.nan)


def _deviation(rewards, valid, axis=-1):
  squares = (rewards - _mean(rewards, valid, axis)) ** 2
  return _mean(squares, valid, axis) ** 0.5


def _others(rewards, valid):
  # reward - mean of the others = (reward - mean) n / (n - 1)
  n = np.maximum(valid.sum(-1, keepdims=True), 1)
  return (n - 1) / n


# What a reward less the mean of its group is divided by; 0: no advantage.
_DIVISORS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
  "mean_std": _deviation,
  "mean": lambda rewards, valid: np.ones((1, 1)),
  "leave_one_out": _others,
  "batch": lambda rewards, valid: _deviation(rewards, valid, None),
}


def advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
  """Advantages of answers from rewards [groups, n], in float64.

  The reward less its group's mean (`mean`), over the group's standard deviation
  (`mean_std`, the report's, section 5.2.2) or that of all answers (`batch`), or
  less the mean of the others (`leave_one_out`). Deviations are divided by n,
  nothing is added to them, and where one is 0 so is the advantage. A reward of
  NaN has failed: it is in no mean and has advantage 0, as has an answer that is
  alone in its group.
  """
  rewards = np.asarray(rewards, np.float64)
  valid = ~np.isnan(rewards)
  centered = np.where(valid, rewards - _mean(rewards, valid), 0)
  divisor = np.nan_to_num(_DIVISORS[kind](rewards, valid))
  divisor = np.broadcast_to(divisor, rewards.shape)
  out = np.zeros_like(rewards)
  return np.divide(centered, divisor, out=out, where=divisor > 0)


def keep_groups(rewards: np.ndarray, low: float, high: float) -> np.ndarray:
  """Groups whose mean is between low and high, [groups] bool.

  `rewards` [groups, n] are the raw ones, before any penalty of length, which
  would give a group of equal answers a spread. NaN is in no mean.
  """
  rewards = np.asarray(rewards, np.float64)
  mean = _mean(rewards, ~np.isnan(rewards))[:, 0]
  return (low < mean) & (mean < high)


def overlong_penalty(
  lengths: np.ndarray, max_tokens: int, overlong_tokens: int
) -> np.ndarray:
  """Penalty, 0 to -1, that a reward gains by its answer's length in tokens.

  0 up to max_tokens - overlong_tokens, then linear to -1 at max_tokens
  (arXiv:2503.14476, eq. 13); 0 without overlong tokens.
  """
  over = np.asarray(lengths, np.float64) - (max_tokens - overlong_tokens)
  return -np.clip(over / max(overlong_tokens, 1), 0, 1) + 0.0


def token_weights(
  lengths: np.ndarray, counted: np.ndarray, aggregation: str, max_tokens: int
) -> np.ndarray:
  """Weight in the loss of each token of an answer, [N] f64 for N answers.

  `sequence`: 1 / (answers * tokens of this one), eq. 26 by token; `token`: 1 /
  tokens of all; `fixed`: 1 / (answers * max_tokens). Answers are those that are
  counted [N] in the global batch of an update. The others, of groups filtered
  out or of failed rewards, have weight 0 and are in no denominator. What the
  sequence mask leaves out stays in it, as do answers with advantage 0.
  """
  lengths, counted = np.asarray(lengths, np.float64), np.asarray(counted, bool)
  n = counted.sum()
  denominators = {
    "sequence": n * lengths,
    "token": lengths.sum(where=counted),
    "fixed": n * max_tokens,
  }
  return counted / np.maximum(denominators[aggregation], 1)


def token_logprobs(
  hidden: Float[Array, "M D"],
  head: Float[Array, "D C"],
  labels: Int[Array, " M"],
  temperature: float | jax.Array = 1.0,
  kept: UInt8[Array, "M _"] | None = None,
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
  """Log-probabilities of labels, and entropies, of what is sampled, float32.

  The distribution is softmax(hidden @ head / temperature) of the tokens kept:
  bits [M, ceil(C / 8)], the lowest first; None: all. Both are 0 where the label
  is IGNORE, and the first is -inf for a label that is not kept. Logits exist
  for one chunk of tokens at a time, in the backward pass too, which computes
  them again. No gradient comes from the entropy.
  """

  def chunk(args):
    x, label, counted, *bits = args
    logits = dot.matmul(
      x, head.astype(x.dtype), preferred_element_type=jnp.float32
    )
    logits /= temperature
    if bits:
      places = jnp.arange(8, dtype=jnp.uint8)[None, None]
      mask = (bits[0][..., None] >> places) & 1
      mask = mask.reshape(len(x), -1)[:, : logits.shape[1]].astype(bool)
      logits = jnp.where(mask | ~counted[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    index = jnp.clip(label, 0)[:, None]  # IGNORE: any row
    logprob = jnp.take_along_axis(logits, index, axis=-1)[:, 0] - lse
    # Those not kept: 0 * -inf.
    p = jax.lax.stop_gradient(jnp.exp(logits - lse[:, None]))
    logits = jax.lax.stop_gradient(jnp.where(p > 0, logits, 0))
    entropy = jax.lax.stop_gradient(lse) - (p * logits).sum(-1)
    return tuple(jnp.where(counted, a, 0) for a in (logprob, entropy))

  args = losses.chunks(
    hidden, labels, labels != IGNORE, *([] if kept is None else [kept])
  )
  values = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), args)
  logprobs, entropy = (a.reshape(-1)[: len(labels)] for a in values)
  return logprobs, entropy


def _exp(log_ratio: jax.Array) -> jax.Array:
  return jnp.exp(jnp.minimum(log_ratio, _LARGEST_LOG))


# Estimators of KL(policy || reference) at a token of log ratio x = log policy -
# log reference. k3 is eq. 28: r - log r - 1 with r = reference / policy.
_SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
  "k1": lambda x: x,
  "k2": lambda x: x**2 / 2,
  "k3": lambda x: jnp.expm1(jnp.minimum(-x, _LARGEST_LOG)) + x,
}
# What they are multiplied by, of the ratio policy / sampler.
_WEIGHTINGS: dict[str, Callable[[jax.Array], jax.Array | float]] = {
  "plain": lambda ratio: 1.0,
  "weighted": lambda ratio: ratio,
  "fixed": jax.lax.stop_gradient,
}


class KLEstimator(NamedTuple):
  """An estimator, and what its gradient is on average over sampled tokens."""

  weighting: str
  shape: str
  on_policy: str  # where the sampler is the policy
  off_policy: str


KL_ESTIMATORS = {
  "k1": KLEstimator("plain", "k1", INERT, BIASED),
  "k2": KLEstimator("plain", "k2", EXACT, BIASED),
  "k3": KLEstimator("plain", "k3", BIASED, BIASED),
  "weighted_k1": KLEstimator("weighted", "k1", EXACT, EXACT),
  "weighted_k2": KLEstimator("weighted", "k2", BIASED, BIASED),
  "weighted_k3": KLEstimator("weighted", "k3", EXACT, EXACT),
  "fixed_k1": KLEstimator("fixed", "k1", INERT, INERT),
  "fixed_k2": KLEstimator("fixed", "k2", EXACT, EXACT),
  "fixed_k3": KLEstimator("fixed", "k3", BIASED, BIASED),
}


def kl_terms(
  kind: str, policy: jax.Array, reference: jax.Array, sampler: jax.Array
) -> jax.Array:
  """KL divergence at tokens, estimated from log-probabilities [...] of each."""
  estimator = KL_ESTIMATORS[kind]
  weight = _WEIGHTINGS[estimator.weighting](_exp(policy - sampler))
  return weight * _SHAPES[estimator.shape](policy - reference)


def policy_terms(
  policy: jax.Array, old: jax.Array, advantage: jax.Array, settings: config.Grpo
) -> tuple[jax.Array, jax.Array]:
  """Clipped policy terms at tokens [...], and where the clip acts, bool.

  min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) of ratio = policy /
  old, of which A > 0 needs the upper limit alone and A < 0 the lower. With
  `dual_clip` a ratio above it counts as it where A < 0 (arXiv:1912.09729).
  """
  ratio = _exp(policy - old)
  negative = advantage < 0
  low = jnp.where(negative, 1 - settings.clip_low, 0)
  high = jnp.where(negative, settings.dual_clip or jnp.inf, jnp.inf)
  high = jnp.where(advantage > 0, 1 + settings.clip_high, high)
  clipped = (ratio < low) | (ratio > high)
  return jnp.clip(ratio, low, high) * advantage, clipped


def importance_weights(
  old: jax.Array, sampler: jax.Array, cap: float
) -> jax.Array:
  """min(old / sampler, cap) at tokens, held fixed; 1 without a cap."""
  if not cap:
    return jnp.ones_like(old)
  return jax.lax.stop_gradient(jnp.minimum(_exp(old - sampler), cap))


def masked_answers(
  policy: Float[Array, "B T"],
  sampler: Float[Array, "B T"],
  advantage: Float[Array, "B T"],
  data: Batch,
  threshold: float,
) -> Array:
  """Tokens [B, T] bool of answers whose policy term is left out.

  Those are the answers with A < 0 whose mean over tokens of log(sampler /
  policy) is above the threshold (arXiv:2512.02556); 0: none. An answer is a
  segment of a row, a row without segments.
  """
  if not threshold:
    return jnp.zeros(advantage.shape, bool)
  counted = data.labels != IGNORE
  segments = data.segments
  if segments is None:
    segments = jnp.zeros_like(data.labels)

  def sums(values, segments):
    return jax.ops.segment_sum(values, segments, values.shape[0] + 1)

  away = jnp.where(counted, jax.lax.stop_gradient(sampler - policy), 0)
  total, n = (
    jax.vmap(sums)(a, segments) for a in (away, counted.astype(away.dtype))
  )
  far = total / jnp.maximum(n, 1) > threshold
  return (advantage < 0) & jnp.take_along_axis(far, segments, axis=1)


@dataclasses.dataclass(frozen=True)
class Policy:
  """The objective of a batch of answers; `data.batch.Objective`.

  `targets` of the batch are f32 [B, T], of the label of each position:
  `advantages`, `weights` (0: no loss), `token_share` (for metrics: 1 / tokens
  with a weight in the global batch, 0 for the others), `sampler_logprobs`,
  `ref_logprobs`, with `old_policy=trainer` also `old_logprobs`; and `kept`, if
  the sampler's distributions were truncated. What the others hold where a
  weight is 0 never matters.
  """

  settings: config.Grpo

  @property
  def metrics(self) -> tuple[str, ...]:
    """Names of the metrics; `kl` needs the reference, which may be absent."""
    names = "policy_loss kl_loss entropy clip_share ratio_mean ratio_outside"
    own = ("kl",) if self.settings.kl_weight else ()
    return (*names.split(), "masked_share", *own)

  def __call__(
    self, hidden: jax.Array, head: jax.Array, data: Batch
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns loss and metrics, sums over tokens; see docs/objectives.md."""
    settings, targets = self.settings, data.targets
    kept = targets.get("kept")
    logprobs, entropy = token_logprobs(
      hidden.reshape(-1, hidden.shape[-1]),
      head,
      data.labels.reshape(-1),
      settings.temperature,
      kept if kept is None else kept.reshape(-1, kept.shape[-1]),
    )
    shape, weights = data.labels.shape, targets["weights"]
    in_loss = weights != 0
    names = ("advantages", "sampler_logprobs", "ref_logprobs")
    advantage, sampler, reference, policy = (
      jnp.where(in_loss, a, 0)
      for a in (*map(targets.get, names), logprobs.reshape(shape))
    )
    old = sampler
    if settings.old_policy == TRAINER:
      old = jnp.where(in_loss, targets["old_logprobs"], 0)

    gain, clipped = policy_terms(policy, old, advantage, settings)
    gain *= importance_weights(old, sampler, settings.importance_cap)
    masked = masked_answers(
      policy, sampler, advantage, data, settings.mask_threshold
    )
    gain = jnp.where(masked, 0, gain)
    kl = kl_terms(settings.kl, policy, reference, sampler)
    policy_loss = -(weights * gain).sum()
    kl_loss = settings.kl_weight * (weights * kl).sum()

    share = targets["token_share"]
    ratio = _exp(policy - sampler)
    means = {
      "kl": _SHAPES["k3"](policy - reference),
      "entropy": entropy.reshape(shape),
      "clip_share": clipped & ~masked,
      "ratio_mean": ratio,
      "ratio_outside": (ratio < 0.99) | (ratio > 1.01),
      "masked_share": masked,
    }
    metrics = {name: (share * a).sum() for name, a in means.items()}
    metrics |= {"policy_loss": policy_loss, "kl_loss": kl_loss}
    metrics = {name: metrics[name] for name in self.metrics}
    return policy_loss + kl_loss, jax.lax.stop_gradient(metrics)


def notes(settings: config.Grpo) -> list[str]:
  """Sentences on chosen settings that are biased or do nothing."""
  return [*_kl_notes(settings), *_ratio_notes(settings), *_data_notes(settings)]


def _kl_notes(settings: config.Grpo) -> Iterator[str]:
  kind, estimator = settings.kl, KL_ESTIMATORS[settings.kl]
  if not settings.kl_weight:
    if kind != config.Grpo.kl:
      yield f"grpo.kl={kind}: has no effect, as kl_weight is 0"
    return
  means = {
    EXACT: "is that of the divergence (exact)",
    INERT: "is 0 on average (inert)",
    BIASED: "is not that of the divergence (biased)",
  }
  on, off = means[estimator.on_policy], means[estimator.off_policy]
  if (estimator.on_policy, estimator.off_policy) != (EXACT, EXACT):
    yield (
      f"grpo.kl={kind}: its gradient {on} for answers of the policy itself, and"
      f" {off} for those of an earlier one; weighted_k3 is exact for both"
    )


def _ratio_notes(settings: config.Grpo) -> Iterator[str]:
  own = settings.updates == 1 and not settings.staleness
  chosen = [
    f"grpo.{name}={value:g}"
    for name in ("clip_low", "clip_high", "dual_clip")
    if (value := getattr(settings, name)) != getattr(config.Grpo, name)
  ]
  if settings.old_policy == TRAINER:
    if settings.updates == 1:
      chosen.insert(0, f"grpo.old_policy={TRAINER}")
      yield (
        f"{', '.join(chosen)}: with updates=1 the ratio is 1, and no clip acts"
      )
    if not settings.importance_cap:
      yield (
        f"grpo.old_policy={TRAINER}: biased where the sampler's"
        " probabilities are others, for which importance_cap=0 corrects nothing"
      )
  elif own and chosen:
    yield (
      f"{', '.join(chosen)}: with updates=1 and staleness=0 the ratio is 1 but"
      " for rounding, and no clip acts"
    )
  if own and settings.mask_threshold:
    yield (
      f"grpo.mask_threshold={settings.mask_threshold:g}: with updates=1 and"
      " staleness=0 sampler and policy differ by rounding, and no answer is"
      " masked"
    )
  if cap := settings.importance_cap:
    yield (
      f"grpo.importance_cap={cap:g}: biased where trainer / sampler is above it"
    )


def _data_notes(settings: config.Grpo) -> Iterator[str]:
  if settings.filter_groups:
    yield (
      "grpo.filter_groups=true: biased to the questions that are kept, unless"
      " all others have groups of equal rewards"
    )
  else:
    for name in ("filter_low", "filter_high"):
      if (value := getattr(settings, name)) != getattr(config.Grpo, name):
        yield f"grpo.{name}={value:g}: has no effect without filter_groups"
  if (settings.top_p < 1 or settings.top_k) and not settings.replay_mask:
    yield (
      "grpo.replay_mask=false: biased, as the sampler draws from truncated"
      " distributions and the trainer does not; the mean ratio is below 1"
    )

"""Cycles of speculative decoding (arXiv:2412.19437, section 5.4.3).

The MTP module drafts k tokens, the main model reads them all at once, and as
many are kept as it agrees with, plus one of its own. What is written has the
distribution of the main model alone, whatever the drafts are
(arXiv:2211.17192, theorem 1). Without drafts a cycle is one step of decoding.

  tokens of the last cycle   t1 .. tn, n known of k + 1 places
  MTP reads                  (h0, t1) .. (h(n-1), tn): its last state drafts x1
  MTP again                  (its state, x1) drafts x2, ...
  the main model reads       tn, x1 .. xk and judges x1 .. xk

States of rejected drafts stay in the caches behind the last valid position; the
next cycle writes over all of them before anything reads there. So does the MTP
module over the positions where it had read its own states for want of the main
model's: every cycle begins with reading them again.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.infer import cached_forward, inference_params, kvcache, sampling
from dsv3_jax.model import moe


@flax.struct.dataclass
class DecodeState:
  """Where the slots are; rows of slots that are not in use hold anything."""

  cache: kvcache.Cache
  tokens: jax.Array  # [B, k + 1] int32, of the last cycle
  n: jax.Array  # [B] int32, how many of them there are
  start: jax.Array  # [B] int32, position of the state before the first of them
  hidden: jax.Array | None  # [B, k + 1, D], states before each, for MTP
  sampling_params: sampling.SamplingParams


@flax.struct.dataclass
class StepOutput:
  """What a cycle wrote."""

  tokens: jax.Array  # [B, k + 1] int32
  n: jax.Array  # [B] int32, how many of them, at least 1
  logprobs: jax.Array  # [B, k + 1] f32, see `token_logprobs`


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probabilities [...] of tokens [...], before any temperature or cut."""
  total = jax.nn.logsumexp(logits, axis=-1)
  return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - total


def _at(a: jax.Array, index: jax.Array) -> jax.Array:
  """[B, T, ...] at index [B] -> [B, 1, ...]."""
  index = index.reshape(-1, *[1] * (a.ndim - 1))
  return jnp.take_along_axis(a, index, axis=1)


def _draft(
  params: inference_params.InferenceParams,
  state: DecodeState,
  active: jax.Array,
  cfg: config.Model,
  mode: str,
  experts: moe.Experts | None,
) -> tuple[jax.Array, jax.Array, kvcache.Cache, jax.Array]:
  """Drafts [B, k], what each was drawn from [B, k, C], cache, load [1, E]."""
  n_drafts = state.tokens.shape[1] - 1
  read = functools.partial(cached_forward.forward_mtp, params, cfg=cfg)
  valid = jnp.arange(n_drafts + 1)[None] < state.n[:, None]
  options = cached_forward.ForwardOptions(
    valid=valid & active[:, None], experts=experts
  )
  out, onward, cache, load = read(
    state.cache, state.hidden, state.tokens, state.start, options=options
  )
  out, onward = _at(out, state.n - 1), _at(onward, state.n - 1)
  position = state.start + state.n  # of the last known token
  options = cached_forward.ForwardOptions(
    valid=active[:, None], experts=experts
  )
  tokens, given = [], []
  for i in range(n_drafts):
    if i:
      out, onward, cache, more = read(
        cache, onward, tokens[-1], position + i - 1, options=options
      )
      load = load + more
    q = sampling.probabilities(
      cached_forward.logits(params, out), state.sampling_params, mode
    )
    ahead = position[:, None] + i + 1
    purpose = sampling.DRAFT
    tokens.append(
      sampling.draw(q, state.sampling_params.seed, ahead, purpose, mode)
    )
    given.append(q)
  drafts, q = jnp.concatenate(tokens, 1), jnp.concatenate(given, 1)
  return drafts, q, cache, load[None]


def verify_drafts(
  p: jax.Array,
  q: jax.Array,
  drafts: jax.Array,
  sampling_params: sampling.SamplingParams,
  position: jax.Array,
  mode: str,
) -> tuple[jax.Array, jax.Array]:
  """Keeps the drafts up to the first that is rejected, and adds one token.

  A draft x is kept with probability min(1, p(x) / q(x)); in place of the first
  rejected one a token is drawn from what p has more than q, behind the last
  kept one from p.

  Args:
    p: [B, k + 1, C], of the main model.
    q: [B, k, C], of the drafts.
    drafts: [B, k] int32.
    sampling_params: settings of the rows.
    position: [B] int32, of the first draft.
    mode: of all rows.

  Returns:
    Tokens [B, k + 1] and how many of them there are [B], 1 .. k + 1.
  """
  k = drafts.shape[1]
  at = position[:, None] + jnp.arange(k + 1)[None]
  chosen = [
    jnp.take_along_axis(a, drafts[..., None], axis=-1)[..., 0]
    for a in (p[:, :k], q)
  ]
  u = sampling.uniform(sampling_params.seed, at[:, :k], sampling.ACCEPT)
  kept = u * chosen[1] < chosen[0]
  n = jnp.cumprod(kept.astype(jnp.int32), axis=1).sum(1)
  more = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)
  # Where p and q differ by rounding alone there may be nothing left.
  more = jnp.where(more.any(-1, keepdims=True), more, p)
  final = sampling.draw(
    _at(more, n), sampling_params.seed, _at(at, n), sampling.FINAL, mode
  )
  tokens = jnp.pad(drafts, ((0, 0), (0, 1)))
  place = jnp.arange(k + 1)[None]
  return jnp.where(place < n[:, None], tokens, final), n + 1


def decode_step(
  params: inference_params.InferenceParams,
  state: DecodeState,
  active: jax.Array,
  cfg: config.Model,
  mode: str,
  experts: moe.Experts | None = None,
) -> tuple[DecodeState, StepOutput, jax.Array]:
  """One cycle of all slots.

  Args:
    params: of `served.params`.
    state: of the slots; k is one less than its places for tokens.
    active: [B] bool, slots in use; the others' tokens go to no expert.
    cfg: the model.
    mode: of all rows, see `sampling.mode`.
    experts: how the routed experts are computed, if not on this device.

  Returns:
    The state; what was written; tokens that each routed expert got, [n, E]
    int32, of the MTP module last if it drafts.
  """
  n_drafts, sampling_params = state.tokens.shape[1] - 1, state.sampling_params
  last, position = _at(state.tokens, state.n - 1), state.start + state.n
  cache, drafts, loads = state.cache, last[:, :0], []
  if n_drafts:
    drafts, q, cache, load = _draft(params, state, active, cfg, mode, experts)
    loads.append(load)
  tokens = jnp.concatenate([last, drafts], axis=1)
  valid = jnp.broadcast_to(active[:, None], tokens.shape)
  x, cache, load = cached_forward.forward(
    params,
    cache,
    tokens,
    position,
    cfg,
    cached_forward.ForwardOptions(valid=valid, experts=experts),
  )
  load = jnp.concatenate([load, *loads])
  hidden = cached_forward.final_norm(params, x, cfg)
  logits = cached_forward.logits(params, hidden)
  p = sampling.probabilities(logits, sampling_params, mode)
  ahead = position + 1
  if n_drafts:
    tokens, n = verify_drafts(p, q, drafts, sampling_params, ahead, mode)
  else:
    purpose = sampling.FINAL
    tokens = sampling.draw(
      p, sampling_params.seed, ahead[:, None], purpose, mode
    )
    n = jnp.ones_like(position)
  state = DecodeState(
    cache=cache,
    tokens=tokens,
    n=n,
    start=position,
    hidden=mtp_input(x, hidden, cfg) if n_drafts else None,
    sampling_params=sampling_params,
  )
  return state, StepOutput(tokens, n, token_logprobs(logits, tokens)), load


def mtp_input(x: jax.Array, normed: jax.Array, cfg: config.Model) -> jax.Array:
  """The main model's state that the MTP module reads."""
  return normed if cfg.mtp.input_state == "post_norm" else x

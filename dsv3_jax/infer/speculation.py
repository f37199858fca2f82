"""Decode steps with speculative decoding (arXiv:2412.19437, section 5.4.3).

The MTP module drafts k tokens; the main model reads all of them at once, and
accepts drafts up to the first that it rejects, plus one token of its own. The
text has the distribution of the main model alone, whatever the drafts are
(arXiv:2211.17192, theorem 1). With k = 0 a step is ordinary decoding.

  tokens of the last step    t1 .. tn, n <= k + 1
  the MTP module reads       (h0, t1) .. (h(n-1), tn): its last state drafts x1
  the MTP module reads       (its state, x1) and drafts x2, ...
  the main model reads       tn, x1 .. xk, and verifies x1 .. xk

States of rejected drafts stay in the caches behind the last valid position; the
next step overwrites all of them before anything reads them. The MTP module has
read its own states where the main model's were not yet available; the next step
begins with reading these positions again.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.infer import cached_forward, kvcache, sampling
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.model import moe


@flax.struct.dataclass
class DecodeState:
  """State of the slots; rows of slots that are not in use hold anything."""

  cache: kvcache.Cache
  tokens: jax.Array  # [B, k + 1] int32, of the last step
  n: jax.Array  # [B] int32, number of them
  start: jax.Array  # [B] int32, position of the state before the first of them
  hidden: jax.Array | None  # [B, k + 1, D], states before each, for MTP
  sampling_params: sampling.SamplingParams


@flax.struct.dataclass
class StepOutput:
  """Tokens of a decode step."""

  tokens: jax.Array  # [B, k + 1] int32
  n: jax.Array  # [B] int32, number of them, at least 1
  logprobs: jax.Array  # [B, k + 1] f32, see `token_logprobs`


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns log-probabilities [...] of tokens [...] under the model itself.

  Temperature, top_p and top_k are not applied.
  """
  return _of_tokens(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


def mtp_input(x: jax.Array, normed: jax.Array, cfg: config.Model) -> jax.Array:
  """Returns the main model's state that the MTP module reads."""
  return normed if cfg.mtp.input_state == "post_norm" else x


def _of_tokens(values: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns values [..., C] of tokens [...]."""
  return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]


def _at(a: jax.Array, index: jax.Array) -> jax.Array:
  """Returns [B, T, ...] at index [B] as [B, 1, ...]."""
  index = index.reshape(-1, *[1] * (a.ndim - 1))
  return jnp.take_along_axis(a, index, axis=1)


def _draft(
  params: InferenceParams,
  state: DecodeState,
  active: jax.Array,
  cfg: config.Model,
  mode: str,
  experts: moe.Experts | None,
) -> tuple[jax.Array, jax.Array, kvcache.Cache, jax.Array]:
  """Returns drafts [B, k] of the MTP module, and what comes with them.

  These are the distributions that they were drawn from [B, k, C], the cache,
  and the load of experts [1, E].
  """
  n_drafts = state.tokens.shape[1] - 1
  forward = functools.partial(cached_forward.forward_mtp, params, cfg=cfg)
  valid = jnp.arange(n_drafts + 1)[None] < state.n[:, None]
  options = cached_forward.ForwardOptions(
    valid=valid & active[:, None], experts=experts
  )
  out, onward, cache, load = forward(
    state.cache, state.hidden, state.tokens, state.start, options=options
  )
  out, onward = _at(out, state.n - 1), _at(onward, state.n - 1)
  position = state.start + state.n  # of the last known token
  options = cached_forward.ForwardOptions(
    valid=active[:, None], experts=experts
  )
  seed, tokens, distributions = state.sampling_params.seed, [], []
  for i in range(n_drafts):
    if i:
      out, onward, cache, more = forward(
        cache, onward, tokens[-1], position + i - 1, options=options
      )
      load = load + more
    logits = cached_forward.logits(params, out)
    q = sampling.probabilities(logits, state.sampling_params, mode)
    ahead = position[:, None] + i + 1
    tokens.append(sampling.draw(q, seed, ahead, sampling.DRAFT, mode))
    distributions.append(q)
  drafts, q = jnp.concatenate(tokens, 1), jnp.concatenate(distributions, 1)
  return drafts, q, cache, load[None]


def _accept(
  p: jax.Array, q: jax.Array, drafts: jax.Array, u: jax.Array
) -> jax.Array:
  """Returns whether drafts [B, k] are accepted, given u [B, k] in (0, 1).

  Rejections must have the mass of max(p - q, 0), which is drawn in their place.
  In exact numbers max(q - p, 0) has it too; rounded, this may have more or
  less, 0 if p is 1 - 1e-9, and rare tokens would come too often or never.
  """
  p_draft, q_draft = _of_tokens(p, drafts), _of_tokens(q, drafts)
  missing = jnp.maximum(p - q, 0).sum(-1)
  excess = jnp.maximum(q - p, 0).sum(-1)
  scale = jnp.minimum(missing / jnp.where(excess > 0, excess, 1), 1)
  scale = jnp.where(missing > 0, scale, 1)
  rejected = jnp.maximum(q_draft - p_draft, 0) / q_draft * scale
  rejected += jnp.maximum(missing - excess, 0)
  # Whichever is rare is compared with u, whose small numbers are exact.
  return jnp.where(2 * p_draft < q_draft, u * q_draft < p_draft, u >= rejected)


def verify_drafts(
  p: jax.Array,
  q: jax.Array,
  drafts: jax.Array,
  seed: jax.Array,
  position: jax.Array,
  mode: str,
) -> tuple[jax.Array, jax.Array]:
  """Accepts drafts up to the first that is rejected, and adds one token.

  A draft x is accepted with probability min(1, p(x) / q(x)). The added token is
  drawn from max(p - q, 0) in place of a rejected draft, and from p after the
  last draft.

  Args:
    p: [B, k + 1, C], distributions of the main model.
    q: [B, k, C], distributions of the drafts.
    drafts: [B, k] int32.
    seed: [B] of the rows.
    position: [B] int32, of the first draft.
    mode: see `sampling.mode`.

  Returns:
    Tokens [B, k + 1], and the number of them [B], 1 .. k + 1.
  """
  k = drafts.shape[1]
  at = position[:, None] + jnp.arange(k + 1)[None]
  u = sampling.uniform(seed, at[:, :k], sampling.ACCEPT)
  accepted = _accept(p[:, :k], q, drafts, u)
  n = jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(1)
  residual = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)
  # If p and q differ by rounding alone, nothing may be left.
  residual = jnp.where(residual.any(-1, keepdims=True), residual, p)
  final = sampling.draw(
    _at(residual, n), seed, _at(at, n), sampling.FINAL, mode
  )
  tokens = jnp.pad(drafts, ((0, 0), (0, 1)))
  index = jnp.arange(k + 1)[None]
  return jnp.where(index < n[:, None], tokens, final), n + 1


def decode_step(
  params: InferenceParams,
  state: DecodeState,
  active: jax.Array,
  cfg: config.Model,
  mode: str,
  experts: moe.Experts | None = None,
) -> tuple[DecodeState, StepOutput, jax.Array]:
  """Generates 1 .. k + 1 tokens of every slot.

  Tokens of slots that are not active, [B] bool, go to no expert. All experts
  are on this device if `experts` is None.

  Returns:
    The new state; the tokens; the number of tokens that each routed expert got,
    [n, E] int32, that of the MTP module last if it drafts.
  """
  n_drafts, sampling_params = state.tokens.shape[1] - 1, state.sampling_params
  last, position = _at(state.tokens, state.n - 1), state.start + state.n
  cache, drafts, loads = state.cache, last[:, :0], []
  if n_drafts:
    drafts, q, cache, load = _draft(params, state, active, cfg, mode, experts)
    loads.append(load)
  tokens = jnp.concatenate([last, drafts], axis=1)
  valid = jnp.broadcast_to(active[:, None], tokens.shape)
  options = cached_forward.ForwardOptions(valid=valid, experts=experts)
  x, cache, load = cached_forward.forward(
    params, cache, tokens, position, cfg, options
  )
  hidden = cached_forward.final_norm(params, x, cfg)
  logits = cached_forward.logits(params, hidden)
  p = sampling.probabilities(logits, sampling_params, mode)
  seed, ahead = sampling_params.seed, position + 1
  if n_drafts:
    tokens, n = verify_drafts(p, q, drafts, seed, ahead, mode)
  else:
    tokens = sampling.draw(p, seed, ahead[:, None], sampling.FINAL, mode)
    n = jnp.ones_like(position)
  mtp_states = mtp_input(x, hidden, cfg) if n_drafts else None
  state = state.replace(
    cache=cache, tokens=tokens, n=n, start=position, hidden=mtp_states
  )
  output = StepOutput(tokens, n, token_logprobs(logits, tokens))
  return state, output, jnp.concatenate([load, *loads])

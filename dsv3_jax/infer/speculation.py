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
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.infer import cached_forward, kvcache, sampling
from dsv3_jax.infer import trace as trace_lib
from dsv3_jax.infer.forward_form import ForwardForm
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.infer.request import GenerationRequest

MAX_STEPS = 8  # decode steps of a dispatch
# Stop tokens of a text that end it on the device. If there are more, the host
# ends it when it reads the token, and a few steps are wasted.
N_STOPS = 4


@flax.struct.dataclass
class Limits:
  """Limits of the texts of the slots."""

  remaining: jax.Array  # [B] int32, tokens a text may still have; 0: it ended
  stop_ids: jax.Array  # [B, N_STOPS] int32, padded with -1

  def after(self, tokens: jax.Array, n: jax.Array) -> "Limits":
    """Returns the limits after n [B] tokens of [B, T]; 0 after a stop token."""
    new = jnp.arange(tokens.shape[1])[None] < n[:, None]
    stops = (tokens[..., None] == self.stop_ids[:, None]).any(-1)
    left = jnp.maximum(self.remaining - n, 0)
    return self.replace(remaining=jnp.where((stops & new).any(-1), 0, left))


def stack_limits(requests: Sequence[GenerationRequest]) -> Limits:
  """Stacks the limits of requests, on the host."""
  stop_ids = np.full((len(requests), N_STOPS), -1, np.int32)
  for row, r in zip(stop_ids, requests, strict=True):
    some = sorted(set(r.stop_token_ids))[:N_STOPS]
    row[: len(some)] = some
  remaining = np.array([r.max_tokens for r in requests], np.int32)
  return Limits(remaining, stop_ids)


@flax.struct.dataclass
class DecodeState:
  """State of the slots; rows of slots that are not in use hold anything."""

  cache: kvcache.Cache
  tokens: jax.Array  # [B, k + 1] int32, of the last step
  n: jax.Array  # [B] int32, number of them
  start: jax.Array  # [B] int32, position of the state before the first of them
  hidden: jax.Array | None  # [B, k + 1, D], states before each, for MTP
  sampling_params: sampling.SamplingParams
  limits: Limits


@flax.struct.dataclass
class StepOutput:
  """Tokens of a decode step; those of several have steps as second dim."""

  tokens: jax.Array  # [B, k + 1] int32
  n: jax.Array  # [B] int32, number of them; 0: the row was not active
  logprobs: jax.Array  # [B, k + 1] f32, see `token_logprobs`
  trace: trace_lib.StepTrace | None = None  # None: it is not asked for


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


def at(a: jax.Array, index: jax.Array) -> jax.Array:
  """Returns [B, T, ...] at index [B] as [B, 1, ...]."""
  index = index.reshape(-1, *[1] * (a.ndim - 1))
  return jnp.take_along_axis(a, index, axis=1)


def _draft(
  params: InferenceParams,
  state: DecodeState,
  active: jax.Array,
  cfg: config.Model,
  mode: str,
  form: ForwardForm,
) -> tuple[jax.Array, jax.Array, kvcache.Cache, cached_forward.Routed]:
  """Returns drafts [B, k] of the MTP module, and what comes with them.

  These are the distributions that they were drawn from [B, k, C], the cache,
  and the experts chosen: the load is of all passes, the experts are those of
  the first one, which reads states of the main model.
  """
  n_drafts = state.tokens.shape[1] - 1
  forward = functools.partial(form.forward_mtp, params, cfg=cfg)
  valid = jnp.arange(n_drafts + 1)[None] < state.n[:, None]
  options = cached_forward.ForwardOptions(
    valid=valid & active[:, None], experts=form.experts
  )
  out, onward, cache, routed = forward(
    state.cache, state.hidden, state.tokens, state.start, options=options
  )
  out, onward = at(out, state.n - 1), at(onward, state.n - 1)
  position = state.start + state.n  # of the last known token
  options = cached_forward.ForwardOptions(
    valid=active[:, None], experts=form.experts
  )
  seed, tokens, distributions = state.sampling_params.seed, [], []
  for i in range(n_drafts):
    if i:
      out, onward, cache, more = forward(
        cache, onward, tokens[-1], position + i - 1, options=options
      )
      routed = routed.replace(load=routed.load + more.load)
    logits = form.logits(params, out, active[:, None])
    q = sampling.probabilities(logits, state.sampling_params, mode)
    ahead = position[:, None] + i + 1
    tokens.append(sampling.draw(q, seed, ahead, sampling.DRAFT, mode))
    distributions.append(q)
  drafts, q = jnp.concatenate(tokens, 1), jnp.concatenate(distributions, 1)
  return drafts, q, cache, routed


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
  ahead = position[:, None] + jnp.arange(k + 1)[None]
  u = sampling.uniform(seed, ahead[:, :k], sampling.ACCEPT)
  accepted = _accept(p[:, :k], q, drafts, u)
  n = jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(1)
  residual = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)
  # If p and q differ by rounding alone, nothing may be left.
  residual = jnp.where(residual.any(-1, keepdims=True), residual, p)
  final = sampling.draw(
    at(residual, n), seed, at(ahead, n), sampling.FINAL, mode
  )
  tokens = jnp.pad(drafts, ((0, 0), (0, 1)))
  index = jnp.arange(k + 1)[None]
  return jnp.where(index < n[:, None], tokens, final), n + 1


def _verify_greedily(
  logits: jax.Array, drafts: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Does what `verify_drafts` does, where all distributions are one-hot."""
  tokens = sampling.most_likely(logits)
  right = (drafts == tokens[:, :-1]).astype(jnp.int32)
  return tokens, jnp.cumprod(right, axis=1).sum(1) + 1


def decode_step(
  params: InferenceParams,
  state: DecodeState,
  in_use: jax.Array,
  cfg: config.Model,
  mode: str,
  form: ForwardForm,
  traced: bool = False,
) -> tuple[DecodeState, StepOutput, jax.Array]:
  """Generates 1 .. k + 1 tokens of every slot whose text has not ended.

  Tokens of the others, and of slots that are not in use, [B] bool, go to no
  expert.

  Returns:
    The new state; the tokens; the number of tokens that each routed expert got,
    [n, E] int32, that of the MTP module last if it drafts.
  """
  n_drafts, sampling_params = state.tokens.shape[1] - 1, state.sampling_params
  active = in_use & (state.limits.remaining > 0)
  last, position = at(state.tokens, state.n - 1), state.start + state.n
  cache, drafts, mtp_routed = state.cache, last[:, :0], None
  q = jnp.zeros((*drafts.shape, cfg.vocab_size))
  if n_drafts:
    drafts, q, cache, mtp_routed = _draft(
      params, state, active, cfg, mode, form
    )
  tokens = jnp.concatenate([last, drafts], axis=1)
  valid = jnp.broadcast_to(active[:, None], tokens.shape)
  options = cached_forward.ForwardOptions(valid=valid, experts=form.experts)
  x, cache, routed = form.forward(params, cache, tokens, position, cfg, options)
  hidden = cached_forward.final_norm(params, x, cfg)
  logits = form.logits(params, hidden, valid)
  adjusted = sampling.adjust(logits, sampling_params, mode)
  if mode == sampling.GREEDY:
    tokens, n = _verify_greedily(logits, drafts)
  else:
    p = jax.nn.softmax(adjusted)
    seed = sampling_params.seed
    tokens, n = verify_drafts(p, q, drafts, seed, position + 1, mode)
  mtp_states = mtp_input(x, hidden, cfg) if n_drafts else None
  told = jnp.where(active, n, 0)
  state = state.replace(
    cache=cache,
    tokens=tokens,
    n=n,
    start=position,
    hidden=mtp_states,
    limits=state.limits.after(tokens, told),
  )
  output = StepOutput(tokens, told, token_logprobs(logits, tokens))
  load, mtp_experts = routed.load, None
  if mtp_routed:
    load = jnp.concatenate([load, mtp_routed.load])
    mtp_experts = mtp_routed.experts
  if traced:
    step = trace_lib.of_step(
      adjusted, tokens, routed.experts, mtp_experts, mode
    )
    output = output.replace(trace=step)
  return state, output, load


def decode_steps(
  params: InferenceParams,
  state: DecodeState,
  rows: tuple[jax.Array, jax.Array],
  cfg: config.Model,
  mode: str,
  form: ForwardForm,
  traced: bool = False,
) -> tuple[DecodeState, StepOutput, jax.Array]:
  """Runs several decode steps, up to MAX_STEPS.

  `rows` are the slots in use and the number of steps, int32; otherwise the
  arguments are those of `decode_step`.

  Returns:
    The new state; the tokens, [B, MAX_STEPS, ...], none of steps that were not
    run; the number of tokens that each expert got in all steps.
  """
  in_use, n_steps = rows
  shape = len(in_use), MAX_STEPS, state.tokens.shape[1]
  output = StepOutput(
    jnp.zeros(shape, jnp.int32),
    jnp.zeros(shape[:2], jnp.int32),
    jnp.zeros(shape, jnp.float32),
    trace_lib.empty(shape, cfg, mode) if traced else None,
  )
  n_routers = cfg.n_moe_layers + (shape[2] > 1)
  load = jnp.zeros((n_routers, cfg.router.n_experts), jnp.int32)

  def step(i, carry):
    state, output, load = carry
    state, new, more = decode_step(
      params, state, in_use, cfg, mode, form, traced
    )
    output = jax.tree.map(
      lambda a, x: jax.lax.dynamic_update_index_in_dim(a, x, i, 1), output, new
    )
    return state, output, load + more

  return jax.lax.fori_loop(0, n_steps, step, (state, output, load))

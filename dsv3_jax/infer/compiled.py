"""Compiled programs of an engine: a decode step, and a chunk of prompts."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.infer import (
  cached_forward,
  forward_form,
  kvcache,
  sampling,
  serving_ffn,
  serving_mesh,
  speculation,
  trace,
)
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.infer.request import IDLE, GenerationRequest


@flax.struct.dataclass
class PromptChunk:
  """Parts of prompts, equally many for each shard of the slots.

  Tokens after the first n are padding; n is 0 for a row without a prompt to
  read.
  """

  tokens: jax.Array  # [R, T] int32
  ahead: jax.Array  # [R, T] int32, the token after each
  start: jax.Array  # [R] int32, position of the first
  n: jax.Array  # [R] int32
  slot: jax.Array  # [R] int32, counted in the shard
  sampling_params: sampling.SamplingParams
  limits: speculation.Limits


def prompt_chunk(
  prompts: Mapping[int, tuple[int, GenerationRequest]],
  n_rows: int,
  start: int,
  size: int,
) -> PromptChunk:
  """Returns up to `size` tokens of prompts from a position on, on the host.

  A prompt has its row, out of n_rows, as key; its slot is counted in the shard.
  """
  n, slots = np.zeros((2, n_rows), np.int32)
  # One more than the chunk: the MTP module reads the token ahead.
  tokens = np.zeros((n_rows, size + 1), np.int32)
  requests = [IDLE] * n_rows
  for row, (slot, request) in prompts.items():
    ids = request.prompt[start : start + size + 1]
    tokens[row, : len(ids)], n[row] = ids, min(len(ids), size)
    slots[row], requests[row] = slot, request
  tokens = tokens[:, : kvcache.bucket(int(n.max()), size) + 1]
  return PromptChunk(
    tokens=tokens[:, :-1],
    ahead=tokens[:, 1:],
    start=np.full(n_rows, start, np.int32),
    n=n,
    slot=slots,
    sampling_params=sampling.stack_params(requests),
    limits=speculation.stack_limits(requests),
  )


Program = Callable[..., tuple[speculation.DecodeState, Any, jax.Array]]


@functools.cache
def program(
  step: Program,
  cfg: config.Model,
  mesh: serving_mesh.ServingMesh | None,
  form: forward_form.ForwardForm,
  traced: bool,
  mode: str,
) -> Program:
  """Compiles `speculation.decode_steps` of all slots, or `read_chunk`.

  The program is a function of parameters, state (donated), and the last
  argument of the step: the slots in use, or a `PromptChunk`.
  """
  if mesh:
    experts = serving_ffn.make_experts(mesh, cfg)
    form = dataclasses.replace(form, experts=experts)

  def local(params, state, rows):
    return step(params, state, rows, cfg, mode, form, traced)

  return jax.jit(serving_mesh.shard_mapped(local, mesh), donate_argnums=1)


def read_chunk(
  params: InferenceParams,
  state: speculation.DecodeState,
  chunk: PromptChunk,
  cfg: config.Model,
  mode: str,
  form: forward_form.ForwardForm,
  traced: bool = False,
) -> tuple[speculation.DecodeState, speculation.StepOutput, jax.Array]:
  """Reads chunks of R prompts into slots, and draws the tokens after them.

  Returns:
    The state; the tokens, drawn with the requests' sampling parameters, [R, 1];
    the load of the main model's experts.
  """
  start, n = chunk.start, chunk.n
  if chunk.tokens.shape[1] > form.max_tokens:
    form = forward_form.XLA

  rows = jax.tree.map(lambda a: a[chunk.slot], state.cache)
  valid = jnp.arange(chunk.tokens.shape[1])[None] < n[:, None]
  options = cached_forward.ForwardOptions(True, valid, form.experts)
  x, rows, routed = form.forward(
    params, rows, chunk.tokens, start, cfg, options
  )
  last = speculation.at(x, jnp.maximum(n - 1, 0))
  normed = cached_forward.final_norm(params, last, cfg)
  logits = form.logits(params, normed, n[:, None] > 0)
  adjusted = sampling.adjust(logits, chunk.sampling_params, mode)
  seed, position = chunk.sampling_params.seed, (start + n)[:, None]
  p = jax.nn.softmax(adjusted)
  token = sampling.draw(p, seed, position, sampling.FINAL, mode)

  def put(a, new):
    # Rows without a prompt go to no slot.
    slot = jnp.where(n > 0, chunk.slot, len(a))
    return a.at[slot].set(new.astype(a.dtype), mode="drop")

  padding, hidden = ((0, 0), (0, state.tokens.shape[1] - 1)), state.hidden
  mtp_experts = None
  if hidden is not None:
    # Fills the cache of the MTP module. The last position, whose next token is
    # not known here, is read again with it in the first decode step.
    normed_states = cached_forward.final_norm(params, x, cfg)
    states = speculation.mtp_input(x, normed_states, cfg)
    _, _, rows, mtp_routed = form.forward_mtp(
      params, rows, states, chunk.ahead, start, cfg, options
    )
    mtp_experts = mtp_routed.experts
    last_state = speculation.mtp_input(last, normed, cfg)
    hidden = put(hidden, jnp.pad(last_state, (*padding, (0, 0))))
  settings = jax.tree.map(put, state.sampling_params, chunk.sampling_params)
  one = jnp.ones_like(start)
  limits = chunk.limits.after(token, one)
  state = state.replace(
    cache=jax.tree.map(put, state.cache, rows),
    tokens=put(state.tokens, jnp.pad(token, padding)),
    n=put(state.n, one),
    start=put(state.start, start + n - 1),
    hidden=hidden,
    sampling_params=settings,
    limits=jax.tree.map(put, state.limits, limits),
  )
  logprobs = speculation.token_logprobs(logits, token)
  output = speculation.StepOutput(token, one, logprobs)
  if traced:
    step = trace.of_step(adjusted, token, routed.experts, mtp_experts, mode)
    output = output.replace(trace=step)
  return state, output, routed.load

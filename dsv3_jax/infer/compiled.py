"""Compiled programs of an engine: a decode step, and a chunk of prompts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.infer import (
  cached_forward,
  forward_form,
  sampling,
  serving_ffn,
  serving_mesh,
  speculation,
  trace,
)
from dsv3_jax.infer.inference_params import InferenceParams


@flax.struct.dataclass
class PromptChunk:
  """Parts of prompts, one for each shard of the slots.

  Tokens after the first n are padding; n is 0 for a shard without a prompt to
  read.
  """

  tokens: jax.Array  # [R, T] int32
  ahead: jax.Array  # [R, T] int32, the token after each
  start: jax.Array  # [R] int32, position of the first
  n: jax.Array  # [R] int32
  slot: jax.Array  # [R] int32, counted in the shard
  sampling_params: sampling.SamplingParams
  limits: speculation.Limits


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
  """Reads a chunk of one prompt into a slot, and draws the token after it.

  Returns:
    The state; the token, drawn with the request's sampling parameters, [1, 1];
    the load of the main model's experts.
  """
  start, (n,), (slot,) = chunk.start, chunk.n, chunk.slot
  if chunk.tokens.shape[1] > form.max_tokens:
    form = forward_form.XLA

  def of_slot(a):
    return jax.lax.dynamic_slice_in_dim(a, slot, 1)

  row = jax.tree.map(of_slot, state.cache)
  valid = jnp.arange(chunk.tokens.shape[1])[None] < n
  options = cached_forward.ForwardOptions(True, valid, form.experts)
  x, row, routed = form.forward(params, row, chunk.tokens, start, cfg, options)
  last = jax.lax.dynamic_slice_in_dim(x, jnp.maximum(n - 1, 0), 1, axis=1)
  normed = cached_forward.final_norm(params, last, cfg)
  logits = form.logits(params, normed)
  adjusted = sampling.adjust(logits, chunk.sampling_params, mode)
  seed, position = chunk.sampling_params.seed, start[:, None] + n
  p = jax.nn.softmax(adjusted)
  token = sampling.draw(p, seed, position, sampling.FINAL, mode)

  def put(a, new):
    new = jnp.where(n > 0, new.astype(a.dtype), of_slot(a))
    return jax.lax.dynamic_update_slice_in_dim(a, new, slot, 0)

  padding, hidden = ((0, 0), (0, state.tokens.shape[1] - 1)), state.hidden
  mtp_experts = None
  if hidden is not None:
    # Fills the cache of the MTP module. The last position, whose next token is
    # not known here, is read again with it in the first decode step.
    normed_states = cached_forward.final_norm(params, x, cfg)
    states = speculation.mtp_input(x, normed_states, cfg)
    _, _, row, mtp_routed = form.forward_mtp(
      params, row, states, chunk.ahead, start, cfg, options
    )
    mtp_experts = mtp_routed.experts
    last_state = speculation.mtp_input(last, normed, cfg)
    hidden = put(hidden, jnp.pad(last_state, (*padding, (0, 0))))
  settings = jax.tree.map(put, state.sampling_params, chunk.sampling_params)
  one = jnp.ones_like(start)
  limits = chunk.limits.after(token, one)
  state = state.replace(
    cache=jax.tree.map(put, state.cache, row),
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

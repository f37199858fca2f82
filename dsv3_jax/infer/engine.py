"""Continuous batching: requests enter and leave a fixed number of slots.

Two programs are compiled: a decode step of all slots, and a chunk of a prompt;
each for a few lengths of the cache and of the chunk. The text of a request
depends on its prompt, settings and seed alone.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.errors import NotFiniteError, raise_problems
from dsv3_jax.infer import (
  compiled,
  eplb,
  expert_balance,
  forward_form,
  inference_params,
  kvcache,
  sampling,
  scheduler,
  serving_mesh,
  serving_params,
  speculation,
)
from dsv3_jax.infer import trace as trace_lib
from dsv3_jax.infer.engine_options import (
  EngineOptions,
  validate_options,
  validate_request,
)
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.infer.request import IDLE, GenerationRequest
from dsv3_jax.plan import memory

STOP, LENGTH = "stop", "length"  # finish reasons

# Decode steps that are run at a time take about this long, so that tokens come
# steadily; more of them cost less of the host's time.
_DISPATCH_S = 0.05


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """Decode steps that the devices run."""

  active: dict[int, scheduler.Active]  # by slot
  n_steps: int
  output: speculation.StepOutput


@dataclasses.dataclass
class EngineStats:
  """Counts since an engine was made."""

  prompt_tokens: int = 0
  tokens: int = 0  # of decode steps, including those after the end of a text
  cycles: int = 0  # decode steps: passes of the main model over the slots
  rows: int = 0  # requests that the steps generated tokens of, summed
  wasted_rows: int = 0  # the same of requests that the host ended meanwhile
  drafts: int = 0
  accepted: int = 0  # of the drafts
  # Before each rebalancing, the largest over mean load of the devices, mean
  # over routers.
  imbalance: list[float] = dataclasses.field(default_factory=list)

  @property
  def acceptance(self) -> float:
    """The fraction of drafts that were accepted."""
    return self.accepted / self.drafts if self.drafts else 0.0

  @property
  def calls_per_token(self) -> float:
    """Passes of the main model per token of one text."""
    return self.rows / self.tokens if self.tokens else 0.0


@dataclasses.dataclass(frozen=True)
class Event:
  """A generated token."""

  index: int  # of the request, as `submit` returned it
  token: int
  logprob: float  # under the model: before temperature, top_p and top_k
  # STOP if this token ended the text and is not part of it, LENGTH if it is the
  # last of max_tokens, "" before.
  finish_reason: str = ""
  # Of the last event of a text, with `EngineOptions.trace`.
  trace: trace_lib.Trace | None = None


class Engine:
  """Generates the texts of requests, `max_batch` at a time."""

  def __init__(
    self,
    params: InferenceParams,
    cfg: config.Model,
    options: EngineOptions | None = None,
    *,
    mesh: serving_mesh.ServingMesh | None = None,
    placement: eplb.ExpertPlacement | None = None,
  ):
    """Makes an engine with an empty cache, of the parameters' dtype.

    Args:
      params: of `inference_params.from_params`.
      cfg: the model.
      options: of the engine; the default options if None.
      mesh: by default the one that the options describe, or one device.
      placement: of the experts at first; by default that for an even load.

    Raises:
      InputError: an option is out of range, or there is no MTP module to draft.
    """
    options = (options or EngineOptions()).resolve(cfg)
    raise_problems(validate_options(cfg, options, mesh))
    if options.serving and not mesh:
      mesh = serving_mesh.make_serving_mesh(options.serving, cfg)
    if placement and not mesh:
      raise ValueError("placement: needs a mesh that experts are divided over")
    if mesh:
      placement = placement or serving_params.uniform_placement(mesh, cfg)
    self.cfg, self.options, self.mesh = cfg, options, mesh
    self.stats, self.submitted = EngineStats(), 0
    self.balancer = expert_balance.ExpertBalancer(cfg, mesh, placement)
    self._params = self._placed(params)
    self.form = forward_form.choose(
      options.form, self._params, cfg, divided=mesh is not None
    )
    self._n_shards = mesh.n_shards if mesh else 1
    self._slots = scheduler.Scheduler(options.max_batch, self._n_shards)
    # Over a mesh a step at a time, since experts may move between two.
    decode = speculation.decode_step if mesh else speculation.decode_steps
    # Cached by sampling mode: hashing the configuration at each call is slow.
    self._decode, self._prefill = (
      functools.cache(
        functools.partial(
          compiled.program, step, cfg, mesh, self.form, options.trace
        )
      )
      for step in (decode, compiled.read_chunk)
    )
    self._state: speculation.DecodeState | None = None
    self._running: Dispatch | None = None
    # Of the last dispatch: seconds a step, and when its tokens were read.
    self._step_s, self._read_at = math.inf, 0.0

  # --- requests ---

  def validate_request(self, request: GenerationRequest) -> list[str]:
    """Lists what is wrong with a request in token ids, a line each."""
    return validate_request(self.cfg, self.options, request)

  def submit(self, request: GenerationRequest) -> int:
    """Puts a request in the queue; returns its index, counted from 0.

    Raises:
      InputError: it cannot be served.
    """
    raise_problems(self.validate_request(request))
    index, self.submitted = self.submitted, self.submitted + 1
    self._slots.waiting.append((index, request))
    return index

  def cancel(self, index: int) -> None:
    """Ends a request early; it has no further events."""
    self._slots.cancel(index)

  @property
  def busy(self) -> bool:
    """Returns whether any request is unfinished."""
    return bool(self._slots.waiting or self._slots.active)

  def step(self) -> list[Event]:
    """Admits requests; else launches decode steps, returns the last's events.

    The devices thus compute while the host reads what they generated before.
    They are few steps, or one while a request waits for a slot. First tokens do
    not wait for a decode step, which compiles first.
    """
    events = []
    while self._slots.free and self._slots.waiting:
      events += self._admit()
    if events:
      return events
    last, self._running = self._running, self._launch()
    return self._dispatch_events(last) if last else []

  def run(self, requests: Iterable[GenerationRequest]) -> Iterator[Event]:
    """Serves requests in order, taking each when there is a slot for it.

    Raises:
      InputError: one cannot be served.
    """
    requests = iter(requests)
    more = True
    while more or self.busy:
      while more and len(self._slots.waiting) < len(self._slots.free):
        if more := (request := next(requests, None)) is not None:
          self.submit(request)
      yield from self.step()

  def update_params(self, params: InferenceParams) -> None:
    """Replaces the parameters; nothing is compiled again.

    Raises:
      RuntimeError: a request is unfinished.
      ValueError: the shape or dtype of a parameter is another one.
    """
    if self.busy:
      raise RuntimeError("parameters may change between requests alone")
    self._params = inference_params.replace(self._params, self._placed(params))

  def _placed(self, params: InferenceParams) -> InferenceParams:
    """Divides parameters over the mesh, where there is one."""
    if not (mesh := self.mesh):
      return params
    placement = self.balancer.placement
    return serving_params.shard_params(params, placement, mesh, self.cfg)

  def rebalance(self) -> None:
    """Moves experts to even their load since the last time.

    Requests in progress continue with the same tokens.
    """
    self.stats.imbalance.append(float(self.balancer.imbalance().mean()))
    self._params = self.balancer.rebalance(self._params)

  # --- the cache ---

  @property
  def _size(self) -> tuple[int, int]:
    """Rows of the state, and positions of each in the cache."""
    if not self._state:
      return 0, 0
    return len(self._state.n), kvcache.length(self._state.cache)

  def _reserve(self, n: int) -> None:
    """Makes the state large enough for a further text of n tokens.

    It has one row as long as there is one text, and rows that are idle cost
    time; max_batch then.
    """
    longest = self.options.n_positions(self.options.max_len)
    n = kvcache.bucket(self.options.n_positions(n), longest)
    alone = len(self._slots.active) == 1 and not self._slots.waiting
    few = alone and not self.mesh and not self.form.skips_idle_rows
    old = self._size
    new = max(1 if few else self.options.max_batch, old[0]), max(n, old[1])
    if new == old:
      return
    specs = self._cache_specs(*new)
    held = param_spec.nbytes(specs) / self._n_shards
    memory.check_fits(
      f"parameters, and a cache of {new[0]} x {new[1]} positions",
      memory.bytes_per_device(self._params) + held,
      list(jax.tree.leaves(self._params)[0].sharding.addressable_devices),
      "shorter texts, or a smaller --max_batch, need less",
    )
    state = self._empty_state(specs, new[0])
    self._state = kvcache.grow(self._state, state) if self._state else state

  def _cache_specs(self, n_rows: int, n: int) -> param_spec.Specs:
    dtype, drafting = self._params["embed"].dtype, self.options.n_drafts > 0
    return kvcache.specs(self.cfg, n_rows, n, dtype, drafting=drafting)

  def _empty_state(
    self, specs: param_spec.Specs, b: int
  ) -> speculation.DecodeState:
    k, dtype = self.options.n_drafts, self._params["embed"].dtype
    idle = [IDLE] * b
    settings = sampling.stack_params(idle), speculation.stack_limits(idle)
    sampling_params, limits = jax.tree.map(jnp.asarray, settings)
    state = speculation.DecodeState(
      cache=kvcache.empty(specs),
      tokens=jnp.zeros((b, k + 1), jnp.int32),
      n=jnp.ones(b, jnp.int32),
      start=jnp.zeros(b, jnp.int32),
      hidden=jnp.zeros((b, k + 1, self.cfg.d_model), dtype) if k else None,
      sampling_params=sampling_params,
      limits=limits,
    )
    return self._shard(state)

  def _shard(self, rows: Any) -> Any:
    """Divides arrays with a row for each slot, or each shard, over the mesh."""
    if not (mesh := self.mesh):
      return rows
    return jax.device_put(rows, jax.NamedSharding(mesh.mesh, mesh.batch))

  # --- prefill ---

  def _admit(self) -> list[Event]:
    """Reads prompts into free slots, and draws their first tokens."""
    n_rows, events = self._n_prompts(), []
    admitted = self._slots.admit(n_rows)
    if self.options.trace:
      for a in admitted.values():
        a.recorder = trace_lib.Recorder(a.request, self.cfg)
    requests = {row: a.request for row, a in admitted.items()}
    self._reserve(max(len(r.prompt) + r.max_tokens for r in requests.values()))
    longest = max(len(r.prompt) for r in requests.values())
    per_shard = self._slots.slots_per_shard
    prompts = {r: (a.slot % per_shard, a.request) for r, a in admitted.items()}
    program = self._prefill(sampling.mode(requests.values()))
    for start in range(0, longest, self.options.chunk):
      chunk = compiled.prompt_chunk(
        prompts, n_rows * self._n_shards, start, self.options.chunk
      )
      self._state, output, load = program(
        self._params, self._state, self._shard(chunk)
      )
      self.balancer.add(load)
      end = start + self.options.chunk
      done = [s for s, r in requests.items() if start < len(r.prompt) <= end]
      if done or self.options.trace:
        output = jax.device_get(output)
      for row, active in admitted.items():
        if active.recorder:
          active.recorder.add_chunk(output, row)
      for row in done:
        self.stats.prompt_tokens += len(requests[row].prompt)
        tokens, logprobs = output.tokens[row], output.logprobs[row]
        events += self._slot_events(admitted[row].slot, tokens, logprobs)
    return events

  def _n_prompts(self) -> int:
    """Returns how many prompts to read in a call, for each shard: 1 or many.

    Many have together as many tokens as a chunk, so that there are few
    programs.
    """
    n = min(len(self._slots.free), len(self._slots.waiting))
    some = itertools.islice(self._slots.waiting, n)
    size = kvcache.bucket(
      max(len(request.prompt) for _, request in some), self.options.chunk
    )
    many = min(self.options.max_batch, self.options.chunk // size)
    worth = n > 1 if self.form.skips_idle_rows else 2 * n > many
    return many if worth and not self.mesh else 1

  # --- decode ---

  def _launch(self) -> Dispatch | None:
    """Starts decode steps of the requests that running ones cannot finish.

    A step generates at least one token of each of its requests.
    """
    left, running = {}, self._running
    for slot, a in self._slots.active.items():
      left[slot] = a.request.max_tokens - a.n_generated
      if running and running.active.get(slot) is a:
        left[slot] -= running.n_steps
    active = {
      slot: self._slots.active[slot] for slot, n in left.items() if n > 0
    }
    if not active:
      return None
    n_steps = min(self._most_steps(), max(left.values()))
    program = self._decode(sampling.mode(a.request for a in active.values()))
    in_use = np.zeros(self._size[0], bool)
    in_use[list(active)] = True
    rows = self._shard(in_use) if self.mesh else (in_use, np.int32(n_steps))
    self._state, output, load = program(self._params, self._state, rows)
    self.balancer.add(load)
    self.stats.cycles += n_steps
    every = self.options.rebalance_every
    if every and not self.stats.cycles % every:
      self.rebalance()
    return Dispatch(active, n_steps, output)

  def _most_steps(self) -> int:
    """Returns the largest number of decode steps for the next dispatch."""
    if self.mesh or self._slots.waiting:
      return 1
    if self._step_s * speculation.MAX_STEPS <= _DISPATCH_S:
      return speculation.MAX_STEPS
    return max(1, int(_DISPATCH_S / self._step_s))

  def _dispatch_events(self, dispatch: Dispatch) -> list[Event]:
    """Returns the tokens of a dispatch, of requests that still want them."""
    output = jax.device_get(dispatch.output)
    self.balancer.flush()
    now = time.perf_counter()
    self._step_s, self._read_at = (now - self._read_at) / dispatch.n_steps, now
    if self.mesh:  # of one step
      output = jax.tree.map(lambda a: a[:, None], output)
    events = []
    for step in range(dispatch.n_steps):
      for slot, a in sorted(dispatch.active.items()):
        n = int(output.n[slot, step])
        if not n:  # it ended in a step before
          continue
        if self._slots.active.get(slot) is not a:
          self.stats.wasted_rows += 1
          continue
        self.stats.rows += 1
        self.stats.tokens += n
        self.stats.drafts += self.options.n_drafts
        self.stats.accepted += n - 1
        if a.recorder:
          a.recorder.add_step(output, (slot, step))
        at = slot, step, slice(n)
        events += self._slot_events(
          slot, output.tokens[at], output.logprobs[at]
        )
    return events

  def _slot_events(
    self, slot: int, tokens: np.ndarray, logprobs: np.ndarray
  ) -> list[Event]:
    """Returns tokens of a slot as events, up to the end of its text."""
    active, events = self._slots.active[slot], []
    for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
      if not logprob <= 0:
        raise NotFiniteError(
          f"request {active.index}: the log-probability of token {token} is"
          f" {logprob}: the model's parameters are not finite, or too large"
        )
      active.n_generated += 1
      full = active.n_generated == active.request.max_tokens
      stopped = token in active.request.stop_token_ids
      reason = STOP if stopped else LENGTH if full else ""
      recorder, trace = active.recorder if reason else None, None
      if recorder:
        trace = recorder.trace(active.n_generated)
      events.append(Event(active.index, token, logprob, reason, trace))
      if reason:
        self._slots.release(slot)
        break
    return events

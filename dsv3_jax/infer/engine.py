"""Continuous batching: texts join and leave a fixed number of slots.

A program for one cycle of all slots and one for a chunk of a prompt are all
that is compiled, for each of a few lengths of the cache and of the chunk. What
a request gets depends on its prompt, settings and seed alone.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.errors import InputError, NotFiniteError
from dsv3_jax.infer import (
  compiled,
  eplb,
  inference_params,
  kvcache,
  sampling,
  serving_mesh,
  speculation,
  stats,
)

STOP, LENGTH = "stop", "length"  # why a text ended
MANY = 100  # loads on devices that are added up on the host


@dataclasses.dataclass(frozen=True)
class Request:
  """A text to write."""

  prompt: Sequence[int]  # token ids
  max_tokens: int = 256
  temperature: float = 1.0  # 0: the most likely token
  top_p: float = 1.0
  top_k: int = 0  # 0: no limit
  seed: int = 0
  stop: tuple[int, ...] = ()  # ids that end the text


@dataclasses.dataclass(frozen=True)
class Event:
  """A token of a text."""

  index: int  # number that `submit` gave
  token: int
  logprob: float  # of the model itself: no temperature, nothing cut
  finish_reason: str = (
    ""  # with this token, which a STOP one does not belong to
  )


@dataclasses.dataclass
class _Active:
  """A request in a slot."""

  number: int
  request: Request
  slot: int
  written: int = 0  # tokens, without those of a cycle that is running


class Engine:
  """Writes the texts of requests, `n_slots` at a time."""

  def __init__(
    self,
    params: inference_params.InferenceParams,
    cfg: config.Model,
    *,
    n_slots: int = 8,
    max_len: int = 4096,
    chunk: int = 512,
    n_drafts: int = 0,
    unit: serving_mesh.ServingMesh | None = None,
    placed: eplb.ExpertPlacement | None = None,
    rebalance_every: int = 0,
  ):
    """An engine with an empty cache.

    Args:
      params: of `served.params`; their type is that of the cache. With a unit,
        of `units.place`.
      cfg: the model.
      n_slots: texts at the same time.
      max_len: positions of a text, prompt included.
      chunk: tokens of a prompt that are read together, a power of two.
      n_drafts: tokens that the MTP module drafts in a cycle.
      unit: of devices that serve together; None: one device.
      placed: with a unit, where the experts are in the parameters.
      rebalance_every: cycles after which they are placed anew; 0: never.

    Raises:
      InputError: a number is out of range, or there is no MTP module to draft.
    """
    problems = _problems(cfg, n_slots, max_len, chunk, n_drafts)
    if unit:
      problems += serving_mesh.validate(unit, cfg, n_slots)
    if bool(unit) != bool(placed):
      problems.append("unit and placed: one needs the other")
    if rebalance_every < 0 or (rebalance_every and not unit):
      problems.append(
        f"rebalance_every={rebalance_every}: must be at least 0, and 0 where"
        " no unit has experts to place"
      )
    if problems:
      raise InputError("\n".join(problems))
    self.cfg, self.n_slots, self.max_len = cfg, n_slots, max_len
    self.chunk, self.n_drafts = chunk, n_drafts
    self.rebalance_every = rebalance_every
    self.stats, self.submitted = stats.EngineStats(), 0
    self._params, self._unit, self._placed = params, unit, placed
    self._n_shards = unit.n_shards if unit else 1
    # By mode. A look at the configuration for each call would take its time.
    self._cycle, self._prefill = (
      functools.cache(functools.partial(program, cfg, unit))
      for program in (compiled.decode_program, compiled.prefill_program)
    )
    self._free = list(range(n_slots))[::-1]
    self._active: dict[int, _Active] = {}
    self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
    self._state: speculation.DecodeState | None = None
    self._load, self._pending = None, []
    self._running: tuple[dict[int, _Active], speculation.StepOutput] | None = (
      None
    )

  # --- requests ---

  def problems(self, request: Request) -> list[str]:
    """What is wrong with a request, a line each."""
    vocab, found = self.cfg.vocab_size, []
    ids = np.asarray(request.prompt)
    if not ids.size:
      found.append("prompt: is empty; at least one token is needed")
    elif ids.dtype.kind not in "iu":
      found.append("prompt: token ids must be integers of 64 bits at most")
    elif ids.min() < 0 or ids.max() >= vocab:
      wrong = ids[(ids < 0) | (ids >= vocab)][0]
      found.append(f"prompt: token id {wrong} must be in [0, {vocab})")
    if request.max_tokens < 1:
      found.append(f"max_tokens={request.max_tokens}: must be at least 1")
    found += sampling.validate(
      request.temperature, request.top_p, request.top_k, request.seed
    )
    if (need := self._need(request)) > self.max_len:
      found.append(
        f"prompt of {ids.size} tokens with max_tokens={request.max_tokens}:"
        f" needs {need} positions of the cache, which has at most"
        f" max_len={self.max_len}"
      )
    return found

  def submit(self, request: Request) -> int:
    """Puts a request in the queue; returns its number, counted from 0.

    Raises:
      InputError: it cannot be served.
    """
    if problems := self.problems(request):
      raise InputError("\n".join(problems))
    number, self.submitted = self.submitted, self.submitted + 1
    self._waiting.append((number, request))
    return number

  def cancel(self, number: int) -> None:
    """Ends a request early; no further event is of it."""
    self._waiting = collections.deque(
      pair for pair in self._waiting if pair[0] != number
    )
    for slot, active in list(self._active.items()):
      if active.number == number:
        self._release(slot)

  @property
  def busy(self) -> bool:
    """Whether any request is unfinished."""
    return bool(self._waiting or self._active)

  def step(self) -> list[Event]:
    """Reads prompts into free slots, starts a cycle, and tells of the last one.

    So the devices are at work while the host looks at what they wrote. A text
    that a stop token ends has a cycle too many then, which is not told of.
    """
    events = []
    while self._free and self._waiting:
      events += self._admit()
    last, self._running = self._running, self._start()
    return events + self._told(*last) if last else events

  def run(self, requests: Iterable[Request]) -> Iterator[Event]:
    """Serves requests in order, each taken when there is room for it.

    Raises:
      InputError: one cannot be served.
    """
    requests = iter(requests)
    more = True
    while more or self.busy:
      while more and len(self._waiting) < len(self._free):
        if (request := next(requests, None)) is None:
          more = False
        else:
          self.submit(request)
      yield from self.step()

  # --- experts ---

  @property
  def load(self) -> np.ndarray:
    """Tokens that each routed expert got, [n, E] int64, since `rebalance`.

    Of the main model's layers, then of the MTP modules: the first one's if it
    drafts, else 0.
    """
    shape = self.cfg.n_routers, self.cfg.router.n_experts
    if self._load is None:
      self._load = np.zeros(shape, np.int64)
    for load in jax.device_get(self._pending):
      self._load[: len(load)] += load
    self._pending = []
    return self._load.copy()

  def imbalance(self) -> np.ndarray:
    """Largest over mean load of the unit's devices, [n] of each router."""
    load = self._unit.load(self.load, self.cfg)
    devices = self._placed.loads(load, self._unit.n_devices)
    return eplb.imbalance(devices)

  def rebalance(self) -> None:
    """Places experts anew for the load since the last time; counts from 0.

    What is being written goes on as if nothing had been done.
    """
    self.stats.imbalance.append(float(self.imbalance().mean()))
    args = self._unit, self.cfg
    new = serving_mesh.placement_for_load(self.load, *args)
    self._params = serving_mesh.apply_placement(
      self._params, self._placed, new, *args
    )
    self._placed, self._load = new, None

  # --- the slots ---

  def _need(self, request: Request) -> int:
    # A last cycle may write as many positions as there are drafts too many.
    return len(request.prompt) + request.max_tokens + self.n_drafts

  def _release(self, slot: int) -> None:
    del self._active[slot]
    self._free.append(slot)

  def _room(self, n: int) -> None:
    """Makes the cache long enough for n positions."""
    n = kvcache.bucket(n, self.max_len)
    if self._state is None:
      self._state = self._empty(n)
    elif n > kvcache.length(self._state.cache):
      self._state = compiled.grow_cache(self._state, n)

  def _empty(self, n: int) -> speculation.DecodeState:
    b, k, dtype = self.n_slots, self.n_drafts, self._params["embed"].dtype
    zeros = jnp.zeros((b, k + 1), jnp.int32)
    state = speculation.DecodeState(
      cache=kvcache.empty(kvcache.specs(self.cfg, b, n, dtype, drafting=k > 0)),
      tokens=zeros,
      n=jnp.ones(b, jnp.int32),
      start=jnp.zeros(b, jnp.int32),
      hidden=jnp.zeros((b, k + 1, self.cfg.d_model), dtype) if k else None,
      sampling_params=jax.tree.map(
        jnp.asarray, sampling.stack_params([(0, 1, 0, 0)] * b)
      ),
    )
    return self._put(state)

  def _put(self, rows: Any) -> Any:
    """Arrays with a row for each text, or for each shard, where they belong."""
    if not self._unit:
      return rows
    sharding = jax.NamedSharding(self._unit.mesh, self._unit.batch)
    return jax.device_put(rows, sharding)

  def _next(self) -> dict[int, _Active]:
    """Gives slots to waiting requests, one a shard at most; by shard."""
    found, size = {}, self.n_slots // self._n_shards
    for slot in self._free[::-1]:
      if self._waiting and slot // size not in found:
        self._free.remove(slot)
        active = _Active(*self._waiting.popleft(), slot=slot)
        self._active[slot] = found[slot // size] = active
    return found

  def _admit(self) -> list[Event]:
    """Reads prompts into free slots, and draws their first tokens."""
    admitted, events = self._next(), []
    requests = {shard: a.request for shard, a in admitted.items()}
    self._room(max(map(self._need, requests.values())))
    longest = max(len(r.prompt) for r in requests.values())
    program = self._prefill(_mode(requests.values()))
    for start in range(0, longest, self.chunk):
      chunk = self._chunk(admitted, start)
      self._state, first, load = program(
        self._params, self._state, self._put(chunk)
      )
      self._pending.append(load)
      done = [
        shard
        for shard, request in requests.items()
        if start < len(request.prompt) <= start + self.chunk
      ]
      if done:
        tokens, logprobs = jax.device_get(first)
      for shard in done:
        self.stats.prompt_tokens += len(requests[shard].prompt)
        events += self._written(
          admitted[shard].slot, tokens[shard], logprobs[shard]
        )
    return events

  def _chunk(
    self, admitted: dict[int, _Active], start: int
  ) -> compiled.PromptChunk:
    """Tokens of prompts from a position on."""
    n_rows, size = self._n_shards, self.n_slots // self._n_shards
    here = {
      shard: a.request.prompt[start : start + self.chunk + 1]
      for shard, a in admitted.items()
    }
    n = np.zeros(n_rows, np.int32)
    for shard, ids in here.items():
      n[shard] = min(len(ids), self.chunk)
    width = kvcache.bucket(int(n.max()), self.chunk)
    ids = np.zeros((n_rows, width + 1), np.int32)
    slot, how = np.zeros(n_rows, np.int32), [(0.0, 1.0, 0, 0)] * n_rows
    for shard, active in admitted.items():
      ids[shard, : len(here[shard])] = here[shard]
      slot[shard] = active.slot % size
      how[shard] = _how(active.request)
    return compiled.PromptChunk(
      tokens=ids[:, :-1],
      ahead=ids[:, 1:],
      start=np.full(n_rows, start, np.int32),
      n=n,
      slot=slot,
      sampling_params=sampling.stack_params(how),
    )

  def _start(self) -> tuple[dict[int, _Active], speculation.StepOutput] | None:
    """Starts a cycle of the texts that the running one does not end for sure.

    It writes at least a token of each that it is of.
    """
    running = self._running[0] if self._running else {}
    active = {
      slot: a
      for slot, a in self._active.items()
      if a.written + (running.get(slot) is a) < a.request.max_tokens
    }
    if not active:
      return None
    program = self._cycle(_mode(a.request for a in active.values()))
    in_use = np.isin(np.arange(self.n_slots), list(active))
    self._state, written, load = program(
      self._params, self._state, self._put(in_use)
    )
    self._pending.append(load)
    self.stats.cycles += 1
    if self.rebalance_every and not self.stats.cycles % self.rebalance_every:
      self.rebalance()
    return active, written

  def _told(
    self, active: dict[int, _Active], written: speculation.StepOutput
  ) -> list[Event]:
    """What a cycle wrote of the texts that are still wanted."""
    written = jax.device_get(written)
    if len(self._pending) > MANY:
      self._load = self.load
    events = []
    for slot, a in sorted(active.items()):
      if self._active.get(slot) is not a:
        self.stats.wasted_rows += 1
        continue
      n = written.n[slot]
      self.stats.rows += 1
      self.stats.tokens += int(n)
      self.stats.drafts += self.n_drafts
      self.stats.accepted += int(n) - 1
      events += self._written(
        slot, written.tokens[slot, :n], written.logprobs[slot, :n]
      )
    return events

  def _written(
    self, slot: int, tokens: np.ndarray, logprobs: np.ndarray
  ) -> list[Event]:
    """Tokens of a slot as events, up to the end of its text."""
    active, events = self._active[slot], []
    for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
      if not logprob <= 0:
        raise NotFiniteError(
          f"request {active.number}: the log-probability of token {token} is"
          f" {logprob}: the model's parameters are not finite, or too large"
        )
      active.written += 1
      ended = ""
      if token in active.request.stop:
        ended = STOP
      elif active.written == active.request.max_tokens:
        ended = LENGTH
      events.append(Event(active.number, token, logprob, ended))
      if ended:
        self._release(slot)
        break
    return events


def _problems(
  cfg: config.Model, n_slots: int, max_len: int, chunk: int, n_drafts: int
) -> list[str]:
  found = []
  for name, value in (("n_slots", n_slots), ("max_len", max_len)):
    if value < 1:
      found.append(f"{name}={value}: must be at least 1")
  longest = cfg.mla.yarn.max_len
  if max_len > longest:
    found.append(
      f"max_len={max_len}: must be at most {longest:g}, what mla.yarn"
      " extends to"
    )
  if chunk < kvcache.MIN_LENGTH or chunk & (chunk - 1):
    found.append(
      f"chunk={chunk}: must be a power of two, at least {kvcache.MIN_LENGTH}"
    )
  if n_drafts < 0:
    found.append(f"n_drafts={n_drafts}: must be at least 0")
  elif n_drafts and not cfg.mtp.depth:
    found.append(
      f"n_drafts={n_drafts}: the model has no MTP module to draft with"
      " (mtp.depth=0)"
    )
  return found


def _how(request: Request) -> tuple[float, float, int, int]:
  return request.temperature, request.top_p, request.top_k, request.seed


def _mode(requests: Iterable[Request]) -> str:
  return sampling.mode([_how(request)[:3] for request in requests])

"""Continuous batching: texts join and leave a fixed number of slots.

A program for one cycle of all slots and one for a chunk of a prompt are all
that is compiled, for each of a few lengths of the cache and of the chunk. What
a request gets depends on its prompt, settings and seed alone.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.infer import decoding
from dsv3_jax.infer import kvcache
from dsv3_jax.infer import sampling
from dsv3_jax.infer import served
from dsv3_jax.infer import speculation
from dsv3_jax.model import mla
from dsv3_jax.model import moe

STOP, LENGTH = "stop", "length"  # why a text ended


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

  request: int  # number that `submit` gave
  token: int
  logprob: float  # of the model itself: no temperature, nothing cut
  ended: str = ""  # with this token, which a STOP one does not belong to


@dataclasses.dataclass
class Stats:
  """Counts since an engine was made."""

  prompt_tokens: int = 0
  tokens: int = 0  # written by cycles, those behind the end of a text too
  cycles: int = 0  # passes of the main model over the slots
  rows: int = 0  # slots in use in them, summed
  drafts: int = 0
  accepted: int = 0  # of the drafts

  @property
  def acceptance(self) -> float:
    """The share of drafts that were kept."""
    return self.accepted / self.drafts if self.drafts else 0.0

  @property
  def calls_per_token(self) -> float:
    """Passes of the main model for a token of one text."""
    return self.rows / self.tokens if self.tokens else 0.0


@flax.struct.dataclass
class _Chunk:
  """A part of a prompt; what is behind the first n tokens is padding."""

  tokens: jax.Array  # [1, T] int32
  ahead: jax.Array  # [1, T] int32, the token after each
  start: jax.Array  # [1] int32, position of the first
  n: jax.Array  # [] int32
  slot: jax.Array  # [] int32
  how: sampling.Settings


@dataclasses.dataclass
class _Active:
  """A request in a slot."""

  number: int
  request: Request
  written: int = 0


class Engine:
  """Writes the texts of requests, `n_slots` at a time."""

  def __init__(
      self,
      params: served.Served,
      cfg: config.Model,
      *,
      n_slots: int = 8,
      max_len: int = 4096,
      chunk: int = 512,
      n_drafts: int = 0,
      experts: moe.Experts | None = None,
  ):
    """An engine with an empty cache.

    Args:
      params: of `served.params`; their type is that of the cache.
      cfg: the model.
      n_slots: texts at the same time.
      max_len: positions of a text, prompt included.
      chunk: tokens of a prompt that are read together, a power of two.
      n_drafts: tokens that the MTP module drafts in a cycle.
      experts: how the routed experts are computed, if not on one device.

    Raises:
      ValueError: a number is out of range, or there is no MTP module to draft.
    """
    problems = _problems(cfg, n_slots, max_len, chunk, n_drafts)
    if problems:
      raise ValueError("\n".join(problems))
    self.cfg, self.n_slots, self.max_len = cfg, n_slots, max_len
    self.chunk, self.n_drafts = chunk, n_drafts
    self.stats, self.submitted = Stats(), 0
    self._params, self._experts = params, experts
    self._free = list(range(n_slots))[::-1]
    self._active: dict[int, _Active] = {}
    self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
    self._state: speculation.State | None = None

  # --- requests ---

  def problems(self, request: Request) -> list[str]:
    """What is wrong with a request, a line each."""
    vocab, found = self.cfg.vocab_size, []
    ids = np.asarray(request.prompt, np.int64)
    if not ids.size:
      found.append("prompt: is empty; at least one token is needed")
    elif ids.min() < 0 or ids.max() >= vocab:
      wrong = ids[(ids < 0) | (ids >= vocab)][0]
      found.append(f"prompt: token id {wrong} must be in [0, {vocab})")
    if request.max_tokens < 1:
      found.append(f"max_tokens={request.max_tokens}: must be at least 1")
    found += sampling.problems(
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
      ValueError: it cannot be served.
    """
    if problems := self.problems(request):
      raise ValueError("\n".join(problems))
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
    """Reads the prompts that there are free slots for; then one cycle."""
    events = []
    while self._free and self._waiting:
      events += self._admit(*self._waiting.popleft())
    return events + self._cycle() if self._active else events

  def run(self, requests: Iterable[Request]) -> Iterator[Event]:
    """Serves requests in order, each taken when there is room for it.

    Raises:
      ValueError: one cannot be served.
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
      self._state = _grow(self._state, n)

  def _empty(self, n: int) -> speculation.State:
    b, k, dtype = self.n_slots, self.n_drafts, self._params["embed"].dtype
    zeros = jnp.zeros((b, k + 1), jnp.int32)
    how = sampling.settings(0, 1, 0, 0)
    return speculation.State(
        cache=kvcache.empty(
            kvcache.specs(self.cfg, b, n, dtype, drafting=k > 0)
        ),
        tokens=zeros,
        n=jnp.ones(b, jnp.int32),
        start=jnp.zeros(b, jnp.int32),
        hidden=jnp.zeros((b, k + 1, self.cfg.d_model), dtype) if k else None,
        how=jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), b), how),
    )

  def _admit(self, number: int, request: Request) -> list[Event]:
    """Reads a prompt into a free slot and draws the first token."""
    slot, n = self._free.pop(), len(request.prompt)
    self._active[slot] = _Active(number, request)
    self._room(self._need(request))
    how = request.temperature, request.top_p, request.top_k, request.seed
    ids = np.asarray(request.prompt, np.int32)
    for start in range(0, n, self.chunk):
      here = ids[start : start + self.chunk]
      size = kvcache.bucket(here.size, self.chunk)
      ahead = ids[start + 1 : start + 1 + here.size]
      piece = _Chunk(
          tokens=_padded(here, size),
          ahead=_padded(ahead, size),
          start=np.int32([start]),
          n=np.int32(here.size),
          slot=np.int32(slot),
          how=sampling.settings(*how),
      )
      self._state, first = _prefill(
          self._params,
          self._state,
          piece,
          cfg=self.cfg,
          mode=sampling.mode([how[:3]]),
          experts=self._experts,
      )
    self.stats.prompt_tokens += n
    token, logprob = jax.device_get(first)
    return self._written(slot, token[0, :1], logprob[0, :1])

  def _cycle(self) -> list[Event]:
    rows = [active.request for active in self._active.values()]
    mode = sampling.mode([(r.temperature, r.top_p, r.top_k) for r in rows])
    self._state, written = _cycle(
        self._params,
        self._state,
        cfg=self.cfg,
        mode=mode,
        experts=self._experts,
    )
    written = jax.device_get(written)
    self.stats.cycles += 1
    events = []
    for slot in sorted(self._active):
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
        raise FloatingPointError(
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
        " (mtp.depth=0); only 0 is possible"
    )
  return found


def _padded(ids: np.ndarray, n: int) -> np.ndarray:
  """[1, n]; what is behind the ids is never read."""
  return np.pad(ids, (0, n - ids.size))[None]


# --- programs ---


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "mode", "experts"),
    donate_argnames="state",
)
def _cycle(params, state, *, cfg, mode, experts):
  return speculation.cycle(params, state, cfg, mode, experts)


@functools.partial(jax.jit, static_argnames="n", donate_argnames="state")
def _grow(state, n):
  return state.replace(cache=kvcache.grow(state.cache, n))


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "mode", "experts"),
    donate_argnames="state",
)
def _prefill(params, state, chunk, *, cfg, mode, experts):
  """Reads a chunk into a slot, and draws what follows it."""
  slot, start, how = chunk.slot, chunk.start, chunk.how
  row = jax.tree.map(
      lambda a: jax.lax.dynamic_slice_in_dim(a, slot, 1), state.cache
  )
  read = {"cfg": cfg, "attend": mla.chunk, "experts": experts}
  x, row = decoding.read(params, row, chunk.tokens, start, **read)
  last = jax.lax.dynamic_slice_in_dim(x, chunk.n - 1, 1, axis=1)
  normed = decoding.final(params, last, cfg)
  logits = decoding.logits(params, normed)
  p = sampling.probabilities(logits, how, mode)
  position = start[:, None] + chunk.n
  token = sampling.draw(p, how.seed, position, sampling.FINAL, mode)
  put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, slot, 0)
  places, hidden = ((0, 0), (0, state.tokens.shape[1] - 1)), state.hidden
  if hidden is not None:
    # The MTP module reads the last position here without its next token, and
    # again with it in the first cycle.
    states = speculation.mtp_input(x, decoding.final(params, x, cfg), cfg)
    *_, row = decoding.read_mtp(
        params, row, states, chunk.ahead, start, **read
    )
    of_last = speculation.mtp_input(last, normed, cfg)
    hidden = put(hidden, jnp.pad(of_last, (*places, (0, 0))))
  state = state.replace(
      cache=jax.tree.map(put, state.cache, row),
      tokens=put(state.tokens, jnp.pad(token, places)),
      n=put(state.n, jnp.ones_like(start)),
      start=put(state.start, start + chunk.n - 1),
      hidden=hidden,
      how=jax.tree.map(put, state.how, how),
  )
  return state, (token, speculation.logprobs(logits, token))

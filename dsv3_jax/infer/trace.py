"""Traces of generated texts: what a trainer needs for the same numbers."""

import dataclasses
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.infer import sampling
from dsv3_jax.infer.request import GenerationRequest


@dataclasses.dataclass(frozen=True)
class Trace:
  """Record of a text of n tokens, generated after a prompt of P tokens.

  `routes` has columns of the MoE layers, then of the MTP modules; they are -1
  where a module has not read a position with the main model's state: a module
  that does not draft, and the last positions of a text.
  """

  tokens: np.ndarray  # [P + n - 1] int32, all that was read: not the last one
  # [n] f32, of the distributions that the generated tokens were drawn from
  logprobs: np.ndarray
  # [n, ceil(C / 8)] uint8, little-endian bits of the tokens that top_k and
  # top_p kept; None: all
  kept: np.ndarray | None
  routes: np.ndarray  # [P + n - 1, n_routers, K] int32, experts


@flax.struct.dataclass
class StepTrace:
  """Trace of a program: of T positions that it read, and N tokens it drew."""

  logprobs: jax.Array  # [B, N] f32
  kept: jax.Array | None  # [B, N, ceil(C / 8)] uint8; None: all
  routes: jax.Array  # [B, T, n_moe_layers, K] int32
  # [B, T, K] int32, of the MTP module; in a decode step at the positions that
  # the step before read
  mtp_routes: jax.Array | None


def of_step(
  adjusted: jax.Array,
  tokens: jax.Array,
  experts: jax.Array,
  mtp_experts: jax.Array | None,
  mode: str,
) -> StepTrace:
  """Returns the trace of a program.

  Args:
    adjusted: logits of `sampling.adjust`, [B, N, C].
    tokens: drawn from them, [B, N] int32.
    experts: of the main model's routers, [n_moe_layers, B, T, K].
    mtp_experts: of the MTP module's, [1, B, T, K].
    mode: see `sampling.mode`.
  """
  logprobs = jax.nn.log_softmax(adjusted)
  kept = None
  if mode == sampling.TRUNCATED:
    kept = jnp.packbits(adjusted > -jnp.inf, axis=-1, bitorder="little")
  return StepTrace(
    jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0],
    kept,
    jnp.moveaxis(experts, 0, 2),
    None if mtp_experts is None else mtp_experts[0],
  )


def empty(shape: tuple[int, ...], cfg: config.Model, mode: str) -> StepTrace:
  """Returns a trace of zeros of decode steps, [B, steps, drafts + 1]."""
  truncated, k = mode == sampling.TRUNCATED, cfg.router.top_k
  n_bytes = -(-cfg.vocab_size // 8)
  return StepTrace(
    jnp.zeros(shape),
    jnp.zeros((*shape, n_bytes), jnp.uint8) if truncated else None,
    jnp.zeros((*shape, cfg.n_moe_layers, k), jnp.int32),
    jnp.zeros((*shape, k), jnp.int32) if shape[-1] > 1 else None,
  )


class Output(Protocol):
  """Tokens that a program generates, with its trace, on the host."""

  tokens: np.ndarray  # [B, ..., N] int32
  n: np.ndarray  # [B, ...] int32, number of them
  trace: StepTrace


class Recorder:
  """Puts together the trace of a text from those of programs, on the host."""

  def __init__(self, request: GenerationRequest, cfg: config.Model):
    """Starts before the first position of the prompt."""
    self._request, self._cfg = request, cfg
    self._tokens, self._logprobs, self._kept = [], [], []
    self._routes, self._mtp_routes = [], []  # of positions from 0 on

  def add_chunk(self, output: Output, row: int) -> None:
    """Adds the next chunk of the prompt, and the token behind the last one."""
    trace = output.trace
    left = len(self._request.prompt) - len(self._routes)
    if trace.mtp_routes is not None:
      # The module reads the last position once its next token is known.
      self._mtp_routes += [*trace.mtp_routes[row, : left - 1]]
    self._routes += [*trace.routes[row, :left]]
    if left <= trace.routes.shape[1]:
      self._add_tokens(output, (row,), 1)

  def add_step(self, output: Output, at: tuple[int, int]) -> None:
    """Adds a decode step: the slot, and the step of the dispatch."""
    trace, n = output.trace, int(output.n[at])
    if trace.mtp_routes is not None:
      unread = len(self._routes) - len(self._mtp_routes)
      self._mtp_routes += [*trace.mtp_routes[at][:unread]]
    # Rejected drafts are behind the n positions.
    self._routes += [*trace.routes[at][:n]]
    self._add_tokens(output, at, n)

  def _add_tokens(self, output: Output, at: tuple[int, ...], n: int) -> None:
    trace = output.trace
    self._tokens += output.tokens[at][:n].tolist()
    self._logprobs += trace.logprobs[at][:n].tolist()
    if trace.kept is not None:
      self._kept += [*trace.kept[at][:n]]

  def trace(self, n: int) -> Trace:
    """Returns the trace of the first n generated tokens."""
    r, cfg = self._request, self._cfg
    tokens = np.array([*r.prompt, *self._tokens[: n - 1]], np.int32)
    shape = len(tokens), cfg.n_routers, cfg.router.top_k
    routes = np.full(shape, -1, np.int32)
    routes[:, : cfg.n_moe_layers] = self._routes[: len(tokens)]
    if ahead := self._mtp_routes:
      routes[: len(ahead), cfg.n_moe_layers] = ahead
    truncated = sampling.mode([r]) == sampling.TRUNCATED
    return Trace(
      tokens,
      np.array(self._logprobs[:n], np.float32),
      np.array(self._kept[:n]) if truncated else None,
      routes,
    )

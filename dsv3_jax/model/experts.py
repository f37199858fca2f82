"""Routed experts: a dropless grouped feed-forward, one interface, three forms.

Each takes (p, x [M, D], chosen [M, K], gates [M, K]) and returns
sum_k gates[m, k] * ffn_{chosen[m, k]}(x[m]), [M, D]; a token chooses an expert
once at most, and a choice of E, one beyond the last, stands for none.
`grouped_ffn` picks the form for the backend: `block_ffn` on CPU, `ragged_ffn`
on accelerators. `dense_ffn` runs every expert on every token and is the
reference.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import manual
from dsv3_jax import schema

MIN_BLOCK, MAX_BLOCK = 8, 256  # rows of a block
KEPT = 1.25  # rows whose hidden state is kept, in rows expected


def grouped_ffn(
    p: schema.Params,
    x: jax.Array,
    chosen: jax.Array,
    gates: jax.Array,
    n_slots: int | None = None,
) -> jax.Array:
  """The form that is fast on the default backend; see the module.

  Args:
    p: parameters of the experts.
    x: [M, D].
    chosen: [M, K] int32.
    gates: [M, K].
    n_slots: about how many choices are of an expert; M * K if not given.
  """
  if jax.default_backend() == "cpu":
    return block_ffn(p, x, chosen, gates, n_slots)
  return ragged_ffn(p, x, chosen, gates)


def dense_ffn(
    p: schema.Params, x: jax.Array, chosen: jax.Array, gates: jax.Array
) -> jax.Array:
  """Reference: every expert on every token, unchosen ones weighted by 0."""
  n_experts = p["down"].shape[0]
  hot = jax.nn.one_hot(chosen, n_experts, dtype=gates.dtype)  # none: zeros
  weight = jnp.einsum("MKE,MK->ME", hot, gates)
  h = jnp.einsum("MD,EDGF->MEGF", x, p["gate_up"])
  act = jax.nn.silu(h[:, :, 0]) * h[:, :, 1]
  y = jnp.einsum("MEF,EFD->MED", act, p["down"])
  return jnp.einsum("MED,ME->MD", y, weight.astype(y.dtype))


def ragged_ffn(
    p: schema.Params, x: jax.Array, chosen: jax.Array, gates: jax.Array
) -> jax.Array:
  """Sorted slots through `lax.ragged_dot`, native on GPU and TPU.

  On CPU it multiplies every slot with every expert: never use it there.
  """
  k, (n_experts, d, _, f) = chosen.shape[1], p["gate_up"].shape
  flat = chosen.reshape(-1)
  gate_up, down, x, gates = manual.alike(
      p["gate_up"].reshape(n_experts, d, 2 * f), p["down"], x, gates
  )
  order = jnp.argsort(flat, stable=True)
  load = jax.nn.one_hot(flat, n_experts, dtype=jnp.int32).sum(0)
  # Choices of none come last: a group has no say over their rows.
  real = flat[order] < n_experts
  token = jnp.where(real, order // k, x.shape[0])
  h = jax.lax.ragged_dot(_pick(x, token), gate_up, load)
  h = jnp.where(real[:, None], h, 0).reshape(-1, 2, f)
  act = jax.nn.silu(h[:, 0]) * h[:, 1]
  y = jax.lax.ragged_dot(act, down, load)
  y = y * gates.reshape(-1)[order, None].astype(y.dtype)
  y = jnp.where(real[:, None], y, 0)
  return jnp.zeros_like(x).at[token].add(y, mode="drop")


# --- the blocked form ---
#
# Slots (token, k) are sorted by expert. The places of an expert are cut into
# blocks of few rows, large ones first, so that padding is less than a small
# block for an expert; a loop runs over the blocks in use. What a block computes
# stays in cache. No slot is lost, however uneven the loads.


@flax.struct.dataclass
class _Blocks:
  """Blocks of one size."""

  start: jax.Array  # [N] int32, first place of each
  expert: jax.Array  # [N] int32, of each
  used: jax.Array  # [] int32, how many are in use


@flax.struct.dataclass
class _Layout:
  """Where every slot m * K + k stands; M * K stands for padding."""

  slots: jax.Array  # [P] int32, the slot of each place
  blocks: tuple[_Blocks, ...]  # of each size


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Sizes that shapes depend on."""

  blocks: tuple[int, ...]  # rows of a block, falling
  places: int  # enough for all slots with their padding
  kept: int  # of the first places: their hidden state is kept


def _plan(n_tokens: int, k: int, n_experts: int, n_slots: int) -> _Plan:
  half = max(int(n_slots / n_experts / 2), 1)  # of the mean load
  large = min(max(1 << half.bit_length() - 1, MIN_BLOCK), MAX_BLOCK)
  small = max(large // 4, MIN_BLOCK)
  most = n_tokens * min(k, n_experts)
  padding = min(n_experts, most) * small
  kept = min(math.ceil(KEPT * n_slots), most) + padding
  blocks = (large, small) if small < large else (large,)
  return _Plan(blocks, most + padding, kept)


def _layout(chosen: jax.Array, n_experts: int, plan: _Plan) -> _Layout:
  flat, small = chosen.reshape(-1), plan.blocks[-1]
  load = jax.nn.one_hot(flat, n_experts, dtype=jnp.int32).sum(0)
  left = -(-load // small) * small
  first_place = jnp.cumsum(left) - left
  at, blocks = first_place, []
  for size in plan.blocks:
    n = left // size
    ends = jnp.cumsum(n)
    index = jnp.arange(plan.places // size, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, n_experts - 1)
    start = at[expert] + (index - (ends - n)[expert]) * size
    blocks.append(_Blocks(start, expert, ends[-1]))
    at, left = at + n * size, left - n * size
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  owner = jnp.minimum(flat[order], n_experts - 1)
  index, first_slot = jnp.arange(flat.size), jnp.cumsum(load) - load
  place = first_place[owner] + index - first_slot[owner]
  # Choices of none come last, and go to as many places beyond the last.
  place = jnp.where(flat[order] < n_experts, place, plan.places + index)
  slots = jnp.full_like(order, flat.size, shape=plan.places)
  slots = slots.at[place].set(order, mode="drop", unique_indices=True)
  return _Layout(slots, tuple(blocks))


def block_ffn(
    p: schema.Params,
    x: jax.Array,
    chosen: jax.Array,
    gates: jax.Array,
    n_slots: int | None = None,
) -> jax.Array:
  """A loop over blocks of rows of one expert."""
  n_experts, d, _, f = p["gate_up"].shape
  gate_up, down, x, gates = manual.alike(
      p["gate_up"].reshape(n_experts, d, 2 * f),
      p["down"],
      x,
      gates.astype(x.dtype),
  )
  if not chosen.size:
    return jnp.zeros_like(x)
  plan = _plan(*chosen.shape, n_experts, n_slots or chosen.size)
  layout = _layout(chosen, n_experts, plan)
  return _ffn(plan, gate_up, down, x, gates, layout)


def _pick(rows: jax.Array, index: jax.Array) -> jax.Array:
  """rows[index], 0 where the index is beyond the last row."""
  return rows.at[index].get(mode="fill", fill_value=0)


def _add(rows: jax.Array, index: jax.Array, update: jax.Array) -> jax.Array:
  """Rows with different ones changed, none for indices beyond the last."""
  return rows.at[index].add(update, mode="drop", unique_indices=True)


_dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
_slice = jax.lax.dynamic_slice_in_dim


def _output(down: jax.Array, gate: jax.Array, h: jax.Array) -> jax.Array:
  """Output of rows of one expert, from their hidden state."""
  a, b = jnp.split(h, 2, axis=-1)
  return (gate[:, None] * jax.nn.silu(a) * b) @ down


def _gradients(
    gate_up: jax.Array,
    down: jax.Array,
    x: jax.Array,
    gate: jax.Array,
    h: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients of a block for gate_up and down (in f32), x and gate."""
  a, b = jnp.split(h, 2, axis=-1)
  sigmoid = jax.nn.sigmoid(a)
  silu = a * sigmoid
  dact = dy @ down.T
  dgate = (silu * b * dact).sum(-1)
  gate, dact = gate[:, None], gate[:, None] * dact
  da = dact * b * (sigmoid + silu * (1 - sigmoid))
  dh = jnp.concatenate([da, dact * silu], axis=-1)
  dgate_up, ddown = _dot(x.T, dh), _dot((gate * silu * b).T, dy)
  return dgate_up, ddown, dh @ gate_up.T, dgate


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(plan, gate_up, down, x, gates, layout):
  return _ffn_fwd(plan, gate_up, down, x, gates, layout)[0]


def _ffn_fwd(plan, gate_up, down, x, gates, layout):
  k, gate = gates.shape[1], gates.reshape(-1)
  hidden = jnp.zeros_like(x, shape=(plan.kept, gate_up.shape[2]))
  carry = jnp.zeros_like(x), hidden
  for size, blocks in zip(plan.blocks, layout.blocks, strict=True):

    def add(i, carry, size=size, blocks=blocks):
      y, hidden = carry
      e, start = blocks.expert[i], blocks.start[i]
      slots = _slice(layout.slots, start, size)
      h = _pick(x, slots // k) @ gate_up[e]
      y = _add(y, slots // k, _output(down[e], _pick(gate, slots), h))
      place = start + jnp.arange(size)
      hidden = hidden.at[place].set(h, mode="drop", unique_indices=True)
      return y, hidden

    carry = jax.lax.fori_loop(0, blocks.used, add, carry)
  y, hidden = carry
  return y, (gate_up, down, x, gates, layout, hidden)


def _ffn_bwd(plan, residuals, dout):
  gate_up, down, x, gates, layout, hidden = residuals
  k, gate = gates.shape[1], gates.reshape(-1)
  grads = tuple(
      jnp.zeros_like(a, dtype)
      for a, dtype in (
          (gate_up, jnp.float32),
          (down, jnp.float32),
          (x, x.dtype),
          (gate, gate.dtype),
      )
  )
  for size, blocks in zip(plan.blocks, layout.blocks, strict=True):

    def add(i, grads, kept, size=size, blocks=blocks):
      e, start = blocks.expert[i], blocks.start[i]
      slots = _slice(layout.slots, start, size)
      rows = _pick(x, slots // k)
      h = _slice(hidden, start, size) if kept else rows @ gate_up[e]
      dy = _pick(dout, slots // k)
      block = _gradients(gate_up[e], down[e], rows, _pick(gate, slots), h, dy)
      return tuple(map(_add, grads, (e, e, slots // k, slots), block))

    inside = blocks.start + size <= plan.kept
    n_kept = jnp.minimum(inside.sum(), blocks.used)
    recompute = functools.partial(add, kept=False)
    grads = jax.lax.fori_loop(
        0, n_kept, functools.partial(add, kept=True), grads
    )
    if plan.kept < plan.places:
      grads = jax.lax.fori_loop(n_kept, blocks.used, recompute, grads)
  dgate_up, ddown, dx, dgates = grads
  return (
      dgate_up.astype(gate_up.dtype),
      ddown.astype(down.dtype),
      dx,
      dgates.reshape(gates.shape),
      None,
  )


_ffn.defvjp(_ffn_fwd, _ffn_bwd)

"""Routed experts: a dropless grouped feed-forward, one interface, three forms.

Each takes (p, x [M, D], chosen [M, K], gates [M, K]) and returns
sum_k gates[m, k] * ffn_{chosen[m, k]}(x[m]), [M, D]; a token chooses an expert
once at most, and a choice of E, one beyond the last, stands for none.
`grouped_ffn` picks the form for the backend: `block_ffn` on CPU, `ragged_ffn`
on accelerators. `dense_ffn` runs every expert on every token and is the
reference.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import manual
from dsv3_jax import schema

SHARE = 1.125  # rows batched for every expert, in mean loads
MIN_BLOCK, MAX_BLOCK = 8, 256  # rows of a block


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
# Slots (token, k) are sorted by expert. The first S of every expert, S a little
# above the mean load, are the rows of products that are batched over experts.
# What an expert has beyond S goes through a loop over blocks of B rows, as many
# as are in use: next to none while the experts are balanced, nearly all slots
# if one expert gets every token. No slot is lost either way.


@flax.struct.dataclass
class _Layout:
  """Where every slot m * K + k stands; M * K stands for padding."""

  share: jax.Array  # [E, S] int32, slots of the batched products
  block: jax.Array  # [N, B] int32, slots of the loop
  expert: jax.Array  # [N] int32, expert of a block
  used: jax.Array  # [] int32, blocks in use
  row: jax.Array  # [M, K] int32, a slot's place in share; E * S or more: block


def _sizes(
    n_tokens: int, k: int, n_experts: int, n_slots: int
) -> tuple[int, int, int]:
  """Rows of a share, rows of a block, and how many blocks at worst."""
  mean = n_slots / n_experts
  # With few slots an expert, shares would mostly multiply padding.
  share = math.ceil(SHARE * mean) if mean >= MIN_BLOCK else 0
  share = min(share, n_tokens)  # an expert gets a token once
  quarter = 1 << max(int(mean / 4), 1).bit_length() - 1
  block = min(max(quarter, MIN_BLOCK), MAX_BLOCK)
  most = n_tokens * min(k, n_experts)
  return share, block, most // block + min(n_experts, most)


def _layout(chosen: jax.Array, n_experts: int, expected: int) -> _Layout:
  n_slots, flat = chosen.size, chosen.reshape(-1)
  share, block, n_blocks = _sizes(*chosen.shape, n_experts, expected)
  n_rows = n_experts * share
  load = jax.nn.one_hot(flat, n_experts, dtype=jnp.int32).sum(0)
  blocks = -(-jnp.maximum(load - share, 0) // block)
  ends = jnp.cumsum(blocks)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  owner = jnp.minimum(flat[order], n_experts - 1)
  first_slot, index = jnp.cumsum(load) - load, jnp.arange(n_slots)
  rank = index - first_slot[owner]
  beyond = n_rows + (ends - blocks)[owner] * block + rank - share
  place = jnp.where(rank < share, owner * share + rank, beyond)
  nowhere = n_rows + n_blocks * block + index  # of choices of none: they last
  place = jnp.where(flat[order] < n_experts, place, nowhere)
  slots = jnp.full_like(order, n_slots, shape=n_rows + n_blocks * block)
  slots = slots.at[place].set(order, mode="drop", unique_indices=True)
  row = jnp.zeros_like(order).at[order].set(place, unique_indices=True)
  expert = jnp.searchsorted(ends, jnp.arange(n_blocks), side="right")
  return _Layout(
      share=slots[:n_rows].reshape(n_experts, share),
      block=slots[n_rows:].reshape(n_blocks, block),
      expert=jnp.minimum(expert, n_experts - 1).astype(jnp.int32),
      used=ends[-1],
      row=row.reshape(chosen.shape),
  )


def block_ffn(
    p: schema.Params,
    x: jax.Array,
    chosen: jax.Array,
    gates: jax.Array,
    n_slots: int | None = None,
) -> jax.Array:
  """An equal share of rows of every expert, batched; the rest in blocks."""
  n_experts, d, _, f = p["gate_up"].shape
  gate_up, down, x, gates = manual.alike(
      p["gate_up"].reshape(n_experts, d, 2 * f),
      p["down"],
      x,
      gates.astype(x.dtype),
  )
  if not chosen.size:
    return jnp.zeros_like(x)
  layout = _layout(chosen, n_experts, n_slots or chosen.size)
  return _ffn(gate_up, down, x, gates, layout)


def _pick(rows: jax.Array, index: jax.Array) -> jax.Array:
  """rows[index], 0 where the index is beyond the last row."""
  if not rows.shape[0]:
    return jnp.zeros_like(rows, shape=index.shape + rows.shape[1:])
  return rows.at[index].get(mode="fill", fill_value=0)


def _add(rows: jax.Array, index: jax.Array, update: jax.Array) -> jax.Array:
  """Rows with different ones changed, none for indices beyond the last."""
  return rows.at[index].add(update, mode="drop", unique_indices=True)


def _sum_slots(rows: jax.Array, layout: _Layout) -> jax.Array:
  """[E, S, D] -> [M, D], the sum of a token's rows in the shares."""
  return _pick(rows.reshape(-1, rows.shape[-1]), layout.row).sum(1)


_dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def _forward(
    gate_up: jax.Array, down: jax.Array, x: jax.Array, gate: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Hidden state and output of rows of one expert, or of [E, S] of all."""
  h = x @ gate_up
  a, b = jnp.split(h, 2, axis=-1)
  return h, (gate[..., None] * jax.nn.silu(a) * b) @ down


def _backward(
    gate_up: jax.Array,
    down: jax.Array,
    x: jax.Array,
    gate: jax.Array,
    h: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients of `_forward` for gate_up and down (in f32), x and gate."""
  turn = lambda w: jnp.swapaxes(w, -1, -2)
  a, b = jnp.split(h, 2, axis=-1)
  sigmoid = jax.nn.sigmoid(a)
  silu = a * sigmoid
  dact = dy @ turn(down)
  dgate = (silu * b * dact).sum(-1)
  gate, dact = gate[..., None], gate[..., None] * dact
  da = dact * b * (sigmoid + silu * (1 - sigmoid))
  dh = jnp.concatenate([da, dact * silu], axis=-1)
  dgate_up, ddown = _dot(turn(x), dh), _dot(turn(gate * silu * b), dy)
  return dgate_up, ddown, dh @ turn(gate_up), dgate


@jax.custom_vjp
def _ffn(gate_up, down, x, gates, layout):
  return _ffn_fwd(gate_up, down, x, gates, layout)[0]


def _ffn_fwd(gate_up, down, x, gates, layout):
  k, gate = gates.shape[1], gates.reshape(-1)
  rows = _pick(x, layout.share // k)
  h, y = _forward(gate_up, down, rows, _pick(gate, layout.share))

  def add_block(i, out):
    slots, e = layout.block[i], layout.expert[i]
    _, y = _forward(
        gate_up[e], down[e], _pick(x, slots // k), _pick(gate, slots)
    )
    return _add(out, slots // k, y)

  out = jax.lax.fori_loop(0, layout.used, add_block, _sum_slots(y, layout))
  return out, (gate_up, down, x, gates, layout, rows, h)


def _ffn_bwd(residuals, dout):
  gate_up, down, x, gates, layout, rows, h = residuals
  k, gate = gates.shape[1], gates.reshape(-1)
  dgate_up, ddown, drows, dgate = _backward(
      gate_up,
      down,
      rows,
      _pick(gate, layout.share),
      h,
      _pick(dout, layout.share // k),
  )

  def add_block(i, grads):
    slots, e = layout.block[i], layout.expert[i]
    rows, weights = _pick(x, slots // k), (gate_up[e], down[e])
    h = rows @ gate_up[e]  # made again: blocks are few
    block = _backward(
        *weights, rows, _pick(gate, slots), h, _pick(dout, slots // k)
    )
    places = (e, e, slots // k, slots)
    return tuple(map(_add, grads, places, block))

  dgates = _pick(dgate.reshape(-1), layout.row.reshape(-1))
  grads = (dgate_up, ddown, _sum_slots(drows, layout), dgates)
  grads = jax.lax.fori_loop(0, layout.used, add_block, grads)
  dgate_up, ddown, dx, dgates = grads
  return (
      dgate_up.astype(gate_up.dtype),
      ddown.astype(down.dtype),
      dx,
      dgates.reshape(gates.shape),
      None,
  )


_ffn.defvjp(_ffn_fwd, _ffn_bwd)

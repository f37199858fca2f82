"""Routed experts: a dropless grouped feed-forward, one interface, three forms.

Each takes (p, x [M, D], chosen [M, K], gates [M, K]) and returns
sum_k gates[m, k] * ffn_{chosen[m, k]}(x[m]), [M, D]. `grouped_ffn` picks the
form for the backend: `block_ffn` on CPU, `ragged_ffn` on accelerators.
`dense_ffn` runs every expert on every token and is the reference.
"""

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import schema

MIN_BLOCK, MAX_BLOCK = 8, 256  # rows of one product in the blocked form


def grouped_ffn(
    p: schema.Params, x: jax.Array, chosen: jax.Array, gates: jax.Array
) -> jax.Array:
  """The form that is fast on the default backend; see the module."""
  form = block_ffn if jax.default_backend() == "cpu" else ragged_ffn
  return form(p, x, chosen, gates)


def dense_ffn(
    p: schema.Params, x: jax.Array, chosen: jax.Array, gates: jax.Array
) -> jax.Array:
  """Reference: every expert on every token, unchosen ones weighted by 0."""
  n_experts = p["down"].shape[0]
  hot = jax.nn.one_hot(chosen, n_experts, dtype=gates.dtype)
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
  order = jnp.argsort(chosen.reshape(-1), stable=True)
  load = jnp.bincount(chosen.reshape(-1), length=n_experts)
  h = jax.lax.ragged_dot(
      x[order // k], p["gate_up"].reshape(n_experts, d, 2 * f), load
  ).reshape(-1, 2, f)
  act = jax.nn.silu(h[:, 0]) * h[:, 1]
  y = jax.lax.ragged_dot(act, p["down"], load)
  y = y * gates.reshape(-1)[order, None].astype(y.dtype)
  return jnp.zeros_like(x).at[order // k].add(y)


# --- the blocked form ---
#
# Slots (token, k) are sorted by expert into R rows, enough for the worst case
# of whole blocks. Where every expert's load is within R / E, each expert gets
# so many rows and the products are batched over experts. Otherwise each expert
# gets the blocks that it needs, and a loop runs over the blocks in use. No slot
# is lost either way.


@flax.struct.dataclass
class _Layout:
  """Where every slot stands among R rows."""

  slot: jax.Array  # [R] int32, the slot in a row; M * K where it is padding
  row: jax.Array  # [M, K] int32, the row of a slot
  even: jax.Array  # [] bool, same number of rows for every expert
  expert: jax.Array  # [N] int32, expert of a block
  used: jax.Array  # [] int32, blocks in use


def _sizes(n_slots: int, n_experts: int) -> tuple[int, int]:
  """Rows of a block, about a quarter of the mean load, and blocks at worst."""
  quarter = 1 << max(n_slots // (4 * n_experts), 1).bit_length() - 1
  block = min(max(quarter, MIN_BLOCK), MAX_BLOCK)
  return block, n_slots // block + min(n_experts, n_slots)


def _layout(chosen: jax.Array, n_experts: int) -> _Layout:
  n_slots, flat = chosen.size, chosen.reshape(-1)
  block, n_blocks = _sizes(n_slots, n_experts)
  share = n_blocks * block // n_experts
  experts = jnp.arange(n_experts, dtype=jnp.int32)
  load = jax.nn.one_hot(flat, n_experts, dtype=jnp.int32).sum(0)
  # With few slots an expert the even form would mostly multiply padding.
  dense = share * n_experts <= 1.5 * n_slots
  even = dense & (load.max() <= share)
  blocks = -(-load // block)
  ends = jnp.cumsum(blocks)
  first_row = jnp.where(even, experts * share, (ends - blocks) * block)
  # A sorted slot moves right by the padding of the experts before its own.
  shift = first_row - (jnp.cumsum(load) - load)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  rows = jnp.arange(n_slots, dtype=jnp.int32) + shift[flat[order]]
  expert = jnp.searchsorted(ends, jnp.arange(n_blocks), side="right")
  slot = jnp.full(n_blocks * block, n_slots, jnp.int32)
  row = jnp.zeros(n_slots, jnp.int32)
  return _Layout(
      slot=slot.at[rows].set(order, unique_indices=True),
      row=row.at[order].set(rows, unique_indices=True).reshape(chosen.shape),
      even=even,
      expert=jnp.minimum(expert, n_experts - 1).astype(jnp.int32),
      used=ends[-1],
  )


def block_ffn(
    p: schema.Params, x: jax.Array, chosen: jax.Array, gates: jax.Array
) -> jax.Array:
  """Rows sorted by expert, padded to an even share or to whole blocks."""
  n_experts, d, _, f = p["gate_up"].shape
  layout = _layout(chosen, n_experts)
  gate = gates.reshape(-1).at[layout.slot].get(mode="fill", fill_value=0)
  y = _ffn(
      p["gate_up"].reshape(n_experts, d, 2 * f),
      p["down"],
      _spread(x, layout),
      gate.astype(x.dtype),
      layout,
  )
  return _collect(y, layout)


@jax.custom_vjp
def _spread(x: jax.Array, layout: _Layout) -> jax.Array:
  """[M, ...] -> [R, ...], the token of every row, 0 in padding.

  The transpose of `_collect`; stated so, because the scatter that automatic
  differentiation would make of a gather is slow.
  """
  k = layout.row.shape[1]
  return x.at[layout.slot // k].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _collect(y: jax.Array, layout: _Layout) -> jax.Array:
  """[R, ...] -> [M, ...], the sum of every token's rows."""
  return y[layout.row].sum(1)


_spread.defvjp(
    lambda x, layout: (_spread(x, layout), layout),
    lambda layout, dy: (_collect(dy, layout), None),
)
_collect.defvjp(
    lambda y, layout: (_collect(y, layout), layout),
    lambda layout, dx: (_spread(dx, layout), None),
)


def _swiglu(h: jax.Array) -> jax.Array:
  gate, up = jnp.split(h, 2, axis=-1)
  return jax.nn.silu(gate) * up


def _forward(
    gate_up: jax.Array, down: jax.Array, x: jax.Array, gate: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Hidden state and output of rows of one expert, or of [E, rows] of all."""
  h = x @ gate_up
  return h, (gate[..., None] * _swiglu(h)) @ down


def _backward(
    gate_up: jax.Array,
    down: jax.Array,
    x: jax.Array,
    gate: jax.Array,
    h: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients of `_forward` for gate_up, down, x and gate."""
  turn = lambda a: jnp.swapaxes(a, -1, -2)
  act, swiglu_vjp = jax.vjp(_swiglu, h)
  dact = dy @ turn(down)
  (dh,) = swiglu_vjp(gate[..., None] * dact)
  return (
      turn(x) @ dh,
      turn(gate[..., None] * act) @ dy,
      dh @ turn(gate_up),
      (act * dact).sum(-1),
  )


@jax.custom_vjp
def _ffn(gate_up, down, x, gate, layout):
  return _ffn_fwd(gate_up, down, x, gate, layout)[0]


def _ffn_fwd(gate_up, down, x, gate, layout):
  def even():
    h, y = _forward(gate_up, down, _shares(x, down), _shares(gate, down))
    return _flat(h, x), _flat(y, x)

  def blocked():
    def body(i, carry):
      e = layout.expert[i]
      h, y = _forward(
          gate_up[e], down[e], _block(x, i, layout), _block(gate, i, layout)
      )
      return _put(carry[0], h, i), _put(carry[1], y, i)

    h = jnp.zeros_like(x, shape=(x.shape[0], gate_up.shape[-1]))
    zeros = (h, jnp.zeros_like(x))
    return jax.lax.fori_loop(0, layout.used, body, zeros)

  h, y = jax.lax.cond(layout.even, even, blocked)
  return y, (gate_up, down, x, gate, layout, h)


def _ffn_bwd(residuals, dy):
  gate_up, down, x, gate, layout, h = residuals
  rows = (x, gate, h, dy)

  def even():
    dgate_up, ddown, dx, dgate = _backward(
        gate_up, down, *(_shares(a, down) for a in rows)
    )
    return dgate_up, ddown, _flat(dx, x), _flat(dgate, x)

  def blocked():
    def body(i, carry):
      e = layout.expert[i]
      dgate_up, ddown, dx, dgate = _backward(
          gate_up[e], down[e], *(_block(a, i, layout) for a in rows)
      )
      return (
          carry[0].at[e].add(dgate_up),
          carry[1].at[e].add(ddown),
          _put(carry[2], dx, i),
          _put(carry[3], dgate, i),
      )

    zeros = jax.tree.map(jnp.zeros_like, (gate_up, down, x, gate))
    return jax.lax.fori_loop(0, layout.used, body, zeros)

  return *jax.lax.cond(layout.even, even, blocked), None


_ffn.defvjp(_ffn_fwd, _ffn_bwd)


def _shares(rows: jax.Array, down: jax.Array) -> jax.Array:
  """[R, ...] -> [E, R // E, ...], the rows of the even form."""
  n_experts = down.shape[0]
  share = rows.shape[0] // n_experts
  return rows[: n_experts * share].reshape(n_experts, share, *rows.shape[1:])


def _flat(shares: jax.Array, like: jax.Array) -> jax.Array:
  """[E, R // E, ...] -> [R, ...] with as many rows as `like`."""
  flat = shares.reshape(-1, *shares.shape[2:])
  pad = [(0, like.shape[0] - flat.shape[0])] + [(0, 0)] * (flat.ndim - 1)
  return jnp.pad(flat, pad)


def _block(rows: jax.Array, i: jax.Array, layout: _Layout) -> jax.Array:
  """The rows of block i."""
  size = rows.shape[0] // layout.expert.size
  return jax.lax.dynamic_slice_in_dim(rows, i * size, size)


def _put(rows: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
  """Rows with block i replaced."""
  start = i * block.shape[0]
  return jax.lax.dynamic_update_slice_in_dim(rows, block, start, 0)

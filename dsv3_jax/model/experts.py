"""Routed experts: a dropless grouped feed-forward.

`grouped_ffn` takes (p, x [M, D], chosen [M, K], gates [M, K]) and returns
sum_k gates[m, k] * ffn_{chosen[m, k]}(x[m]), [M, D]; a token chooses an expert
once at most, and a choice of E, one beyond the last, stands for none.
`dense_ffn` runs every expert on every token and is the reference. So does
`lax.ragged_dot` outside of TPUs, which is why it is not used.

Slots (token, k) are sorted by expert. The places of an expert are cut into
blocks of rows, large ones first, so that padding is less than a small block for
an expert; a loop runs over the blocks in use. No slot is lost, however uneven
the loads.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import param_spec, varying
from dsv3_jax.linear import linear
from dsv3_jax.model import remat, swiglu

MIN_BLOCK = 8  # rows
# On CPU what a block computes stays in cache; elsewhere a block must keep a
# whole device at work.
MAX_BLOCK, MAX_BLOCK_ON_CPU = 4096, 256
KEPT = 1.25  # rows whose hidden state is kept, in rows expected


def dense_ffn(
  p: param_spec.Params, x: jax.Array, chosen: jax.Array, gates: jax.Array
) -> jax.Array:
  """Reference: every expert on every token, unchosen ones weighted by 0."""
  n_experts = p["down"].shape[0]
  hot = jax.nn.one_hot(chosen, n_experts, dtype=gates.dtype)  # none: zeros
  weight = jnp.einsum("MKE,MK->ME", hot, gates)
  h = jnp.einsum("MD,EDGF->MEGF", x, p["gate_up"])
  act = jax.nn.silu(h[:, :, 0]) * h[:, :, 1]
  y = jnp.einsum("MEF,EFD->MED", act, p["down"])
  return jnp.einsum("MED,ME->MD", y, weight.astype(y.dtype))


def slotwise_ffn(
  p: param_spec.Params,
  x: jax.Array,
  chosen: jax.Array,
  gates: jax.Array,
  n_slots: int | None = None,
) -> jax.Array:
  """The same for very few tokens: slot by slot, sorting nothing."""
  del n_slots
  n_experts, k = p["down"].shape[0], chosen.shape[1]
  leaves, structure = jax.tree.flatten(
    (p["gate_up"], p["down"], x, gates.astype(x.dtype))
  )
  gate_up, down, x, gates = jax.tree.unflatten(
    structure, varying.alike(*leaves)
  )
  gates = jnp.where(chosen < n_experts, gates, 0)

  def add(y, slot):
    i, e, gate = slot
    e = jnp.minimum(e, n_experts - 1)
    up_e, down_e = _one(gate_up, e), _one(down, e)
    left, _ = linear.rows(_slice(x, i // k, 1), up_e)
    h = linear.output(left, up_e).astype(x.dtype)
    act, _ = linear.rows(swiglu.activation(h, gate[None]), down_e)
    return y.at[i // k].add(linear.output(act, down_e)[0].astype(x.dtype)), None

  slots = jnp.arange(chosen.size), chosen.reshape(-1), gates.reshape(-1)
  return jax.lax.scan(add, jnp.zeros_like(x), slots)[0]


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
  split_wgrad: bool  # gradients of weights in a loop of their own


def _plan(
  n_tokens: int, k: int, n_experts: int, n_slots: int, split_wgrad: bool = False
) -> _Plan:
  half = max(int(n_slots / n_experts / 2), 1)  # of the mean load
  on_cpu = jax.default_backend() == "cpu"
  limit = MAX_BLOCK_ON_CPU if on_cpu else MAX_BLOCK
  large = min(max(1 << half.bit_length() - 1, MIN_BLOCK), limit)
  small = max(large // 4, MIN_BLOCK)
  most = n_tokens * min(k, n_experts)
  padding = min(n_experts, most) * small
  kept = min(math.ceil(KEPT * n_slots), most) + padding
  blocks = (large, small) if small < large else (large,)
  return _Plan(blocks, most + padding, kept, split_wgrad)


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


def grouped_ffn(
  p: param_spec.Params,
  x: jax.Array,
  chosen: jax.Array,
  gates: jax.Array,
  n_slots: int | None = None,
  *,
  split_wgrad: bool = False,
) -> jax.Array:
  """What each token's experts make of it; see the module.

  Args:
    p: parameters of the experts.
    x: [M, D].
    chosen: [M, K] int32.
    gates: [M, K].
    n_slots: about how many choices are of an expert; M * K if not given.
    split_wgrad: compute the gradients of weights in loops of their own, so that
      a pipeline can run them later.
  """
  n_experts = p["down"].shape[0]
  leaves, structure = jax.tree.flatten(
    (p["gate_up"], p["down"], x, gates.astype(x.dtype))
  )
  gate_up, down, x, gates = jax.tree.unflatten(
    structure, varying.alike(*leaves)
  )
  if not chosen.size:
    return jnp.zeros_like(x)
  plan = _plan(*chosen.shape, n_experts, n_slots or chosen.size, split_wgrad)
  layout = _layout(chosen, n_experts, plan)
  return _ffn(plan, gate_up, down, x, gates, layout)


def _pick(rows: linear.Rows, index: jax.Array) -> linear.Rows:
  """rows[index], 0 where the index is beyond the last row."""
  pick = lambda a: a.at[index].get(mode="fill", fill_value=0)
  return jax.tree.map(pick, rows)


def _add(rows: jax.Array, index: jax.Array, update: jax.Array) -> jax.Array:
  """Rows with different ones changed, none for indices beyond the last."""
  return rows.at[index].add(update, mode="drop", unique_indices=True)


_slice = jax.lax.dynamic_slice_in_dim


def _one(w: linear.Weight, e: jax.Array) -> linear.Weight:
  """The weight of an expert."""
  return jax.tree.map(lambda a: a[e], w)


def _put(rows: linear.Rows, place: jax.Array, new: linear.Rows) -> linear.Rows:
  """Rows with different ones replaced, none for indices beyond the last."""

  def put(a, b):
    return a.at[place].set(b, mode="drop", unique_indices=True)

  return jax.tree.map(put, rows, new)


def _plus(total: jax.Array | None, more: jax.Array | None):
  """The sum of what was counted, if anything is."""
  return None if total is None else total + more


def _dhidden(down, e, gate, h, dy):
  """Gradients of the hidden state and of the gates of a block."""
  dact = linear.input_gradient(dy, _one(down, e)).astype(h.dtype)
  return swiglu.activation_gradient(h, dact, gate)


def _dinput(gate_up, e, dh):
  """That of the input, and what was counted."""
  left, counted = linear.gradient_rows(dh, gate_up)
  dx = linear.input_gradient(left, _one(gate_up, e))
  return dx.astype(dh.dtype), counted


def _dweights(gate_up, down, rows, gate, h, dh, dy):
  """Those of the weights, in float32."""
  act = swiglu.activation(h, gate)
  return (
    linear.weight_gradient(rows, dh, gate_up, "power_of_two"),
    linear.weight_gradient(act, dy, down, "power_of_two"),
  )


def _no_rows(like, n, n_columns, w):
  """Zeros in place of rows [N, C] to be quantized for a weight."""
  h = jax.ShapeDtypeStruct((n, n_columns), like.dtype)
  types, _ = jax.eval_shape(linear.rows, h, w)
  zeros = lambda t: jnp.zeros_like(like, t.dtype, shape=t.shape)
  return jax.tree.map(zeros, types)


def _no_weight_gradients(like, weights):
  """Zeros [E, K, N] f32 for each."""
  shapes = [(*w.shape[:2], math.prod(w.shape[2:])) for w in weights]
  return tuple(jnp.zeros_like(like, jnp.float32, shape=s) for s in shapes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(plan, gate_up, down, x, gates, layout):
  return _ffn_fwd(plan, gate_up, down, x, gates, layout)[0]


def _ffn_fwd(plan, gate_up, down, x, gates, layout):
  k, gate = gates.shape[1], gates.reshape(-1)
  weights = linear.untrained(gate_up), linear.untrained(down)
  gate_up, down = map(linear.multiplied_out, weights)
  # Once a token: they have been sent like this, with powers of two.
  left, of_x = linear.rows(x, gate_up, "power_of_two")
  hidden = _no_rows(x, plan.kept, 2 * down.shape[1], gate_up)
  of_act = None if of_x is None else jnp.zeros_like(of_x)
  carry = jnp.zeros_like(x), hidden, of_act
  for size, blocks in zip(plan.blocks, layout.blocks, strict=True):

    def add(i, carry, size=size, blocks=blocks):
      y, hidden, of_act = carry
      e, start = blocks.expert[i], blocks.start[i]
      slots = _slice(layout.slots, start, size)
      up_e, down_e = _one(gate_up, e), _one(down, e)
      h = linear.output(_pick(left, slots // k), up_e).astype(x.dtype)
      act = swiglu.activation(h, _pick(gate, slots))
      act, more = linear.rows(act, down_e)
      y_here = linear.output(act, down_e).astype(x.dtype)
      kept, _ = linear.rows(h, up_e)
      hidden = _put(hidden, start + jnp.arange(size), kept)
      return _add(y, slots // k, y_here), hidden, _plus(of_act, more)

    carry = jax.lax.fori_loop(0, blocks.used, add, carry)
  y, hidden, of_act = carry
  hidden = remat.named(hidden, "hidden")
  return y, (*weights, left, gates, layout, hidden, of_x, of_act)


def _ffn_bwd(plan, residuals, dout):
  *weights, x, gates, layout, hidden, of_x, of_act = residuals
  k, gate = gates.shape[1], gates.reshape(-1)
  gate_up, down = map(linear.multiplied_out, weights)
  of_tokens, of_dy = linear.gradient_rows(dout, down, "power_of_two")

  def block(i, blocks, size, kept):
    """Expert, first place, slots, rows, gates, hidden state, dy of a block."""
    e, start = blocks.expert[i], blocks.start[i]
    slots = _slice(layout.slots, start, size)
    rows = _pick(x, slots // k)
    if kept:
      here = jax.tree.map(lambda a: _slice(a, start, size), hidden)
      h = linear.numbers(here, dout.dtype)
    else:
      h = linear.output(rows, _one(gate_up, e)).astype(dout.dtype)
    dy = _pick(of_tokens, slots // k)
    return e, start, slots, rows, _pick(gate, slots), h, dy

  def add_all(i, carry, **how):
    *grads, of_dh = carry
    e, _, slots, rows, gate_here, h, dy = block(i, **how)
    dh, dgate = _dhidden(down, e, gate_here, h, dy)
    dx, more = _dinput(gate_up, e, dh)
    here = dx, dgate, *_dweights(gate_up, down, rows, gate_here, h, dh, dy)
    grads = map(_add, grads, (slots // k, slots, e, e), here)
    return *grads, _plus(of_dh, more)

  def add_inputs(i, carry, kept, **how):
    dx, dgates, dhidden, of_dh = carry
    e, start, slots, _, gate_here, h, dy = block(i, kept=kept, **how)
    dh, dgate = _dhidden(down, e, gate_here, h, dy)
    if kept:
      dhidden = jax.lax.dynamic_update_slice_in_dim(dhidden, dh, start, 0)
    dx_here, more = _dinput(gate_up, e, dh)
    dx = _add(dx, slots // k, dx_here)
    return dx, _add(dgates, slots, dgate), dhidden, _plus(of_dh, more)

  def add_weights(i, grads, kept, **how):
    e, start, _, rows, gate_here, h, dy = block(i, kept=kept, **how)
    if kept:
      dh = _slice(dhidden, start, how["size"])
    else:
      dh, _ = _dhidden(down, e, gate_here, h, dy)
    here = _dweights(gate_up, down, rows, gate_here, h, dh, dy)
    return tuple(_add(d, e, new) for d, new in zip(grads, here, strict=True))

  dx, dgates = jnp.zeros_like(dout), jnp.zeros_like(gate)
  dweights = _no_weight_gradients(dout, weights)
  of_dh = None if of_dy is None else jnp.zeros_like(of_dy)
  over = functools.partial(_over_blocks, plan, layout)
  if plan.split_wgrad:
    dhidden = jnp.zeros_like(dout, shape=(plan.kept, 2 * down.shape[1]))
    carry = over(add_inputs, (dx, dgates, dhidden, of_dh))
    dx, dgates, dhidden, of_dh = carry
    dgate_up, ddown = over(add_weights, dweights)
  else:
    carry = over(add_all, (dx, dgates, *dweights, of_dh))
    dx, dgates, dgate_up, ddown, of_dh = carry
  return (
    linear.gradient(weights[0], dgate_up, [of_x, of_dh]),
    linear.gradient(weights[1], ddown, [of_act, of_dy]),
    dx,
    dgates.reshape(gates.shape),
    None,
  )


def _over_blocks(plan, layout, add, carry):
  """Adds block after block; those whose hidden state was kept come first."""
  for size, blocks in zip(plan.blocks, layout.blocks, strict=True):
    one = functools.partial(add, blocks=blocks, size=size)
    inside = blocks.start + size <= plan.kept
    n_kept = jnp.minimum(inside.sum(), blocks.used)
    kept = functools.partial(one, kept=True)
    carry = jax.lax.fori_loop(0, n_kept, kept, carry)
    if plan.kept < plan.places:
      others = functools.partial(one, kept=False)
      carry = jax.lax.fori_loop(n_kept, blocks.used, others, carry)
  return carry


_ffn.defvjp(_ffn_fwd, _ffn_bwd)

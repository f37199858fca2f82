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
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import param_spec, varying
from dsv3_jax.linear import dot, linear, quantize
from dsv3_jax.model import layers, remat

MIN_BLOCK = 8  # rows
# On CPU what a block computes stays in cache; elsewhere a block must keep a
# whole device at work.
MAX_BLOCK, MAX_BLOCK_ON_CPU = 4096, 256
SAVED_ROWS = 1.25  # rows whose hidden state is saved, over those expected

Tokens, Gates = Float[Array, "M D"], Float[Array, "M K"]
Chosen = Int[Array, "M K"]


def dense_ffn(
  p: param_spec.Params, x: Tokens, chosen: Chosen, gates: Gates
) -> Tokens:
  """Reference: every expert on every token, unchosen ones weighted by 0."""
  n_experts = p["down"].shape[0]
  hot = jax.nn.one_hot(chosen, n_experts, dtype=gates.dtype)  # none: zeros
  weight = dot.einsum("MKE,MK->ME", hot, gates)
  h = dot.einsum("MD,EDGF->MEGF", x, p["gate_up"])
  act = jax.nn.silu(h[:, :, 0]) * h[:, :, 1]
  y = dot.einsum("MEF,EFD->MED", act, p["down"])
  return dot.einsum("MED,ME->MD", y, weight.astype(y.dtype))


def _same_varying(
  p: param_spec.Params, x: Tokens, gates: Gates
) -> tuple[linear.Weight, linear.Weight, Tokens, Gates]:
  args = p["gate_up"], p["down"], x, gates.astype(x.dtype)
  return varying.same_varying(*args)


def slotwise_ffn(
  p: param_spec.Params,
  x: Tokens,
  chosen: Chosen,
  gates: Gates,
  n_slots: int | None = None,
) -> Tokens:
  """`grouped_ffn` for very few tokens: slot by slot, without sorting."""
  del n_slots
  n_experts, k = p["down"].shape[0], chosen.shape[1]
  gate_up, down, x, gates = _same_varying(p, x, gates)
  gates = jnp.where(chosen < n_experts, gates, 0)

  def add(y, slot):
    i, e, gate = slot
    e = jnp.minimum(e, n_experts - 1)
    up_e, down_e = _expert(gate_up, e), _expert(down, e)
    x_rows, _ = linear.quantize_rows(_slice(x, i // k, 1), up_e)
    h = linear.fprop(x_rows, up_e).astype(x.dtype)
    act, _ = linear.quantize_rows(layers.swiglu_product(h, gate[None]), down_e)
    return y.at[i // k].add(linear.fprop(act, down_e)[0].astype(x.dtype)), None

  slots = jnp.arange(chosen.size), chosen.reshape(-1), gates.reshape(-1)
  y, _ = jax.lax.scan(add, jnp.zeros_like(x, jnp.float32), slots)
  return y.astype(x.dtype)


@flax.struct.dataclass
class _Blocks:
  """Blocks of one size."""

  start: jax.Array  # [N] int32, first place of each
  expert: jax.Array  # [N] int32, of each
  used: jax.Array  # [] int32, how many are in use


@flax.struct.dataclass
class _Layout:
  """The place of every slot m * K + k; slot M * K is padding."""

  slots: jax.Array  # [P] int32, the slot of each place
  blocks: tuple[_Blocks, ...]  # of each size


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
  """Static sizes of a grouped feed-forward."""

  blocks: tuple[int, ...]  # rows of a block, falling
  places: int  # enough for all slots with their padding
  saved: int  # of the first places: their hidden state is saved
  split_wgrad: bool  # gradients of weights in a loop of their own


def _make_plan(
  n_tokens: int, k: int, n_experts: int, n_slots: int, split_wgrad: bool = False
) -> ExpertPlan:
  half = max(int(n_slots / n_experts / 2), 1)  # of the mean load
  on_cpu = jax.default_backend() == "cpu"
  limit = MAX_BLOCK_ON_CPU if on_cpu else MAX_BLOCK
  large = min(max(1 << half.bit_length() - 1, MIN_BLOCK), limit)
  small = max(large // 4, MIN_BLOCK)
  most = n_tokens * min(k, n_experts)
  padding = min(n_experts, most) * small
  saved = min(math.ceil(SAVED_ROWS * n_slots), most) + padding
  blocks = (large, small) if small < large else (large,)
  return ExpertPlan(blocks, most + padding, saved, split_wgrad)


def _layout(chosen: jax.Array, n_experts: int, plan: ExpertPlan) -> _Layout:
  flat, small = chosen.reshape(-1), plan.blocks[-1]
  load = jax.nn.one_hot(flat, n_experts, dtype=jnp.int32).sum(0)
  remaining = -(-load // small) * small  # padded rows, not yet in a block
  first_place = jnp.cumsum(remaining) - remaining
  at, blocks = first_place, []
  for size in plan.blocks:
    n = remaining // size
    ends = jnp.cumsum(n)
    index = jnp.arange(plan.places // size, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, n_experts - 1)
    start = at[expert] + (index - (ends - n)[expert]) * size
    blocks.append(_Blocks(start, expert, ends[-1]))
    at, remaining = at + n * size, remaining - n * size
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
  x: Tokens,
  chosen: Chosen,
  gates: Gates,
  n_slots: int | None = None,
  *,
  split_wgrad: bool = False,
) -> Tokens:
  """Gate-weighted sum of the outputs of each token's experts.

  Outputs have the type of x, and are added in float32.
  `n_slots` is the expected number of choices of a real expert; M * K if not
  given. `split_wgrad` computes the gradients of weights in loops of their own,
  so that a pipeline can run them later.
  """
  n_experts, n_slots = p["down"].shape[0], n_slots or chosen.size
  gate_up, down, x, gates = _same_varying(p, x, gates)
  if not chosen.size:
    return jnp.zeros_like(x)
  plan = _make_plan(*chosen.shape, n_experts, n_slots, split_wgrad)
  layout = _layout(chosen, n_experts, plan)
  return _ffn(plan, gate_up, down, x, gates, layout)


def _take(rows: linear.Rows, index: jax.Array) -> linear.Rows:
  """rows[index], 0 where the index is beyond the last row."""
  fill = {"mode": "fill", "fill_value": 0}
  return jax.tree.map(lambda a: a.at[index].get(**fill), rows)


def _add(rows: jax.Array, index: jax.Array, update: jax.Array) -> jax.Array:
  """Adds to rows at distinct indices; those beyond the last are dropped."""
  return rows.at[index].add(update, mode="drop", unique_indices=True)


_slice = jax.lax.dynamic_slice_in_dim


def _expert(w: linear.Weight, e: jax.Array) -> linear.Weight:
  """The weight of one expert of a stack."""
  if isinstance(w, linear.StackedWeight):
    return w[e]
  return jax.tree.map(lambda a: a[e], w)


def _put(rows: linear.Rows, place: jax.Array, new: linear.Rows) -> linear.Rows:
  """Replaces rows at distinct places; those beyond the last are dropped."""

  def put(a, b):
    return a.at[place].set(b, mode="drop", unique_indices=True)

  return jax.tree.map(put, rows, new)


def _add_counts(total: linear.Counts, more: linear.Counts) -> linear.Counts:
  return None if total is None else total + more


def _empty_rows(
  like: jax.Array, n: int, n_columns: int, w: linear.Weight
) -> linear.Rows:
  """Zeros for n rows [n, C] that will be quantized for a weight."""

  def zeros(t):
    return jnp.zeros_like(like, t.dtype, shape=t.shape)

  h = jax.ShapeDtypeStruct((n, n_columns), like.dtype)
  types, _ = jax.eval_shape(linear.quantize_rows, h, w)
  return jax.tree.map(zeros, types)


def _zero_counts(like: jax.Array, w: linear.Weight) -> linear.Counts:
  """Counts of no quantization for a weight."""
  if not linear.block_size(w):
    return None
  return jnp.zeros_like(like, jnp.float32, shape=len(quantize.COUNTERS))


def _empty_wgrad(like: jax.Array, w: linear.Weight) -> jax.Array:
  """Zeros [E, K, N] f32, not made before `like` is there.

  Of a constant, XLA would make a copy for each layer when a step begins.
  """
  shape = *w.shape[:2], math.prod(w.shape[2:])
  missing = jnp.isnan(like[0, 0]).astype(jnp.float32)
  return jnp.broadcast_to(jnp.minimum(missing, 0), shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(plan, gate_up, down, x, gates, layout):
  return _ffn_fwd(plan, gate_up, down, x, gates, layout)[0]


def _ffn_fwd(plan, gate_up, down, x, gates, layout):
  k, gate = gates.shape[1], gates.reshape(-1)
  weights = linear.without_handle(gate_up), linear.without_handle(down)
  gate_up, down = map(linear.with_dequantized, weights)
  # Once a token, with powers of two: dispatch has sent tokens like this.
  x_rows, x_counts = linear.quantize_rows(x, gate_up, "power_of_two")
  hidden = _empty_rows(x, plan.saved, 2 * down.shape[1], gate_up)
  carry = jnp.zeros_like(x, jnp.float32), hidden, _zero_counts(x, down)
  for size, blocks in zip(plan.blocks, layout.blocks, strict=True):

    def add(i, carry, size=size, blocks=blocks):
      y, hidden, act_counts = carry
      e, start = blocks.expert[i], blocks.start[i]
      slots = _slice(layout.slots, start, size)
      up_e, down_e = _expert(gate_up, e), _expert(down, e)
      h = linear.fprop(_take(x_rows, slots // k), up_e).astype(x.dtype)
      act = layers.swiglu_product(h, _take(gate, slots))
      act, counts = linear.quantize_rows(act, down_e)
      y_block = linear.fprop(act, down_e).astype(x.dtype)
      h_rows, _ = linear.quantize_rows(h, up_e)
      hidden = _put(hidden, start + jnp.arange(size), h_rows)
      y = _add(y, slots // k, y_block)
      return y, hidden, _add_counts(act_counts, counts)

    carry = jax.lax.fori_loop(0, blocks.used, add, carry)
  y, hidden, act_counts = carry
  y = y.astype(x.dtype)
  hidden = remat.named(hidden, "hidden")
  return y, (*weights, x_rows, gates, layout, hidden, x_counts, act_counts)


@dataclasses.dataclass(frozen=True)
class _Block:
  """A block of rows of one expert, in the backward pass."""

  expert: jax.Array
  start: jax.Array  # its first place
  slots: jax.Array  # [n]
  tokens: jax.Array  # [n]
  x: linear.Rows  # [n, D]
  gate: jax.Array  # [n]
  h: jax.Array  # [n, 2F], hidden state
  dy: linear.Rows  # [n, D]


@dataclasses.dataclass(frozen=True)
class _Backward:
  """The backward pass of `_ffn`, block by block."""

  plan: ExpertPlan
  layout: _Layout
  gate_up: linear.Weight
  down: linear.Weight
  x: linear.Rows  # [M, D]
  gates: jax.Array  # [M, K]
  hidden: linear.Rows  # [saved places, 2F]
  dy: linear.Rows  # [M, D]
  dtype: jax.typing.DTypeLike

  def block(self, i, blocks: _Blocks, size: int, saved: bool) -> _Block:
    """Block i of one size; its hidden state was saved, or is recomputed."""
    e, start = blocks.expert[i], blocks.start[i]
    slots = _slice(self.layout.slots, start, size)
    tokens = slots // self.gates.shape[1]
    x = _take(self.x, tokens)
    if saved:
      rows = jax.tree.map(lambda a: _slice(a, start, size), self.hidden)
      h = linear.dequantize_rows(rows, self.dtype)
    else:
      h = linear.fprop(x, _expert(self.gate_up, e)).astype(self.dtype)
    dy = _take(self.dy, tokens)
    gate = _take(self.gates.reshape(-1), slots)
    return _Block(e, start, slots, tokens, x, gate, h, dy)

  def dhidden(self, b: _Block) -> tuple[jax.Array, jax.Array]:
    """Gradients of the hidden state and of the gates of a block."""
    down_e = _expert(self.down, b.expert)
    dact = linear.dgrad(b.dy, down_e).astype(b.h.dtype)
    return layers.swiglu_product_grad(b.h, dact, b.gate)

  def dinput(self, b: _Block, dh: jax.Array) -> tuple[jax.Array, linear.Counts]:
    """Gradient of the input of a block, and counts of its quantization."""
    dh_rows, counts = linear.quantize_gradient(dh, self.gate_up)
    dx = linear.dgrad(dh_rows, _expert(self.gate_up, b.expert))
    return dx.astype(dh.dtype), counts

  def dweights(self, b: _Block, dh: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of both weights of a block's expert, float32."""
    act = layers.swiglu_product(b.h, b.gate)
    return (
      linear.wgrad(b.x, dh, self.gate_up, "power_of_two"),
      linear.wgrad(act, b.dy, self.down, "power_of_two"),
    )

  def over_blocks(self, add: Callable[..., Any], carry: Any) -> Any:
    """Folds `add` over all blocks; those with a saved hidden state first."""
    plan = self.plan
    for size, blocks in zip(plan.blocks, self.layout.blocks, strict=True):

      def body(saved, i, carry, size=size, blocks=blocks):
        return add(carry, self.block(i, blocks, size, saved), saved)

      n_saved = (blocks.start + size <= plan.saved).sum()
      n_saved = jnp.minimum(n_saved, blocks.used)
      with_saved = functools.partial(body, True)
      carry = jax.lax.fori_loop(0, n_saved, with_saved, carry)
      if plan.saved < plan.places:
        recomputed = functools.partial(body, False)
        carry = jax.lax.fori_loop(n_saved, blocks.used, recomputed, carry)
    return carry

  def all_at_once(self, carry: Any) -> Any:
    """Adds the gradients of input, gates and weights in one loop."""

    def add(carry, b, saved):
      del saved
      *grads, dh_counts = carry
      dh, dgate = self.dhidden(b)
      dx, counts = self.dinput(b, dh)
      new = dx, dgate, *self.dweights(b, dh)
      grads = map(_add, grads, (b.tokens, b.slots, b.expert, b.expert), new)
      return *grads, _add_counts(dh_counts, counts)

    return self.over_blocks(add, carry)

  def split(self, dx, dgates, dgate_up, ddown, dh_counts) -> Any:
    """Does the same in two loops, that of the weights last."""
    shape = self.plan.saved, 2 * self.down.shape[1]
    dhidden = jnp.zeros_like(dx, self.dtype, shape=shape)

    def add_inputs(carry, b, saved):
      dx, dgates, dhidden, dh_counts = carry
      dh, dgate = self.dhidden(b)
      if saved:
        dhidden = jax.lax.dynamic_update_slice_in_dim(dhidden, dh, b.start, 0)
      dx_block, counts = self.dinput(b, dh)
      dx = _add(dx, b.tokens, dx_block)
      dgates = _add(dgates, b.slots, dgate)
      return dx, dgates, dhidden, _add_counts(dh_counts, counts)

    carry = self.over_blocks(add_inputs, (dx, dgates, dhidden, dh_counts))
    dx, dgates, dhidden, dh_counts = carry

    def add_weights(carry, b, saved):
      size = len(b.slots)
      dh = _slice(dhidden, b.start, size) if saved else self.dhidden(b)[0]
      new = self.dweights(b, dh)
      return tuple(map(_add, carry, (b.expert, b.expert), new))

    dweights = self.over_blocks(add_weights, (dgate_up, ddown))
    return dx, dgates, *dweights, dh_counts


def _ffn_bwd(plan, residuals, dout):
  *weights, x, gates, layout, hidden, x_counts, act_counts = residuals
  gate_up, down = map(linear.with_dequantized, weights)
  dy_rows, dy_counts = linear.quantize_gradient(dout, down, "power_of_two")
  backward = _Backward(
    plan, layout, gate_up, down, x, gates, hidden, dy_rows, dout.dtype
  )
  grads = (
    jnp.zeros_like(dout, jnp.float32),
    jnp.zeros_like(gates.reshape(-1), jnp.float32),
    *(_empty_wgrad(dout, w) for w in weights),
    _zero_counts(dout, gate_up),
  )
  split = plan.split_wgrad
  grads = backward.split(*grads) if split else backward.all_at_once(grads)
  dx, dgates, dgate_up, ddown, dh_counts = grads
  return (
    linear.weight_cotangent(weights[0], dgate_up, [x_counts, dh_counts]),
    linear.weight_cotangent(weights[1], ddown, [act_counts, dy_counts]),
    dx.astype(dout.dtype),
    dgates.reshape(gates.shape).astype(gates.dtype),
    None,
  )


_ffn.defvjp(_ffn_fwd, _ffn_bwd)

"""Expert parallelism: tokens travel to the experts they chose, and back.

Routed experts are divided over the mesh axes `node` and `expert`. Each form has
the signature of the local experts in `model/experts.py`, is exact and drops
nothing; all run inside `shard_map`.

  allgather                every device receives all tokens of the group; for
                           few tokens
  all_to_all               a token is sent once to each device that holds
                           experts it chose
  hierarchical_all_to_all  a token is sent once to each node, to the device of
                           the same index in it, and from there to the other
                           devices of the node; partial sums return the same
                           way (arXiv:2412.19437, section 3.2.2)

An exchange goes in rounds of a fixed number of rows for each pair of devices, a
little more than balanced routing needs: usually one round, as many as it takes
otherwise. Memory is that of a round. On CPU there is one, of as many rows as
there can be: see `manual.after` for what its runtime does to loops that send.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import linear, quantize, recipe
from dsv3_jax.model import experts as experts_lib
from dsv3_jax.model import moe, remat
from dsv3_jax.parallel import comm_volume, device_mesh

SLACK = 1.25  # rows of a round, in rows that balanced routing needs

Ffn = Callable[..., jax.Array]
Axes = tuple[str, ...]


def make_expert_parallel_ffn(
  form: str,
  sizes: Mapping[str, int],
  cfg: config.Router,
  *,
  rounds: str = "auto",
  split_wgrad: bool = False,
  group: Axes = device_mesh.EXPERTS,
) -> moe.Experts:
  """The routed experts of a mesh.

  Args:
    form: `allgather`, `all_to_all` or `hierarchical_all_to_all`; a prefix
      `ragged_` sends only the rows in use, where the backend can; `auto` is
      hierarchical if both axes are larger than 1.
    sizes: of the mesh axes.
    cfg: routing rules: how many experts, of which a token chooses how many.
    rounds: `one` of the rows there can be, `many` of those expected; `auto`.
    split_wgrad: keep the weights' gradients apart, see `experts.grouped_ffn`.
    group: mesh axes that the experts are divided over, nodes first.
  """
  axes = device_mesh.active_axes(sizes, group)
  local = experts_lib.grouped_ffn
  if split_wgrad:
    local = functools.partial(local, split_wgrad=True)
  if not axes:
    return moe.Experts(local)
  swap = _ragged_swap if form.startswith("ragged_") else _padded_swap
  form = form.removeprefix("ragged_")
  if form == "auto":
    form = "hierarchical_all_to_all"
  if len(axes) == 1 and form == "hierarchical_all_to_all":
    form = "all_to_all"
  sent = functools.partial(
    comm_volume.token_copies, sizes=sizes, cfg=cfg, form=form
  )
  if group != device_mesh.EXPERTS:
    sent = moe.LOCAL.sent
  if form == "allgather":
    return moe.Experts(
      functools.partial(_gathered, axes=axes, inner=local), sent
    )
  exchange = functools.partial(_exchange, split_wgrad=split_wgrad)
  if rounds == "auto":
    rounds = "one" if jax.default_backend() == "cpu" else "many"
  slack = SLACK if rounds == "many" else math.inf
  if form == "all_to_all":
    hop = _Hop(axes, axes, swap, n_devices=1, fanout=cfg.top_k, slack=slack)
    return moe.Experts(functools.partial(exchange, hop, inner=local), sent)
  n_nodes, n_places = sizes[axes[0]], device_mesh.axis_size(sizes, axes[1:])
  # A group of experts inside one node: tokens reach no more nodes than groups.
  aligned = cfg.n_groups % n_nodes == 0
  fanout = cfg.top_groups if aligned else cfg.top_k
  hop = functools.partial(_Hop, group=axes, swap=swap, slack=slack)
  inside = hop(axes[1:], n_devices=1, fanout=cfg.top_k)
  across = hop(axes[:1], n_devices=n_places, fanout=fanout)
  inner = functools.partial(exchange, inside, inner=local)
  return moe.Experts(functools.partial(exchange, across, inner=inner), sent)


# --- what travels, and how ---
#
# A way takes the rows of x [M, ...] to where they are wanted, `spread`, and
# adds up what returns of them, `collect`; each is the gradient of the other.
# With FP8 weights, states to the experts and gradients of their outputs are
# sent in FP8, with powers of two, and what returns of either in bfloat16
# (section 3.3.3). Quantizing again what was received changes nothing, so the
# number of hops does not matter.


def _spread(way: Any, tile: int, x: jax.Array, where: Any) -> jax.Array:
  """Rows sent, in FP8 if there is a tile."""
  spread = lambda a: remat.named(way.spread(a, where), "sent")
  if not tile:
    return spread(x)
  made = quantize.quantize(x, (1, tile), "power_of_two")
  return quantize.dequantize(jax.tree.map(spread, made), x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(way, tile, x, where):
  return _spread(way, tile, x, where)


_send.defvjp(
  lambda way, tile, x, where: (_spread(way, tile, x, where), where),
  lambda way, _, where, dy: (way.collect(dy, where), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combine(way, tile, y, where):
  del tile
  return way.collect(y, where)


_combine.defvjp(
  lambda way, _, y, where: (way.collect(y, where), where),
  lambda way, tile, where, dx: (_spread(way, tile, dx, where), None),
)


# --- all tokens everywhere ---


@dataclasses.dataclass(frozen=True)
class _Everyone:
  """To all devices of some axes."""

  axes: Axes

  def spread(self, x: jax.Array, where: None) -> jax.Array:
    del where
    return jax.lax.all_gather(x, self.axes, tiled=True)

  def collect(self, y: jax.Array, where: None) -> jax.Array:
    del where
    return jax.lax.psum_scatter(y, self.axes, tiled=True)


def _owned(chosen: jax.Array, device: jax.Array, n: int) -> jax.Array:
  """Choices among the n experts of a device by their place there, n: none."""
  here = chosen - device * n
  return jnp.where((here >= 0) & (here < n), here, n)


def _gathered(
  p: param_spec.Params,
  x: jax.Array,
  chosen: jax.Array,
  gates: jax.Array,
  n_slots: int | None = None,
  *,
  axes: Axes,
  inner: Ffn,
) -> jax.Array:
  n, way = p["down"].shape[0], _Everyone(axes)
  chosen_all = remat.named(way.spread(chosen, None), "sent")
  here = _owned(chosen_all, jax.lax.axis_index(axes), n)
  send = functools.partial(_send, way, linear.tile(p["gate_up"]))
  gates = _send(way, 0, gates, None)
  y = inner(p, send(x, None), here, gates, n_slots or chosen.size)
  return _combine(way, linear.tile(p["down"]), y, None)


# --- exchanges ---


def _padded_swap(rows: jax.Array, counts: jax.Array, axes: Axes) -> jax.Array:
  """Block i of rows [R, C, ...] goes to device i; theirs arrive in order."""
  del counts
  return jax.lax.all_to_all(rows, axes, 0, 0, tiled=True)


def _ragged_swap(rows: jax.Array, counts: jax.Array, axes: Axes) -> jax.Array:
  """The same, sending the first counts[i] rows of block i; the rest are 0."""
  n, capacity = rows.shape[:2]
  flat = rows.reshape(n * capacity, *rows.shape[2:])
  starts = capacity * jnp.arange(n, dtype=jnp.int32)
  mine = jnp.full_like(starts, capacity) * jax.lax.axis_index(axes)
  theirs = _padded_swap(counts, counts, axes)
  out = jax.lax.ragged_all_to_all(
    flat,
    jnp.zeros_like(flat),
    *varying.alike(starts, counts, mine, theirs),
    axis_name=axes,
  )
  return out.reshape(rows.shape)


@dataclasses.dataclass(frozen=True)
class _Hop:
  """An exchange over some axes of the expert-parallel group."""

  axes: Axes  # exchanged over
  group: Axes  # all that must do as many rounds
  swap: Callable[..., jax.Array]
  n_devices: int  # that a destination stands for: those of a node, or 1
  fanout: int  # destinations of a token at most
  slack: float  # rows of a round, in rows that balanced routing needs

  def spread(self, x: jax.Array, where: "_Rows") -> jax.Array:
    rows = x.at[where.token].get(mode="fill", fill_value=0)
    rows = self.swap(rows, where.mine, self.axes)
    return rows.reshape(-1, x.shape[-1])

  def collect(self, y: jax.Array, where: "_Rows") -> jax.Array:
    y = y.reshape(*where.token.shape, -1)
    y = self.swap(y, where.theirs, self.axes)
    x = jnp.zeros_like(y, shape=(where.n_rows, y.shape[-1]))
    return x.at[where.token].add(y, mode="drop")


@flax.struct.dataclass
class _Rows:
  """Those of a round."""

  token: jax.Array  # [R, C] int32, which go to each destination; M: none
  mine: jax.Array  # [R] int32, how many
  theirs: jax.Array  # [R] int32, how many come
  n_rows: int = flax.struct.field(pytree_node=False)  # M


@flax.struct.dataclass
class DispatchPlan:
  """Which tokens go where; M stands for none."""

  queue: jax.Array  # [R, Q] int32, tokens for each destination
  counts: jax.Array  # [R] int32, how many they are
  chosen: jax.Array  # [M, K] int32
  rounds: jax.Array  # [] int32, the same in the whole group


def _capacity(
  n_rows: int, n_slots: int, size: int, fanout: int, slack: float = SLACK
) -> int:
  """Rows of a round for one destination, of n_rows with n_slots choices.

  Choices at random leave a destination out with (1 - 1 / size)^(choices of a
  row); limited routing sends a row to `fanout` destinations at most.
  """
  reached = 1 - (1 - 1 / size) ** (n_slots / n_rows)
  needed = slack * n_rows * min(reached, fanout / size)
  return math.ceil(min(n_rows, needed))


def _plan(
  chosen: jax.Array, n_experts: int, size: int, capacity: int, group: Axes
) -> DispatchPlan:
  """Queues for `size` destinations of n_experts each."""
  n_rows = chosen.shape[0]
  wanted = jax.nn.one_hot(chosen // n_experts, size, dtype=jnp.bool_).any(1)
  place = jnp.cumsum(wanted, axis=0, dtype=jnp.int32) - 1
  length = -(-n_rows // capacity) * capacity
  place = jnp.where(wanted, place, length)
  row, destination = jnp.indices(wanted.shape, dtype=jnp.int32)
  queue = jnp.full_like(chosen, n_rows, shape=(size, length))
  queue = queue.at[destination, place].set(row, mode="drop")
  counts = wanted.sum(0, dtype=jnp.int32)
  rounds = jax.lax.pmax(-(-counts.max() // capacity), group)
  return DispatchPlan(queue, counts, chosen, rounds)


def _exchange(
  hop: _Hop,
  p: param_spec.Params,
  x: jax.Array,
  chosen: jax.Array,
  gates: jax.Array,
  n_slots: int | None = None,
  *,
  inner: Ffn = experts_lib.grouped_ffn,
  split_wgrad: bool = False,
) -> jax.Array:
  """Rows go to those that hold their experts; `inner` runs on what arrives."""
  if not chosen.size:
    return jnp.zeros_like(x)
  leaves, structure = jax.tree.flatten((p, x, gates))
  p, x, gates = jax.tree.unflatten(structure, varying.alike(*leaves))
  n_slots = n_slots or chosen.size
  size, n_experts = jax.lax.axis_size(hop.axes), p["down"].shape[0]
  capacity = _capacity(len(x), n_slots, size, hop.fanout, hop.slack)
  plan = _plan(chosen, n_experts * hop.n_devices, size, capacity, hop.group)
  one = functools.partial(_round, hop, inner, capacity, n_slots)
  # As all else that one pass may keep for another.
  rounds = varying.vary(plan.rounds, varying.varying(x))
  plan = plan.replace(rounds=remat.named(rounds, "sent"))
  if capacity == len(x):
    return one(0, p, x, gates, plan)
  return _all_rounds(one, split_wgrad, recipe.trained(p), p, x, gates, plan)


def _round(hop, inner, capacity, n_slots, i, p, x, gates, plan):
  """Sends a round of rows to each destination and adds up what returns."""
  n_experts = p["down"].shape[0] * hop.n_devices
  token = jax.lax.dynamic_slice_in_dim(plan.queue, i * capacity, capacity, 1)
  counts = jnp.clip(plan.counts - i * capacity, 0, capacity)
  theirs = remat.named(_padded_swap(counts, counts, hop.axes), "sent")
  where = _Rows(token, counts, theirs, len(x))
  arrived = jnp.arange(capacity)[None] < theirs[:, None]
  here = remat.named(hop.spread(plan.chosen, where), "sent")
  here = _owned(here, jax.lax.axis_index(hop.axes), n_experts)
  here = jnp.where(arrived.reshape(-1, 1), here, n_experts)
  states = _send(hop, linear.tile(p["gate_up"]), x, where)
  gates = _send(hop, 0, gates, where)
  y = inner(p, states, here, gates, min(n_slots, here.size))
  return _combine(hop, linear.tile(p["down"]), y, where)


def _over_rounds(rounds, add, init):
  """fori_loop over all rounds but the first, and how many there were."""

  def body(carry):
    i, total = carry
    return i + 1, add(i, total)

  one = jnp.ones_like(rounds)
  return jax.lax.while_loop(lambda c: c[0] < rounds, body, (one, init))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_rounds(one, split_wgrad, trained, p, x, gates, plan):
  """The sum of `one` over all rounds; all but the first recomputed backwards.

  Each loop starts from what was there before, so that it comes after that.
  """
  return _all_rounds_fwd(one, split_wgrad, trained, p, x, gates, plan)[0]


def _of_round(one, p, plan):
  def of(i, trained, x, gates):
    return one(i, recipe.joined(trained, p), x, gates, plan)

  return of


def _all_rounds_fwd(one, split_wgrad, trained, p, x, gates, plan):
  del split_wgrad
  of = _of_round(one, p, plan)
  y, vjp = jax.vjp(functools.partial(of, 0), trained, x, gates)
  add = lambda i, y: y + of(i, trained, x, gates)
  _, y = _over_rounds(plan.rounds, add, y)
  return y, (vjp, trained, p, x, gates, plan)


def _all_rounds_bwd(one, split_wgrad, residuals, dy):
  vjp, trained, p, x, gates, plan = residuals
  of = _of_round(one, p, plan)

  def plus(total, rounds, of, *inputs):
    """With the gradients of all rounds, of a function of a round and inputs."""

    def add(i, total):
      _, vjp = jax.vjp(functools.partial(of, i), *inputs)
      return jax.tree.map(jnp.add, total, vjp(dy))

    return _over_rounds(rounds, add, total)

  d_trained, dx, dgates = vjp(dy)
  if split_wgrad:
    of_rows = lambda i, x, gates: of(i, trained, x, gates)
    total = dx, dgates
    done, (dx, dgates) = plus(total, plan.rounds, of_rows, x, gates)
    of_weights = lambda i, new: of(i, new, x, gates)
    rounds = varying.after(plan.rounds, done)
    _, (d_trained,) = plus((d_trained,), rounds, of_weights, trained)
  else:
    total = d_trained, dx, dgates
    _, total = plus(total, plan.rounds, of, trained, x, gates)
    d_trained, dx, dgates = total
  return d_trained, None, dx, dgates, None


_all_rounds.defvjp(_all_rounds_fwd, _all_rounds_bwd)

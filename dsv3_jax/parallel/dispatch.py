"""Expert parallelism: sends tokens to the devices of their experts, and back.

Routed experts are divided over the mesh axes `node` and `expert`. Every form
has the signature of the local experts in `model/experts.py`, is exact, drops no
token, and runs inside `shard_map`.

  allgather                every device receives all tokens of the group; for
                           few tokens
  all_to_all               a token is sent once to each device that holds
                           experts it chose
  hierarchical_all_to_all  a token is sent once to each node, to the device of
                           the same index in it, and from there to the other
                           devices of the node; partial sums return the same
                           way (arXiv:2412.19437, section 3.2.2)

An exchange takes rounds of a fixed number of rows for each pair of devices, a
little more than balanced routing needs: usually one round, and more if routing
is unbalanced. Memory is that of one round. On CPU there is one round, of as
many rows as possible: see `varying.data_dependent_on` for loops with
collectives there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import linear, recipe
from dsv3_jax.model import experts as experts_lib
from dsv3_jax.model import moe, remat
from dsv3_jax.parallel import comm_volume, device_mesh, transports
from dsv3_jax.parallel.device_mesh import Axes, Sizes
from dsv3_jax.parallel.transports import (
  AllToAll,
  padded_all_to_all,
  ragged_all_to_all,
)

# Rows of a round, relative to balanced routing. Unlike the capacity factor of
# other MoE layers it drops no token: rows beyond it wait for another round.
BUFFER_FACTOR = 1.25

Ffn = Callable[..., jax.Array]


def make_expert_parallel_ffn(
  form: str,
  sizes: Sizes,
  cfg: config.Router,
  *,
  rounds: str = "auto",
  split_wgrad: bool = False,
  group: Axes = device_mesh.EXPERTS,
) -> moe.Experts:
  """Makes the function that runs the routed experts of a mesh.

  Args:
    form: `allgather`, `all_to_all` or `hierarchical_all_to_all`; a prefix
      `ragged_` sends only the rows in use, where the backend can; `auto` is
      hierarchical if both axes are larger than 1.
    rounds: `one` of the largest possible number of rows, `many` of the expected
      number, or `auto`.
    split_wgrad: compute weight gradients apart, see `experts.grouped_ffn`.
    group: mesh axes that the experts are divided over, nodes first.
  """
  axes = device_mesh.active_axes(sizes, group)
  ffn = experts_lib.grouped_ffn
  if split_wgrad:
    ffn = functools.partial(ffn, split_wgrad=True)
  if not axes:
    return moe.Experts(ffn)
  ragged, form = form.startswith("ragged_"), form.removeprefix("ragged_")
  if form == "auto":
    form = "hierarchical_all_to_all"
  if len(axes) == 1 and form == "hierarchical_all_to_all":
    form = "all_to_all"
  counts = moe.LOCAL.sent
  if group == device_mesh.EXPERTS:
    counts = functools.partial(
      comm_volume.token_copies, sizes=sizes, cfg=cfg, form=form
    )
  if form == "allgather":
    ffn = functools.partial(_allgather_ffn, axes=axes, inner=ffn)
    return moe.Experts(ffn, counts)
  if rounds == "auto":
    rounds = "one" if jax.default_backend() == "cpu" else "many"
  hop = functools.partial(
    AllToAll,
    group=axes,
    all_to_all=ragged_all_to_all if ragged else padded_all_to_all,
    buffer_factor=BUFFER_FACTOR if rounds == "many" else math.inf,
  )
  for transport in _transports(hop, form, axes, sizes, cfg):
    ffn = functools.partial(
      _exchange, transport, inner=ffn, split_wgrad=split_wgrad
    )
  return moe.Experts(ffn, counts)


def _transports(
  hop: Callable[..., AllToAll],
  form: str,
  axes: Axes,
  sizes: Sizes,
  cfg: config.Router,
) -> list[AllToAll]:
  """Lists the exchanges of a token, the last hop first."""
  if form == "all_to_all":
    return [hop(axes, n_devices=1, fanout=cfg.top_k)]
  # If a group of experts is inside one node, tokens reach at most as many nodes
  # as groups.
  aligned = cfg.n_groups % sizes[axes[0]] == 0
  return [
    hop(axes[1:], n_devices=1, fanout=cfg.top_k),
    hop(
      axes[:1],
      n_devices=device_mesh.axis_size(sizes, axes[1:]),
      fanout=cfg.top_groups if aligned else cfg.top_k,
    ),
  ]


def _local_choices(chosen: jax.Array, device: jax.Array, n: int) -> jax.Array:
  """Renumbers choices by the n experts of a device; n for experts elsewhere."""
  local = chosen - device * n
  return jnp.where((local >= 0) & (local < n), local, n)


# --- allgather ---


def _allgather_ffn(
  p: param_spec.Params,
  x: jax.Array,
  chosen: jax.Array,
  gates: jax.Array,
  n_slots: int | None = None,
  *,
  axes: Axes,
  inner: Ffn,
) -> jax.Array:
  transport = transports.AllGather(axes)
  all_chosen = remat.named(transport.dispatch(chosen, None), "sent")
  device, n_experts = jax.lax.axis_index(axes), p["down"].shape[0]
  local = _local_choices(all_chosen, device, n_experts)
  gates = transports.dispatch(transport, 0, gates, None)
  tile = linear.block_size(p["gate_up"])
  states = transports.dispatch(transport, tile, x, None)
  y = inner(p, states, local, gates, n_slots or chosen.size)
  return transports.combine(transport, linear.block_size(p["down"]), y, None)


# --- all-to-all ---


@flax.struct.dataclass
class DispatchPlan:
  """Queues of tokens for all destinations; M stands for none."""

  queue: jax.Array  # [R, Q] int32, tokens for each destination
  counts: jax.Array  # [R] int32, tokens in each queue
  chosen: jax.Array  # [M, K] int32
  rounds: jax.Array  # [] int32, the same in the whole group


def _buffer_rows(
  n_rows: int, n_slots: int, size: int, fanout: int, buffer_factor: float
) -> int:
  """Returns the rows of a round for each of `size` destinations.

  A row of random choices misses a destination with probability
  (1 - 1 / size)^(choices of a row); limited routing sends a row to at most
  `fanout` destinations. All rows together have n_slots choices.
  """
  reached = 1 - (1 - 1 / size) ** (n_slots / n_rows)
  needed = buffer_factor * n_rows * min(reached, fanout / size)
  return math.ceil(min(n_rows, needed))


def _plan(
  chosen: jax.Array, n_experts: int, size: int, buffer_rows: int, group: Axes
) -> DispatchPlan:
  """Queues tokens for `size` destinations of n_experts each."""
  n_rows = chosen.shape[0]
  wanted = jax.nn.one_hot(chosen // n_experts, size, dtype=jnp.bool_).any(1)
  index = jnp.cumsum(wanted, axis=0, dtype=jnp.int32) - 1
  length = -(-n_rows // buffer_rows) * buffer_rows
  index = jnp.where(wanted, index, length)
  row, destination = jnp.indices(wanted.shape, dtype=jnp.int32)
  queue = jnp.full_like(chosen, n_rows, shape=(size, length))
  queue = queue.at[destination, index].set(row, mode="drop")
  counts = wanted.sum(0, dtype=jnp.int32)
  rounds = jax.lax.pmax(-(-counts.max() // buffer_rows), group)
  return DispatchPlan(queue, counts, chosen, rounds)


def _exchange(
  transport: AllToAll,
  p: param_spec.Params,
  x: jax.Array,
  chosen: jax.Array,
  gates: jax.Array,
  n_slots: int | None = None,
  *,
  inner: Ffn = experts_lib.grouped_ffn,
  split_wgrad: bool = False,
) -> jax.Array:
  """Sends rows to the devices of their experts, and runs `inner` there."""
  if not chosen.size:
    return jnp.zeros_like(x)
  p, x, gates = varying.same_varying(p, x, gates)
  n_slots = n_slots or chosen.size
  size, n_experts = jax.lax.axis_size(transport.axes), p["down"].shape[0]
  buffer_rows = _buffer_rows(
    len(x), n_slots, size, transport.fanout, transport.buffer_factor
  )
  plan = _plan(
    chosen, n_experts * transport.n_devices, size, buffer_rows, transport.group
  )
  one_round = functools.partial(_round, transport, inner, buffer_rows, n_slots)
  # Marked as varying, as all that a pass may save for another.
  rounds = varying.vary(plan.rounds, varying.varying(x))
  plan = plan.replace(rounds=remat.named(rounds, "sent"))
  trained = recipe.differentiable(p)
  if buffer_rows == len(x):
    return one_round(p, plan, 0, trained, x, gates)
  return _all_rounds(one_round, split_wgrad, p, plan, trained, x, gates)


def _round(
  transport: AllToAll,
  inner: Ffn,
  buffer_rows: int,
  n_slots: int,
  p: param_spec.Params,
  plan: DispatchPlan,
  i: Any,
  trained: Any,
  x: jax.Array,
  gates: jax.Array,
) -> jax.Array:
  """Exchanges the i-th rows of every queue; returns their sums [M, D]."""
  p = recipe.with_differentiable(trained, p)
  n_experts, start = p["down"].shape[0] * transport.n_devices, i * buffer_rows
  token = jax.lax.dynamic_slice_in_dim(plan.queue, start, buffer_rows, 1)
  outgoing = jnp.clip(plan.counts - start, 0, buffer_rows)
  incoming = padded_all_to_all(outgoing, outgoing, transport.axes)
  incoming = remat.named(incoming, "sent")
  rows = transports.Rows(token, outgoing, incoming, len(x))
  arrived = jnp.arange(buffer_rows)[None] < incoming[:, None]
  local = remat.named(transport.dispatch(plan.chosen, rows), "sent")
  device = jax.lax.axis_index(transport.axes)
  local = _local_choices(local, device, n_experts)
  local = jnp.where(arrived.reshape(-1, 1), local, n_experts)
  tile = linear.block_size(p["gate_up"])
  states = transports.dispatch(transport, tile, x, rows)
  gates = transports.dispatch(transport, 0, gates, rows)
  y = inner(p, states, local, gates, min(n_slots, local.size))
  return transports.combine(transport, linear.block_size(p["down"]), y, rows)


# --- rounds ---


def _later_rounds(
  rounds: jax.Array, add: Callable[[jax.Array, Any], Any], init: Any
) -> tuple[jax.Array, Any]:
  """Adds all rounds but the first to `init`; returns their number, too."""

  def body(carry):
    i, total = carry
    return i + 1, add(i, total)

  first = jnp.ones_like(rounds)
  return jax.lax.while_loop(
    lambda carry: carry[0] < rounds, body, (first, init)
  )


def _wide(tree: Any) -> Any:
  """Arrays in float32, in which rounds are added."""
  return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_rounds(
  one_round: Callable[..., jax.Array],
  split_wgrad: bool,
  p: param_spec.Params,
  plan: DispatchPlan,
  trained: Any,
  x: jax.Array,
  gates: jax.Array,
) -> jax.Array:
  """Sums all rounds; all but the first are recomputed in the backward pass.

  Each loop starts from an earlier result, so that XLA runs it later.
  """
  return _all_rounds_fwd(one_round, split_wgrad, p, plan, trained, x, gates)[0]


def _all_rounds_fwd(one_round, split_wgrad, p, plan, trained, x, gates):
  del split_wgrad
  f = functools.partial(one_round, p, plan)
  y, vjp = jax.vjp(functools.partial(f, 0), trained, x, gates)
  _, total = _later_rounds(
    plan.rounds, lambda i, total: total + f(i, trained, x, gates), _wide(y)
  )
  return total.astype(y.dtype), (vjp, p, plan, trained, x, gates)


def _all_rounds_bwd(one_round, split_wgrad, residuals, dy):
  vjp, p, plan, trained, x, gates = residuals
  f = functools.partial(one_round, p, plan)

  def add_later_rounds(total, rounds, f, *inputs):
    """Adds the gradients of f(round, *inputs) for all later rounds."""

    def add(i, total):
      _, vjp = jax.vjp(functools.partial(f, i), *inputs)
      return jax.tree.map(jnp.add, total, vjp(dy))

    return _later_rounds(rounds, add, total)

  first = vjp(dy)
  d_trained, dx, dgates = _wide(first)
  if split_wgrad:
    done, (dx, dgates) = add_later_rounds(
      (dx, dgates), plan.rounds, lambda i, *a: f(i, trained, *a), x, gates
    )
    _, (d_trained,) = add_later_rounds(
      (d_trained,),
      varying.data_dependent_on(plan.rounds, done),
      lambda i, trained: f(i, trained, x, gates),
      trained,
    )
  else:
    _, (d_trained, dx, dgates) = add_later_rounds(
      (d_trained, dx, dgates), plan.rounds, f, trained, x, gates
    )
  return (
    None,
    None,
    *jax.tree.map(
      lambda total, like: total.astype(like.dtype),
      (d_trained, dx, dgates),
      first,
    ),
  )


_all_rounds.defvjp(_all_rounds_fwd, _all_rounds_bwd)

"""The executor of a schedule: one scan over the ticks of its lock-step form.

All ranks run one program. In a tick, each does what its row of a table says:
loops over the layers of a stage run as many times as it has layers, or not at
all, so that ranks differ without branches and every buffer is updated in place.
What a stage made goes to its neighbours at the end of the tick. The forward
pass keeps what the backward pass reads, see `splitting.py`; nothing is computed
twice unless `train.remat` says so (arXiv:2412.19437, section 3.2.1).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import config, losses, param_spec, varying
from dsv3_jax.data.batch import Batch
from dsv3_jax.linear import recipe
from dsv3_jax.model import moe, transformer
from dsv3_jax.parallel import sharding
from dsv3_jax.parallel.pipeline import split_backward, tick_table


@flax.struct.dataclass
class _Memory:
  """What a rank has; every array differs between all devices."""

  inputs: jax.Array  # [slots + 1, B, T, D]
  gradients: jax.Array  # the same
  kept: dict[str, list[jax.Array]]  # [slots * places, ...] by kind of layer
  deferred: dict[str, list[jax.Array]]
  sums: param_spec.Params  # of gradients, f32
  main: jax.Array  # sums of losses
  mtp: jax.Array
  stats: moe.Stats  # sums


def gradient_sums(
  params: param_spec.Params,
  bias: jax.Array,
  mtp_weight: jax.Array,
  batch: Batch,
  weights: jax.Array,
  *,
  run: config.Run,
  layout: sharding.Layout,
) -> tuple[param_spec.Params, losses.Losses, moe.Stats]:
  """Sums over the micro-batches and stages of one device.

  Args:
    params: as `layout.gather_for_step` returns them.
    bias: [n_routers, E] f32.
    mtp_weight: lambda.
    batch: tokens and labels [A, B', T], the rows of this device.
    weights: [A, B', T], of labels.
    run: the configuration.
    layout: its layout, with stages.

  Returns:
    As `train.gradients`, of this device alone.
  """
  work = tick_table.build_tick_table(layout.stages.schedule)
  executor = _executor(params, bias, mtp_weight, batch, weights, run, layout)
  memory = executor.memory(work)
  rank = jax.lax.axis_index("pipe")

  def tick(memory, of_ranks):
    turn = jax.tree.map(lambda a: a[rank], of_ranks)
    return executor.tick(turn, memory), None

  memory, _ = jax.lax.scan(tick, memory, jax.tree.map(jnp.asarray, work.turns))
  balance = executor.share * memory.stats.balance.sum()
  total = memory.main + mtp_weight * memory.mtp + balance
  terms = losses.Losses(total, memory.main, memory.mtp, balance)
  return memory.sums, terms, memory.stats


def _executor(params, bias, mtp_weight, batch, weights, run, layout):
  """Divides the layers of each kind into passes."""
  vary = functools.partial(varying.vary, axes=layout.varying_axes)
  x = vary(transformer.embed(params, batch.tokens[0]))
  bias = vary(bias)
  passes = {}
  for name in layout.stages.kinds:
    p = jax.tree.map(lambda a: a[0], params[name])
    trained = recipe.trained(p)
    constants = p, {"dense": (), "moe": bias[:1]}[name]
    put_off = [leaf.ndim > 1 for leaf in jax.tree.leaves(trained)]
    layer = functools.partial(
      _layer, name, cfg=run.model, experts=layout.experts
    )
    passes[name] = split_backward.split(
      layer, trained, constants, x, put_off, run.train.activations
    )
  share = 1.0 / (batch.tokens.shape[0] * layout.n_shards)
  return _Executor(
    params, bias, mtp_weight, batch, weights, run, layout, passes, share, vary
  )


# Layers as (parameters, router bias [1, E] if any, x) -> outputs, stats.


def _dense(p, bias, x, cfg, experts):
  del bias, experts
  return (transformer.dense_block(p, x, cfg),), None


def _moe(p, bias, x, cfg, experts):
  y, stats = transformer.moe_block(p, x, bias[0], cfg, experts)
  return (y, stats.balance), stats


LAYERS = {"dense": _dense, "moe": _moe}


def _layer(name, trained, constants, x, cfg, experts):
  """A layer as `splitting` divides it: what is trained, and all else."""
  p, bias = constants
  return LAYERS[name](recipe.joined(trained, p), bias, x, cfg, experts)


@dataclasses.dataclass(frozen=True)
class _Executor:
  """What the ticks of a step have in common."""

  params: param_spec.Params
  bias: jax.Array
  mtp_weight: jax.Array
  batch: Batch
  weights: jax.Array
  run: config.Run
  layout: sharding.Layout
  passes: dict[str, split_backward.Passes]
  share: float  # of a balance loss
  vary: Callable[[jax.Array], jax.Array]

  def memory(self, work: tick_table.TickTable) -> _Memory:
    """All zeros."""

    def zeros(*shape, dtype=jnp.float32):
      return self.vary(jnp.zeros(shape, dtype))

    def of_layers(slots, types):
      return {
        name: [
          zeros(slots * kind.size, *t.shape, dtype=t.dtype)
          for t in types(self.passes[name])
        ]
        for name, kind in self.layout.stages.kinds.items()
      }

    x = jax.eval_shape(transformer.embed, self.params, self.batch.tokens[0])
    n_routers, n_experts = self.bias.shape
    return _Memory(
      inputs=zeros(work.inputs + 1, *x.shape, dtype=x.dtype),
      gradients=zeros(work.gradients + 1, *x.shape, dtype=x.dtype),
      kept=of_layers(work.kept, lambda passes: passes.kept),
      deferred=of_layers(work.deferred, lambda passes: passes.deferred),
      sums=jax.tree.map(lambda a: zeros(*a.shape), recipe.trained(self.params)),
      main=zeros(),
      mtp=zeros(),
      stats=moe.Stats(
        load=zeros(n_routers, n_experts, dtype=jnp.int32),
        balance=zeros(n_routers),
        sent=zeros(n_routers, 2, dtype=jnp.int32),
      ),
    )

  def tick(self, turn: tick_table.TickOps, memory: _Memory) -> _Memory:
    """One turn."""
    f, b, w = turn.forward, turn.backward, turn.weight
    tokens = self.batch.tokens[f.micro_batch]
    first = self.vary(transformer.embed(self.params, tokens))
    x = jnp.where(f.stage == 0, first, _get(memory.inputs, f.arrived))
    dy = _get(memory.gradients, b.arrived)
    if "dense" in self.passes:
      x, memory = self._forward("dense", f, 0, x, memory)
    if "moe" in self.passes:
      x, dy, memory, n = self._together(turn, x, dy, memory)
      x, memory = self._forward("moe", f, n, x, memory)
      dy, memory = self._backward("moe", b, n, dy, memory)
    if "dense" in self.passes:
      dy, memory = self._backward("dense", b, 0, dy, memory)
    done = jnp.zeros_like(w.on)
    for name in self.passes:
      done, memory = self._weights(name, w, done, memory)
    memory = self._embed_gradient(b, dy, memory)
    # The MTP module's exchange must not meet those of the layers.
    last = f.replace(on=varying.after(f.on, done))
    d_last, memory = self._loss(last, x, memory)
    # Sent as one and last: ranks that meet in the middle of a tick wait for
    # each other twice.
    made = varying.after(jnp.stack([x, dy]), done)
    return self._deliver(turn, made, d_last, memory)

  # --- the layers of a stage ---

  def _count(self, name: str, task: tick_table.EncodedOp) -> jax.Array:
    """Layers that a task goes through."""
    count = jnp.asarray(self.layout.stages.kinds[name].count, jnp.int32)
    return task.on * count[task.stage]

  def _layer(self, name: str, task: tick_table.EncodedOp, i: jax.Array):
    """Of layer i of a stage: what is trained, constants, places of both."""
    kind = self.layout.stages.kinds[name]
    at = task.direction * kind.size + i
    p = jax.tree.map(lambda a: _get(a, at), self.params[name])
    if name == "dense":
      return recipe.trained(p), (p, ()), at, None
    router = jnp.asarray(kind.first, jnp.int32)[task.stage] + i
    bias = _get(self.bias, router)[None]
    return recipe.trained(p), (p, bias), at, router

  def _forward_layer(self, name, task, i, x, memory):
    p, constants, _, router = self._layer(name, task, i)
    (y, *_), told, kept = self.passes[name].forward(p, constants, x)
    at = task.kept * self.layout.stages.kinds[name].size + i
    memory = memory.replace(
      kept=memory.kept | {name: _put(memory.kept[name], at, kept)}
    )
    if told is not None:
      stats = jax.tree.map(
        lambda total, new: _add(total, router, new), memory.stats, told
      )
      memory = memory.replace(stats=stats)
    return y, memory

  def _kept(self, name, task, i, memory):
    at = task.kept * self.layout.stages.kinds[name].size + i
    return [_get(a, at) for a in memory.kept[name]]

  def _backward_layer(self, name, task, i, kept, dy, memory):
    p, constants, own, _ = self._layer(name, task, i)
    size = self.layout.stages.kinds[name].size
    d_outputs = dy, self.vary(jnp.float32(self.share))
    if name == "dense":
      d_outputs = d_outputs[:1]
    dx, gradients, deferred = self.passes[name].input_gradient(
      p, constants, kept, d_outputs
    )
    left = _put(memory.deferred[name], task.deferred * size + i, deferred)
    memory = memory.replace(deferred=memory.deferred | {name: left})
    return dx, _add_gradients(memory, name, own, gradients)

  def _weight_layer(self, name, task, i, memory):
    p, constants, own, _ = self._layer(name, task, i)
    at = task.deferred * self.layout.stages.kinds[name].size + i
    deferred = [_get(a, at) for a in memory.deferred[name]]
    gradients = self.passes[name].weight_gradient(p, constants, deferred)
    return _add_gradients(memory, name, own, gradients)

  def _forward(self, name, task, start, x, memory):
    """Layers of a stage from the start-th on."""

    def layer(i, carry):
      return self._forward_layer(name, task, i, *carry)

    n = self._count(name, task)
    return jax.lax.fori_loop(start, n, layer, (x, memory))

  def _backward(self, name, task, start, dy, memory):
    """Layers of a stage from the start-th but last one back."""
    n = self._count(name, task)

    def layer(i, carry):
      _, memory = carry
      kept = self._kept(name, task, n - 1 - i, memory)
      return self._backward_layer(name, task, n - 1 - i, kept, *carry)

    return jax.lax.fori_loop(start, n, layer, (dy, memory))

  def _weights(self, name, task, done, memory):
    """Weight gradients of a stage's layers, whose number is added to done."""

    def layer(i, carry):
      done, memory = carry
      return done + 1, self._weight_layer(name, task, i, memory)

    n = self._count(name, task)
    return jax.lax.fori_loop(0, n, layer, (done, memory))

  def _together(self, turn, x, dy, memory):
    """A layer forward and one backward at a time, in one block of code.

    Neither needs the other: what one sends can travel while the other computes.
    Returns how many there were, too.
    """
    f, b = turn.forward, turn.backward
    n_forward, n_back = self._count("moe", f), self._count("moe", b)
    n = turn.pair * jnp.minimum(n_forward, n_back)

    # What the next layer back needs is read from the buffers as the layer
    # forward leaves them: beside its writing, reading would copy them whole.
    def layers(i, carry):
      x, dy, kept, memory = carry
      last = n_back - 1 - i
      dx, memory = self._backward_layer("moe", b, last, kept, dy, memory)
      y, memory = self._forward_layer("moe", f, i, x, memory)
      return y, dx, self._kept("moe", b, last - 1, memory), memory

    kept = self._kept("moe", b, n_back - 1, memory)
    carry = x, dy, kept, memory
    x, dy, _, memory = jax.lax.fori_loop(0, n, layers, carry)
    return x, dy, memory, n

  # --- the ends ---

  def _embed_gradient(
    self, task: tick_table.EncodedOp, dx, memory: _Memory
  ) -> _Memory:
    """Adds the embedding's gradient, on the first stage."""
    tokens = self.batch.tokens[task.micro_batch]

    def add(_, memory):
      embed = memory.sums["embed"].at[tokens].add(dx.astype(jnp.float32))
      return memory.replace(sums=memory.sums | {"embed": embed})

    here = task.on * (task.stage == 0)
    return jax.lax.fori_loop(0, here, add, memory)

  def _loss(self, task: tick_table.EncodedOp, x, memory: _Memory):
    """On the last stage: the losses of its output, and their gradient."""
    names = [name for name in self.params if name not in self.passes]
    ends = {name: self.params[name] for name in names}
    n_layers = self.run.model.n_moe_layers
    data, token_weights = jax.tree.map(
      lambda a: a[task.micro_batch], (self.batch, self.weights)
    )

    def objective(trained, x):
      terms, stats = losses.of_last_layer(
        recipe.joined(trained, ends),
        self.bias[n_layers:],
        x,
        data,
        token_weights,
        self.mtp_weight,
        self.run.model,
        kept=self.run.train.activations,
        experts=self.layout.experts,
      )
      total = terms.main + self.mtp_weight * terms.mtp
      return total + self.share * terms.balance, (terms, stats)

    def add(i, carry):
      _, memory = carry
      # XLA takes out of a loop what does not change in it: all ranks would do
      # this in every tick.
      (d_weights, dx), (terms, stats) = jax.grad(
        objective, argnums=(0, 1), has_aux=True
      )(recipe.trained(ends), varying.after(x, i))
      sums = jax.tree.map(
        lambda total, g: total + g.astype(jnp.float32),
        {name: memory.sums[name] for name in names},
        d_weights,
      )
      told = jax.tree.map(
        lambda total, new: total.at[n_layers:].add(new), memory.stats, stats
      )
      return dx, memory.replace(
        sums=memory.sums | sums,
        main=memory.main + terms.main,
        mtp=memory.mtp + terms.mtp,
        stats=told,
      )

    last = self.layout.stages.schedule.n_stages - 1
    here = task.on * (task.stage == last)
    return jax.lax.fori_loop(0, here, add, (jnp.zeros_like(x), memory))

  def _deliver(self, turn: tick_table.TickOps, made, d_last, memory):
    """Sends what the tick made, [2, B, T, D], and stores what arrives."""
    inputs, gradients = memory.inputs, memory.gradients
    arrived = zip(tick_table.SOURCES, turn.inputs, turn.gradients, strict=True)
    for source, input_slot, gradient_slot in arrived:
      if source == "loss":
        gradients = _put(gradients, gradient_slot, d_last)
        continue
      y, dx = self._from(source, made)
      inputs = _put(inputs, input_slot, y)
      gradients = _put(gradients, gradient_slot, dx)
    return memory.replace(inputs=inputs, gradients=gradients)

  def _from(self, step: int, a: jax.Array) -> jax.Array:
    """What the rank some steps away has; zeros where there is none."""
    if step == 0:
      return a
    ranks = range(self.layout.stages.schedule.n_ranks)
    pairs = [(rank + step, rank) for rank in ranks if rank + step in ranks]
    return jax.lax.ppermute(a, "pipe", pairs)


# --- buffers ---


def _get(a: jax.Array, at: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(a, at, keepdims=False)


def _put(tree: Any, at: jax.Array, new: Any) -> Any:
  """Arrays with row `at` replaced."""
  put = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, at, 0)
  return jax.tree.map(put, tree, new)


def _add(a: jax.Array, at: jax.Array, new: jax.Array) -> jax.Array:
  """An array with something added to row `at`."""
  return _put(a, at, _get(a, at) + new.astype(a.dtype))


def _add_gradients(memory, name, at, gradients) -> _Memory:
  """Adds gradients of a layer; None: not made by this pass."""
  totals, structure = jax.tree.flatten(memory.sums[name])
  totals = [
    total if g is None else _add(total, at, g)
    for total, g in zip(totals, gradients, strict=True)
  ]
  totals = jax.tree.unflatten(structure, totals)
  return memory.replace(sums=memory.sums | {name: totals})

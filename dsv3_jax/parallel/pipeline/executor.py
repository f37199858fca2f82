"""Executes a pipeline schedule: one `lax.scan` over the ticks of its table.

All ranks run one program. In a tick, each runs the operations of its row of the
table: loops over the layers of a stage run as many times as it has layers, or
not at all, so that ranks differ without branches and every buffer is updated in
place. At the end of a tick, activations and gradients are sent to the
neighbours. The forward pass saves what the backward pass reads, see
`split_backward.py`; nothing is computed twice unless `train.remat` says so
(arXiv:2412.19437, section 3.2.1).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config, losses, param_spec, varying
from dsv3_jax.data.batch import Batch
from dsv3_jax.linear import recipe
from dsv3_jax.model import moe, transformer
from dsv3_jax.parallel import layouts
from dsv3_jax.parallel.pipeline import buffers as buffers_lib
from dsv3_jax.parallel.pipeline import split_backward, tick_table
from dsv3_jax.parallel.pipeline.buffers import Buffers
from dsv3_jax.parallel.pipeline.tick_table import EncodedOp, TickOps


def gradient_sums(
  params: param_spec.Params,
  bias: jax.Array,
  mtp_weight: jax.Array,
  batch: Batch,
  weights: losses.TokenWeights,
  *,
  run: config.Run,
  layout: layouts.Layout,
) -> tuple[param_spec.Params, losses.Losses, moe.MoEStats]:
  """Sums gradients over the micro-batches and stages of one device.

  Args:
    params: result of `layout.gather_for_step`.
    bias: [n_routers, E] f32.
    mtp_weight: lambda.
    batch: tokens and labels [A, B', T], the rows of this device.
    weights: [A, B', T - k] of the labels of each depth k.
    run: the configuration.
    layout: its layout, with stages.

  Returns:
    Gradients, losses and router statistics of this device alone.
  """
  table = tick_table.build_tick_table(layout.stages.schedule)
  executor = _executor(params, bias, mtp_weight, batch, weights, run, layout)
  rank = jax.lax.axis_index("pipe")

  def tick(buffers: Buffers, ops: TickOps) -> tuple[Buffers, None]:
    return executor.tick(jax.tree.map(lambda a: a[rank], ops), buffers), None

  buffers = jax.tree.map(
    executor.vary,
    buffers_lib.zeros(
      table,
      layout.stages.stacks,
      executor.passes,
      x=jax.eval_shape(transformer.embed, params, batch.tokens[0]),
      sums=recipe.differentiable(params),
      load=bias,
      batch=batch,
    ),
  )
  ops = jax.tree.map(jnp.asarray, table.ops)
  buffers, _ = jax.lax.scan(tick, buffers, ops)
  balance = executor.share * buffers.stats.balance.sum()
  total = buffers.main + mtp_weight * buffers.mtp + balance
  terms = losses.Losses(
    total, buffers.main, buffers.mtp, balance, buffers.metrics
  )
  return buffers.sums, terms, buffers.stats


def _executor(
  params: param_spec.Params,
  bias: jax.Array,
  mtp_weight: jax.Array,
  batch: Batch,
  weights: losses.TokenWeights,
  run: config.Run,
  layout: layouts.Layout,
) -> "_Executor":
  """Splits the layers of each type into passes."""
  vary = functools.partial(varying.vary, axes=layout.varying_axes)
  x = vary(transformer.embed(params, batch.tokens[0]))
  bias = vary(bias)
  passes = {}
  for name in layout.stages.stacks:
    p = jax.tree.map(lambda a: a[0], params[name])
    trained = recipe.differentiable(p)
    constants = p, jax.tree.map(vary, _constants(name, bias, batch, 0, 0))
    deferred = [leaf.ndim > 1 for leaf in jax.tree.leaves(trained)]
    layer = functools.partial(
      _layer, name, cfg=run.model, experts=layout.experts
    )
    passes[name] = split_backward.split(
      layer, trained, constants, x, deferred, run.train.activations
    )
  share = 1.0 / (batch.tokens.shape[0] * layout.n_shards)
  return _Executor(
    params, bias, mtp_weight, batch, weights, run, layout, passes, share, vary
  )


# Layers as functions of parameters, constants and x. The constants are router
# bias [1, E] or (), segments [B, T] or None, valid [B, T] or None, and of an
# MoE layer routes [B, T, K] or None.


def _constants(
  name: str, bias: jax.Array, batch: Batch, micro: Any, router: Any
) -> Any:
  masks = jax.tree.map(lambda a: a[micro], (batch.segments, batch.valid))
  if name == "dense":
    return (), *masks
  routes = jax.tree.map(lambda a: a[micro][:, :, router], batch.routes)
  return buffers_lib.get(bias, router)[None], *masks, routes


def _dense(
  p: param_spec.Params,
  constants: Any,
  x: jax.Array,
  cfg: config.Model,
  experts: moe.Experts,
) -> tuple[tuple[jax.Array], None]:
  """Returns (y,), and no stats."""
  del experts
  _, segments, _ = constants
  return (transformer.dense_block(p, x, cfg, segments),), None


def _moe(
  p: param_spec.Params,
  constants: Any,
  x: jax.Array,
  cfg: config.Model,
  experts: moe.Experts,
) -> tuple[tuple[jax.Array, jax.Array], moe.MoEStats]:
  """Returns (y, balance loss), and the stats of the layer."""
  (bias,), *masks = constants
  y, stats = transformer.moe_block(p, x, bias, cfg, experts, *masks)
  return (y, stats.balance), stats


LAYERS = {"dense": _dense, "moe": _moe}


def _layer(
  name: str,
  trained: Any,
  constants: Any,
  x: jax.Array,
  cfg: config.Model,
  experts: moe.Experts,
) -> Any:
  """Runs a layer; only `trained` and x have gradients."""
  p, others = constants
  return LAYERS[name](
    recipe.with_differentiable(trained, p), others, x, cfg, experts
  )


@dataclasses.dataclass(frozen=True)
class _Executor:
  """The operations of a tick, and what all ticks of a step share."""

  params: param_spec.Params
  bias: jax.Array
  mtp_weight: jax.Array
  batch: Batch
  weights: losses.TokenWeights
  run: config.Run
  layout: layouts.Layout
  passes: dict[str, split_backward.Passes]
  share: float  # of a balance loss
  vary: Callable[[jax.Array], jax.Array]

  def tick(self, ops: TickOps, buffers: Buffers) -> Buffers:
    """Runs the operations of a rank in a tick, and exchanges their results."""
    f, b, w = ops.forward, ops.backward, ops.weight
    tokens = self.batch.tokens[f.micro_batch]
    first = self.vary(transformer.embed(self.params, tokens))
    x = jnp.where(
      f.stage == 0, first, buffers_lib.get(buffers.inputs, f.input_slot)
    )
    dy = buffers_lib.get(buffers.gradients, b.input_slot)
    if "dense" in self.passes:
      x, buffers = self._forward("dense", f, 0, x, buffers)
    if "moe" in self.passes:
      x, dy, buffers, n = self._overlapped(ops, x, dy, buffers)
      x, buffers = self._forward("moe", f, n, x, buffers)
      dy, buffers = self._backward("moe", b, n, dy, buffers)
    if "dense" in self.passes:
      dy, buffers = self._backward("dense", b, 0, dy, buffers)
    done = jnp.zeros_like(w.active)
    for name in self.passes:
      done, buffers = self._weights(name, w, done, buffers)
    buffers = self._embed_gradient(b, dy, buffers)
    # The MTP module's exchange must not run beside those of the layers.
    last = f.replace(active=varying.data_dependent_on(f.active, done))
    d_last, buffers = self._loss(last, x, buffers)
    # Sent together and last: ranks that meet in the middle of a tick wait for
    # each other twice.
    results = varying.data_dependent_on(jnp.stack([x, dy]), done)
    return self._exchange(ops, results, d_last, buffers)

  # --- the layers of a stage ---

  def _n_layers(self, name: str, op: EncodedOp) -> jax.Array:
    """Counts the layers that an operation runs; 0 if it is not active."""
    count = jnp.asarray(self.layout.stages.stacks[name].count, jnp.int32)
    return op.active * count[op.stage]

  def _row(self, name: str, slot: jax.Array, i: jax.Array) -> jax.Array:
    """Returns the row of layer i in a buffer of residuals or for W."""
    return slot * self.layout.stages.stacks[name].size + i

  def _layer_args(
    self, name: str, op: EncodedOp, i: jax.Array
  ) -> tuple[Any, Any, jax.Array, jax.Array | None]:
    """Returns trained leaves and constants of layer i, its row and router."""
    stack = self.layout.stages.stacks[name]
    row = op.direction * stack.size + i
    p = jax.tree.map(lambda a: buffers_lib.get(a, row), self.params[name])
    first = jnp.asarray(stack.first, jnp.int32)
    router = first[op.stage] + i if name == "moe" else None
    args = self.bias, self.batch, op.micro_batch, router
    return recipe.differentiable(p), (p, _constants(name, *args)), row, router

  def _forward_layer(
    self, name: str, op: EncodedOp, i: jax.Array, x: jax.Array, buffers: Buffers
  ) -> tuple[jax.Array, Buffers]:
    p, constants, _, router = self._layer_args(name, op, i)
    (y, *_), stats, saved = self.passes[name].forward(p, constants, x)
    row = self._row(name, op.residual_slot, i)
    residuals = buffers_lib.put(buffers.residuals[name], row, saved)
    buffers = buffers.replace(residuals=buffers.residuals | {name: residuals})
    if stats is not None:
      stats = jax.tree.map(
        lambda total, new: buffers_lib.add(total, router, new),
        buffers.stats,
        stats,
      )
      buffers = buffers.replace(stats=stats)
    return y, buffers

  def _residuals(
    self, name: str, op: EncodedOp, i: jax.Array, buffers: Buffers
  ) -> list[jax.Array]:
    row = self._row(name, op.residual_slot, i)
    return [buffers_lib.get(a, row) for a in buffers.residuals[name]]

  def _backward_layer(
    self,
    name: str,
    op: EncodedOp,
    i: jax.Array,
    residuals: list[jax.Array],
    dy: jax.Array,
    buffers: Buffers,
  ) -> tuple[jax.Array, Buffers]:
    p, constants, params_row, _ = self._layer_args(name, op, i)
    d_outputs = dy, self.vary(jnp.float32(self.share))
    if name == "dense":
      d_outputs = d_outputs[:1]
    dx, gradients, saved = self.passes[name].input_gradient(
      p, constants, residuals, d_outputs
    )
    row = self._row(name, op.wgrad_slot, i)
    wgrad = buffers_lib.put(buffers.wgrad[name], row, saved)
    buffers = buffers.replace(wgrad=buffers.wgrad | {name: wgrad})
    return dx, buffers_lib.add_gradients(buffers, name, params_row, gradients)

  def _weight_layer(
    self, name: str, op: EncodedOp, i: jax.Array, buffers: Buffers
  ) -> Buffers:
    p, constants, params_row, _ = self._layer_args(name, op, i)
    row = self._row(name, op.wgrad_slot, i)
    saved = [buffers_lib.get(a, row) for a in buffers.wgrad[name]]
    gradients = self.passes[name].weight_gradient(p, constants, saved)
    return buffers_lib.add_gradients(buffers, name, params_row, gradients)

  def _forward(
    self, name: str, op: EncodedOp, start: Any, x: jax.Array, buffers: Buffers
  ) -> tuple[jax.Array, Buffers]:
    """Runs the layers of a stage from `start` on."""

    def layer(i, carry):
      return self._forward_layer(name, op, i, *carry)

    n = self._n_layers(name, op)
    return jax.lax.fori_loop(start, n, layer, (x, buffers))

  def _backward(
    self, name: str, op: EncodedOp, start: Any, dy: jax.Array, buffers: Buffers
  ) -> tuple[jax.Array, Buffers]:
    """Runs the layers of a stage backwards, without the last `start`."""
    n = self._n_layers(name, op)

    def layer(i, carry):
      _, buffers = carry
      residuals = self._residuals(name, op, n - 1 - i, buffers)
      return self._backward_layer(name, op, n - 1 - i, residuals, *carry)

    return jax.lax.fori_loop(start, n, layer, (dy, buffers))

  def _weights(
    self, name: str, op: EncodedOp, done: jax.Array, buffers: Buffers
  ) -> tuple[jax.Array, Buffers]:
    """Adds weight gradients of a stage, and its number of layers to `done`."""

    def layer(i, carry):
      done, buffers = carry
      return done + 1, self._weight_layer(name, op, i, buffers)

    n = self._n_layers(name, op)
    return jax.lax.fori_loop(0, n, layer, (done, buffers))

  def _overlapped(
    self, ops: TickOps, x: jax.Array, dy: jax.Array, buffers: Buffers
  ) -> tuple[jax.Array, jax.Array, Buffers, jax.Array]:
    """Runs a layer forward and one backward in each step of one loop.

    They are independent: all-to-alls of one can run while the other computes.

    Returns:
      x and dy after the loop, the buffers, and the number of steps.
    """
    f, b = ops.forward, ops.backward
    n_forward, n_backward = self._n_layers("moe", f), self._n_layers("moe", b)
    n = ops.overlapped * jnp.minimum(n_forward, n_backward)

    # The residuals of the next layer backwards are read after those of the
    # layer forward are written: read before, XLA would copy the whole buffers.
    def layers(i, carry):
      x, dy, residuals, buffers = carry
      last = n_backward - 1 - i
      dx, buffers = self._backward_layer("moe", b, last, residuals, dy, buffers)
      y, buffers = self._forward_layer("moe", f, i, x, buffers)
      return y, dx, self._residuals("moe", b, last - 1, buffers), buffers

    residuals = self._residuals("moe", b, n_backward - 1, buffers)
    carry = x, dy, residuals, buffers
    x, dy, _, buffers = jax.lax.fori_loop(0, n, layers, carry)
    return x, dy, buffers, n

  # --- the first and the last stage ---

  def _embed_gradient(
    self, op: EncodedOp, dx: jax.Array, buffers: Buffers
  ) -> Buffers:
    """Adds the embedding's gradient, on the first stage."""
    tokens = self.batch.tokens[op.micro_batch]

    def add(_, buffers):
      embed = buffers.sums["embed"].at[tokens].add(dx.astype(jnp.float32))
      return buffers.replace(sums=buffers.sums | {"embed": embed})

    n = op.active * (op.stage == 0)
    return jax.lax.fori_loop(0, n, add, buffers)

  def _loss(
    self, op: EncodedOp, x: jax.Array, buffers: Buffers
  ) -> tuple[jax.Array, Buffers]:
    """Adds losses and their gradients, on the last stage; returns that of x."""
    names = [name for name in self.params if name not in self.passes]
    ends = {name: self.params[name] for name in names}
    n_layers = self.run.model.n_moe_layers
    data, token_weights = jax.tree.map(
      lambda a: a[op.micro_batch], (self.batch, self.weights)
    )

    def objective(trained, x):
      terms, stats = losses.loss_from_last_layer(
        recipe.with_differentiable(trained, ends),
        self.bias[n_layers:],
        x,
        data,
        token_weights,
        self.mtp_weight,
        self.run.model,
        transformer.ForwardContext(
          saved_activations=self.run.train.activations,
          experts=self.layout.experts,
        ),
      )
      total = terms.main + self.mtp_weight * terms.mtp
      return total + self.share * terms.balance, (terms, stats)

    def add(i, carry):
      _, buffers = carry
      # XLA moves what does not depend on a loop out of it: then all ranks would
      # compute the loss in every tick.
      (d_weights, dx), (terms, stats) = jax.grad(
        objective, argnums=(0, 1), has_aux=True
      )(recipe.differentiable(ends), varying.data_dependent_on(x, i))
      sums = jax.tree.map(
        lambda total, g: total + g.astype(jnp.float32),
        {name: buffers.sums[name] for name in names},
        d_weights,
      )
      stats = jax.tree.map(
        lambda total, new: total.at[n_layers:].add(new), buffers.stats, stats
      )
      return dx, buffers.replace(
        sums=buffers.sums | sums,
        main=buffers.main + terms.main,
        mtp=buffers.mtp + terms.mtp,
        metrics=jax.tree.map(jnp.add, buffers.metrics, terms.metrics),
        stats=stats,
      )

    last = self.layout.stages.schedule.n_stages - 1
    n = op.active * (op.stage == last)
    return jax.lax.fori_loop(0, n, add, (jnp.zeros_like(x), buffers))

  def _exchange(
    self, ops: TickOps, results: jax.Array, d_last: jax.Array, buffers: Buffers
  ) -> Buffers:
    """Sends activations and gradients [2, B, T, D] and stores what arrives."""
    inputs, gradients = buffers.inputs, buffers.gradients
    for source, input_slot, gradient_slot in zip(
      tick_table.SOURCES, ops.input_slots, ops.gradient_slots, strict=True
    ):
      if source == "loss":
        gradients = buffers_lib.put(gradients, gradient_slot, d_last)
        continue
      y, dx = self._receive(source, results)
      inputs = buffers_lib.put(inputs, input_slot, y)
      gradients = buffers_lib.put(gradients, gradient_slot, dx)
    return buffers.replace(inputs=inputs, gradients=gradients)

  def _receive(self, step: int, a: jax.Array) -> jax.Array:
    """Returns a of the rank `step` ahead; zeros if there is no such rank."""
    if step == 0:
      return a
    ranks = range(self.layout.stages.schedule.n_ranks)
    pairs = [(rank + step, rank) for rank in ranks if rank + step in ranks]
    return jax.lax.ppermute(a, "pipe", pairs)

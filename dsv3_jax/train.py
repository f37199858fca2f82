"""The training state and one optimizer step."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dsv3_jax import config, losses, optim, param_spec
from dsv3_jax.data.batch import IGNORE, Batch
from dsv3_jax.linear import recipe
from dsv3_jax.model import moe, router, transformer
from dsv3_jax.parallel import device_mesh, layouts, sharded_forward
from dsv3_jax.parallel.pipeline import executor

Metrics = dict[str, jax.Array]
StepFn = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]  # jitted


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes."""

  params: param_spec.Params  # float32 masters
  opt_state: optax.OptState
  router_bias: jax.Array  # [n_routers, E] f32, moved by counts, not gradients
  step: jax.Array  # [] int32, optimizer steps done
  skipped: jax.Array  # [] int32, steps not applied since not all was finite
  key: jax.Array  # PRNG key of the run; a use folds in the step


def init_state(run: config.Run, key: jax.Array) -> TrainState:
  """The state before the first step, drawn from key."""
  init_key, run_key = jax.random.split(key)
  params = param_spec.init(transformer.specs(run.model), init_key)
  return _first_state(run, params, run_key)


def _first_state(
  run: config.Run, params: param_spec.Params, key: jax.Array
) -> TrainState:
  return TrainState(
    params=params,
    opt_state=optim.make(run).init(params),
    router_bias=transformer.router_bias(run.model),
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    key=key,
  )


def _shapes(run: config.Run) -> TrainState:
  # Tracing the draws of `init_state` would take most of a second.
  params = param_spec.abstract(transformer.specs(run.model))
  return jax.eval_shape(
    functools.partial(_first_state, run), params, jax.random.key(0)
  )


def shardings(run: config.Run, mesh: jax.sharding.Mesh) -> TrainState:
  """Sharding of each array of the state: the optimizer's as its parameter's."""
  params = layouts.make_layout(run, mesh.shape).specs
  state = _shapes(run)
  opt_state = _like_params(state.opt_state, state.params, params)
  specs = jax.tree.map(lambda _: jax.P(), state)
  specs = specs.replace(params=params, opt_state=opt_state)
  return jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)


def _like_params(
  opt_state: optax.OptState, params: param_spec.Params, specs: param_spec.Specs
) -> optax.OptState:
  """Specs of an optimizer's arrays: of the parameter their path ends with."""
  spec_of, like = map(param_spec.flatten_with_paths, (specs, params))

  def spec(path, array):
    names = param_spec.name(path).split("/")
    for i in range(len(names)):
      end = "/".join(names[i:])
      if end in like and like[end].shape == array.shape:
        return spec_of[end]
    return jax.P()

  return jax.tree.map_with_path(spec, opt_state)


def abstract_state(
  run: config.Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> TrainState:
  """Shape, dtype and sharding of every array of the state, unallocated."""
  return jax.tree.map(
    lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to),
    _shapes(run),
    shardings(run, mesh),
  )


def make_state(
  run: config.Run,
  mesh: jax.sharding.Mesh,
  seed: int,
  compiler_options: dict[str, str] | None = None,
) -> TrainState:
  """The state before the first step, every array born where it belongs."""
  init = jax.jit(
    init_state,
    static_argnums=0,
    out_shardings=shardings(run, mesh),
    compiler_options=compiler_options,
  )
  return init(run, jax.random.key(seed))


@flax.struct.dataclass
class BatchGradients:
  """Sums over a global batch, in which `update` moves the state."""

  grads: param_spec.Params  # of the total loss, float32
  losses: losses.Losses
  stats: moe.MoEStats  # of the routers, [n_routers, ...]
  # Counts of the quantization to FP8, by class of tensor and path of weight:
  # `activation` and `gradient` [..., 6] f32, per layer; with
  # `precision.counters` also `weight` [6]. Empty in other precisions.
  fp8_counts: dict[str, dict[str, jax.Array]]


def gradients(
  state: TrainState,
  batch: Batch,
  run: config.Run,
  mesh: jax.sharding.Mesh | None = None,
) -> BatchGradients:
  """Computes gradient, losses and router statistics of a global batch.

  Any split of the batch, over micro-batches or devices, gives the same sums: a
  token is weighted by 1 / (labels of the whole batch), a balance loss by its
  share of the sequences. Tokens and labels are [A, B, T]: A micro-batches, B
  divided over the batch axes of the mesh, if there is one.
  """
  weights = losses.token_weights(batch, run.model.mtp.depth)
  weight = optim.mtp_weight(state.step, run)
  args = state.params, state.router_bias, weight, batch, weights
  if mesh is None:
    params = _compute_params(state.params, run)
    sums = _gradient_sums(params, *args[1:], run, transformer.LOCAL)
    weight_counts = _weight_counts(state.params, run)
  else:
    n_micro = batch.tokens.shape[0]
    layout = layouts.make_layout(run, mesh.shape, micro_batches=n_micro)
    divided = device_mesh.batch_spec(mesh.shape, 1)
    *sums, weight_counts = jax.shard_map(
      functools.partial(_local_gradients, run=run, layout=layout),
      mesh=mesh,
      in_specs=(layout.specs, jax.P(), jax.P(), divided, divided),
      out_specs=(layout.grad_specs, jax.P(), jax.P(), jax.P()),
    )(*args)
  weight_grads, terms, stats = sums
  grads, fp8_counts = recipe.split_gradients(weight_grads)
  if weight_counts:
    fp8_counts["weight"] = weight_counts
  return BatchGradients(grads, terms, stats, fp8_counts)


def _compute_params(params, run, slices=None):
  specs = transformer.specs(run.model)
  return recipe.compute_params(params, specs, run.precision, slices)


def _weight_counts(params, run, slices=None):
  if not run.precision.counters:
    return {}
  specs = transformer.specs(run.model)
  return recipe.weight_counts(params, specs, run.precision, slices)


def _local_gradients(params, *args, run, layout):
  """Gradients on one device, summed over all devices."""
  weight_counts = _weight_counts(params, run, layout.fsdp_dims)
  params = sharded_forward.gather_params(params, run, layout)
  if layout.stages:
    sums = executor.gradient_sums(params, *args, run=run, layout=layout)
  else:
    ctx = sharded_forward.context(layout)
    sums = _gradient_sums(params, *args, run, ctx, layout.n_shards)
  grads, terms, stats = sums
  terms, stats = jax.lax.psum((terms, stats), layout.varying_axes)
  return layout.reduce_scatter_grads(grads), terms, stats, weight_counts


def _gradient_sums(
  params: param_spec.Params,
  bias: jax.Array,
  mtp_weight: jax.Array,
  batch: Batch,
  weights: losses.TokenWeights,
  run: config.Run,
  ctx: transformer.ForwardContext,
  n_shards: int = 1,
) -> tuple[param_spec.Params, losses.Losses, moe.MoEStats]:
  """Sums over the micro-batches of one device."""
  share = 1.0 / (batch.tokens.shape[0] * n_shards)
  ctx = dataclasses.replace(
    ctx,
    saved_activations=run.train.activations,
    scan=run.train.scan_layers,
    dtype=params["embed"].dtype,
  )

  def objective(trained, micro, micro_weights):
    terms, stats = losses.loss(
      recipe.with_differentiable(trained, params),
      bias,
      micro,
      micro_weights,
      mtp_weight,
      run.model,
      ctx,
    )
    balance = terms.balance * share
    total = terms.main + mtp_weight * terms.mtp + balance
    return total, (terms.replace(total=total, balance=balance), stats)

  def micro_sums(micro):
    grad = jax.grad(objective, has_aux=True)
    grads, (terms, stats) = grad(recipe.differentiable(params), *micro)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return grads, terms, stats

  def add(total, micro):
    return jax.tree.map(jnp.add, total, micro_sums(micro)), None

  micros = (batch, weights)
  first = jax.tree.map(lambda a: a[0], micros)
  if batch.tokens.shape[0] == 1:
    return micro_sums(first)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(micro_sums, first))
  return jax.lax.scan(add, zeros, micros)[0]


def _all_finite(tree: Any) -> jax.Array:
  """Returns whether every float in a tree of arrays is finite, [] bool."""
  alike = collections.defaultdict(list)
  for a in jax.tree.leaves(tree):
    if jnp.issubdtype(a.dtype, jnp.floating):
      kind = jax.typeof(a)
      alike[kind.shape, kind.sharding].append(jnp.isfinite(a))
  alls = [functools.reduce(jnp.logical_and, g).all() for g in alike.values()]
  return jnp.stack(alls).all()


def _is_there(tree: Any) -> jax.Array:
  """Returns whether no array of a tree begins with NaN, [] bool.

  It is known when all are computed; those divided over devices are left out.
  """
  there = jnp.array(True)
  for a in jax.tree.leaves(tree):
    if not any(jax.typeof(a).sharding.spec):
      there &= ~jnp.isnan(a[(0,) * a.ndim])
  return there


def update(
  state: TrainState, sums: BatchGradients, run: config.Run
) -> tuple[TrainState, Metrics]:
  """Applies what `gradients` returned.

  A step changes nothing but the counters if anything about it is not finite:
  loss, gradient, or a number of the state that it would leave behind.
  The router bias moves once, by the counts of the whole batch, and acts from
  the next step on (section 2.1.2).
  """
  grads, terms, stats = sums.grads, sums.losses, sums.stats
  norm = optax.tree.norm(grads)
  rate = optim.learning_rate(state.step, run)
  speed = optim.bias_speed(state.step, run)
  optimizer = optim.make(run)

  def moved(grads, opt_state, params):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), opt_state

  before = grads, state.opt_state, state.params
  params, opt_state = moved(*before)
  checked = moved(*jax.lax.optimization_barrier(before))
  bias = router.update_bias(state.router_bias, stats.load, speed)
  finite = _all_finite((terms.total, norm, checked, bias))
  keep = functools.partial(jnp.where, finite)
  params = jax.tree.map(keep, params, state.params)
  # Parameters are computed from the moments of before, which XLA would copy
  # if it were free to overwrite them first.
  keep = functools.partial(jnp.where, finite & _is_there(params))
  new_state = TrainState(
    params=params,
    opt_state=jax.tree.map(keep, opt_state, state.opt_state),
    router_bias=keep(bias, state.router_bias),
    step=state.step + 1,
    skipped=state.skipped + ~finite,
    key=state.key,
  )
  replayed = {}
  if stats.replayed is not None:
    given, other = stats.replayed.astype(jnp.float32).sum(0)
    replayed["routes_replaced"] = other / jnp.maximum(given, 1)
  return new_state, replayed | {
    "loss": terms.total,
    "main_loss": terms.main,
    "mtp_loss": terms.mtp,
    "balance_loss": terms.balance,
    **terms.metrics,
    "lr": rate,
    "bias_speed": speed,
    "mtp_weight": optim.mtp_weight(state.step, run),
    "grad_norm": norm,
    "finite": finite,
    "skipped_steps": new_state.skipped,
    "load": stats.load,
    "sent": stats.sent,
    "max_vio_per_layer": router.max_violation(stats.load),
  }


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  run: config.Run,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, Metrics]:
  """One optimizer step, a pure function; arguments as in `gradients`."""
  sums = gradients(state, batch, run, mesh)
  with jax.named_scope("optimizer"):
    state, metrics = update(state, sums, run)
  if sums.fp8_counts:
    metrics["fp8"] = sums.fp8_counts
  if run.data.supervised:
    n = (batch.labels != IGNORE).sum()
    metrics["supervised_share"] = n / batch.valid.sum()
  return state, metrics


def make_step(run: config.Run, mesh: jax.sharding.Mesh | None = None) -> StepFn:
  """The jitted step of a run; the state is donated.

  With a mesh, the state is sharded as `shardings` says, and the batch as
  `device_mesh.make_global_batch` does.
  """
  step = functools.partial(train_step, run=run, mesh=mesh)
  return jax.jit(step, donate_argnums=0)


def trace_step(
  run: config.Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> jax.stages.Traced:
  """The step of a run, type-checked for a mesh; allocates nothing.

  An abstract mesh stands for devices that are not here: what it returns lowers
  for a platform that is named, and does not compile.
  """
  batch = abstract_batch(run, mesh, run.train.micro_batches)
  return make_step(run, mesh).trace(abstract_state(run, mesh), batch)


def abstract_batch(
  run: config.Run,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  n_micro: int,
) -> Batch:
  """Shapes and shardings of a batch of n_micro micro-batches."""
  spec = device_mesh.batch_spec(mesh.shape, 1)
  shape = n_micro, run.train.micro_batch_size, run.data.seq_len
  divided = jax.NamedSharding(mesh, spec)
  ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=divided)
  valid = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=divided)
  segments = ids if run.data.segment_mask else None
  return Batch(ids, ids, segments, valid)

"""Optimizers by name, and schedules keyed to the token budget (section 4.2).

To add an optimizer or a learning-rate schedule, write a function and add it to
`OPTIMIZERS` or `SCHEDULES`; docs/extend.md has an example of each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dsv3_jax import config, param_spec
from dsv3_jax.config import fields


def decayed(params: param_spec.Params) -> param_spec.Params:
  """Mask of weight decay: True everywhere but on scales of norms."""
  return jax.tree.map_with_path(
    lambda path, _: not path[-1].key.endswith("norm"), params
  )


def store_moments_as(
  inner: optax.GradientTransformation, dtype: jax.typing.DTypeLike
) -> optax.GradientTransformation:
  """Stores the float leaves of a state in dtype and computes in float32."""

  def cast(state, to):
    def leaf(a):
      return a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(leaf, state)

  def init(params):
    return cast(inner.init(params), dtype)

  def update(updates, state, params=None):
    updates, state = inner.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(init, update)


def adamw(run: config.Run) -> optax.GradientTransformation:
  """Clips by global norm, then Adam with decoupled weight decay."""
  cfg = run.optim
  adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm),
    store_moments_as(adam, cfg.moments),
    optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
  )


def with_auto_sharding(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Lets XLA choose the shardings inside of `update`.

  The optimizer's state is divided over devices. An optimizer that works number
  by number needs nothing for that; one that multiplies matrices, as Muon does,
  would have to name the sharding of every product.
  """

  def update(updates, state, params=None):
    mesh = jax.typeof(jax.tree.leaves(updates)[0]).sharding.mesh
    if mesh.empty:
      return inner.update(updates, state, params)
    out = jax.tree.map(lambda a: jax.typeof(a).sharding, (updates, state))
    with jax.sharding.use_abstract_mesh(mesh):
      run = jax.sharding.auto_axes(inner.update, out_sharding=out)
      return run(updates, state, params)

  return optax.GradientTransformation(inner.init, update)


# `optim.name`: a transformation of gradients to directions. The learning rate
# is not in it: `train.update` subtracts rate * direction.
Optimizer = Callable[[config.Run], optax.GradientTransformation]
OPTIMIZERS: dict[str, Optimizer] = {"adamw": adamw}


def make(run: config.Run) -> optax.GradientTransformation:
  """Returns the optimizer that `optim.name` names, without learning rate."""
  return OPTIMIZERS[run.optim.name](run)


def progress(step: jax.Array | int, run: config.Run) -> jax.Array:
  """Share of the token budget that was consumed before a step, f32."""
  share = run.data.seq_len / run.train.tokens  # of a sequence
  first = jnp.array([phase.first_step for phase in run.batch_phases])
  before = jnp.array([phase.first_row * share for phase in run.batch_phases])
  size = jnp.array([phase.batch_size * share for phase in run.batch_phases])
  at = jnp.searchsorted(first, step, side="right") - 1
  return before[at] + (step - first[at]).astype(jnp.float32) * size[at]


def constant_cosine(at: jax.Array, run: config.Run) -> jax.Array:
  """V3's schedule: constant, cosine, and two constant tails (section 4.2)."""
  opt, plan = run.optim, run.schedule
  length = max(plan.decay_until - plan.constant_until, 1e-9)
  turn = jnp.clip((at - plan.constant_until) / length, 0, 1) * jnp.pi
  cosine = opt.min_lr + (opt.peak_lr - opt.min_lr) * (1 + jnp.cos(turn)) / 2
  return jnp.where(at < plan.tail_from, cosine, opt.final_lr)


# `schedule.name`: the learning rate as a function of `progress` and the run.
SCHEDULES: dict[str, Callable[[jax.Array, config.Run], jax.Array]] = {
  "constant_cosine": constant_cosine
}


def learning_rate(step: jax.Array | int, run: config.Run) -> jax.Array:
  """Learning rate of a step: linear warm-up of the schedule chosen by name."""
  rate = SCHEDULES[run.schedule.name](progress(step, run), run)
  warmup = max(run.warmup_steps, 1)
  warm = (jnp.asarray(step, jnp.float32) + 1) / warmup
  return rate * jnp.minimum(warm, 1)


def validate(run: config.Run) -> list[str]:
  """Problems with the names of optimizer and schedule, one line each."""
  return [
    *fields.unknown("optim.name", run.optim.name, OPTIMIZERS),
    *fields.unknown("schedule.name", run.schedule.name, SCHEDULES),
  ]


def bias_speed(step: jax.Array | int, run: config.Run) -> jax.Array:
  """Gamma of the router bias: constant, then 0."""
  until = run.schedule.bias_update_until
  return jnp.where(progress(step, run) < until, run.model.router.bias_speed, 0)


def mtp_weight(step: jax.Array | int, run: config.Run) -> jax.Array:
  """Lambda of the MTP loss: high, then low."""
  mtp, until = run.model.mtp, run.schedule.mtp_until
  return jnp.where(progress(step, run) < until, mtp.weight, mtp.late_weight)

"""AdamW with clipping, and the schedules of the recipe (section 4.2)."""

import jax
import jax.numpy as jnp
import optax

from dsv3_jax import config, param_spec


def decayed(params: param_spec.Params) -> param_spec.Params:
  """True where weight decay applies: everywhere but on norm gains."""
  return jax.tree.map_with_path(
    lambda path, _: not path[-1].key.endswith("norm"), params
  )


def store_moments_as(
  inner: optax.GradientTransformation, dtype: jax.typing.DTypeLike
) -> optax.GradientTransformation:
  """Keeps the float leaves of a state in dtype, computes in float32."""

  def cast(state, to):
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    return jax.tree.map(lambda a: a.astype(to) if is_float(a) else a, state)

  def init(params):
    return cast(inner.init(params), dtype)

  def update(updates, state, params=None):
    updates, state = inner.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(init, update)


def adamw(cfg: config.Optim) -> optax.GradientTransformation:
  """Clipping by global norm, Adam, decoupled decay; the rate comes later."""
  adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm),
    store_moments_as(adam, cfg.moments),
    optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
  )


def progress(step: jax.Array | int, run: config.Run) -> jax.Array:
  """Share of the token budget consumed before a step, f32."""
  share = run.data.seq_len / run.train.tokens  # of a sequence
  first = jnp.array([phase.first_step for phase in run.phases])
  before = jnp.array([phase.first_row * share for phase in run.phases])
  size = jnp.array([phase.batch_size * share for phase in run.phases])
  at = jnp.searchsorted(first, step, side="right") - 1
  return before[at] + (step - first[at]).astype(jnp.float32) * size[at]


def learning_rate(step: jax.Array | int, run: config.Run) -> jax.Array:
  """Linear warm-up, constant, cosine, and two constant tails."""
  opt, plan = run.optim, run.schedule
  at = progress(step, run)
  length = max(plan.decay_until - plan.constant_until, 1e-9)
  turn = jnp.clip((at - plan.constant_until) / length, 0, 1) * jnp.pi
  cosine = opt.min_lr + (opt.peak_lr - opt.min_lr) * (1 + jnp.cos(turn)) / 2
  rate = jnp.where(at < plan.tail_from, cosine, opt.final_lr)
  warm = (jnp.asarray(step, jnp.float32) + 1) / max(plan.warmup_steps, 1)
  return rate * jnp.minimum(warm, 1)


def bias_speed(step: jax.Array | int, run: config.Run) -> jax.Array:
  """Gamma of the router bias: constant, then 0."""
  until = run.schedule.bias_update_until
  return jnp.where(progress(step, run) < until, run.model.router.bias_speed, 0)


def mtp_weight(step: jax.Array | int, run: config.Run) -> jax.Array:
  """Lambda of the MTP loss: high, then low."""
  mtp, until = run.model.mtp, run.schedule.mtp_until
  return jnp.where(progress(step, run) < until, mtp.weight, mtp.late_weight)

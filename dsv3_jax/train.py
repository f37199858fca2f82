"""The training state, one optimizer step, and the loop."""

import functools
from collections.abc import Callable
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dsv3_jax import config
from dsv3_jax import losses
from dsv3_jax import optim
from dsv3_jax import schema
from dsv3_jax.model import precision
from dsv3_jax.model import router
from dsv3_jax.model import transformer

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes."""

  params: schema.Params  # float32 masters
  opt_state: optax.OptState
  router_bias: jax.Array  # [n_routers, E] f32, moved by counts, not gradients
  step: jax.Array  # [] int32, optimizer steps done
  skipped: jax.Array  # [] int32, steps whose loss or gradient was not finite
  key: jax.Array  # PRNG key of the run; a use folds in the step


def init_state(run: config.Run, key: jax.Array) -> TrainState:
  """The state before the first step, drawn from key."""
  init_key, run_key = jax.random.split(key)
  params = schema.init(transformer.specs(run.model), init_key)
  return TrainState(
      params=params,
      opt_state=optim.adamw(run.optim).init(params),
      router_bias=transformer.router_bias(run.model),
      step=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
      key=run_key,
  )


def gradients(
    state: TrainState,
    batch: losses.Batch,
    run: config.Run,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[schema.Params, losses.Losses, jax.Array]:
  """Gradient, losses and router loads of a global batch.

  Any split of the batch, over micro-batches or devices, gives the same sums: a
  token is weighted by 1 / (labels of the whole batch), a balance loss by its
  share of the sequences.

  Args:
    state: parameters and bias are read.
    batch: tokens and labels [A, B, T], A micro-batches, B sharded over `data`.
    run: the configuration.
    mesh: where the batch is; None without one.
  """
  params = precision.compute_params(state.params, run.precision.recipe)
  weights = losses.token_weights(batch.labels)
  weight = optim.mtp_weight(state.step, run)
  args = params, state.router_bias, weight, batch, weights
  if mesh is None:
    return _gradient_sums(*args, run=run, n_shards=1)
  sharded, whole = jax.P(None, "data"), jax.P()
  return jax.shard_map(
      functools.partial(_reduced_sums, run=run, n_shards=mesh.shape["data"]),
      mesh=mesh,
      in_specs=(whole, whole, whole, sharded, sharded),
      out_specs=whole,
  )(*args)


def _reduced_sums(*args, run, n_shards):
  # Parameters that are said to differ between devices get local gradients, and
  # one sum at the end, instead of one at every use.
  args = jax.tree.map(
      lambda a: a
      if "data" in jax.typeof(a).mat.varying
      else jax.lax.pcast(a, "data", to="varying"),
      args,
  )
  sums = _gradient_sums(*args, run=run, n_shards=n_shards)
  return jax.lax.psum(sums, "data")


def _gradient_sums(params, bias, mtp_weight, batch, weights, *, run, n_shards):
  """Sums over the micro-batches of one device."""
  share = 1.0 / (batch.tokens.shape[0] * n_shards)

  def objective(params, micro, micro_weights):
    terms, load = losses.loss(
        params,
        bias,
        micro,
        micro_weights,
        mtp_weight,
        run.model,
        remat=run.train.remat == "block",
        scan=run.train.scan_layers,
    )
    balance = terms.balance * share
    total = terms.main + mtp_weight * terms.mtp + balance
    return total, (terms.replace(total=total, balance=balance), load)

  def one(micro):
    grads, (terms, load) = jax.grad(objective, has_aux=True)(params, *micro)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return grads, terms, load

  def add(total, micro):
    return jax.tree.map(jnp.add, total, one(micro)), None

  micros = (batch, weights)
  first = jax.tree.map(lambda a: a[0], micros)
  if batch.tokens.shape[0] == 1:
    return one(first)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, first))
  return jax.lax.scan(add, zeros, micros)[0]


def train_step(
    state: TrainState,
    batch: losses.Batch,
    *,
    run: config.Run,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, Metrics]:
  """One optimizer step; pure.

  A step whose loss or gradient is not finite changes nothing but the counters.
  The router bias moves once, by the counts of the whole batch, and acts from
  the next step on (section 2.1.2).

  Args:
    state: the state, donated by `make_step`.
    batch: tokens and labels [A, B, T], A micro-batches.
    run: the configuration.
    mesh: of the devices that share the batch; None for one device.
  """
  grads, terms, load = gradients(state, batch, run, mesh)
  norm = optax.tree.norm(grads)
  rate = optim.learning_rate(state.step, run)
  speed = optim.bias_speed(state.step, run)
  updates, opt_state = optim.adamw(run.optim).update(
      grads, state.opt_state, state.params
  )
  params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
  bias = router.update_bias(state.router_bias, load, speed)
  finite = jnp.isfinite(terms.total) & jnp.isfinite(norm)
  keep = functools.partial(jnp.where, finite)
  new_state = TrainState(
      params=jax.tree.map(keep, params, state.params),
      opt_state=jax.tree.map(keep, opt_state, state.opt_state),
      router_bias=keep(bias, state.router_bias),
      step=state.step + 1,
      skipped=state.skipped + ~finite,
      key=state.key,
  )
  return new_state, {
      "loss": terms.total,
      "main_loss": terms.main,
      "mtp_loss": terms.mtp,
      "balance_loss": terms.balance,
      "lr": rate,
      "bias_speed": speed,
      "mtp_weight": optim.mtp_weight(state.step, run),
      "grad_norm": norm,
      "finite": finite,
      "skipped_steps": new_state.skipped,
      "load": load,
      "max_vio_per_layer": router.max_violation(load),
  }


def make_step(
    run: config.Run, mesh: jax.sharding.Mesh | None = None
) -> Callable[[TrainState, losses.Batch], tuple[TrainState, Metrics]]:
  """The jitted step of a run; the state is donated.

  With a mesh, the state must be replicated over it and the batch on it, see
  `place`.
  """
  step = functools.partial(train_step, run=run, mesh=mesh)
  return jax.jit(step, donate_argnums=0)


def place(batch: losses.Batch, mesh: jax.sharding.Mesh) -> losses.Batch:
  """The batch [A, B, T] on a mesh, sequences divided over `data`."""
  return jax.device_put(batch, jax.NamedSharding(mesh, jax.P(None, "data")))


def fit(
    state: TrainState,
    run: config.Run,
    batches: Iterator[losses.Batch],
    stop: int,
    *,
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[int, Metrics], None],
    evaluate: Callable[[TrainState], None],
    save: Callable[[TrainState], None],
) -> TrainState:
  """Trains until `stop` optimizer steps are done.

  The host's work on a step overlaps the next one. The last step is always
  evaluated and saved.

  Args:
    state: where to go on from; donated.
    run: the configuration.
    batches: micro-batched batches from the state's step on.
    stop: steps done at the end.
    mesh: of the devices that share the work; None for one device.
    report: takes the number of steps done and the metrics of the last.
    evaluate: called every `run.evaluate.every` steps.
    save: called every `run.checkpoint.every` steps.
  """
  step_fn = make_step(run, mesh)
  pending = None
  for done in range(int(state.step) + 1, stop + 1):
    state, metrics = step_fn(state, next(batches))  # starts, does not wait
    if pending:
      report(*pending)
    pending = (done, metrics)
    evaluating = done % run.evaluate.every == 0 or done == stop
    saving = done % run.checkpoint.every == 0 or done == stop
    if evaluating or saving:  # what is saved has been reported
      report(*pending)
      pending = None
    if evaluating:
      evaluate(state)
    if saving:
      save(state)
  return state

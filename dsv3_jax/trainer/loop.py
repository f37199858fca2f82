"""Training loop: steps, overlapped with the host's work on the step before."""

import functools
import itertools
from collections.abc import Generator, Iterable

import jax

from dsv3_jax import config, ema, train
from dsv3_jax.data import loader
from dsv3_jax.data.batch import Batch
from dsv3_jax.parallel import device_mesh


class Hooks:
  """Work besides the steps of a loop; each method here does nothing."""

  def should_continue(self, done: int) -> bool:
    """Returns whether to start a step, when `done` steps were started."""
    return True

  def report(self, done: int, metrics: train.Metrics) -> None:
    """Receives the metrics of the step after which `done` are done."""

  def check(self, state: train.TrainState) -> None:
    """Runs every `run.parallel.replica_check_every` steps, before a save."""

  def evaluate(self, state: train.TrainState) -> None:
    """Runs every `run.evaluate.every` steps and after the last."""

  def save(self, state: train.TrainState) -> None:
    """Runs every `run.checkpoint.every` steps and after the last."""


class Batches:
  """Batches of a run, in the order of its steps."""

  def __init__(self, batches: Iterable[Batch]):
    """Takes batches [A, B, T], those from the first step of a loop on."""
    self._batches = iter(batches)

  def next(self, state: train.TrainState) -> tuple[Batch, dict[str, float]]:
    """Returns the batch of the next step, and what to add to its metrics.

    The state is that before the step.
    """
    del state
    return next(self._batches), {}

  def close(self) -> None:
    """Ends the threads that read ahead."""
    if isinstance(self._batches, Generator):
      self._batches.close()


def global_batches(
  source: loader.BatchSource, first_step: int, mesh: jax.sharding.Mesh
) -> Generator[Batch, None, None]:
  """Yields the batches [A, B, T] of optimizer steps from first_step on.

  Each process reads the rows of its own devices.
  """
  n_rows = source.run.train.micro_batch_size
  read = functools.partial(source, columns=device_mesh.local_rows(n_rows, mesh))
  for batch in loader.prefetch(read, itertools.count(first_step)):
    yield device_mesh.make_global_batch(batch, n_rows, mesh, dim=1)


def fit(
  state: train.TrainState,
  run: config.Run,
  batches: Batches,
  stop: int,
  *,
  hooks: Hooks,
  mesh: jax.sharding.Mesh | None = None,
  average: ema.Average | None = None,
  step_fn: train.StepFn | None = None,
) -> train.TrainState:
  """Trains until `stop` steps are done or a hook says not to continue.

  The host's work on a step overlaps the next step. The state after the last
  step is always saved, and evaluated if that step is `stop`.

  The state is donated; the batches are those from its step on; a mesh
  of None is one device; the average is updated after every step; `step_fn` is
  that of `train.make_step`, if it was made before.
  """
  step_fn = step_fn or train.make_step(run, mesh)
  pending = None
  done = saved = int(state.step)
  while done < stop and hooks.should_continue(done):
    done += 1
    batch, more = batches.next(state)
    state, metrics = step_fn(state, batch)  # starts, does not wait
    if average:
      average.update(done, state.params, metrics["finite"])
    if pending:
      hooks.report(*pending)
    pending = (done, metrics | more if more else metrics)
    evaluating = done % run.evaluate.every == 0 or done == stop
    saving = done % run.checkpoint.every == 0 or done == stop
    if evaluating or saving:  # a step is reported before its state is saved
      hooks.report(*pending)
      pending = None
    check_every = run.parallel.replica_check_every
    if check_every and done % check_every == 0:
      hooks.check(state)
    if evaluating:
      hooks.evaluate(state)
    if saving:
      hooks.save(state)
      saved = done
  if pending:
    hooks.report(*pending)
  if saved < done:
    hooks.save(state)
  return state

"""TrainHooks: replica checks, evaluations and checkpoints of a training run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax import config, ema, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.data import loader
from dsv3_jax.parallel import replica_check
from dsv3_jax.trainer import evaluation, heartbeat, loop, memory, step_monitor


def checkpoint_metadata(
  source: loader.BatchSource, step: int
) -> dict[str, Any]:
  """Describes data, model and position in the data, to save with a state."""
  return {
    "data": source.corpus.digests | {"seed": source.seed},
    "model": config.flatten(source.run.model),
    "rows": source.positions(step).start,  # read next
  }


@dataclasses.dataclass
class TrainHooks(loop.Hooks):
  """Work of a run besides its steps."""

  source: loader.BatchSource
  mesh: jax.sharding.Mesh
  checkpoints: checkpointer.Checkpointer
  watchdog: heartbeat.Heartbeat
  average: ema.Average | None
  monitor: step_monitor.StepMonitor
  heldout: dict[str, float] = dataclasses.field(default_factory=dict)  # newest

  def should_continue(self, done: int) -> bool:
    """Returns whether to start a step; checks the save that is under way."""
    self._run_save(self.checkpoints.check)
    return self.watchdog.should_continue(done)

  def report(self, done: int, metrics: train.Metrics) -> None:
    """Writes the row of a step, see `StepMonitor.report`."""
    self.monitor.report(done, metrics)
    self.watchdog.begin()

  def check(self, state: train.TrainState) -> None:
    """Compares the copies of replicated arrays."""
    replica_check.check_replicas(state, self.mesh)

  def evaluate(self, state: train.TrainState) -> None:
    """Writes scores of held-out data, and samples."""
    run = self.source.run
    scores = evaluation.scores(self.source, state, self.mesh)
    if run.evaluate.ema:
      shardings = jax.tree.map(lambda a: a.sharding, state.params)
      averaged = jax.device_put(self.average.params(), shardings)
      averaged = state.replace(params=averaged)
      ema_scores = evaluation.scores(self.source, averaged, self.mesh)
      scores |= {f"{name}_ema": value for name, value in ema_scores.items()}
    row = scores | evaluation.samples(self.source, state, self.mesh)
    numbers = {k: v for k, v in row.items() if isinstance(v, float)}
    self.heldout.update(numbers)
    self.monitor.writer.write({"step": int(state.step)} | row)
    self.watchdog.progress()
    self.monitor.timer.lap("evaluating")

  def save(self, state: train.TrainState) -> None:
    """Starts saving the state and the average."""
    metadata = checkpoint_metadata(self.source, int(state.step))
    average = self.average.params() if self.average else None
    self._run_save(self.checkpoints.wait)
    self._run_save(lambda: self.checkpoints.save(state, metadata, average))
    self.watchdog.progress()
    self.monitor.timer.lap("saving")

  def _run_save(self, work: Callable[[], int | None]) -> None:
    """Runs a part of saving; logs the step that it finished."""
    try:
      step = work()
    except checkpointer.SaveError as error:
      if self.source.run.checkpoint.on_error == "stop":
        raise
      self.monitor.writer.note(f"{error}; training continues")
      return
    if step is not None:
      seconds, peak = self.monitor.timer.seconds, memory.peak_bytes()
      self.monitor.record("saved", step=step, seconds=seconds, peak_bytes=peak)

  def finish(self, done: int) -> None:
    """Waits for the last save; raises SaveError if it did not succeed."""
    self._run_save(self.checkpoints.wait)
    self.monitor.timer.lap("saving")
    if jax.process_index() == 0 and done not in self.checkpoints.steps():
      raise checkpointer.SaveError(
        f"{self.checkpoints.folder(done)}: the last step is not saved"
      )

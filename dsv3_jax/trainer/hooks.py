"""TrainHooks: replica checks, evaluations and checkpoints of a training run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax import config, ema, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.data import loader, packing, tokenizer
from dsv3_jax.data.batch import make_batch
from dsv3_jax.evals import hidden, likelihood
from dsv3_jax.infer import engine, inference_params
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.parallel import device_mesh, replica_check
from dsv3_jax.trainer import heartbeat, loop, step_monitor


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
    """Writes the likelihood of held-out text, and a sample."""
    run = self.source.run
    scores = self._heldout(state)
    if run.evaluate.ema:
      shardings = jax.tree.map(lambda a: a.sharding, state.params)
      averaged = jax.device_put(self.average.params(), shardings)
      ema_scores = self._heldout(state.replace(params=averaged))
      scores |= {f"{name}_ema": value for name, value in ema_scores.items()}
    self.heldout.update(scores)
    row = {"step": int(state.step)} | scores
    if run.evaluate.sample_tokens:
      row["sample"] = self._sample(state)
    self.monitor.writer.write(row)
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
      seconds = self.monitor.timer.seconds
      self.monitor.record("saved", step=step, seconds=seconds)

  def finish(self, done: int) -> None:
    """Waits for the last save; raises SaveError if it did not succeed."""
    self._run_save(self.checkpoints.wait)
    self.monitor.timer.lap("saving")
    if jax.process_index() == 0 and done not in self.checkpoints.steps():
      raise checkpointer.SaveError(
        f"{self.checkpoints.folder(done)}: the last step is not saved"
      )

  def _heldout(self, state: train.TrainState) -> dict[str, float]:
    run, data, by_domain = self.source.run, self.source.run.data, {}
    model = hidden.EvalModel(state.params, state.router_bias, run, self.mesh)
    for domain in self.source.corpus.domains:
      *rows, mask = packing.heldout_windows(domain.heldout_tokens, data.seq_len)
      batch = make_batch(*rows, segment_mask=data.segment_mask)
      by_domain[domain.name] = likelihood.heldout(
        model, batch, mask, domain.heldout.text_bytes
      )
    return likelihood.metrics(by_domain)

  def _sample(self, state: train.TrainState) -> str:
    """Generates text without a prompt, in process 0 on one device."""
    arrays = state.params, state.router_bias, state.step
    params, bias, step = device_mesh.on_first_device(arrays, self.mesh)
    run, n = self.source.run, self.source.run.evaluate.sample_tokens
    if jax.process_index():
      return ""
    model = config.override(run.model, "mtp.depth=0")
    weights = inference_params.from_params(params, bias, model)
    options = EngineOptions(max_batch=1, max_len=n + 1)
    generator = engine.Engine(weights, model, options)
    request = GenerationRequest(
      [tokenizer.BOS_ID],
      max_tokens=n,
      temperature=0.8,
      top_p=0.95,
      seed=int(step),
      stop_token_ids=(tokenizer.EOS_ID,),
    )
    events = generator.run([request])
    tokens = [e.token for e in events if e.finish_reason != engine.STOP]
    return self.source.corpus.tokenizer.decode(tokens)

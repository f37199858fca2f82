"""TrainHooks: replica checks, evaluations and checkpoints of a training run."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsv3_jax import config, ema, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.data import loader, packing, tokenizer
from dsv3_jax.data.batch import make_batch
from dsv3_jax.evals import hidden, likelihood
from dsv3_jax.infer import engine, inference_params
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.parallel import device_mesh, replica_check
from dsv3_jax.trainer import heartbeat, loop, memory, step_monitor

PROMPT_TOKENS = 16  # of a sample, BOS included


def checkpoint_metadata(
  source: loader.BatchSource, step: int
) -> dict[str, Any]:
  """Describes data, model and position in the data, to save with a state."""
  return {
    "data": source.corpus.digests | {"seed": source.seed},
    "model": config.flatten(source.run.model),
    "rows": source.positions(step).start,  # read next
  }


def sample_prompt(heldout: np.ndarray, most: int) -> list[int]:
  """Returns BOS and the start of a held-out document, `most` tokens together.

  The document is the first one; it may be shorter.

  Args:
    heldout: [n] ids, documents of BOS ... EOS one after the other.
    most: at least 1.
  """
  text = heldout[: most + 1].tolist()
  if text[:1] == [tokenizer.BOS_ID]:
    del text[0]
  whole = itertools.takewhile(lambda token: token != tokenizer.EOS_ID, text)
  return [tokenizer.BOS_ID, *whole][:most]


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
      row["sample_prompt"], row["sample"] = self._sample(state)
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

  def _sample(self, state: train.TrainState) -> tuple[str, str]:
    """Returns a prompt, and its continuation by process 0 on one device.

    The prompt is the start of the held-out text, and therefore the same at each
    evaluation of a run.
    """
    arrays = state.params, state.router_bias, state.step
    params, bias, step = device_mesh.on_first_device(arrays, self.mesh)
    run, n = self.source.run, self.source.run.evaluate.sample_tokens
    if jax.process_index():
      return "", ""
    model = config.override(run.model, "mtp.depth=0")
    weights = inference_params.from_params(params, bias, model)
    room = min(PROMPT_TOKENS, run.model.attention.max_len - n)
    heldout = self.source.corpus.domains[0].heldout_tokens
    prompt = sample_prompt(heldout, max(int(room), 1))
    options = EngineOptions(max_batch=1, max_len=len(prompt) + n)
    generator = engine.Engine(weights, model, options)
    request = GenerationRequest(
      prompt,
      max_tokens=n,
      temperature=0.8,
      top_p=0.95,
      seed=int(step),
      stop_token_ids=(tokenizer.EOS_ID,),
    )
    events = generator.run([request])
    tokens = [e.token for e in events if e.finish_reason != engine.STOP]
    decode = self.source.corpus.tokenizer.decode
    return decode(prompt), decode(tokens)

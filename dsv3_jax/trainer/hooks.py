"""What a run does besides training: comparisons, evaluations, checkpoints."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax import config, ema, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.data import loader, packing, tokenized_corpus, tokenizer
from dsv3_jax.evals import hidden, likelihood
from dsv3_jax.infer import engine, inference_params
from dsv3_jax.parallel import device_mesh, replica_check
from dsv3_jax.trainer import event_log, heartbeat


def checkpoint_metadata(
  source: loader.BatchSource, step: int
) -> dict[str, Any]:
  """What a checkpoint holds beside the state."""
  return {
    "data": source.corpus.digests | {"seed": source.seed},
    "model": config.flatten(source.run.model),
    "rows": source.positions(step).start,  # read next
  }


@dataclasses.dataclass
class TrainHooks:
  """What a run does now and then besides training."""

  source: loader.BatchSource
  mesh: jax.sharding.Mesh
  checkpoints: checkpointer.Checkpointer
  book: Any
  record: Callable[..., None]
  watch: event_log.GoodputTimer
  line: heartbeat.Heartbeat
  average: ema.Average | None
  heldout: dict[str, float] = dataclasses.field(default_factory=dict)  # last

  def should_continue(self, done: int) -> bool:
    """Whether to do another step; sees whether saving went well."""
    self._saving(self.checkpoints.check)
    return self.line.should_continue(done)

  def check(self, state: train.TrainState) -> None:
    """Compares what devices hold alike."""
    replica_check.check_replicas(state, self.mesh)

  def evaluate(self, state: train.TrainState) -> None:
    """Writes the likelihood of held-out text, and a sample."""
    run, mesh, data = self.source.run, self.mesh, self.source.corpus
    found = _heldout(state, data, run, mesh)
    if run.evaluate.ema:
      places = jax.tree.map(lambda a: a.sharding, state.params)
      averaged = jax.device_put(self.average.params(), places)
      averaged = state.replace(params=averaged)
      more = _heldout(averaged, data, run, mesh)
      found |= {f"{name}_ema": value for name, value in more.items()}
    self.heldout.update(found)
    row = {"step": int(state.step)} | found
    if run.evaluate.sample_tokens:
      row["sample"] = _sample(state, data.tokenizer, run, mesh)
    self.book.evaluation(row)
    self.line.progress()
    self.watch.lap("evaluating")

  def save(self, state: train.TrainState) -> None:
    """Starts saving the state and the average."""
    step = int(state.step)
    beside = checkpoint_metadata(self.source, step)
    average = self.average.params() if self.average else None
    self._saving(self.checkpoints.wait)
    self._saving(lambda: self.checkpoints.save(state, beside, average))
    self.line.progress()
    self.watch.lap("saving")

  def _saving(self, work: Callable[[], int | None]) -> None:
    """Does a part of saving; takes down what it finished."""
    try:
      step = work()
    except checkpointer.SaveError as error:
      if self.source.run.checkpoint.on_error == "stop":
        raise
      self.book.note(f"{error}; going on")
      return
    if step is not None:
      self.record("saved", step=step, seconds=self.watch.seconds)

  def finish(self, done: int) -> None:
    """Waits for the last save.

    Raises:
      SaveError: there is no checkpoint of the last step.
    """
    self._saving(self.checkpoints.wait)
    self.watch.lap("saving")
    if jax.process_index() == 0 and done not in self.checkpoints.steps():
      raise checkpointer.SaveError(
        f"{self.checkpoints.folder(done)}: the last step is not saved"
      )


def _heldout(
  state: train.TrainState,
  data: tokenized_corpus.TokenizedCorpus,
  run: config.Run,
  mesh: jax.sharding.Mesh,
) -> dict[str, float]:
  model = hidden.EvalModel(state.params, state.router_bias, run, mesh)
  found = {}
  for domain in data.domains:
    rows, mask = packing.heldout_windows(
      domain.heldout_tokens, run.data.seq_len
    )
    if run.data.segment_mask:
      mask &= rows[:, 1:] != run.data.segment_start
    found[domain.name] = likelihood.heldout(
      model, rows, mask, domain.heldout.text_bytes
    )
  return likelihood.joined(found)


def _sample(
  state: train.TrainState,
  tok: Any,
  run: config.Run,
  mesh: jax.sharding.Mesh,
) -> str:
  """Text that process 0 lets the model write from nothing, on one device."""
  parts = state.params, state.router_bias, state.step
  params, bias, step = device_mesh.on_first_device(parts, mesh)
  n = run.evaluate.sample_tokens
  if jax.process_index() or not n:
    return ""
  model = config.override(run.model, "mtp.depth=0")
  writer = engine.Engine(
    inference_params.from_params(params, bias, model),
    model,
    n_slots=1,
    max_len=n + 1,
  )
  request = engine.Request(
    [tokenizer.BOS_ID],
    max_tokens=n,
    temperature=0.8,
    top_p=0.95,
    seed=int(step),
    stop=(tokenizer.EOS_ID,),
  )
  events = writer.run([request])
  return tok.decode([e.token for e in events if e.finish_reason != engine.STOP])

"""Trains a run in a workdir: data, state, loop, evaluation, checkpoints."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from dsv3_jax import checkpoint
from dsv3_jax import config
from dsv3_jax import ema
from dsv3_jax import losses
from dsv3_jax import schema
from dsv3_jax import train
from dsv3_jax.data import corpus
from dsv3_jax.data import stream
from dsv3_jax.data import tokenizer
from dsv3_jax.evals import hidden
from dsv3_jax.evals import likelihood
from dsv3_jax.infer import engine
from dsv3_jax.infer import served
from dsv3_jax.interop import runs
from dsv3_jax.model import transformer
from dsv3_jax.parallel import layouts
from dsv3_jax.parallel import replicas
from dsv3_jax.parallel import topology
from dsv3_jax.parallel import traffic
from experiments import cluster
from experiments import common
from experiments import logbook
from experiments import quantization
from experiments import workdir

RIVALS_BYTES = 1 << 25  # most text that other compressors are given
LOADS = 60  # times in a run that the loads of all experts are written


def micro_batches(
    data: stream.Prepared,
    run: config.Run,
    seed: int,
    first_step: int,
    mesh: jax.sharding.Mesh,
) -> Iterator[losses.Batch]:
  """Batches [A, B, T] of optimizer steps from first_step on.

  A process reads the rows of its own devices.
  """
  order, n_rows = data.order(seed), run.train.micro_batch_size
  columns = topology.own_rows(n_rows, mesh)
  unpredicted = [tokenizer.PAD_ID]
  if run.data.segment_mask:
    unpredicted.append(run.data.segment_start)

  def own(step):
    first, size = run.rows_before(step), run.phase(step).batch_size
    starts = range(first, first + size, n_rows)
    return [start + column for start in starts for column in columns]

  for rows in stream.batches(order, map(own, itertools.count(first_step))):
    tokens = rows["tokens"].reshape(-1, len(columns), run.data.seq_len + 1)
    batch = losses.batch(tokens, run.model.vocab_size, *unpredicted)
    yield train.place(batch, n_rows, mesh)


class _Reporter:
  """Turns the metrics of steps into rows of the logbook."""

  def __init__(self, book: logbook.Logbook, run: config.Run, stop: int):
    self._book, self._run, self._stop = book, run, stop
    self._time = time.monotonic()
    self._bad_in_a_row = 0
    self.train_s = 0.0

  def restart_clock(self) -> None:
    """Leaves out what happened since the last step: it was no training."""
    self._time = time.monotonic()

  def step(self, done: int, metrics: train.Metrics) -> None:
    """Writes a row; waits for the step to finish.

    Raises:
      FloatingPointError: too many steps in a row were not finite.
    """
    metrics = jax.device_get(metrics)
    seconds = time.monotonic() - self._time
    self.restart_clock()
    self.train_s += seconds
    length = self._run.data.seq_len
    row = {"step": done, "tokens": self._run.rows_before(done) * length}
    apart = ("load", "finite", "sent", "fp8")
    row |= {k: v for k, v in metrics.items() if k not in apart}
    sent = traffic.bytes_sent(metrics["sent"], self._run)
    for axis, n_bytes in sent.items():
      if n_bytes:
        row[f"bytes_over_{axis}"] = n_bytes
    counted = metrics.get("fp8", {})
    row |= quantization.shares(counted)
    size = self._run.phase(done - 1).batch_size
    row["tokens_per_s"] = size * length / seconds
    if metrics["load"].size:
      row["max_vio"] = metrics["max_vio_per_layer"].max()
    every = max(self._run.total_steps // LOADS, 1)
    if done % every == 0 or done in (1, self._stop):
      row["load"] = metrics["load"]
    self._book.step(row)
    self._bad_in_a_row = 0 if metrics["finite"] else self._bad_in_a_row + 1
    if not metrics["finite"]:
      self._book.note(f"step {done} was skipped: loss or gradient not finite")
    for line in quantization.not_finite(counted):
      self._book.note(f"step {done}: {line}")
    if self._bad_in_a_row > self._run.train.max_bad_steps:
      raise FloatingPointError(
          f"{self._bad_in_a_row} steps in a row up to step {done} were not"
          " finite; the newest checkpoint is from before them. Lower"
          " optim.peak_lr, or look at the data of these steps"
      )


def _start(
    command: common.Command,
    checkpoints: Any,
    facts: dict[str, Any],
    mesh: jax.sharding.Mesh,
) -> train.TrainState:
  """The newest checkpoint's state, or a fresh one that is saved at once.

  Saving the first state shows before any work that saving works; from then on,
  a workdir without a checkpoint has lost it.
  """
  run, step = command.run, checkpoints.latest_step()
  if step is None:
    metrics = command.workdir / logbook.METRICS
    if metrics.exists() and logbook.read(metrics):
      raise manifest.MissingError(
          f"{command.workdir} holds metrics of a run but no checkpoint under"
          f" {checkpoints.directory}; restore it, or start in a new --workdir"
      )
    state = train.make_state(run, mesh, command.seed)
    if command.init_from:
      state = _with_parameters(state, command, mesh)
    checkpoint.save(checkpoints, state, facts)
    checkpoints.wait_until_finished()
    return state
  try:
    like = train.abstract_state(run, mesh)
    state, saved = checkpoint.restore(checkpoints, step, like)
  except ValueError as error:
    raise manifest.MissingError(str(error)) from error
  changes = config.difference(saved["data"], facts["data"])
  if changes:
    raise ValueError(
        "the data is not what the checkpoint was trained on (there -> here):\n"
        + "\n".join(changes)
    )
  return state


def _with_parameters(
    state: train.TrainState, command: common.Command, mesh: jax.sharding.Mesh
) -> train.TrainState:
  """The state with parameters and router bias of another run's newest step.

  Raises:
    ValueError: that run has another architecture, or no checkpoint.
  """
  folder = command.init_from
  facts = runs.read_config(folder)
  source = config.override(
      runs.run_of(facts),
      f"parallel.layout={command.run.parallel.layout}",
  )
  of = lambda run: {
      path: str(spec.shape)
      for path, spec in schema.paths(transformer.specs(run.model)).items()
  }
  if changes := config.difference(of(source), of(command.run)):
    raise ValueError(
        f"--init_from={folder} has another architecture (there -> here):\n"
        + "\n".join(f"  {line}" for line in changes)
    )
  params, bias = runs.newest(folder, source, mesh)
  return state.replace(params=params, router_bias=bias)


def _book(
    folder: pathlib.Path, stop: int, first: int
) -> logbook.Logbook | logbook.Silent:
  if jax.process_index():
    return logbook.Silent()
  return logbook.Logbook(folder, stop, first)


def _prepare(command: common.Command) -> stream.Prepared:
  """The workdir and the data in it, written by process 0."""
  run, folder = command.run, command.workdir
  learned = None
  if command.init_from:
    learned = command.init_from / "data" / "tokenizer.json"

  def prepare():
    vocab_size = run.model.vocab_size
    return stream.prepare(run.data, vocab_size, folder / "data", learned)

  def write():
    description = workdir.describe(command.variant, command.seed, run)
    workdir.claim(folder, description)
    prepare()
    workdir.write_config(folder, description)
    workdir.write_environment(folder)

  cluster.first_does(write)
  return prepare()


def execute(command: common.Command) -> None:
  """Trains up to `command.stop`, from the newest checkpoint if there is one."""
  run, folder = command.run, command.workdir
  began = time.monotonic()
  mesh = cluster.mesh(command.mesh)
  problems = layouts.problems(run, mesh.shape)
  form = run.parallel.dispatch
  if form.startswith("ragged") and jax.default_backend() == "cpu":
    problems.append(
        f"parallel.dispatch={form}: not on CPU;"
        f" {form.removeprefix('ragged_')} is the same with padding"
    )
  if problems:
    raise ValueError("\n".join(problems))
  data = _prepare(command)
  checkpoints = checkpoint.manager(folder / "checkpoints", run.checkpoint)
  facts = _facts(command, data, 0)
  state = _start(command, checkpoints, facts, mesh)
  average = _average(run, checkpoints, state)
  first = int(state.step)
  with _book(folder, command.stop, first) as book:
    book.note(
        f"{command.variant}: {first} of {command.stop} steps done,"
        f" {data.n_tokens:,} tokens of text an epoch, {data.padding:.2%}"
        " padding in rows"
    )
    reporter = _Reporter(book, run, command.stop)
    aside = _Aside(command, data, mesh, checkpoints, book, reporter, average)
    train.fit(
        state,
        run,
        micro_batches(data, run, command.seed, first, mesh),
        command.stop,
        mesh=mesh,
        report=reporter.step,
        check=aside.check,
        evaluate=aside.evaluate,
        save=aside.save,
        average=average,
    )
    checkpoints.wait_until_finished()
  if average:
    average.close()
  if first < command.stop and jax.process_index() == 0:
    summary = _summary(run, data) | aside.heldout
    summary["train_seconds"] = reporter.train_s
    summary["total_seconds"] = time.monotonic() - began
    workdir.write_summary(folder, summary)


def _facts(
    command: common.Command, data: stream.Prepared, step: int
) -> dict[str, Any]:
  """What a checkpoint holds beside the state."""
  rows = command.run.rows_before(step)
  return {"data": data.digests | {"seed": command.seed}, "rows": rows}


def _average(
    run: config.Run, checkpoints: Any, state: train.TrainState
) -> ema.Average | None:
  """The average of the parameters, from where the state stands."""
  if not run.optim.ema_decay:
    return None
  params, step = state.params, int(state.step)
  if step:
    like = jax.tree.map(ema.in_host_memory, params)
    params = checkpoint.restore_average(checkpoints, step, like)
  return ema.Average(params, run.optim.ema_decay)


@dataclasses.dataclass(frozen=True)
class _Aside:
  """What a run does now and then besides training; none of it is timed."""

  command: common.Command
  data: stream.Prepared
  mesh: jax.sharding.Mesh
  checkpoints: Any
  book: Any
  reporter: _Reporter
  average: ema.Average | None
  heldout: dict[str, float] = dataclasses.field(default_factory=dict)  # last

  def check(self, state: train.TrainState) -> None:
    """Compares what devices hold alike."""
    replicas.check(state, self.mesh)
    self.reporter.restart_clock()

  def evaluate(self, state: train.TrainState) -> None:
    """Writes the likelihood of held-out text, and a sample."""
    run, mesh = self.command.run, self.mesh
    found = _heldout(state, self.data, run, mesh)
    if run.evaluate.ema:
      places = jax.tree.map(lambda a: a.sharding, state.params)
      averaged = jax.device_put(self.average.params(), places)
      averaged = state.replace(params=averaged)
      more = _heldout(averaged, self.data, run, mesh)
      found |= {f"{name}_ema": value for name, value in more.items()}
    self.heldout.update(found)
    row = {"step": int(state.step)} | found
    if run.evaluate.sample_tokens:
      row["sample"] = _sample(state, self.data.tokenizer, run, mesh)
    self.book.evaluation(row)
    self.reporter.restart_clock()

  def save(self, state: train.TrainState) -> None:
    """Starts saving the state and the average."""
    checkpoint.save(
        self.checkpoints,
        state,
        _facts(self.command, self.data, int(state.step)),
        self.average.params() if self.average else None,
    )
    self.reporter.restart_clock()


def _heldout(
    state: train.TrainState,
    data: stream.Prepared,
    run: config.Run,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
  model = hidden.Model(state.params, state.router_bias, run, mesh)
  found = {}
  for domain in data.domains:
    rows, mask = stream.heldout_windows(
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
  params, bias, step = topology.on_first_device(parts, mesh)
  n = run.evaluate.sample_tokens
  if jax.process_index() or not n:
    return ""
  model = config.override(run.model, "mtp.depth=0")
  writer = engine.Engine(
      served.params(params, bias, model), model, n_slots=1, max_len=n + 1
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
  return tok.decode([e.token for e in events if e.ended != engine.STOP])


def _summary(run: config.Run, data: stream.Prepared) -> dict[str, Any]:
  """Figures of the model and of the text, for the report."""
  counts = transformer.parameter_counts(run.model)
  facts = {
      "parameters": counts["main"] + counts["mtp"],
      "active_parameters": counts["active"],
      "train_bytes": data.train_bytes,
      "heldout_bytes": data.heldout_bytes,
  }
  if data.train_bytes > RIVALS_BYTES:
    return facts
  train, heldout = (
      b"".join(map(corpus.text_bytes, documents))
      for documents in zip(*stream.texts(run.data).values(), strict=True)
  )
  rivals = corpus.compression_bits_per_byte(train, heldout)
  return facts | {"bzip2_bpb": rivals["bzip2 -9"], "xz_bpb": rivals["xz -9e"]}

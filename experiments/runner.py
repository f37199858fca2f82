"""Trains a run in a workdir: data, state, loop, evaluation, checkpoints."""

import contextlib
import itertools
import pathlib
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax

from dsv3_jax import checkpoint
from dsv3_jax import config
from dsv3_jax import ema
from dsv3_jax import losses
from dsv3_jax import manifest
from dsv3_jax import schema
from dsv3_jax import train
from dsv3_jax.data import corpus
from dsv3_jax.data import stream
from dsv3_jax.data import tokenizer
from dsv3_jax.interop import runs
from dsv3_jax.model import transformer
from dsv3_jax.parallel import layouts
from dsv3_jax.parallel import topology
from experiments import aside
from experiments import cluster
from experiments import common
from experiments import exits
from experiments import history
from experiments import lifeline
from experiments import logbook
from experiments import reporter
from experiments import starts
from experiments import workdir

RIVALS_BYTES = 1 << 25  # most text that other compressors are given


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


def _start(
    command: common.Command,
    checkpoints: checkpoint.Checkpoints,
    facts: dict[str, Any],
    mesh: jax.sharding.Mesh,
) -> train.TrainState:
  """The newest good checkpoint's state, or a fresh one that is saved at once.

  Saving the first state shows before any work that saving works; from then on,
  a workdir without a checkpoint has lost it.
  """
  run = command.run
  like = train.abstract_state(run, mesh)

  def load(step):
    saved = checkpoints.facts(step)
    for what in ("model", "data"):
      if changes := config.difference(saved[what], facts[what]):
        raise ValueError(
            f"the {what} is not that of {checkpoints.folder(step)} (there ->"
            " here):\n" + "\n".join(f"  {line}" for line in changes)
        )
    return checkpoints.restore(step, like)

  if found := checkpoints.newest(load, set_aside=True):
    return found[1]
  metrics = command.workdir / logbook.METRICS
  if metrics.exists() and logbook.read(metrics):
    raise manifest.MissingError(
        f"{command.workdir} holds metrics of a run but no checkpoint under"
        f" {checkpoints.directory}; restore it, or start in a new --workdir"
    )
  state = train.make_state(run, mesh, command.seed)
  if command.init_from:
    state = _with_parameters(state, command, mesh)
  checkpoints.save(state, facts)
  checkpoints.wait()
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


def _prepare(
    command: common.Command, stack: contextlib.ExitStack
) -> stream.Prepared:
  """The workdir and the data in it, written by process 0, which locks it."""
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
    stack.enter_context(workdir.lock(folder))
    prepare()
    workdir.write_config(folder, description)
    workdir.write_environment(folder)

  cluster.first_does(write)
  return prepare()


def _problems(command: common.Command, mesh: jax.sharding.Mesh) -> list[str]:
  run = command.run
  problems = layouts.problems(run, mesh.shape)
  form = run.parallel.dispatch
  if form.startswith("ragged") and jax.default_backend() == "cpu":
    problems.append(
        f"parallel.dispatch={form}: not on CPU;"
        f" {form.removeprefix('ragged_')} is the same with padding"
    )
  if run.checkpoint.on_error == "continue" and jax.process_count() > 1:
    problems.append(
        "checkpoint.on_error=continue: one process alone can; the others would"
        " wait for the one that failed"
    )
  return problems


def execute(command: common.Command) -> None:
  """Trains up to `command.stop`, from the newest checkpoint if there is one.

  Raises:
    PreemptedError: it was told to leave, and saved.
    ValueError: something cannot be as the command has it.
    FloatingPointError: too many steps in a row were not finite.
    SaveError: a checkpoint could not be written.
    DivergedError: devices hold different copies.
  """
  with contextlib.ExitStack() as stack:
    line = lifeline.Lifeline(command.patience, command.processes.host)
    _train(command, stack.enter_context(line), stack)


def _train(
    command: common.Command,
    line: lifeline.Lifeline,
    stack: contextlib.ExitStack,
) -> None:
  run, folder, began = command.run, command.workdir, time.time()
  mesh = cluster.mesh(command.mesh)
  if problems := _problems(command, mesh):
    raise ValueError("\n".join(problems))
  data = _prepare(command, stack)
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", run.checkpoint)
  stack.callback(checkpoints.close)
  cluster.first_does(lambda: starts.clean(command, checkpoints))
  state = _start(command, checkpoints, aside.facts_of(command, data, 0), mesh)
  average = _average(run, checkpoints, state)
  if average:
    stack.callback(average.close)
  first = int(state.step)
  watch = history.Stopwatch()
  record = stack.enter_context(starts.recorded(command, first, began, watch))
  book = stack.enter_context(_book(folder, command.stop, first))
  book.note(
      f"{command.variant}: {first} of {command.stop} steps done,"
      f" {data.n_tokens:,} tokens of text an epoch, {data.padding:.2%}"
      " padding in rows"
  )
  report = reporter.Reporter(
      book, run, command.stop, _row_ids(data, command), record, watch
  )
  beside = aside.Aside(
      command, data, mesh, checkpoints, book, record, watch, line, average
  )
  state = train.fit(
      state,
      run,
      micro_batches(data, run, command.seed, first, mesh),
      command.stop,
      hooks=train.Hooks(
          report.step,
          beside.check,
          beside.evaluate,
          beside.save,
          beside.may_go_on,
      ),
      mesh=mesh,
      average=average,
  )
  done = int(state.step)
  line.may_go_on(done, last=True)
  beside.finish(done)
  if done < command.stop:
    raise exits.PreemptedError(
        f"told to leave after step {done}, which is saved; the same command"
        " goes on from there"
    )
  if first < command.stop and jax.process_index() == 0:
    summary = _summary(run, data) | beside.heldout
    summary["train_seconds"] = watch.seconds["compiling"]
    summary["train_seconds"] += watch.seconds["training"]
    summary["total_seconds"] = time.time() - began
    workdir.write_summary(folder, summary)


def _row_ids(
    data: stream.Prepared, command: common.Command
) -> Callable[[int], list[int]]:
  """What gives the rows of the data that a step reads, from 0."""
  order, run = data.order(command.seed), command.run

  def ids(step):
    first, size = run.rows_before(step), run.phase(step).batch_size
    return stream.batch(order, range(first, first + size))["row"].tolist()

  return ids


def _average(
    run: config.Run,
    checkpoints: checkpoint.Checkpoints,
    state: train.TrainState,
) -> ema.Average | None:
  """The average of the parameters, from where the state stands."""
  if not run.optim.ema_decay:
    return None
  step = int(state.step)
  if not step:
    return ema.Average(state.params, run.optim.ema_decay)
  in_host = jax.tree.map(ema.in_host_memory, state.params)
  params, _ = checkpoints.restore_parameters(
      step, state.replace(params=in_host), average=True
  )
  return ema.Average(params, run.optim.ema_decay)


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

"""Trains a run in a workdir: data, state, loop, evaluation, checkpoints."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from dsv3_jax import config, ema, optim, param_spec, train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.data import loader, prepare, tokenized_corpus
from dsv3_jax.errors import InputError, NotFiniteError
from dsv3_jax.interop import open_run
from dsv3_jax.model import transformer
from dsv3_jax.parallel import layout_check
from dsv3_jax.plan import flops
from dsv3_jax.trainer import (
  batches,
  crash_loop,
  distributed,
  event_log,
  exit_codes,
  heartbeat,
  hooks,
  metrics_writer,
  run_args,
  step_monitor,
  workdir,
)

SPIKES = 3  # times that other data is tried after one checkpoint


def _start(
  command: run_args.RunArgs,
  checkpoints: checkpointer.Checkpointer,
  source: loader.BatchSource,
  mesh: jax.sharding.Mesh,
) -> tuple[train.TrainState, ema.Average | None]:
  """State and average of the newest good checkpoint, or fresh ones, saved.

  Saving the first state shows before any work that saving works; from then on,
  a workdir without a checkpoint has lost it.
  """
  run, facts = command.run, hooks.checkpoint_metadata(source, 0)
  like = train.abstract_state(run, mesh)

  def load(step):
    saved = checkpoints.metadata(step)
    # A setting newer than the checkpoint: its default is what was done then.
    model = config.with_current_names(saved["model"])
    saved["model"] = config.default_settings(config.Model) | model
    for what in ("model", "data"):
      if changes := config.diff(saved[what], facts[what]):
        raise InputError(
          f"the {what} is not that of {checkpoints.folder(step)} (there ->"
          " here):\n" + "\n".join(f"  {line}" for line in changes)
        )
    state = checkpoints.restore(step, like)
    return state, _average(run, checkpoints, state)

  if found := checkpoints.newest(load, quarantine=True):
    return found[1]
  metrics = command.workdir / metrics_writer.METRICS
  if metrics.exists() and metrics_writer.read(metrics):
    raise manifest.MissingError(
      f"{command.workdir} holds metrics of a run but no checkpoint under"
      f" {checkpoints.directory}; restore it, or start in a new --workdir"
    )
  state = train.make_state(run, mesh, command.seed)
  if command.init_from:
    state = _with_parameters(state, command, mesh)
  checkpoints.save(state, facts)
  checkpoints.wait()
  return state, _average(run, checkpoints, state)


def _with_parameters(
  state: train.TrainState, command: run_args.RunArgs, mesh: jax.sharding.Mesh
) -> train.TrainState:
  """The state with parameters and router bias of another run's newest step.

  Raises:
    InputError: that run has another architecture, or no checkpoint.
  """
  folder = command.init_from
  facts = open_run.read_config(folder)
  source = config.override(
    open_run.run_from_config(facts),
    f"parallel.layout={command.run.parallel.layout}",
  )
  of = lambda run: {
    path: str(spec.shape)
    for path, spec in param_spec.paths(transformer.specs(run.model)).items()
  }
  if changes := config.diff(of(source), of(command.run)):
    raise InputError(
      f"--init_from={folder} has another architecture (there -> here):\n"
      + "\n".join(f"  {line}" for line in changes)
    )
  params, bias = open_run.load_newest_params(folder, source, mesh)
  return state.replace(params=params, router_bias=bias)


def _book(
  folder: pathlib.Path, stop: int, first: int
) -> metrics_writer.MetricsWriter | metrics_writer.NullWriter:
  if jax.process_index():
    return metrics_writer.NullWriter()
  return metrics_writer.MetricsWriter(folder, stop, first)


def read_data(command: run_args.RunArgs) -> tokenized_corpus.TokenizedCorpus:
  """Opens the corpus of a run; process 0 tokenizes or verifies it before."""
  run, directory = command.run, command.workdir / "data"
  tokenizer_file = None
  if command.init_from:
    tokenizer_file = command.init_from / "data" / tokenized_corpus.TOKENIZER

  def write() -> tokenized_corpus.TokenizedCorpus:
    vocab_size = run.model.vocab_size
    return prepare.prepare(run.data, vocab_size, directory, tokenizer_file)

  written = distributed.run_on_process_zero(write)
  return written or tokenized_corpus.open_corpus(run.data, directory)


def _prepare(
  command: run_args.RunArgs, stack: contextlib.ExitStack
) -> tokenized_corpus.TokenizedCorpus:
  """Locks and describes the workdir in process 0; opens the data in it."""
  folder = command.workdir
  description = workdir.run_identity(command.variant, command.seed, command.run)

  def claim() -> None:
    workdir.check_or_create(folder, description)
    stack.enter_context(workdir.lock(folder))

  def write() -> None:
    workdir.write_config(folder, description)
    workdir.write_environment(folder)

  distributed.run_on_process_zero(claim)
  data = read_data(command)
  distributed.run_on_process_zero(write)
  return data


def _problems(command: run_args.RunArgs, mesh: jax.sharding.Mesh) -> list[str]:
  run = command.run
  problems = layout_check.validate(run, mesh.shape) + optim.validate(run)
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


def execute(command: run_args.RunArgs) -> None:
  """Trains up to `command.stop`, from the newest checkpoint if there is one.

  Raises:
    PreemptedError: it was told to leave, and saved.
    InputError: something cannot be as the command has it.
    NotFiniteError: too many steps in a row were not finite.
    SaveError: a checkpoint could not be written.
    DivergedError: devices hold different copies.
  """
  line = heartbeat.Heartbeat(command.timeouts, command.processes.host)
  spikes: list[exit_codes.SpikeError] = []
  with line:
    while True:
      try:
        with contextlib.ExitStack() as stack:
          return _train(command, line, stack, spikes)
      except exit_codes.SpikeError as spike:
        spikes.append(spike)
      except Exception as error:
        if exit_codes.code_of(error) is None:
          metrics_writer.add_traceback(command.workdir, error)
        raise


def _train(
  command: run_args.RunArgs,
  line: heartbeat.Heartbeat,
  stack: contextlib.ExitStack,
  spikes: Sequence[exit_codes.SpikeError],
) -> None:
  run, folder, began = command.run, command.workdir, time.time()
  mesh = distributed.mesh(command.mesh)
  if problems := _problems(command, mesh):
    raise InputError("\n".join(problems))
  data = _prepare(command, stack)
  checkpoints = checkpointer.Checkpointer(
    folder / "checkpoints", run.checkpoint
  )
  stack.callback(checkpoints.close)
  distributed.run_on_process_zero(
    lambda: crash_loop.repair_workdir(command, checkpoints)
  )
  source = loader.BatchSource(data, run, command.seed)
  state, average = _start(command, checkpoints, source, mesh)
  if average:
    stack.callback(average.close)
  first = int(state.step)
  source = _from_step(source, checkpoints, first, spikes)
  rows = crash_loop.steps_up_to(folder, first)
  watch = event_log.GoodputTimer()
  record = stack.enter_context(
    crash_loop.log_start_and_end(command, first, began, watch)
  )
  book = stack.enter_context(_book(folder, command.stop, first))
  book.note(
    f"{command.variant}: {first} of {command.stop} steps done,"
    f" {data.n_tokens:,} tokens of text an epoch, {data.padding:.2%}"
    " padding in rows"
  )
  report = step_monitor.StepMonitor(
    book, source, command.stop, record, watch, rows
  )
  beside = hooks.TrainHooks(
    source, mesh, checkpoints, book, record, watch, line, average
  )
  state = train.fit(
    state,
    run,
    batches.global_batches(source, first, mesh),
    command.stop,
    hooks=train.Hooks(
      report.step,
      beside.check,
      beside.evaluate,
      beside.save,
      beside.should_continue,
    ),
    mesh=mesh,
    average=average,
  )
  done = int(state.step)
  line.should_continue(done, last=True)
  beside.finish(done)
  if done < command.stop:
    raise exit_codes.PreemptedError(
      f"told to leave after step {done}, which is saved; the same command"
      " goes on from there"
    )
  if first < command.stop and jax.process_index() == 0:
    summary = _summary(run, data) | beside.heldout
    spent = event_log.goodput(event_log.read(folder))  # by all starts
    summary["train_seconds"] = spent["compiling"] + spent["training"]
    summary["total_seconds"] = time.time() - began
    workdir.write_summary(folder, summary)


def _from_step(
  source: loader.BatchSource,
  checkpoints: checkpointer.Checkpointer,
  first: int,
  spikes: Sequence[exit_codes.SpikeError],
) -> loader.BatchSource:
  """The data from a checkpoint on, without what is around the last spike.

  Raises:
    NotFiniteError: the loss has jumped too often after this checkpoint.
  """
  run = source.run
  left_out = checkpoints.metadata(first)["rows"] - run.rows_before(first)
  for spike in spikes:
    if spike.back_to is None:
      spike.back_to = first
  here = [spike for spike in spikes if spike.back_to == first]
  if len(here) > SPIKES:
    raise NotFiniteError(
      f"{here[-1]}; with other data after step {first} it was no better"
      f" {SPIKES} times. Lower optim.peak_lr"
    )
  for spike in here:
    until = spike.step + run.train.spike_skip
    left_out += run.rows_before(until) - run.rows_before(first)
  return dataclasses.replace(source, n_skipped=left_out)


def _average(
  run: config.Run,
  checkpoints: checkpointer.Checkpointer,
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


def _summary(
  run: config.Run, data: tokenized_corpus.TokenizedCorpus
) -> dict[str, Any]:
  """Returns figures of the model and of the text, for the report."""
  counts = flops.parameter_counts(run.model)
  sizes = {
    "parameters": counts["main"] + counts["mtp"],
    "active_parameters": counts["active"],
    "train_bytes": data.train_bytes,
    "heldout_bytes": data.heldout_bytes,
  }
  return sizes | (data.compression or {})

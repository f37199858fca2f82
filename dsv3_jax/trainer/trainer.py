"""Trainer: trains a run in a workdir, with evaluations and checkpoints.

result = Trainer(run, workdir).fit()
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Sequence

import jax

from dsv3_jax import config, display, io, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.data import loader, prepare, tokenized_corpus
from dsv3_jax.errors import NotFiniteError, raise_problems
from dsv3_jax.interop import open_run
from dsv3_jax.parallel import layout_check
from dsv3_jax.plan import flops
from dsv3_jax.trainer import (
  compilation,
  crash_loop,
  distributed,
  event_log,
  exit_codes,
  heartbeat,
  hooks,
  initial_state,
  loop,
  memory,
  metrics_writer,
  run_args,
  start_lines,
  step_monitor,
  terminal,
  workdir,
)

MAX_SPIKES = 3  # times that other data is tried after one checkpoint


@dataclasses.dataclass(frozen=True, repr=False)
class FitResult(display.Table):
  """Outcome of a training run."""

  state: train.TrainState  # after the last step, also in the checkpoint
  metrics: metrics_writer.Row  # of the last step; empty if none was left to do
  heldout: dict[str, float]  # of the last evaluation, such as heldout_bpb

  def _rows(self) -> dict[str, object]:
    return {
      "step": int(self.state.step),
      **_figures([self.metrics | self.heldout]),
    }


_SHOWN = ("loss", "grad_norm", "lr", "max_vio", "tokens_per_s", "heldout_bpb")


def _figures(rows: Sequence[metrics_writer.Row]) -> dict[str, str]:
  """Returns the last values of the metrics that tables show."""
  last = {key: row[key] for row in rows for key in _SHOWN if key in row}
  return {
    key: f"{last[key]:.5g}" for key in _SHOWN if last.get(key) is not None
  }


class Trainer(display.Table, run_args.RunArgs):
  """Trains a configuration in a folder; takes the arguments of `RunArgs`.

  For example `Trainer(presets.TINY, "runs/tiny", stop=100).fit()`.
  """

  def fit(self) -> FitResult:
    """Trains; see `fit`."""
    return fit(self)

  def metrics(self) -> list[metrics_writer.Row]:
    """Returns the rows of metrics.jsonl: of steps, and of evaluations."""
    if self.workdir is None:
      return []
    return metrics_writer.read(self.workdir / metrics_writer.METRICS)

  def _rows(self) -> dict[str, object]:
    run, metrics = self.run, self.metrics()
    mesh = ", ".join(f"{axis}={n}" for axis, n in (self.mesh or {}).items())
    step = metrics[-1]["step"] if metrics else 0
    return {
      "variant": self.variant,
      "workdir": self.workdir,
      **flops.describe(run.model),
      "tokens": f"{run.train.tokens:,.0f}",
      "batch": f"{run.train.batch_size} x {run.data.seq_len} tokens",
      "optimizer": f"{run.optim.name}, peak_lr={run.optim.peak_lr:g}",
      "precision": run.precision.recipe,
      "mesh": mesh or "all devices on data",
      "step": f"{step:,} of {self.stop:,}",
      **_figures(metrics),
    }


def fit(args: run_args.RunArgs) -> FitResult:
  """Trains up to `args.stop`, from the newest checkpoint if there is one.

  Raises:
    PreemptedError: a signal stopped the run, which is saved.
    InputError: arguments, workdir or data do not fit.
    NotFiniteError: too many of the recent steps were not finite.
    SaveError: a checkpoint could not be written.
    DivergedError: copies of a replicated array differ between devices.
    OutOfMemoryError: an allocation failed.
  """
  problems = args.validate()
  if args.workdir is None:
    problems.append("--workdir is missing: the folder that the run writes to")
  raise_problems(problems)
  start_lines.print_first(args)
  spikes: list[exit_codes.SpikeError] = []
  host, own_process = args.processes.host, args.own_process
  with heartbeat.Heartbeat(
    args.timeouts,
    host,
    own_process,
    lambda: workdir.what_is_saved(args.workdir, own_process=own_process),
  ) as watchdog:
    while True:
      try:
        with contextlib.ExitStack() as stack:
          return _train(args, watchdog, stack, spikes)
      except exit_codes.SpikeError as spike:
        spikes.append(spike)
      except Exception as error:
        if exit_codes.code_of(error) is None:
          metrics_writer.add_traceback(args.workdir, error)
        if exit_codes.is_out_of_memory(error):
          sizes = args.mesh or {"data": jax.device_count()}
          text = memory.out_of_memory(args.run, sizes, error)
          raise exit_codes.OutOfMemoryError(text) from error
        raise


def _train(
  args: run_args.RunArgs,
  watchdog: heartbeat.Heartbeat,
  stack: contextlib.ExitStack,
  spikes: Sequence[exit_codes.SpikeError],
) -> FitResult:
  run, stop, began = args.run, args.stop, time.time()
  mesh = distributed.mesh(args.mesh)
  raise_problems(_validate(run, mesh))
  raise_problems(memory.validate(run, mesh))
  lines = _claim(args, stack)
  folder = args.workdir / "checkpoints"
  if lines and not spikes:
    start_lines.print_all(lines, args, mesh)
  step_fn, compiling = _compile_step(args, mesh)
  data = _prepare(args, lines)
  checkpoints = checkpointer.Checkpointer(folder, run.checkpoint)
  stack.callback(checkpoints.close)
  distributed.run_on_process_zero(crash_loop.repair_workdir, args, checkpoints)
  source = loader.BatchSource(data, run, args.seed)
  state, average = initial_state.restore_or_create(
    args, checkpoints, source, mesh
  )
  if average:
    stack.callback(average.close)
  first = int(state.step)
  source = _skip_spikes(source, checkpoints, first, spikes)
  monitor = _open_monitor(args, stack, source, first, began, lines)
  train_hooks = hooks.TrainHooks(
    source, mesh, checkpoints, watchdog, average, monitor
  )
  if args.open_batches:
    batches = args.open_batches(args, source, state, mesh, watchdog)
  else:
    batches = loop.Batches(loop.global_batches(source, first, mesh))
  # Closed here, since the traceback of an error would keep its thread.
  stack.callback(batches.close)
  if compiling and lines:
    with lines.waiting("compiling the step"):
      compiling.join()
  state = loop.fit(
    state,
    run,
    batches,
    stop,
    hooks=train_hooks,
    mesh=mesh,
    average=average,
    step_fn=step_fn,
  )
  done = int(state.step)
  watchdog.should_continue(done, last=True)
  train_hooks.finish(done)
  if done < stop:
    again = workdir.rerun("resume", own_process=args.own_process)
    raise exit_codes.PreemptedError(f"preempted; step {done} is saved; {again}")
  if first < stop and jax.process_index() == 0:
    _write_summary(args, data, train_hooks.heldout, began)
  return FitResult(state, monitor.row, train_hooks.heldout)


def _open_monitor(
  args: run_args.RunArgs,
  stack: contextlib.ExitStack,
  source: loader.BatchSource,
  first: int,
  began: float,
  lines: terminal.Terminal | None,
) -> step_monitor.StepMonitor:
  """Opens event log and metrics writer, which `stack` closes."""
  rows = metrics_writer.read(args.workdir / metrics_writer.METRICS)
  earlier = [row for row in rows if "loss" in row and row["step"] <= first]
  timer = event_log.GoodputTimer()
  log = crash_loop.log_start_and_end(args, first, began, timer)
  record = stack.enter_context(log)
  writer = metrics_writer.NullWriter()
  if lines:
    writer = metrics_writer.MetricsWriter(
      args.workdir, args.stop, first, lines, args.writers
    )
    stack.enter_context(writer)
  writer.note(
    f"{args.variant}: {first} of {args.stop} steps done,"
    f" {source.corpus.n_tokens:,} tokens of text an epoch,"
    f" {source.corpus.padding:.2%} padding in rows"
  )
  return step_monitor.StepMonitor(
    writer, source, args.stop, record, timer, earlier
  )


def read_data(
  args: run_args.RunArgs, waiting: prepare.Waiting = contextlib.nullcontext
) -> tokenized_corpus.TokenizedCorpus:
  """Opens the corpus of a run; process 0 tokenizes or verifies it before."""
  data, directory, tokenizer_file = args.run.data, args.workdir / "data", None
  if args.init_from:
    tokenizer_file = args.init_from / "data" / tokenized_corpus.TOKENIZER
  inputs = data, args.run.model.vocab_size, directory, tokenizer_file
  written = distributed.run_on_process_zero(prepare.prepare, *inputs, waiting)
  return written or tokenized_corpus.open_corpus(data, directory)


def _claim(
  args: run_args.RunArgs, stack: contextlib.ExitStack
) -> terminal.Terminal | None:
  """Locks the workdir in process 0, and opens its log."""
  folder = args.workdir
  identity = workdir.run_identity(args.variant, args.seed, args.run)

  def claim() -> terminal.Terminal:
    workdir.check_or_create(folder, identity)
    # Before the folder is the run's, which other settings could not use then.
    if args.init_from and not (folder / open_run.CONFIG).exists():
      initial_state.check_source(args.init_from, args.run)
    stack.enter_context(workdir.lock(folder))
    return stack.enter_context(contextlib.closing(terminal.Terminal(folder)))

  return distributed.run_on_process_zero(claim)


def _compile_step(
  args: run_args.RunArgs, mesh: jax.sharding.Mesh
) -> tuple[train.StepFn, threading.Thread | None]:
  """Returns the step, and a thread that compiles it while data is read.

  Several processes compile one program after another, in the same order.
  """
  run, step_fn = args.run, train.make_step(args.run, mesh)
  done = workdir.newest_step(args.workdir)
  if jax.process_count() > 1 or done >= args.stop or args.open_batches:
    return step_fn, None
  size = run.batch_phase(done).batch_size
  batch = train.abstract_batch(run, mesh, size // run.train.micro_batch_size)
  state = train.abstract_state(run, mesh)
  return step_fn, compilation.start(step_fn, state, batch)


def _prepare(
  args: run_args.RunArgs, lines: terminal.Terminal | None
) -> tokenized_corpus.TokenizedCorpus:
  """Opens the data in the workdir; describes the run there in process 0."""
  waiting = lines.waiting if lines else contextlib.nullcontext
  data = read_data(args, waiting)
  identity = workdir.run_identity(args.variant, args.seed, args.run)
  distributed.run_on_process_zero(workdir.write_config, args.workdir, identity)
  distributed.run_on_process_zero(
    lambda: workdir.write_environment(
      args.workdir, own_process=args.own_process
    )
  )
  return data


def _validate(run: config.Run, mesh: jax.sharding.Mesh) -> list[str]:
  problems = layout_check.validate(run, mesh.shape)
  dispatch = run.parallel.dispatch
  if dispatch.startswith("ragged") and jax.default_backend() == "cpu":
    problems.append(
      f"parallel.dispatch={dispatch}: not on CPU;"
      f" {dispatch.removeprefix('ragged_')} is the same with padding"
    )
  if run.checkpoint.on_error == "continue" and jax.process_count() > 1:
    problems.append(
      "checkpoint.on_error=continue: only with one process; others would wait"
      " for the process that failed"
    )
  return problems


def _skip_spikes(
  source: loader.BatchSource,
  checkpoints: checkpointer.Checkpointer,
  first: int,
  spikes: Sequence[exit_codes.SpikeError],
) -> loader.BatchSource:
  """Continues the data of a checkpoint, without the data around loss spikes.

  Raises NotFiniteError if the loss has jumped too often after this checkpoint.
  """
  run = source.run
  n_skipped = checkpoints.metadata(first)["rows"] - run.rows_before(first)
  for spike in spikes:
    if spike.back_to is None:
      spike.back_to = first
  since = [spike for spike in spikes if spike.back_to == first]
  if len(since) > MAX_SPIKES:
    raise NotFiniteError(
      f"{since[-1]}; other data after step {first} did not help"
      f" {MAX_SPIKES} times. Lower optim.peak_lr"
    )
  for spike in since:
    until = spike.step + run.train.spike_skip
    n_skipped += run.rows_before(until) - run.rows_before(first)
  return dataclasses.replace(source, n_skipped=n_skipped)


def _write_summary(
  args: run_args.RunArgs,
  data: tokenized_corpus.TokenizedCorpus,
  heldout: dict[str, float],
  began: float,
) -> None:
  """Writes summary.json, figures for the report, at the end of a run."""
  counts = flops.parameter_counts(args.run.model)
  spent = event_log.goodput(event_log.read(args.workdir))  # by all starts
  summary = {
    "parameters": counts["main"] + counts["mtp"],
    "active_parameters": counts["active"],
    "train_bytes": data.train_bytes,
    "heldout_bytes": data.heldout_bytes,
    **_compression(args),
    **heldout,
    "train_seconds": spent["compiling"] + spent["training"],
    "total_seconds": time.time() - began,
  }
  io.write_json(args.workdir / workdir.SUMMARY, summary)


def _compression(args: run_args.RunArgs) -> dict[str, float]:
  """Bits per byte of general compressors, measured at the run's first end."""
  path = args.workdir / workdir.SUMMARY
  before = io.read_json_object(path) if path.exists() else {}
  known = {name: before[name] for name in prepare.COMPRESSORS if name in before}
  return known or prepare.compression(args.run.data)

"""Replays logged steps and compares them bitwise, to find bad hardware."""

import dataclasses

import jax

from dsv3_jax import train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.data import loader
from dsv3_jax.errors import InputError
from dsv3_jax.trainer import (
  distributed,
  event_log,
  exit_codes,
  heartbeat,
  loop,
  metrics_writer,
  run_args,
  step_monitor,
  trainer,
  workdir,
)

OF_ONE_START = {"tokens_per_s", "peak_bytes"}  # no result of a step


class _Comparison(metrics_writer.NullWriter):
  """Compares the rows of steps with logged rows."""

  def __init__(self, logged: dict[int, metrics_writer.Row]):
    self._logged = logged
    self.differences: list[str] = []
    self.n_numbers = 0

  def write(self, row: metrics_writer.Row) -> None:
    row = metrics_writer.to_json(row)
    step = row["step"]
    if step not in self._logged:
      raise InputError(f"step {step} is not in {metrics_writer.METRICS}")
    logged = self._logged[step]
    for key in sorted(logged.keys() & row.keys() - OF_ONE_START):
      self.n_numbers += 1
      if logged[key] != row[key]:
        self.differences.append(
          f"step {step}: {key} was {logged[key]}, is {row[key]}"
        )


def replay(args: run_args.RunArgs, step: int) -> None:
  """Replays from the newest checkpoint before `step`; writes nothing.

  Every step on the way is compared too. Number of devices and layout must be
  those of the run: others sum in another order.

  Raises:
    InputError: the step is not logged.
    MissingError: there is no checkpoint before it.
    MismatchError: numbers differ; names them.
  """
  host = args.processes.host
  with heartbeat.Heartbeat(args.timeouts, host, args.own_process):
    _replay(args, step)


def _replay(args: run_args.RunArgs, step: int) -> None:
  run, folder = args.run, args.workdir
  workdir.check_same(folder, workdir.run_identity(args.variant, args.seed, run))
  mesh = distributed.mesh(args.mesh)
  rows = metrics_writer.read(folder / metrics_writer.METRICS)
  logged = {row["step"]: row for row in rows if "loss" in row}
  if step not in logged:
    there = f"steps 1 to {max(logged)} are" if logged else "no step is"
    raise InputError(f"--replay_step={step}: {there} logged")
  directory = folder / "checkpoints"
  checkpoints = checkpointer.Checkpointer(directory, run.checkpoint)
  earlier = [s for s in checkpoints.steps() if s < step]
  if not earlier:
    raise manifest.MissingError(
      f"{checkpoints.directory}: no checkpoint from before step {step};"
      " checkpoint.keep_every keeps some for good"
    )
  first = earlier[-1]
  state = checkpoints.restore(first, train.abstract_state(run, mesh))
  position = checkpoints.metadata(first)["rows"]
  checkpoints.close()
  source = loader.BatchSource(trainer.read_data(args), run, args.seed)
  n_skipped = position - source.positions(first).start
  source = dataclasses.replace(source, n_skipped=n_skipped)
  comparison = _Comparison(logged)
  timer, record = event_log.GoodputTimer(), lambda *_, **__: None
  monitor = step_monitor.StepMonitor(
    comparison, source, args.stop, record, timer
  )
  batches = loop.Batches(loop.global_batches(source, first, mesh))
  loop.fit(state, run, batches, step, hooks=monitor, mesh=mesh)
  if comparison.differences:
    raise exit_codes.MismatchError(
      "\n".join(comparison.differences)
      + "\na device computes wrongly, or the run had another number or type of"
      " devices, another layout, another version, or --nodeterministic on GPUs"
    )
  if jax.process_index() == 0:
    print(
      f"steps {first + 1} to {step} replayed from checkpoint {first}: all"
      f" {comparison.n_numbers} numbers are bitwise identical"
    )

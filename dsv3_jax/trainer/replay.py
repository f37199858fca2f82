"""Does a logged step again: what computes right gets the same bits."""

import dataclasses
from typing import Any

import jax

from dsv3_jax import train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.data import loader
from dsv3_jax.errors import InputError
from dsv3_jax.trainer import (
  batches,
  distributed,
  event_log,
  exit_codes,
  heartbeat,
  metrics_writer,
  run_args,
  step_monitor,
  trainer,
  workdir,
)

_OF_TIME = {"tokens_per_s"}


class _Compared(metrics_writer.NullWriter):
  """A logbook that compares its rows with those of another one."""

  def __init__(self, logged: dict[int, metrics_writer.Row]):
    self._logged = logged
    self.found: list[str] = []  # differences, a line each
    self.n = 0  # numbers compared

  def step(self, row: metrics_writer.Row) -> None:
    row = metrics_writer.to_json(row)
    step = row["step"]
    if step not in self._logged:
      raise InputError(f"step {step} is not in {metrics_writer.METRICS}")
    logged = self._logged[step]
    for key in sorted(logged.keys() & row.keys() - _OF_TIME):
      self.n += 1
      if logged[key] != row[key]:
        self.found.append(
          f"step {step}: {key} was {logged[key]}, is {row[key]}"
        )


def execute(command: run_args.RunArgs, step: int) -> None:
  """Replays from the newest checkpoint before a step; writes nothing.

  Every step on the way is compared too. Device number and layout must be those
  of the run: others sum in another order.

  Raises:
    InputError: the step is not logged.
    MissingError: there is no checkpoint before it.
    MismatchError: something differs; names it.
  """
  with heartbeat.Heartbeat(command.timeouts, command.processes.host):
    _replay(command, step)


def _replay(command: run_args.RunArgs, step: int) -> None:
  run, folder = command.run, command.workdir
  workdir.check_same(
    folder, workdir.run_identity(command.variant, command.seed, run)
  )
  mesh = distributed.mesh(command.mesh)
  rows = metrics_writer.read(folder / metrics_writer.METRICS)
  logged = {row["step"]: row for row in rows if "loss" in row}
  if step not in logged:
    last = max(logged, default=0)
    raise InputError(f"--replay_step={step}: steps 1 to {last} are logged")
  checkpoints = checkpointer.Checkpointer(
    folder / "checkpoints", run.checkpoint
  )
  state = _before(checkpoints, step, train.abstract_state(run, mesh))
  first = int(state.step)
  facts = checkpoints.metadata(first)
  checkpoints.close()
  source = loader.BatchSource(trainer.read_data(command), run, command.seed)
  left_out = facts["rows"] - source.positions(first).start
  source = dataclasses.replace(source, n_skipped=left_out)
  book, nothing = _Compared(logged), lambda *_, **__: None
  report = step_monitor.StepMonitor(
    book, source, command.stop, nothing, event_log.GoodputTimer()
  )
  train.fit(
    state,
    run,
    batches.global_batches(source, first, mesh),
    step,
    hooks=train.Hooks(report.step, nothing, nothing, nothing),
    mesh=mesh,
  )
  if book.found:
    raise exit_codes.MismatchError(
      "\n".join(book.found)
      + "\na device that computes wrongly; or another number or kind of"
      " devices, another layout, another version, --nodeterministic on GPUs"
    )
  if jax.process_index() == 0:
    print(
      f"steps {first + 1} to {step} again, from checkpoint {first}: all"
      f" {book.n} numbers are those logged, bit for bit"
    )


def _before(
  checkpoints: checkpointer.Checkpointer, step: int, like: train.TrainState
) -> Any:
  steps = [s for s in checkpoints.steps() if s < step]
  if not steps:
    raise manifest.MissingError(
      f"{checkpoints.directory}: no checkpoint from before step {step};"
      " checkpoint.keep_every keeps some for good"
    )
  return checkpoints.restore(steps[-1], like)

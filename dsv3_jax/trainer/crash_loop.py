"""How a run starts again: what it cleans up, and what it takes down."""

import contextlib
import faulthandler
import functools
import os
import pathlib
import socket
import sys
from collections.abc import Callable, Iterator

import jax
from absl import logging

from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.trainer import event_log, exit_codes, metrics_writer, run_args

FATAL = "fatal.txt"


def repair_workdir(
  command: run_args.RunArgs, checkpoints: checkpointer.Checkpointer
) -> None:
  """Removes what a kill left, and goes a checkpoint back where starts fail."""
  for line in checkpoints.repair():
    logging.error("set aside: %s", line)
  _record_fatal(command.workdir)
  events, steps = event_log.read(command.workdir), checkpoints.steps()
  n, reached = event_log.crashes(events)
  if command.ignore_crash_loop or n < event_log.TRIES or steps[-1:] > [reached]:
    return
  older = [step for step in steps if step < reached]
  if n >= 2 * event_log.TRIES or not older:
    ends = [event for event in events if event["event"] == "end"]
    last = ends[-1]["text"] if ends else "killed"
    raise manifest.MissingError(
      f"--workdir={command.workdir}: {n} starts in a row failed before there"
      f" was a checkpoint after step {reached}, the last with: {last}. When"
      " the cause is mended, --ignore_crash_loop starts from the newest"
      " checkpoint"
    )
  for step in steps[len(older) :]:
    aside = checkpoints.quarantine(step, checkpointer.SUSPECT)
    logging.error(
      "%d starts failed before there was a checkpoint after step %d: going"
      " back to step %d; %s keeps the other",
      *(n, reached, older[-1], aside),
    )


def _record_fatal(folder: pathlib.Path) -> None:
  """Takes down what ended the start before, if a fatal signal did."""
  path = folder / FATAL
  stacks = path.read_text(errors="replace") if path.exists() else ""
  if stacks:
    logging.error("the start before ended so:\n%s", stacks)
    text, *_ = stacks.splitlines()
    event_log.add(folder, "end", code=exit_codes.INTERNAL, text=text)
    path.unlink()


@contextlib.contextmanager
def _fatal_to(path: pathlib.Path) -> Iterator[None]:
  """Stacks go to a file where a fatal signal ends the process."""
  before = faulthandler.is_enabled()
  with open(path, "w", encoding="utf-8") as file:
    faulthandler.enable(file)
    try:
      yield
    finally:
      faulthandler.disable()
      if before:
        faulthandler.enable(sys.__stderr__)  # sys.stderr may be no file
      path.unlink(missing_ok=True)


def steps_up_to(folder: pathlib.Path, step: int) -> list[metrics_writer.Row]:
  """The rows of the steps that were done when a step was saved."""
  path = folder / metrics_writer.METRICS
  rows = metrics_writer.read(path) if path.exists() else []
  return [row for row in rows if "loss" in row and row["step"] <= step]


@contextlib.contextmanager
def log_start_and_end(
  command: run_args.RunArgs,
  first: int,
  began: float,
  watch: event_log.GoodputTimer,
) -> Iterator[Callable[..., None]]:
  """What adds to the history, which gets the start and the end."""
  if jax.process_index():
    yield lambda event, **facts: None
    return
  folder = command.workdir
  metrics = folder / metrics_writer.METRICS
  record = functools.partial(event_log.add, folder)
  record(
    "start",
    step=first,
    began=began,
    seen_at=metrics.stat().st_mtime if metrics.exists() else 0.0,
    again=command.ignore_crash_loop,
    host=socket.gethostname(),
    process=os.getpid(),
  )
  code, text = exit_codes.OK, ""
  try:
    with _fatal_to(folder / FATAL):
      yield record
  except BaseException as error:
    code, text = exit_codes.code_of(error) or exit_codes.INTERNAL, f"{error}"
    raise
  finally:
    record("end", code=code, text=text, seconds=watch.seconds)

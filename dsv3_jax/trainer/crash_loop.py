"""Restart: repairs the workdir, detects crash loops, logs start and end."""

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
from dsv3_jax.trainer import (
  event_log,
  exit_codes,
  memory,
  metrics_writer,
  run_args,
)

FATAL = "fatal.txt"


def repair_workdir(
  args: run_args.RunArgs, checkpoints: checkpointer.Checkpointer
) -> None:
  """Removes leftovers of a kill; after repeated crashes, drops a checkpoint.

  The newest checkpoint is quarantined after `event_log.TRIES` failed starts.

  Raises:
    MissingError: as many starts failed again, or there is no older checkpoint.
  """
  for line in checkpoints.repair():
    logging.error("quarantined: %s", line)
  _log_fatal(args.workdir)
  events, steps = event_log.read(args.workdir), checkpoints.steps()
  n, reached = event_log.crashes(events)
  if args.ignore_crash_loop or n < event_log.TRIES or steps[-1:] > [reached]:
    return
  older = [step for step in steps if step < reached]
  if n >= 2 * event_log.TRIES or not older:
    ends = [event for event in events if event["event"] == "end"]
    last = ends[-1]["text"] if ends else "killed"
    raise manifest.MissingError(
      f"--workdir={args.workdir}: {n} starts in a row failed before there was"
      f" a checkpoint after step {reached}, the last with: {last}. When the"
      " cause is fixed, --ignore_crash_loop starts from the newest checkpoint"
    )
  for step in steps[len(older) :]:
    folder = checkpoints.quarantine(step, checkpointer.SUSPECT)
    logging.error(
      "%d starts failed before there was a checkpoint after step %d:"
      " restarting from step %d; the newer checkpoint is %s now",
      *(n, reached, older[-1], folder),
    )


def _log_fatal(folder: pathlib.Path) -> None:
  """Logs the stack trace of the previous process if a fatal signal ended it."""
  path = folder / FATAL
  stacks = path.read_text(errors="replace") if path.exists() else ""
  if stacks:
    logging.error("a fatal signal ended the previous process:\n%s", stacks)
    text, *_ = stacks.splitlines()
    event_log.add(folder, "end", code=exit_codes.INTERNAL, text=text)
    path.unlink()


@contextlib.contextmanager
def _fatal_to(path: pathlib.Path) -> Iterator[None]:
  """Sends stack traces to a file if a fatal signal ends the process."""
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


@contextlib.contextmanager
def log_start_and_end(
  args: run_args.RunArgs, step: int, began: float, timer: event_log.GoodputTimer
) -> Iterator[Callable[..., None]]:
  """Logs start and end of the block as events; yields what adds an event.

  The program started at `began`, in seconds since 1970, and trains from `step`.
  """
  if jax.process_index():
    yield lambda event, **fields: None
    return
  folder = args.workdir
  metrics = folder / metrics_writer.METRICS
  record = functools.partial(event_log.add, folder)
  seen_at = metrics.stat().st_mtime if metrics.exists() else 0.0
  sender = {"host": socket.gethostname(), "process": os.getpid()}
  again = args.ignore_crash_loop
  record(
    "start", step=step, began=began, seen_at=seen_at, again=again, **sender
  )
  code, text = exit_codes.OK, ""
  try:
    with _fatal_to(folder / FATAL):
      yield record
  except BaseException as error:
    code, text = exit_codes.code_of(error) or exit_codes.INTERNAL, f"{error}"
    raise
  finally:
    peak = memory.peak_bytes()
    record("end", code=code, text=text, seconds=timer.seconds, peak_bytes=peak)

"""What is written about each step, and what ends a run that goes wrong."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax

from dsv3_jax import config
from dsv3_jax import train
from dsv3_jax.parallel import traffic
from experiments import history
from experiments import logbook
from experiments import quantization

LOADS = 60  # times in a run that the loads of all experts are written
IDS = 64  # rows that are named where a step is bad


class Reporter:
  """Turns the metrics of steps into rows of the logbook."""

  def __init__(
      self,
      book: logbook.Logbook | logbook.Silent,
      run: config.Run,
      stop: int,
      rows_of: Callable[[int], Sequence[int]],
      record: Callable[..., None],
      watch: history.Stopwatch,
  ):
    """Begins before the first step of this start.

    Args:
      book: written to.
      run: of it.
      stop: where this start ends.
      rows_of: the rows of data that a step reads, from 0.
      record: adds an event to the history.
      watch: counts the time of steps.
    """
    self._book, self._run, self._stop = book, run, stop
    self._rows_of, self._record, self._watch = rows_of, record, watch
    self._bad_in_a_row = 0
    self._started = False

  def step(self, done: int, metrics: train.Metrics) -> None:
    """Writes a row; waits for the step to finish.

    Raises:
      FloatingPointError: too many steps in a row were not finite.
    """
    metrics = jax.device_get(metrics)
    seconds = self._watch.lap("training" if self._started else "compiling")
    self._started = True
    self._book.step(self._row(done, metrics, seconds))
    for line in quantization.not_finite(metrics.get("fp8", {})):
      self._book.note(f"step {done}: {line}")
    if metrics["finite"]:
      self._bad_in_a_row = 0
    else:
      self._bad_in_a_row += 1
      self._bad(done, "was skipped: loss or gradient not finite", metrics)
    if self._bad_in_a_row > self._run.train.max_bad_steps:
      raise FloatingPointError(
          f"{self._bad_in_a_row} steps in a row up to step {done} were not"
          " finite; the newest checkpoint is from before them. Lower"
          " optim.peak_lr, or look at the data of these steps:"
          f" {history.FILE} lists their rows, --replay_step does one again"
      )

  def _row(
      self, done: int, metrics: train.Metrics, seconds: float
  ) -> dict[str, Any]:
    run = self._run
    length = run.data.seq_len
    row = {"step": done, "tokens": run.rows_before(done) * length}
    apart = ("load", "finite", "sent", "fp8")
    row |= {k: v for k, v in metrics.items() if k not in apart}
    for axis, n_bytes in traffic.bytes_sent(metrics["sent"], run).items():
      if n_bytes:
        row[f"bytes_over_{axis}"] = n_bytes
    row |= quantization.shares(metrics.get("fp8", {}))
    row["tokens_per_s"] = run.phase(done - 1).batch_size * length / seconds
    if metrics["load"].size:
      row["max_vio"] = metrics["max_vio_per_layer"].max()
    every = max(run.total_steps // LOADS, 1)
    if done % every == 0 or done in (1, self._stop):
      row["load"] = metrics["load"]
    return row

  def _bad(self, done: int, why: str, metrics: train.Metrics) -> None:
    """Says that a step stands out, and which data it read."""
    rows = self._rows_of(done - 1)
    first = self._run.rows_before(done - 1)
    self._book.note(
        f"step {done} {why}; it read sequences {first} to"
        f" {first + len(rows) - 1} of the run, rows"
        f" {', '.join(map(str, rows[:IDS]))}"
        + (", ..." if len(rows) > IDS else "")
    )
    self._record(
        "bad",
        step=done,
        why=why,
        rows=rows,
        loss=metrics["loss"],
        grad_norm=metrics["grad_norm"],
    )

"""What is written about each step, and what ends a run that goes wrong."""

import collections
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import jax

from dsv3_jax import train
from dsv3_jax.data import loader
from dsv3_jax.errors import NotFiniteError
from dsv3_jax.parallel import comm_volume
from dsv3_jax.trainer import (
  event_log,
  exit_codes,
  metrics_writer,
  quantization,
)

LOADS = 60  # times in a run that the loads of all experts are written
IDS = 64  # rows that are named where a step is bad
# A spike is looked for among so many steps, once there are so many.
RECENT, ENOUGH = 100, 20


class StepMonitor:
  """Turns the metrics of steps into rows of the logbook."""

  def __init__(
    self,
    book: metrics_writer.MetricsWriter | metrics_writer.NullWriter,
    source: loader.BatchSource,
    stop: int,
    record: Callable[..., None],
    watch: event_log.GoodputTimer,
    before: Iterable[metrics_writer.Row] = (),
  ):
    """Begins before the first step of this start.

    Args:
      book: written to.
      source: of the data.
      stop: where this start ends.
      record: adds an event to the history.
      watch: counts the time of steps.
      before: rows of the steps before, as logged.
    """
    self._book, self._source, self._stop = book, source, stop
    self._record, self._watch = record, watch
    self._run = source.run
    self._bad_in_a_row = 0
    self._started = False
    self._recent = {
      key: collections.deque(maxlen=RECENT) for key in ("loss", "grad_norm")
    }
    for row in before:
      self._spike(row)

  def step(self, done: int, metrics: train.Metrics) -> None:
    """Writes a row; waits for the step to finish.

    Raises:
      NotFiniteError: too many steps in a row were not finite.
      SpikeError: loss or gradient jumped, and train.spike_skip is set.
    """
    metrics = jax.device_get(metrics)
    seconds = self._watch.lap("training" if self._started else "compiling")
    self._started = True
    row = metrics_writer.to_json(self._row(done, metrics, seconds))
    self._book.step(row)
    for line in quantization.not_finite(metrics.get("fp8", {})):
      self._book.note(f"step {done}: {line}")
    if metrics["finite"]:
      self._bad_in_a_row = 0
    else:
      self._bad_in_a_row += 1
      self._bad(row, "was skipped: loss or gradient not finite")
    if self._bad_in_a_row > self._run.train.max_bad_steps:
      raise NotFiniteError(
        f"{self._bad_in_a_row} steps in a row up to step {done} were not"
        " finite; the newest checkpoint is from before them. Lower"
        " optim.peak_lr, or look at the data of these steps:"
        f" {event_log.FILE} lists their rows, --replay_step does one again"
      )
    if jump := self._spike(row):
      self._bad(row, jump)
      if self._run.train.spike_skip:
        raise exit_codes.SpikeError(done, f"step {done} {jump}")

  def _row(
    self, done: int, metrics: train.Metrics, seconds: float
  ) -> metrics_writer.Row:
    run = self._run
    length = run.data.seq_len
    row = {"step": done, "tokens": run.rows_before(done) * length}
    apart = ("load", "finite", "sent", "fp8")
    row |= {k: v for k, v in metrics.items() if k not in apart}
    for axis, n_bytes in comm_volume.bytes_sent(metrics["sent"], run).items():
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

  def _spike(self, row: metrics_writer.Row) -> str:
    """How a step stands out from those before it; "": it does not."""
    factor, found = self._run.train.spike_factor, []
    for key, recent in self._recent.items():
      value = row[key]
      if value is None:  # not finite, which is another matter
        continue
      median = statistics.median(recent) if len(recent) >= ENOUGH else value
      if factor and value > factor * median:
        found.append(f"{key} {value:.4g} is {value / median:.1f} times")
      else:
        recent.append(value)
    return f"jumped: {', '.join(found)} the median before" if found else ""

  def _bad(self, row: metrics_writer.Row, why: str) -> None:
    """Says that a step stands out, and which data it read."""
    step = row["step"] - 1
    read, ids = self._source.positions(step), self._source.row_ids(step)
    self._book.note(
      f"step {row['step']} {why}; it read sequences {read.start} to"
      f" {read.stop - 1} of the run, rows {', '.join(map(str, ids[:IDS]))}"
      + (", ..." if len(ids) > IDS else "")
    )
    facts: dict[str, Any] = {key: row[key] for key in self._recent}
    self._record("bad", step=row["step"], why=why, rows=ids, **facts)

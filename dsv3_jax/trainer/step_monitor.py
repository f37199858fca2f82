"""StepMonitor: writes the row of each step; stops on NaNs and loss spikes."""

import collections
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from dsv3_jax import train
from dsv3_jax.data import loader
from dsv3_jax.errors import NotFiniteError
from dsv3_jax.linear import quantize
from dsv3_jax.parallel import comm_volume
from dsv3_jax.trainer import event_log, exit_codes, loop, metrics_writer

LOADS = 60  # times in a run that the loads of all experts are written
IDS = 64  # rows of data that are listed for a bad step
# A spike is searched among the RECENT steps, once there are ENOUGH of them.
RECENT, ENOUGH = 100, 20
# FP8 counters that rows report, and what each is a share of.
_SHARES = {"zero": "tiles", "saturated": "elements", "underflow": "elements"}

# FP8 counters by tensor class and weight, see `train.gradients`.
Counters = Mapping[str, Mapping[str, np.ndarray]]


class StepMonitor(loop.Hooks):
  """Turns the metrics of steps into rows, and finds steps that went wrong."""

  def __init__(
    self,
    writer: metrics_writer.MetricsWriter | metrics_writer.NullWriter,
    source: loader.BatchSource,
    stop: int,
    record: Callable[..., None],
    timer: event_log.GoodputTimer,
    earlier: Iterable[metrics_writer.Row] = (),
  ):
    """Prepares for the steps up to `stop`; `earlier` are the rows before them.

    `record` appends to the event log.
    """
    self.writer, self._source, self._stop = writer, source, stop
    self.record, self.timer = record, timer
    self._run = source.run
    self._bad_in_a_row, self._started = 0, False
    self.row: metrics_writer.Row = {}  # of the newest step
    self._recent = {
      key: collections.deque(maxlen=RECENT) for key in ("loss", "grad_norm")
    }
    for row in earlier:
      self._find_spike(row)

  def report(self, done: int, metrics: train.Metrics) -> None:
    """Writes the row of a step; waits for the step to finish.

    Raises:
      NotFiniteError: too many steps in a row were not finite.
      SpikeError: loss or gradient jumped, and train.spike_skip is set.
    """
    metrics = jax.device_get(metrics)
    seconds = self.timer.lap("training" if self._started else "compiling")
    self._started = True
    row = metrics_writer.to_json(self._make_row(done, metrics, seconds))
    self.row = row
    self.writer.write(row)
    for line in not_finite_tiles(metrics.get("fp8", {})):
      self.writer.note(f"step {done}: {line}")
    if metrics["finite"]:
      self._bad_in_a_row = 0
    else:
      self._bad_in_a_row += 1
      self._report_bad(row, "was skipped: loss or gradient not finite")
    if self._bad_in_a_row > self._run.train.max_bad_steps:
      raise NotFiniteError(
        f"{self._bad_in_a_row} steps in a row up to step {done} were not"
        " finite; the newest checkpoint is from before them. Lower"
        " optim.peak_lr, or look at the data of these steps:"
        f" {event_log.FILE} lists their rows, --replay_step repeats one"
      )
    if spike := self._find_spike(row):
      self._report_bad(row, spike)
      if self._run.train.spike_skip:
        raise exit_codes.SpikeError(done, f"step {done} {spike}")

  def _make_row(
    self, done: int, metrics: train.Metrics, seconds: float
  ) -> metrics_writer.Row:
    run = self._run
    length = run.data.seq_len
    row = {"step": done, "tokens": run.rows_before(done) * length}
    separate = ("load", "finite", "sent", "fp8")
    row |= {k: v for k, v in metrics.items() if k not in separate}
    for axis, n_bytes in comm_volume.bytes_sent(metrics["sent"], run).items():
      if n_bytes:
        row[f"bytes_over_{axis}"] = n_bytes
    row |= fp8_shares(metrics.get("fp8", {}))
    n_tokens = run.batch_phase(done - 1).batch_size * length
    row["tokens_per_s"] = n_tokens / seconds
    if metrics["load"].size:
      row["max_vio"] = metrics["max_vio_per_layer"].max()
    every = max(run.total_steps // LOADS, 1)
    if done % every == 0 or done in (1, self._stop):
      row["load"] = metrics["load"]
    return row

  def _find_spike(self, row: metrics_writer.Row) -> str:
    """Describes how a step exceeds the recent ones; "" if it does not."""
    factor, spikes = self._run.train.spike_factor, []
    for key, recent in self._recent.items():
      value = row[key]
      if value is None:  # not finite, which is handled elsewhere
        continue
      median = statistics.median(recent) if len(recent) >= ENOUGH else value
      if factor and value > factor * median:
        spikes.append(f"{key} {value:.4g} is {value / median:.1f} times")
      else:
        recent.append(value)
    return f"jumped: {', '.join(spikes)} the median before" if spikes else ""

  def _report_bad(self, row: metrics_writer.Row, why: str) -> None:
    """Logs a bad step and the data that it read."""
    step = row["step"] - 1
    read, ids = self._source.positions(step), self._source.row_ids(step)
    self.writer.note(
      f"step {row['step']} {why}; it read sequences {read.start} to"
      f" {read.stop - 1} of the run, rows {', '.join(map(str, ids[:IDS]))}"
      + (", ..." if len(ids) > IDS else "")
    )
    values = {key: row[key] for key in self._recent}
    self.record("bad", step=row["step"], why=why, rows=ids, **values)


def fp8_shares(counters: Counters) -> dict[str, float]:
  """Computes shares of zero tiles, saturated and underflowed elements.

  They are over all weights, under names such as `fp8_gradient_underflow`; none
  if only tiles that are not finite were counted.
  """
  shares = {}
  for tensor_class, by_path in counters.items():
    total = np.zeros(len(quantize.COUNTERS))
    for counts in by_path.values():
      total += counts.reshape(-1, len(total)).sum(0, dtype=np.float64)
    sums = dict(zip(quantize.COUNTERS, total, strict=True))
    for name, whole in _SHARES.items():
      if sums[whole]:
        shares[f"fp8_{tensor_class}_{name}"] = sums[name] / sums[whole]
  return shares


def not_finite_tiles(counters: Counters) -> Iterator[str]:
  """Yields a line for each class, weight and layer with non-finite tiles."""
  column = quantize.COUNTERS.index("not_finite")
  for tensor_class, by_path in counters.items():
    for path, counts in sorted(by_path.items()):
      by_layer = counts.reshape(-1, counts.shape[-1])[:, column]
      for layer in np.flatnonzero(by_layer):
        where = f"{path}, layer {layer}" if counts.ndim > 1 else path
        n = by_layer[layer]
        yield f"{where}: {n:.0f} tiles of the {tensor_class} are not finite"

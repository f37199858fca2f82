"""StepMonitor: writes the row of each step; stops on NaNs and loss spikes."""

import collections
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from dsv3_jax import train
from dsv3_jax.data import loader
from dsv3_jax.errors import NotFiniteError
from dsv3_jax.linear import quantize
from dsv3_jax.parallel import comm_volume
from dsv3_jax.trainer import event_log, exit_codes, loop, memory, metrics_writer

LOADS = 60  # times in a run that the loads of all experts are written
IDS = 64  # rows of data that are listed for a bad step
# Steps that are not finite are counted among the RECENT ones; a spike is
# searched among them, once there are ENOUGH.
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
    self._started = False
    earlier = list(earlier)
    self.row: metrics_writer.Row = earlier[-1] if earlier else {}  # the newest
    self._recent = {
      key: collections.deque(maxlen=RECENT) for key in ("loss", "grad_norm")
    }
    for row in earlier:
      self._find_spike(row)
    skipped = [row.get("skipped_steps", 0) for row in earlier]
    is_bad = (now > before for before, now in itertools.pairwise(skipped))
    self._bad = collections.deque(is_bad, maxlen=RECENT)

  def report(self, done: int, metrics: train.Metrics) -> None:
    """Writes the row of a step; waits for the step to finish.

    Raises:
      NotFiniteError: too many of the recent steps were not finite.
      SpikeError: loss or gradient jumped, and train.spike_skip is set.
    """
    metrics = jax.device_get(metrics)
    seconds = self.timer.lap("training" if self._started else "compiling")
    self._started = True
    row = metrics_writer.to_json(self._make_row(done, metrics, seconds))
    for change in _schedule_changes(self.row, row):
      self.writer.note(f"step {done}: {change}")
    self.row = row
    self.writer.write(row)
    for line in not_finite_tiles(metrics.get("fp8", {})):
      self.writer.note(f"step {done}: {line}")
    self._bad.append(not metrics["finite"])
    if not metrics["finite"]:
      self._report_bad(row, f"was skipped: {_what_is_bad(metrics)} not finite")
      self._limit_bad(done)
    if spike := self._find_spike(row):
      self._report_bad(row, spike)
      if self._run.train.spike_skip:
        raise exit_codes.SpikeError(done, f"step {done} {spike}")

  def _limit_bad(self, done: int) -> None:
    """Raises NotFiniteError if too many of the recent steps were skipped."""
    if (n_bad := sum(self._bad)) > self._run.train.max_bad_steps:
      raise NotFiniteError(
        f"{n_bad} of the last {len(self._bad)} steps up to step {done} were not"
        " finite; none of them was applied or saved. Lower optim.peak_lr, or"
        f" look at the data of these steps: {event_log.FILE} lists their rows,"
        " --replay_step repeats one"
      )

  def _make_row(
    self, done: int, metrics: train.Metrics, seconds: float
  ) -> metrics_writer.Row:
    run = self._run
    length = run.data.seq_len
    row = {"step": done, "tokens": run.rows_before(done) * length}
    separate = ("load", "finite", "sent", "fp8", "n_tokens")
    row |= {k: v for k, v in metrics.items() if k not in separate}
    for axis, n_bytes in comm_volume.bytes_sent(metrics["sent"], run).items():
      if n_bytes:
        row[f"bytes_over_{axis}"] = n_bytes
    row |= fp8_shares(metrics.get("fp8", {}))
    n_tokens = run.batch_phase(done - 1).batch_size * length
    row["tokens_per_s"] = metrics.get("n_tokens", n_tokens) / seconds
    peak = memory.peak_bytes()
    row["peak_bytes"] = peak.get("device", peak["host"])
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


def _schedule_changes(
  before: metrics_writer.Row, row: metrics_writer.Row
) -> Iterator[str]:
  """Yields a line for each weight that a schedule has changed since a row."""
  names = {
    "mtp_weight": "weight of the MTP loss (lambda)",
    "bias_speed": "speed of the router's bias (gamma)",
  }
  for key, name in names.items():
    if key in before and key in row and before[key] != row[key]:
      yield f"the {name} is now {row[key]:g}, after {before[key]:g}"


def _what_is_bad(metrics: train.Metrics) -> str:
  """Names what is not finite in a step that was skipped."""
  if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
    return "the update is"
  return "loss or gradient"


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

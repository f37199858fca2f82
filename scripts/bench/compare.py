"""Comparison of metrics with those of an earlier run of `scripts.bench`.

Noise is the larger spread of the two runs, and a spread is the distance of the
slowest from the fastest round, relative to the median. Medians of five normal
rounds differ by more than that in one of 270 comparisons, of three in one of
16. What one run has and the other has not, such as a busy machine, is no part
of it: see `warnings`.
"""

import contextlib
import json
import os
import pathlib
import platform
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dsv3_jax.errors import InputError

MIN_ROUNDS = 3  # fewer have no spread to speak of
SLOWER = 1  # exit code
PEAK_CHANGE = 0.1  # of the matmul peak, above which the machine has changed

Metric = dict[str, Any]
Key = tuple[str, str, int, str]  # what, shape, batch, precision
Earlier = dict[Key, Metric]


def cpu() -> str:
  """Returns the name and the number of this machine's processors."""
  name = platform.processor() or platform.machine()
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        name = line.partition(":")[2].strip()
        break
  return f"{os.cpu_count()} x {name}"


def spread(rounds: Sequence[float]) -> float:
  """Returns the range of rounds relative to their median."""
  return round((max(rounds) - min(rounds)) / statistics.median(rounds), 4)


def key(metric: Mapping[str, Any]) -> Key:
  """Returns what identifies a metric; those of old files were in float32."""
  what, shape, batch = (metric[name] for name in ("what", "shape", "batch"))
  return what, shape, batch, metric.get("precision", "fp32")


def read(path: pathlib.Path) -> Earlier:
  """Reads the metrics that `--json` printed; of repeated ones the last.

  Raises:
    InputError: the file cannot be read, or a line is not such a metric.
  """
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"--compare={path}: cannot be read: {error}") from error
  earlier = {}
  for i, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      metric = json.loads(line)
      if "change" in metric:  # a line of an earlier comparison
        continue
      if len(metric["rounds"]) < MIN_ROUNDS:
        raise InputError(
          f"--compare={path}: line {i}: has {len(metric['rounds'])} rounds, and"
          f" at least {MIN_ROUNDS} say how large the noise is"
        )
      spread(metric["rounds"])
      earlier[key(metric)] = metric
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
      if isinstance(error, InputError):
        raise
      raise InputError(
        f"--compare={path}: line {i}: is not a metric; the file holds what"
        " python -m scripts.bench --json printed"
      ) from error
  return earlier


def describe(key: Key) -> str:
  """Names a metric in words."""
  what, shape, batch, precision = key
  return f"{what} of {shape}, batch {batch}, {precision}"


def missing(
  path: str, earlier: Earlier, wanted: Iterable[Key]
) -> Iterator[str]:
  """Yields a line for each metric that the earlier run did not measure."""
  absent = [describe(key) for key in wanted if key not in earlier]
  if absent:
    held = "; ".join(map(describe, earlier)) or "nothing"
    yield from (f"--compare={path}: has no {name}" for name in absent)
    yield f"--compare={path}: has {held}; give the flags that it was made with"


def compare(old: Metric, new: Metric) -> Metric:
  """Compares a metric, of which more is better, with that of an earlier run."""
  before, after = (statistics.median(m["rounds"]) for m in (old, new))
  change = after / before - 1
  noise = max(spread(m["rounds"]) for m in (old, new))
  verdict = "within noise"
  if abs(change) > noise:
    verdict = "faster" if change > 0 else "slower"
  return {
    "what": new["what"],
    "shape": new["shape"],
    "batch": new["batch"],
    "before": before,
    "after": after,
    "change": round(change, 4),
    "noise": noise,
    "verdict": verdict,
  }


def is_regression(verdict: Metric, ours: Sequence[str]) -> bool:
  """Returns whether this package became slower, alone or in a ratio."""
  what = verdict["what"]
  return verdict["verdict"] == "slower" and (what in ours or "_ratio_" in what)


def warnings(path: str, old: Metric, new: Metric) -> Iterator[str]:
  """Yields the reasons why two metrics are not of the same machine."""
  there, here = old.get("cpu"), new.get("cpu")
  if here and there != here:
    yield f"{path} was measured on {there or 'another processor'}, not {here}"
  peaks = old.get("peak_gflops"), new.get("peak_gflops")
  if all(peaks) and abs(peaks[1] / peaks[0] - 1) > PEAK_CHANGE:
    yield (
      f"{new['what']}, batch {new['batch']}: a matmul's peak is {peaks[1]:g}"
      f" GFLOP/s, was {peaks[0]:g}: the machine itself is"
      f" {'slower' if peaks[1] < peaks[0] else 'faster'} than then"
    )

"""What a run writes while it trains: metrics, tensorboard events, progress.

In the workdir: `metrics.jsonl` (a JSON object a line, read back by `read`),
`tensorboard/` (the scalars of the same rows) and `log.txt` (the plain lines).
"""

import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

from dsv3_jax.trainer import events

METRICS, EVENTS, LOG = "metrics.jsonl", "tensorboard", "log.txt"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S  "  # before each line of log.txt
LINE_S = 5.0  # least time between two plain lines
LIVE_S = 0.1  # least time between two states of the live line

Row = dict[str, Any]


def read(path: pathlib.Path) -> list[Row]:
  """The rows of a metrics file.

  Lines that are no JSON objects are left out: a run that was killed, or that
  is writing just now, leaves a torn last one.
  """
  with open(path, encoding="utf-8", errors="replace") as lines:
    rows = map(_parse, lines)
    return [row for row in rows if row is not None]


def _parse(line: str) -> Row | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return row if isinstance(row, dict) and "step" in row else None


def truncate(path: pathlib.Path, done_steps: int) -> None:
  """Removes the rows of steps after `done_steps` and torn lines.

  A run that starts at step 0 starts an empty file. The old file is replaced
  in one operation, so a crash here loses nothing.
  """
  rows = read(path) if done_steps and path.exists() else []
  shorter = path.with_suffix(".partial")
  with open(shorter, "w", encoding="utf-8") as file:
    file.writelines(_line(row) for row in rows if row["step"] <= done_steps)
    file.flush()
    os.fsync(file.fileno())
  os.replace(shorter, path)


def _line(row: Row) -> str:
  return json.dumps(row, allow_nan=False) + "\n"


def to_json(value: Any) -> Any:
  """A value as strict JSON has it: arrays to lists, NaN and infinity to None.

  JSON has no NaN: a key whose value is null was computed and is not finite.
  """
  if hasattr(value, "tolist"):  # numpy and jax, arrays and scalars
    value = value.tolist()
  if isinstance(value, dict):
    return {key: to_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [to_json(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
  """Tensorboard tags and values of a row; loads are left to the report."""
  for key, value in row.items():
    if key.startswith("heldout_"):
      key = f"heldout/{key.removeprefix('heldout_')}"
    else:
      key = f"train/{key}"
    if isinstance(value, (int, float)):
      yield key, value
    elif key == "train/max_vio_per_layer":
      for i, part in enumerate(value):
        if part is not None:
          yield f"max_vio/router_{i}", part


def _number(value: float | None, form: str) -> str:
  return "nan" if value is None else format(value, form)


def duration(seconds: float) -> str:
  """Hours, minutes and seconds as 1:02:03, or 2:03 below an hour."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"


def printable(text: str) -> str:
  """A text whose characters that cannot be shown are replaced."""
  return "".join(
    c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
    for c in text
  )


def excerpt(text: str, length: int) -> str:
  """The start of a text on one line, without what would steer a terminal."""
  text = printable(" ".join(text.split()))
  return text if len(text) <= length else text[: length - 3] + "..."


def add_traceback(folder: pathlib.Path, error: BaseException) -> None:
  """Appends the traceback of an unexpected error to the log of a run."""
  if folder.is_dir():
    with open(folder / LOG, "a", encoding="utf-8") as file:
      file.write(time.strftime(TIME_FORMAT))
      file.writelines(traceback.format_exception(error))


class NullWriter:
  """A logbook of a process that leaves writing to process 0."""

  def __enter__(self) -> "NullWriter":
    return self

  def __exit__(self, *_: object) -> None:
    pass

  def step(self, row: Row) -> None:
    del row

  def evaluation(self, row: Row) -> None:
    del row

  def note(self, text: str) -> None:
    del text


class MetricsWriter:
  """Writes the rows of one run; a context manager.

  On a terminal, one live line shows the newest step; elsewhere a plain line is
  printed every few seconds. Evaluations and the last step are always printed.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    total_steps: int,
    done_steps: int = 0,
    stream: TextIO | None = None,
  ):
    """Opens the files, first cutting them back to the step resumed from.

    Args:
      workdir: made if it is not there.
      total_steps: the step that this run stops at; for the time left.
      done_steps: finished steps in the checkpoint that the run goes on from,
        0 for a new run. Rows of later steps are removed.
      stream: where progress goes, default standard output.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    truncate(workdir / METRICS, done_steps)
    self._metrics = open(workdir / METRICS, "a", encoding="utf-8")
    self._log = open(workdir / LOG, "a", encoding="utf-8")
    self._events = events.Events(
      workdir / EVENTS,
      first_step=done_steps + 1 if done_steps else 0,
      suffix=f".{os.getpid()}.{done_steps}",
    )
    self._stream = stream or sys.stdout
    self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
    self._total_steps = total_steps
    self._began = None  # (time, step) of the first row: compilation is over
    self._line_at = self._live_at = -math.inf
    self._unsaid = None  # progress text that no plain line has shown yet
    self._bpb = None

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, kind: object, *_: object) -> None:
    # Where something has failed, that is what is to be heard.
    with contextlib.suppress(*([OSError] if kind else [])):
      self.close()

  def step(self, row: Row) -> None:
    """Writes the row of an optimizer step; it needs `step` and `loss`."""
    row = self._write(row)
    now = time.monotonic()
    self._began = self._began or (now, row["step"])
    text = self._progress(row, now)
    self._unsaid = f"step {text}"
    if self._live and now - self._live_at >= LIVE_S:
      width = shutil.get_terminal_size().columns
      self._put(f"\r{text[: width - 1]}\x1b[K")
      self._live_at = now
    if now - self._line_at >= LINE_S:
      self._say(self._unsaid, everywhere=not self._live)
      self._line_at = now
      self._unsaid = None

  def evaluation(self, row: Row) -> None:
    """Writes an evaluation: `step`, `heldout_loss`, `heldout_bpb`, `sample`."""
    row = self._write(row)
    self._catch_up()
    self._bpb = row.get("heldout_bpb")
    text = f"step {row['step']}/{self._total_steps}"
    text += f"  held-out loss {_number(row.get('heldout_loss'), '.4f')}"
    text += f"  {_number(self._bpb, '.3f')} bits per byte"
    self._say(text)
    if sample := row.get("sample"):
      self._say("  > " + excerpt(sample, 96))

  def note(self, text: str) -> None:
    """Prints a line of text and keeps it in log.txt."""
    self._say(text)

  def close(self) -> None:
    """Shows the last step and closes all files."""
    self._catch_up()
    self._events.close()
    self._metrics.close()
    self._log.close()

  def _catch_up(self) -> None:
    """Prints the newest step, if it has not been."""
    if self._unsaid:
      self._say(self._unsaid)
      self._unsaid = None

  def _write(self, row: Row) -> Row:
    row = to_json(row)
    self._metrics.write(_line(row))
    self._metrics.flush()
    values = dict(_scalars(row))
    values.pop("train/step", None)
    self._events.add(values, row["step"])
    return row

  def _progress(self, row: Row, now: float) -> str:
    """What a person wants to know of a step, within 80 columns."""
    step = row["step"]
    parts = [f"{step}/{self._total_steps}"]
    parts.append(f"loss {_number(row['loss'], '.3f')}")
    if rate := row.get("tokens_per_s"):
      parts.append(f"{rate:,.0f} tok/s")
    began, first = self._began
    if step > first:
      left_s = (now - began) / (step - first) * (self._total_steps - step)
      parts.append(f"{duration(left_s)} left")
    if "max_vio" in row:
      parts.append(f"MaxVio {_number(row['max_vio'], '.2f')}")
    if "skipped_steps" in row:
      parts.append(f"skipped {row['skipped_steps']}")
    if self._bpb is not None:
      parts.append(f"bpb {self._bpb:.3f}")
    return "  ".join(parts)

  def _say(self, text: str, *, everywhere: bool = True) -> None:
    """A plain line in log.txt, and on the stream if it is to go everywhere."""
    self._log.write(time.strftime(TIME_FORMAT) + text + "\n")
    self._log.flush()
    if everywhere:
      self._put(("\r\x1b[K" if self._live else "") + text + "\n")

  def _put(self, text: str) -> None:
    # A model may write letters that the terminal's encoding does not have.
    encoding = self._stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    self._stream.write(text)
    self._stream.flush()

"""Writers of metrics: JSON lines, TensorBoard events, progress on a terminal.

`WRITERS` names them; `MetricsWriter` passes each row to those of a run. In the
workdir: `metrics.jsonl` (a JSON object a line, read back by `read`),
`tensorboard/` (the scalars of the same rows) and `log.txt` (what is printed).
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TextIO

from dsv3_jax import io

METRICS, EVENTS, LOG = "metrics.jsonl", "tensorboard", "log.txt"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S  "  # before each line of log.txt
LINE_S = 5.0  # least time between two plain lines
LIVE_S = 0.1  # least time between two states of the live line

Row = dict[str, Any]


def read(path: pathlib.Path) -> list[Row]:
  """Reads the rows of a metrics file; none if there is no file."""
  rows = io.read_jsonl(path) if path.exists() else []
  return [row for row in rows if "step" in row]


def truncate(path: pathlib.Path, done_steps: int) -> None:
  """Removes rows of steps after `done_steps` and torn lines; all, if that is 0.

  The old file is replaced in one operation, so a crash here loses nothing.
  """
  rows = read(path) if done_steps else []
  with io.atomic_write(path) as file:
    file.writelines(_line(row) for row in rows if row["step"] <= done_steps)


def _line(row: Row) -> str:
  return json.dumps(row, allow_nan=False) + "\n"


def to_json(value: Any) -> Any:
  """Converts a value to strict JSON: arrays to lists, NaN and infinity to None.

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


def _number(value: float | None, form: str) -> str:
  return "nan" if value is None else format(value, form)


def duration(seconds: float) -> str:
  """Formats seconds as 1:02:03, or 2:03 below an hour."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"


def printable(text: str) -> str:
  """Replaces the characters of a text that cannot be shown."""
  return "".join(
    c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
    for c in text
  )


def excerpt(text: str, length: int) -> str:
  """Returns the start of a text on one line, without control characters."""
  text = printable(" ".join(text.split()))
  return text if len(text) <= length else text[: length - 3] + "..."


def add_traceback(folder: pathlib.Path, error: BaseException) -> None:
  """Appends the traceback of an unexpected error to the log of a run."""
  if folder.is_dir():
    with open(folder / LOG, "a", encoding="utf-8") as file:
      file.write(time.strftime(TIME_FORMAT))
      file.writelines(traceback.format_exception(error))


class Terminal:
  """Prints lines, which log.txt gets too, and one live line on a terminal."""

  def __init__(self, workdir: pathlib.Path, stream: TextIO | None = None):
    """Opens log.txt; `stream` is standard output by default."""
    self._log = open(workdir / LOG, "a", encoding="utf-8")
    self._stream = stream or sys.stdout
    self.live = self._stream.isatty() and os.environ.get("TERM") != "dumb"

  def print(self, text: str, *, to_stream: bool = True) -> None:
    """Prints a line and appends it to log.txt."""
    self._log.write(time.strftime(TIME_FORMAT) + text + "\n")
    self._log.flush()
    if to_stream:
      self._put(("\r\x1b[K" if self.live else "") + text + "\n")

  def show(self, text: str) -> None:
    """Replaces the live line."""
    width = shutil.get_terminal_size().columns
    self._put(f"\r{text[: width - 1]}\x1b[K")

  def _put(self, text: str) -> None:
    # A model may write letters that the terminal's encoding does not have.
    encoding = self._stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
      self._stream.write(text)
      self._stream.flush()
    except BrokenPipeError:
      if not io.discard_closed_output():
        raise
      self.print("nobody reads the output: it goes to this file alone")

  def close(self) -> None:
    """Closes log.txt."""
    self._log.close()


@dataclasses.dataclass(frozen=True)
class Context:
  """Facts of a run that a writer is made with."""

  workdir: pathlib.Path
  done_steps: int  # of the checkpoint resumed from; later rows are void
  total_steps: int  # where the run stops
  terminal: Terminal


class Writer(Protocol):
  """Receives the rows of a run."""

  def write(self, step: int, row: Row) -> None:
    """Writes a row, of strict JSON values, after `step` steps.

    It holds the metrics of an optimizer step (with `loss`) or of an evaluation
    (with `heldout_loss`, and `sample`, a text).
    """

  def close(self) -> None:
    """Finishes writing."""


class JsonLines:
  """Writes rows to metrics.jsonl."""

  def __init__(self, context: Context):
    """Opens the file, first removing rows that the run will write again."""
    path = context.workdir / METRICS
    truncate(path, context.done_steps)
    self._file = open(path, "a", encoding="utf-8")

  def write(self, step: int, row: Row) -> None:
    """Writes a row, on disk when the call returns."""
    self._file.write(_line(row))
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class TensorBoard:
  """Writes the scalars of rows to a TensorBoard event file.

  Not with tensorboardX's own writer, which hands events to a thread; that
  thread ends when a disk is full, and the caller then waits for room in its
  queue for ever.
  """

  def __init__(self, context: Context):
    """Opens a new file, which hides later steps of older files."""
    # Slow to import: it imports torch where that is installed.
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    self._event, self._summary = event_pb2, summary_pb2
    folder, done = context.workdir / EVENTS, context.done_steps
    folder.mkdir(parents=True, exist_ok=True)
    # Two files within a second would have the same name without a suffix.
    self._file = event_file_writer.EventsWriter(
      str(folder / "events"), f".{os.getpid()}.{done}"
    )
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(done + 1 if done else 0, session_log=start)

  def write(self, step: int, row: Row) -> None:
    """Writes the scalars of a row; raises OSError if that fails."""
    value, scalars = self._summary.Summary.Value, _scalars(row)
    values = [value(tag=tag, simple_value=scalar) for tag, scalar in scalars]
    self._write(step, summary=self._summary.Summary(value=values))

  def _write(self, step: int, **fields: object) -> None:
    event = self._event.Event(wall_time=time.time(), step=step, **fields)
    self._file.write_event(event)
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
  """Yields TensorBoard tags and values; expert loads are for the report."""
  for key, value in row.items():
    if key == "max_vio_per_layer":
      for i, part in enumerate(value):
        if part is not None:
          yield f"max_vio/router_{i}", part
    elif isinstance(value, (int, float)) and key != "step":
      if key.startswith("heldout_"):
        yield f"heldout/{key.removeprefix('heldout_')}", value
      else:
        yield f"train/{key}", value


class Progress:
  """Prints progress for a person.

  On a terminal, one live line shows the newest step; elsewhere a plain line is
  printed every few seconds. Evaluations and the last step are always printed.
  """

  def __init__(self, context: Context):
    """Prints nothing yet."""
    self._terminal, self._total_steps = context.terminal, context.total_steps
    self._first = None  # (time, step) of the first row: compilation is over
    self._line_at = self._live_at = -math.inf
    self._unprinted = None  # text of the newest step, if not printed yet
    self._bpb = None

  def write(self, step: int, row: Row) -> None:
    """Shows a row."""
    if "loss" in row:
      self._step(step, row)
    if "heldout_loss" in row or "heldout_bpb" in row:
      self._evaluation(step, row)

  def _step(self, step: int, row: Row) -> None:
    now = time.monotonic()
    self._first = self._first or (now, step)
    text = self._text(step, row, now)
    self._unprinted = f"step {text}"
    if self._terminal.live and now - self._live_at >= LIVE_S:
      self._terminal.show(text)
      self._live_at = now
    if now - self._line_at >= LINE_S:
      self._terminal.print(self._unprinted, to_stream=not self._terminal.live)
      self._line_at = now
      self._unprinted = None

  def _evaluation(self, step: int, row: Row) -> None:
    self._catch_up()
    self._bpb = row.get("heldout_bpb")
    self._terminal.print(
      f"step {step}/{self._total_steps}"
      f"  held-out loss {_number(row.get('heldout_loss'), '.4f')}"
      f"  {_number(self._bpb, '.3f')} bits per byte"
    )
    if sample := row.get("sample"):
      self._terminal.print("  > " + excerpt(sample, 96))

  def _text(self, step: int, row: Row, now: float) -> str:
    """Returns a step's progress within 80 columns."""
    columns = [f"{step}/{self._total_steps}"]
    columns.append(f"loss {_number(row['loss'], '.3f')}")
    if rate := row.get("tokens_per_s"):
      columns.append(f"{rate:,.0f} tok/s")
    began, first = self._first
    if step > first:
      left_s = (now - began) / (step - first) * (self._total_steps - step)
      columns.append(f"{duration(left_s)} left")
    if "max_vio" in row:
      columns.append(f"MaxVio {_number(row['max_vio'], '.2f')}")
    if "skipped_steps" in row:
      columns.append(f"skipped {row['skipped_steps']}")
    if self._bpb is not None:
      columns.append(f"bpb {self._bpb:.3f}")
    return "  ".join(columns)

  def close(self) -> None:
    """Prints the newest step."""
    self._catch_up()

  def _catch_up(self) -> None:
    if self._unprinted:
      self._terminal.print(self._unprinted)
      self._unprinted = None


# A writer is made with the `Context` of a run; add yours here.
WRITERS: dict[str, Callable[[Context], Writer]] = {
  "jsonl": JsonLines,
  "tensorboard": TensorBoard,
  "progress": Progress,
}
DEFAULT = tuple(WRITERS)


class NullWriter:
  """Writes nothing: the writer of processes other than process 0."""

  def write(self, row: Row) -> None:
    """Ignores a row."""

  def note(self, text: str) -> None:
    """Ignores a line of text."""


class MetricsWriter:
  """Writes the rows of one run with several writers; a context manager."""

  def __init__(
    self,
    workdir: str | os.PathLike,
    total_steps: int,
    done_steps: int = 0,
    stream: TextIO | None = None,
    writers: Sequence[str] = DEFAULT,
  ):
    """Opens the writers of these names in `WRITERS`, and makes the workdir.

    `Context` explains the numbers of steps. Progress goes to `stream`, standard
    output by default.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
      self._terminal = Terminal(workdir, stream)
      opened.callback(self._terminal.close)
      context = Context(workdir, done_steps, total_steps, self._terminal)
      self._writers = [
        opened.enter_context(contextlib.closing(WRITERS[name](context)))
        for name in writers
      ]
      self._closing = opened.pop_all()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, error_type: type | None, *_: object) -> None:
    # An error that is raised already is the one to report.
    with contextlib.suppress(*([OSError] if error_type else [])):
      self.close()

  def write(self, row: Row) -> None:
    """Writes the row of an optimizer step or evaluation; it needs `step`."""
    row = to_json(row)
    for writer in self._writers:
      writer.write(row["step"], row)

  def note(self, text: str) -> None:
    """Prints a line of text and appends it to log.txt."""
    self._terminal.print(text)

  def close(self) -> None:
    """Closes all writers."""
    self._closing.close()

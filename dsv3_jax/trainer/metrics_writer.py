"""Writers of metrics: JSON lines, TensorBoard events, lines for a person.

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
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from dsv3_jax import io
from dsv3_jax.trainer import progress, terminal

METRICS, EVENTS = "metrics.jsonl", "tensorboard"

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


def add_traceback(folder: pathlib.Path, error: BaseException) -> None:
  """Appends the traceback of an unexpected error to the log of a run."""
  if folder.is_dir():
    with open(folder / terminal.LOG, "a", encoding="utf-8") as file:
      file.write(time.strftime(terminal.TIME_FORMAT))
      file.writelines(traceback.format_exception(error))


@dataclasses.dataclass(frozen=True)
class Context:
  """Facts of a run that a writer is made with."""

  workdir: pathlib.Path
  done_steps: int  # of the checkpoint resumed from; later rows are void
  total_steps: int  # where the run stops
  terminal: terminal.Terminal


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


# A writer is made with the `Context` of a run; add yours here.
WRITERS: dict[str, Callable[[Context], Writer]] = {
  "jsonl": JsonLines,
  "tensorboard": TensorBoard,
  "progress": lambda context: progress.Progress(
    context.terminal, context.total_steps
  ),
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
    lines: terminal.Terminal | None = None,
    writers: Sequence[str] = DEFAULT,
  ):
    """Opens the writers of these names in `WRITERS`, and makes the workdir.

    `Context` explains the numbers of steps. `lines`, which stays open, shows
    the progress; by default standard output does.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
      if lines is None:
        lines = terminal.Terminal(workdir)
        opened.callback(lines.close)
      self._terminal = lines
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

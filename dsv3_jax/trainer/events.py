"""Tensorboard's event files, written by the thread that logs.

The library's own writer hands events to a thread; when a disk is full that
ends, and whoever logs then waits for room in its queue for ever.
"""

import pathlib
import time
from collections.abc import Mapping

from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2


class Events:
  """One file of scalars."""

  def __init__(self, folder: pathlib.Path, first_step: int, suffix: str):
    """Opens a new file.

    Args:
      folder: made if it is not there.
      first_step: what older files have from it on is not shown.
      suffix: of the file's name; two within a second would be alike.
    """
    folder.mkdir(parents=True, exist_ok=True)
    self._file = event_file_writer.EventsWriter(str(folder / "events"), suffix)
    log = event_pb2.SessionLog
    self._write(first_step, session_log=log(status=log.START))

  def add(self, values: Mapping[str, float], step: int) -> None:
    """Writes scalars of a step by their tags.

    Raises:
      OSError: they cannot be written.
    """
    value = summary_pb2.Summary.Value
    found = [value(tag=tag, simple_value=v) for tag, v in values.items()]
    self._write(step, summary=summary_pb2.Summary(value=found))

  def _write(self, step: int, **what: object) -> None:
    event = event_pb2.Event(wall_time=time.time(), step=step, **what)
    self._file.write_event(event)
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

"""Event log of a run over all of its starts: events.jsonl in the workdir.

One JSON object a line, each with `event` and `time` (seconds since 1970):

  start   training starts at `step`; `began`: when the program started;
          `seen_at`: when the start before last wrote metrics
  saved   the checkpoint of `step` is finished
  bad     `step` was skipped or is a spike; `why`, and `rows` that it read
  end     exit `code` and `text`; missing if the process was killed

`saved` and `end` also hold the seconds since the start, by phase, and the most
memory so far, see `memory.peak_bytes`.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from dsv3_jax import io
from dsv3_jax.trainer import exit_codes, metrics_writer

FILE = "events.jsonl"
TRIES = 3  # failed starts in a row before an older checkpoint is used
PHASES = "compiling", "training", "evaluating", "saving"

Event = dict[str, Any]


def read(workdir: pathlib.Path) -> list[Event]:
  """Reads all events, oldest first; skips a torn last line."""
  path = workdir / FILE
  events = io.read_jsonl(path) if path.exists() else []
  return [event for event in events if _is_event(event)]


def _is_event(row: dict[str, Any]) -> bool:
  return type(row.get("event")) is str and type(row.get("time")) is float


def add(workdir: pathlib.Path, event: str, **fields: Any) -> None:
  """Appends an event."""
  row = {"event": event, "time": time.time()} | metrics_writer.to_json(fields)
  line = json.dumps(row) + "\n"
  path = workdir / FILE
  with open(path, "ab+") as file:
    # A line that a kill has torn ends here.
    if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
      line = "\n" + line
    file.write(line.encode())


def crashes(events: Sequence[Event]) -> tuple[int, int]:
  """Counts the failed starts since the latest saved step, and returns both.

  Starts that were killed do not count: machines that are preempted again and
  again are often preempted at the same place, where most time is spent.
  """
  n, reached = 0, -1
  for event in events:
    if event["event"] == "start" and event.get("again"):
      n = 0
    elif event["event"] == "end":
      n += event["code"] in (exit_codes.INTERNAL, exit_codes.STUCK)
    step = event["step"] if event["event"] in ("start", "saved") else -1
    if step > reached:
      n, reached = 0, step
  return n, reached


@dataclasses.dataclass
class GoodputTimer:
  """Seconds of a start by phase, see `PHASES`."""

  since: float = dataclasses.field(default_factory=time.monotonic)
  seconds: dict[str, float] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(PHASES, 0.0)
  )

  def lap(self, phase: str) -> float:
    """Adds the time since the last lap to a phase; returns it."""
    now = time.monotonic()
    lap, self.since = now - self.since, now
    self.seconds[phase] += lap
    return lap


def goodput(events: Sequence[Event]) -> dict[str, float]:
  """Sums the seconds of all starts by phase, up to the last event.

  Besides `PHASES`: `lost`, on steps that a later start repeated; `starting`,
  before the first step; `down`, from an end to the next start.
  """
  seconds = dict.fromkeys(PHASES, 0.0)
  other = dict.fromkeys(("starting", "lost", "down"), 0.0)
  at_save, last = {}, None  # `seconds` by saved step; the event before
  for event in events:
    if event["event"] == "start":
      other["starting"] += event["time"] - event["began"]
      if last:
        ended = max(event["seen_at"], last["time"])
        other["down"] += max(event["began"] - ended, 0.0)
        before = at_save.get(event["step"], seconds)
        other["lost"] += sum(seconds.values()) - sum(before.values())
        other["lost"] += ended - last["time"]
        seconds = dict(before)
    elif "seconds" in event:
      since = last.get("seconds", {})
      for phase in PHASES:
        seconds[phase] += event["seconds"][phase] - since.get(phase, 0.0)
    else:
      continue
    last = event
    if event["event"] in ("start", "saved"):
      at_save[event["step"]] = dict(seconds)
  return seconds | other

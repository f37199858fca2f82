"""What happened to a run over all of its starts: events.jsonl in the workdir.

A JSON object a line, each with `event` and `time` (seconds since 1970):

  start   from `step`; `began`: when the program did. `seen`, `seen_at`: the
          last step that the start before had reported, and when
  saved   the checkpoint of `step` is finished
  bad     `step` was skipped, or stands out; `why`, `rows` that it read
  end     with exit `code` and `text`; missing where the process was killed

`saved` and `end` also hold the seconds since the start, by what was done.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from dsv3_jax.trainer import exit_codes, metrics_writer

FILE = "events.jsonl"
TRIES = 3  # failed starts in a row, before an older checkpoint is taken
KINDS = "compiling", "training", "evaluating", "saving"

Event = dict[str, Any]


def read(workdir: pathlib.Path) -> list[Event]:
  """All events, oldest first; a torn last line is left out."""
  path = workdir / FILE
  if not path.exists():
    return []
  with open(path, encoding="utf-8", errors="replace") as lines:
    found = map(_parse, lines)
    return [event for event in found if event is not None]


def _parse(line: str) -> Event | None:
  try:
    event = json.loads(line)
  except (ValueError, RecursionError):
    return None
  good = isinstance(event, dict) and isinstance(event.get("event"), str)
  return event if good and isinstance(event.get("time"), float) else None


def add(workdir: pathlib.Path, event: str, **facts: Any) -> None:
  """Appends an event."""
  facts = {"event": event, "time": time.time()} | metrics_writer.to_json(facts)
  line = json.dumps(facts) + "\n"
  path = workdir / FILE
  with open(path, "ab+") as file:
    # What a kill has torn gets a line of its own.
    if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
      line = "\n" + line
    file.write(line.encode())


def crashes(events: Sequence[Event]) -> tuple[int, int]:
  """Starts that ended in an error since a checkpoint of a later step.

  One that was killed says nothing of the run: whoever takes machines away does
  so again and again, and often at the same place, where most time is spent.

  Args:
    events: of the run.

  Returns:
    Their number, and the latest step of which there was a checkpoint.
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
  """Seconds since a start, by what was done."""

  since: float = dataclasses.field(default_factory=time.monotonic)
  seconds: dict[str, float] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(KINDS, 0.0)
  )

  def lap(self, kind: str) -> float:
    """Counts the time since the last lap as a kind; returns it."""
    now = time.monotonic()
    lap, self.since = now - self.since, now
    self.seconds[kind] += lap
    return lap


def goodput(events: Sequence[Event]) -> dict[str, float]:
  """Seconds by what they went into, from the first start to the last event.

  The kinds of a `GoodputTimer`, and: `lost`, on steps that a later start did
  again; `starting`, before the first step; `down`, from an end to the next
  start.
  """
  kinds = dict.fromkeys(KINDS, 0.0)
  other = dict.fromkeys(("starting", "lost", "down"), 0.0)
  kept, last = {}, None  # `kinds` when a step was saved; the event before
  for event in events:
    if event["event"] == "start":
      other["starting"] += event["time"] - event["began"]
      if last:
        ended = max(event["seen_at"], last["time"])
        other["down"] += max(event["began"] - ended, 0.0)
        before = kept.get(event["step"], kinds)
        other["lost"] += sum(kinds.values()) - sum(before.values())
        other["lost"] += ended - last["time"]
        kinds = dict(before)
    elif "seconds" in event:
      since = last.get("seconds", {})
      for kind in KINDS:
        kinds[kind] += event["seconds"][kind] - since.get(kind, 0.0)
    else:
      continue
    last = event
    if event["event"] in ("start", "saved"):
      kept[event["step"]] = dict(kinds)
  return kinds | other

"""Progress: rows of a run as lines for a person, and as a live line."""

import collections
import math
import statistics
import time
from typing import Any

from dsv3_jax.trainer import terminal

LINE_S = 5.0  # least time between two plain lines
LIVE_S = 0.1  # least time between two states of the live line
RECENT = 32  # steps whose median time is that of those to come


class Progress:
  """Prints progress for a person.

  On a terminal, one live line shows the newest step; elsewhere a plain line is
  printed every few seconds. Evaluations and the last step are always printed.
  """

  def __init__(self, lines: terminal.Terminal, total_steps: int):
    """Prints nothing yet."""
    self._terminal, self._total_steps = lines, total_steps
    self._left = _TimeLeft(total_steps)
    self._line_at = self._live_at = -math.inf
    self._unprinted = None  # text of the newest step, if not printed yet
    self._score = ""  # of the newest evaluation

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Shows a row."""
    if "loss" in row:
      self._step(step, row)
    if "heldout_loss" in row or "heldout_bpb" in row:
      self._evaluation(step, row)

  def _step(self, step: int, row: dict[str, Any]) -> None:
    now = time.monotonic()
    self._left.add_step(step, now)
    columns = self._columns(step, row)
    self._unprinted = f"step {terminal.fit(columns)}"
    if now - self._live_at >= LIVE_S:
      self._terminal.show(*columns)
      self._live_at = now
    if now - self._line_at >= LINE_S:
      self._terminal.print(self._unprinted, to_stream=not self._terminal.live)
      self._line_at = now
      self._unprinted = None

  def _evaluation(self, step: int, row: dict[str, Any]) -> None:
    self._catch_up()
    line = (
      f"step {step}/{self._total_steps}"
      f"  held-out loss {_number(row.get('heldout_loss'), '.4f')}"
    )
    if "heldout_prompt_loss" in row:
      line += f"  of prompts {_number(row['heldout_prompt_loss'], '.4f')}"
    right = row.get("heldout_exact_match", row.get("heldout_accuracy"))
    if right is not None:
      line += f"  {right:.1%} right"
      self._score = f"right {right:.1%} at {step}"
    elif "heldout_prompt_loss" not in row:
      bpb = _number(row.get("heldout_bpb"), ".3f")
      line += f"  {bpb} bits per byte"
      self._score = f"bpb {bpb} at {step}"
    self._terminal.print(line)
    if sample := row.get("sample"):
      self._terminal.print("  > " + terminal.excerpt(sample, 96))
    self._left.add_evaluation(step, time.monotonic())

  def _columns(self, step: int, row: dict[str, Any]) -> list[tuple[int, str]]:
    """Returns (rank, text): on a narrow terminal the highest ranks go first."""
    loss = row.get("main_loss", row["loss"])
    columns = [(0, f"{step}/{self._total_steps}")]
    columns.append((1, f"loss {_number(loss, '.3f')}"))
    if "mtp_loss" in row and row["mtp_loss"] != 0:
      columns.append((6, f"mtp {_number(row['mtp_loss'], '.3f')}"))
    if "reward" in row:
      columns.append((2, f"reward {_number(row['reward'], '.3f')}"))
    if "grad_norm" in row:
      columns.append((7, f"norm {_number(row['grad_norm'], '.2f')}"))
    if rate := row.get("tokens_per_s"):
      columns.append((4, f"{rate:,.0f} tok/s"))
    if left := self._left.text(step):
      columns.append((2, f"{left} left"))
    if "max_vio" in row:
      columns.append((8, f"MaxVio {_number(row['max_vio'], '.2f')}"))
    if used := row.get("peak_bytes"):
      columns.append((9, f"{used / 2**30:.1f} GiB"))
    if skipped := row.get("skipped_steps"):
      columns.append((3, f"skipped {skipped}"))
    if self._score:
      columns.append((5, self._score))
    return columns

  def close(self) -> None:
    """Prints the newest step."""
    self._catch_up()

  def _catch_up(self) -> None:
    if self._unprinted:
      self._terminal.print(self._unprinted)
      self._unprinted = None


class _TimeLeft:
  """Estimates the time left: of the steps, and of the evaluations among them.

  The first step and the first evaluation compile, and are no measure of others.
  """

  def __init__(self, total_steps: int):
    self._total_steps = total_steps
    self._steps = collections.deque(maxlen=RECENT)  # seconds of each
    self._evaluations = []  # seconds of each but the first
    self._n_evaluations = self._evaluated = 0  # and the step of the newest
    self._first = self._now = None  # first step; time of the newest row

  def add_step(self, step: int, now: float) -> None:
    if self._first is None:
      self._first = step
    else:
      self._steps.append(now - self._now)
    self._now = now

  def add_evaluation(self, step: int, now: float) -> None:
    if self._n_evaluations and self._now is not None:
      self._evaluations.append(now - self._now)
    self._n_evaluations += 1
    self._evaluated, self._now = step, now

  def text(self, step: int) -> str:
    """Returns the time left after a step, or "" before it is known."""
    if not self._steps:
      return ""
    seconds = statistics.median(self._steps)
    if self._evaluations:
      every = (self._evaluated - self._first + 1) / self._n_evaluations
      seconds += statistics.median(self._evaluations) / every
    return terminal.duration(seconds * (self._total_steps - step))


def _number(value: float | None, form: str) -> str:
  return "nan" if value is None else format(value, form)

"""Tests of what is taken down about the starts of a run, and read from it."""

import pathlib
import tempfile

import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.trainer import event_log, exit_codes


def start(step, **more):
  return {"event": "start", "step": step, **more}


def saved(step):
  return {"event": "saved", "step": step}


def end(code=exit_codes.INTERNAL):
  return {"event": "end", "code": code, "text": ""}


@pytest.mark.fault("F10")
class CrashesTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("nothing", [], (0, -1)),
    ("an_error", [start(0), end()], (1, 0)),
    ("a_watchdog", [start(0), end(exit_codes.STUCK)], (1, 0)),
    ("errors_in_a_row", [start(4), end()] * 3, (3, 4)),
    ("preempted", [start(0), end(exit_codes.PREEMPTED)], (0, 0)),
    ("refused", [start(0), end(exit_codes.BAD_INPUT)], (0, 0)),
    ("kills", [start(0)] * 9 + [start(4)] * 9, (0, 4)),
    ("errors_between_kills", [start(4), end(), start(4)] * 4, (4, 4)),
    (
      "progress_in_between",
      [start(0), end(), start(0), saved(4), end()],
      (1, 4),
    ),
    (
      "the_same_again_is_no_progress",
      [start(8), end(), start(4), saved(8), end()],
      (2, 8),
    ),
    (
      "told_to_try_again",
      [start(4), end()] * 4 + [start(4, again=True), end()],
      (1, 4),
    ),
  )
  def test_counts(self, events, expected):
    self.assertEqual(event_log.crashes(events), expected)


class FileTest(absltest.TestCase):
  def test_is_read_as_it_was_added(self):
    folder = testing.folder(self)
    self.assertEqual(event_log.read(folder), [])
    event_log.add(folder, "bad", step=3, loss=float("nan"), rows=[1, 2])
    event_log.add(folder, "saved", step=4)
    bad, good = event_log.read(folder)
    self.assertGreater(bad.pop("time"), 1e9)
    self.assertEqual(
      bad, {"event": "bad", "step": 3, "loss": None, "rows": [1, 2]}
    )
    self.assertEqual(good["step"], 4)

  def test_a_torn_line_costs_no_other(self):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    event_log.add(folder, "saved", step=1)
    path = folder / event_log.FILE
    path.write_bytes(path.read_bytes() + b'{"event": "sav')
    event_log.add(folder, "saved", step=2)
    self.assertEqual([e["step"] for e in event_log.read(folder)], [1, 2])

  def test_what_is_no_event_is_left_out(self):
    folder = testing.folder(self)
    (folder / event_log.FILE).write_bytes(b'[]\n"x"\n\xff\n{"event": 3}\n{}\n')
    self.assertEqual(event_log.read(folder), [])


class GoodputTest(absltest.TestCase):
  def test_adds_up_to_the_time_there_was(self):

    def seconds(compiling, training, saving=0.0):
      kinds = dict.fromkeys(event_log.PHASES, 0.0)
      return kinds | {
        "compiling": compiling,
        "training": training,
        "saving": saving,
      }

    events = [
      # 10 s to start, 5 to compile, 20 of training up to the save, which
      # took one; 14 s of training, then killed.
      start(0, began=100.0, seen_at=0.0) | {"time": 110.0},
      saved(8) | {"time": 136.0, "seconds": seconds(5, 20, 1)},
      # 30 s later.
      start(8, began=180.0, seen_at=150.0) | {"time": 185.0},
      {"event": "bad", "time": 186.0},
      saved(16) | {"time": 210.0, "seconds": seconds(4, 20, 1)},
      # Training that was not saved.
      end() | {"time": 217.0, "seconds": seconds(4, 27, 1)},
      start(16, began=220.0, seen_at=216.0) | {"time": 221.0},
      end(0) | {"time": 221.5, "seconds": seconds(0.5, 0)},
    ]
    found = event_log.goodput(events)
    self.assertEqual(
      found,
      {
        "compiling": 9.5,
        "training": 40.0,
        "evaluating": 0.0,
        "saving": 2.0,
        "starting": 16.0,
        "lost": 14.0 + 7.0,
        "down": 30.0 + 3.0,
      },
    )
    self.assertAlmostEqual(sum(found.values()), 221.5 - 100.0)

  def test_of_nothing(self):
    self.assertEqual(sum(event_log.goodput([]).values()), 0)

  def test_a_stopwatch_counts_by_kind(self):
    watch = event_log.GoodputTimer()
    laps = [watch.lap(kind) for kind in ("training", "saving", "training")]
    self.assertAlmostEqual(watch.seconds["training"], laps[0] + laps[2])
    self.assertEqual(watch.seconds["saving"], laps[1])
    self.assertEqual(watch.seconds["evaluating"], 0)


if __name__ == "__main__":
  absltest.main()

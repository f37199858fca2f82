"""Tests of how a run starts again."""

import dataclasses
import errno
import pathlib
import signal
import subprocess
import sys

import jax
import pytest
import testing
from absl import logging
from absl.testing import absltest

from dsv3_jax import config
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.errors import NotFiniteError
from dsv3_jax.trainer import (
  crash_loop,
  event_log,
  exit_codes,
  metrics_writer,
  run_args,
)

ROOT = pathlib.Path(__file__).parents[2]
FATAL = """
import faulthandler, pathlib, sys, types
from dsv3_jax.trainer import crash_loop, event_log

def recorded_work():
  faulthandler._sigsegv()

command = types.SimpleNamespace(
  workdir=pathlib.Path(sys.argv[1]), ignore_crash_loop=False
)
with crash_loop.log_start_and_end(command, 8, 0.0, event_log.GoodputTimer()):
  recorded_work()
"""


@pytest.mark.fault("F10")
class CleanTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    run = testing.run()
    self.command = run_args.RunArgs(run, self.folder, variant="tiny", stop=9)
    self.store = checkpointer.Checkpointer(
      self.folder / "checkpoints", config.Checkpoint(keep=9)
    )
    self.addCleanup(self.store.close)
    state = testing.state(run)
    for step in (0, 4, 8):
      self.store.save(state.replace(step=jax.numpy.int32(step)), {})
    self.store.wait()

  def crash(self, n, step=8):
    for _ in range(n):
      event_log.add(self.folder, "start", step=step)
      event_log.add(
        self.folder, "end", code=exit_codes.INTERNAL, text="the usual error"
      )

  def clean(self, **changes):
    command = dataclasses.replace(self.command, **changes)
    with self.assertLogs(logging.get_absl_logger(), "ERROR") as logs:
      logging.error("so that there is one")
      crash_loop.repair_workdir(command, self.store)
    return "\n".join(logs.output[1:])

  def test_goes_on_after_a_few_failures(self):
    self.crash(event_log.TRIES - 1)
    self.assertEqual(self.clean(), "")
    self.assertEqual(self.store.steps(), [0, 4, 8])

  def test_goes_back_one_after_more(self):
    self.crash(event_log.TRIES)
    said = self.clean()
    self.assertRegex(said, "restarting from step 4; .*8.suspect now")
    self.assertEqual(self.store.steps(), [0, 4])

  def test_stays_back_when_it_fails_there(self):
    self.crash(event_log.TRIES)
    self.crash(1, step=4)
    self.clean()
    self.assertEqual(self.store.steps(), [0, 4])

  def test_stops_in_the_end(self):
    self.crash(event_log.TRIES)
    self.crash(event_log.TRIES, step=4)
    with self.assertRaisesRegex(
      manifest.MissingError, "6 starts .* step 8, the last .*: the usual err"
    ):
      self.clean()
    self.assertEqual(self.store.steps(), [0, 4, 8])

  def test_stops_where_there_is_nothing_to_go_back_to(self):
    self.crash(event_log.TRIES, step=0)
    for step in (4, 8):
      self.store.quarantine(step, checkpointer.CORRUPT)
    with self.assertRaisesRegex(manifest.MissingError, "--ignore_crash_loop"):
      self.clean()

  def test_tries_again_when_told_to(self):
    self.crash(2 * event_log.TRIES)
    self.assertEqual(self.clean(ignore_crash_loop=True), "")
    self.assertEqual(self.store.steps(), [0, 4, 8])

  def test_a_checkpoint_that_no_event_tells_of_is_progress(self):
    self.crash(event_log.TRIES, step=4)
    self.assertEqual(self.clean(), "")
    self.assertEqual(self.store.steps(), [0, 4, 8])

  def test_a_fatal_signal_is_a_failure(self):
    self.crash(event_log.TRIES - 1)
    done = subprocess.run(
      [sys.executable, "-c", FATAL, str(self.folder)], cwd=ROOT
    )
    self.assertEqual(done.returncode, -signal.SIGSEGV)
    said = self.clean()
    self.assertIn("process:\nFatal Python error: Segmentation fault", said)
    self.assertIn("in recorded_work", said)
    self.assertIn("3 starts failed", said)
    self.assertEqual(self.store.steps(), [0, 4])
    self.assertEqual(self.clean(), "")

  def test_sets_aside_what_is_no_checkpoint(self):
    (self.store.folder(8) / manifest.NAME).unlink()
    self.assertRegex(self.clean(), "8.corrupt: .*has no manifest.json")
    self.assertEqual(self.store.steps(), [0, 4])


class RecordedTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    self.command = run_args.RunArgs(
      testing.run(), self.folder, variant="tiny", stop=9
    )

  def recorded(self):
    return crash_loop.log_start_and_end(
      self.command, 4, 10.0, event_log.GoodputTimer()
    )

  def test_a_start_and_its_end(self):
    metrics = self.folder / metrics_writer.METRICS
    metrics.write_text('{"step": 6, "loss": 1.0}\n{"st')
    with self.recorded() as record:
      record("saved", step=8)
    begun, saved, ended = event_log.read(self.folder)
    self.assertEqual(begun["step"], 4)
    self.assertEqual(begun["seen_at"], metrics.stat().st_mtime)
    self.assertEqual(saved["step"], 8)
    self.assertEqual((ended["code"], ended["text"]), (exit_codes.OK, ""))

  def test_an_end_by_an_error(self):
    for error, code in (
      (exit_codes.PreemptedError("told"), exit_codes.PREEMPTED),
      (NotFiniteError("nan"), exit_codes.NOT_FINITE),
      (manifest.SaveError("full"), exit_codes.INTERNAL),
      (TypeError("a bug"), exit_codes.INTERNAL),
      (OSError(errno.ENOSPC, "No space left on device"), exit_codes.INTERNAL),
      (OSError(errno.ENAMETOOLONG, "File name too long"), exit_codes.BAD_INPUT),
    ):
      with self.assertRaises(type(error)):
        with self.recorded():
          raise error
      ended = event_log.read(self.folder)[-1]
      self.assertEqual((ended["code"], ended["text"]), (code, str(error)))


if __name__ == "__main__":
  absltest.main()

"""Tests of what watches over a process; `faults_test` has several of them."""

import contextlib
import math
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from unittest import mock

import jax
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.trainer import exit_codes, heartbeat, peers, preemption, workdir

ROOT = pathlib.Path(__file__).parents[2]


class HeartbeatTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"heartbeat_s": 1.0}, "--heartbeat=1: must be at least 2 s"),
    ({"heartbeat_s": float("nan")}, "--heartbeat=nan: must be at least 2 s"),
    ({"stuck_s": -1.0}, "--watchdog_timeout=-1: must be at least 0 s"),
    ({"grace_s": -0.5}, "--grace_period=-0.5: must be at least 0 s"),
    ({"grace_s": math.inf}, "--grace_period=inf: must be at most 1e+09 s"),
  )
  def test_says_what_is_wrong(self, fields, message):
    self.assertEqual(heartbeat.Timeouts(**fields).validate(), [message])

  def test_the_default_is_good(self):
    self.assertEqual(heartbeat.Timeouts().validate(), [])

  def test_one_process_stops_where_it_is(self):
    with heartbeat.Heartbeat() as watchdog:
      self.assertTrue(watchdog.should_continue(0))
      self.assertTrue(watchdog.should_continue(1))
      watchdog.request_stop()
      self.assertFalse(watchdog.should_continue(2))

  def test_is_told_before_the_first_step(self):
    with heartbeat.Heartbeat() as watchdog:
      watchdog.request_stop()
      self.assertFalse(watchdog.should_continue(7))

  @parameterized.parameters(False, True)
  def test_a_signal_before_the_first_step_ends_all_at_once(self, begun):
    codes = []
    self.enter_context(
      mock.patch.object(preemption, "exit_now", lambda *end: codes.append(end))
    )
    saved = lambda: "step 3 is saved"
    with heartbeat.Heartbeat(what_is_saved=saved) as watchdog:
      send = self.enter_context(mock.patch.object(watchdog, "_send"))
      if begun:
        watchdog.begin()
      signal.raise_signal(signal.SIGINT)
      while not (codes or watchdog._vote._requested):
        time.sleep(0.01)
    text = "SIGINT before the end of the first step; step 3 is saved"
    end = exit_codes.PREEMPTED, text
    self.assertEqual(codes, [] if begun else [end])
    self.assertEqual(mock.call(end=list(end)) in send.mock_calls, not begun)

  def test_says_which_checkpoint_there_is(self):
    folder = testing.folder(self)
    self.assertIn("nothing is saved yet", workdir.what_is_saved(folder))
    for name in ("0", "20", "30.orbax-checkpoint-tmp", "40.corrupt"):
      (folder / "checkpoints" / name).mkdir(parents=True)
    self.assertStartsWith(workdir.what_is_saved(folder), "step 20 is saved")

  def test_a_peer_that_leaves_is_not_taken_for_lost_nor_disconnected(self):
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    self.enter_context(theirs)
    patch = mock.patch.object
    self.enter_context(patch(jax, "process_count", return_value=2))
    self.enter_context(
      patch(peers, "connect_all", return_value={1: peers.Peer(ours, 1)})
    )
    lost = self.enter_context(patch(heartbeat.Heartbeat, "_end"))
    with heartbeat.Heartbeat() as watchdog:
      theirs.sendall(b'{"leaving": true}\n')
      while watchdog._peers:  # until its thread has read that
        time.sleep(0.01)
      theirs.setblocking(False)
      with contextlib.suppress(BlockingIOError):
        while True:  # heartbeats may have come before; no end of file
          self.assertNotEmpty(theirs.recv(1 << 16))
    lost.assert_not_called()
    theirs.settimeout(60)
    self.assertEmpty(theirs.recv(1 << 16))  # closed at the end

  def test_two_may_follow_each_other(self):
    for _ in range(2):
      with heartbeat.Heartbeat() as watchdog:
        self.assertTrue(watchdog.should_continue(0))
        self.assertTrue(watchdog.should_continue(9, last=True))


class SuperviseTest(parameterized.TestCase):
  def supervised(self, *codes):
    """The exit code, and how often a program that ends so was started."""
    folder = testing.folder(self)
    program = folder / "program"
    program.write_text(
      f"cd {folder}; echo >> starts; n=$(wc -l < starts)\n"
      f"set -- {' '.join(map(str, codes))}; shift $((n - 1))\n"
      "case $1 in KILL) kill -9 $$ ;; *) exit $1 ;; esac\n"
    )
    script = ROOT / "scripts" / "supervise.sh"
    bash = shutil.which("bash")
    done = subprocess.run(
      [bash, script, bash, program], capture_output=True, timeout=60
    )
    return done.returncode, len((folder / "starts").read_text().splitlines())

  @parameterized.parameters(0, 2, 3, 4)
  def test_ends_with_the_program(self, code):
    self.assertEqual(self.supervised(code), (code, 1))

  def test_starts_again_after_a_preemption_and_a_crash(self):
    self.assertEqual(self.supervised(75, "KILL", 75, 0), (0, 4))

  def test_needs_a_command(self):
    script = ROOT / "scripts" / "supervise.sh"
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    self.assertEqual(done.returncode, 2)
    self.assertStartsWith(done.stderr, "usage:")


if __name__ == "__main__":
  absltest.main()

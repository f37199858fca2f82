"""Faults of processes and storage, on the real program.

After every one of them the run goes on by the same command and ends in the bits
of the run that nothing happened to.
"""

import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from unittest import mock

import numpy as np
import programs
import pytest
from absl.testing import absltest, parameterized

from dsv3_jax.trainer import event_log, exit_codes, workdir

EVERY = 10  # steps, of checkpoints
HEARTBEAT_S = 5
STUCK_S = 15  # longer than compiling takes
RESTART = "resume from the newest checkpoint"


KEPT = tempfile.TemporaryDirectory()


def tearDownModule():
  KEPT.cleanup()


def _bytes(folder):
  """Returns the bytes of all files of checkpoints."""
  files = (folder / "checkpoints").rglob("*")
  return sum(p.stat().st_size for p in files if p.is_file())


class Case(programs.Programs):
  SETTINGS = (
    *programs.SETTINGS,
    "train.tokens=6400",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep=2",
    "evaluate.every=50",
  )
  STEPS = 100
  N, MESH = 1, "data=1"
  CACHE = True  # programs read what others have compiled

  whole: dict[int, pathlib.Path] = {}  # by the number of processes

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    if cls.N not in Case.whole:  # the text is part of what must be equal
      cls.launch("whole", wait=True)
      Case.whole[cls.N] = pathlib.Path(KEPT.name) / str(cls.N)
      shutil.move(cls.root / "whole", Case.whole[cls.N])

  def setUp(self):
    super().setUp()
    self.addCleanup(shutil.rmtree, self.root / "run", ignore_errors=True)

  @classmethod
  def launch(cls, name="run", *more, wait=False, point=()):
    """Starts all processes of a run; with wait, until all are done."""
    flags = programs.members(cls.N) if cls.N > 1 else [()]
    more = (f"--heartbeat={HEARTBEAT_S}", *more)
    commands = [
      cls.command(cls, name, cls.MESH, *each, *more) for each in flags
    ]
    if point:
      which, *point = point
      commands[which] = ["tests/dying.py", *point, *commands[which][2:]]
    started = programs.Started(*commands, cache=cls.CACHE)
    if not wait:
      return started
    with started:
      ended = started.ended()
    for each in ended:
      assert each.code == exit_codes.OK, each
    return ended

  @property
  def run_(self):
    return self.root / "run"

  def steps(self):
    """Steps that were reported."""
    return [row["step"] for row in programs.rows(self.run_) if "loss" in row]

  def after_step(self, n, *names):
    """A condition: step n is reported, and files are there."""
    return lambda: (
      n in self.steps()
      and all(
        any(re.fullmatch(name, there) for there in programs.names(self.run_))
        for name in names
      )
    )

  def assert_one_goes_on(self, started, code, *lines):
    """One process ended so, left what it should, and the run goes on."""
    (ended,) = started.ended()
    self.assertEqual(ended.code, code, ended)
    for line in lines:
      self.assertRegex(ended.err, line)
    self.goes_on()

  def goes_on(self):
    """The same command ends as if nothing had happened."""
    before = [s for s in programs.names(self.run_) if s.isdecimal()]
    seen = max(self.steps(), default=0)
    ended = self.launch(wait=True)
    first = int(re.search(r"tiny: (\d+) of", ended[0].out)[1])
    # What was saved is not done again.
    events = (self.run_ / event_log.FILE).read_text()
    self.assertGreaterEqual(
      first, max(map(int, before), default=0), f"{ended}\n{events}"
    )
    if seen < self.STEPS:
      self.assertGreaterEqual(first, (seen - 1) // EVERY * EVERY - EVERY)
    self.assert_whole()

  def assert_whole(self):
    """It ended in the bits of the run that was left alone."""
    whole = self.whole[self.N]
    self.assertEqual(
      programs.saved(self.run_, self.STEPS), programs.saved(whole, self.STEPS)
    )
    self.assertEqual(programs.rows(self.run_), programs.rows(whole))
    names = programs.names(self.run_)
    self.assertEqual(names, programs.names(whole))
    partial = [p for p in self.run_.rglob("*") if p.suffix == ".partial"]
    self.assertEmpty(partial)

  def kill(self, started):
    started.processes[0].kill()
    started.ended()

  def check_random_kills(self, seed, n):
    """Kills a run n times, then lets it end; anew once it has ended."""
    rng = np.random.default_rng(seed)
    per_checkpoint = _bytes(self.whole[1]) / 2
    for _ in range(n):
      began = time.monotonic()
      last = rng.uniform(1.0, 9.0)  # imports, compiles, trains, saves, ends
      with self.launch() as started:
        started.until(lambda at=began + last: time.monotonic() > at)
        self.kill(started)
      if not programs.names(self.run_):
        continue
      # Two that are kept, one that is written and one that is removed.
      self.assertLessEqual(_bytes(self.run_), 4.5 * per_checkpoint)
      if self.STEPS in self.steps():
        self.goes_on()
        shutil.rmtree(self.run_)
    self.goes_on()

  def check_signal(self, number, happened, said="saving, then exiting"):
    with self.launch() as started:
      started.until(happened)
      started.processes[0].send_signal(number)
      self.assert_one_goes_on(
        started, exit_codes.PREEMPTED, said, "rerun the command to resume"
      )


class QuickTest(Case):
  """One fault of each of two kinds; the programs are compiled once."""

  @pytest.mark.fault(
    "F01",
    "SIGKILL at a random moment, 100 times",
    "resumes from the last checkpoint; the end is bitwise identical",
  )
  def test_at_random_moments(self):
    self.check_random_kills(seed=0, n=1)

  @pytest.mark.fault(
    "F04",
    "SIGTERM, SIGINT; a second signal; a save longer than the grace period",
    "saves and exits 75; exits at once after a second signal or the "
    "grace period",
  )
  def test_sigterm_saves_and_leaves(self):
    self.check_signal(signal.SIGTERM, self.after_step(33))
    events = event_log.read(self.run_)
    starts = [e["step"] for e in events if e["event"] == "start"]
    self.assertGreaterEqual(starts[1], 33)
    self.assertEqual(
      [e["code"] for e in events if e["event"] == "end"],
      [exit_codes.PREEMPTED, exit_codes.OK],
    )


class KillTest(Case):
  """SIGKILL of the only process."""

  CACHE = False  # it is killed while it compiles too

  @pytest.mark.slow
  @pytest.mark.timeout(3600)
  @pytest.mark.fault("F01")
  def test_at_a_hundred_random_moments(self):
    self.check_random_kills(seed=1, n=100)

  @parameterized.parameters(
    ("compile", 1),  # before the first step
    ("step", 15),
    ("arrays", 1),  # of the first of all checkpoints
    ("arrays", 4),
    ("manifest", 4),
    ("rename", 4),
    ("remove", 1),
    ("removing", 1),
  )
  @pytest.mark.slow
  @pytest.mark.fault(
    "F02",
    "SIGKILL at each point of a save: before and during the arrays, "
    "before the manifest, before the rename, before and during removal "
    "of an old checkpoint",
    "the older checkpoint is intact; the partial one is never read and "
    "is removed at the next start",
  )
  def test_at_a_point(self, point, n):
    with self.launch(point=(0, point, str(n))) as started:
      self.assert_one_goes_on(started, -signal.SIGKILL)

  @pytest.mark.slow
  @pytest.mark.fault("F02")
  def test_while_arrays_are_written(self):
    with self.launch() as started:
      started.until(self.after_step(1, r".*0\.orbax-checkpoint-tmp"))
      self.kill(started)
    self.goes_on()

  @pytest.mark.slow
  @pytest.mark.fault(
    "F03",
    "ten SIGKILLs in a row, some before any progress",
    "never resumes from an older step; bounded disk use",
  )
  def test_ten_times_some_before_any_progress(self):
    for i in range(10):
      over = time.monotonic() + 3
      early = lambda over=over: time.monotonic() > over
      with self.launch() as started:
        started.until(self.after_step(10 * i) if i % 2 else early)
        self.kill(started)
      self.assertLessEqual(len(programs.names(self.run_)), 4)
    self.goes_on()


class SignalTest(Case):
  """SIGTERM and SIGINT to the only process, and two at one workdir."""

  @pytest.mark.slow
  @pytest.mark.fault("F04")
  def test_sigint_too(self):
    self.check_signal(signal.SIGINT, self.after_step(33))

  @pytest.mark.slow
  @pytest.mark.fault(
    "F05", "SIGTERM while compiling, saving, evaluating", "no hang; exits 75"
  )
  def test_while_it_compiles(self):
    self.enter_context(mock.patch.object(SignalTest, "CACHE", False))
    log = self.run_ / "log.txt"
    self.check_signal(
      signal.SIGTERM,
      lambda: log.exists() and "steps done" in log.read_text(),
      "error: SIGTERM before the end of the first step; step 0 is saved",
    )

  @pytest.mark.slow
  @pytest.mark.fault("F05")
  def test_while_it_saves(self):
    self.check_signal(
      signal.SIGTERM, self.after_step(1, r".*0\.orbax-checkpoint-tmp")
    )

  @pytest.mark.slow
  @pytest.mark.fault("F05")
  def test_while_it_evaluates(self):
    self.check_signal(signal.SIGTERM, self.after_step(50))

  @pytest.mark.slow
  @pytest.mark.fault("F04")
  def test_a_second_one_ends_it_at_once(self):
    with self.launch(point=(0, "hang", "20")) as started:
      started.until(self.after_step(18))
      for _ in range(2):
        started.processes[0].terminate()
        time.sleep(0.5)
      self.assert_one_goes_on(started, exit_codes.PREEMPTED, "exiting at once")

  @pytest.mark.slow
  @pytest.mark.fault("F04")
  def test_what_is_not_saved_in_time_is_left(self):
    point = (0, "hang", "20")
    with self.launch("run", "--grace_period=2", point=point) as started:
      started.until(self.after_step(18))
      started.processes[0].terminate()
      self.assert_one_goes_on(started, exit_codes.PREEMPTED, "not saved in 2 s")

  @pytest.mark.slow
  @pytest.mark.fault(
    "F11",
    "two runs in one workdir; the first is killed",
    "the second is refused and names the first; the lock is released",
  )
  def test_a_workdir_is_for_one_at_a_time(self):
    with self.launch() as started:
      started.until((self.run_ / workdir.LOCK).exists)
      with self.launch() as second:
        (refused,) = second.ended()
      (first,) = started.processes
      self.assertEqual(refused.code, exit_codes.BAD_INPUT)
      self.assertRegex(refused.err, f"locked by process {first.pid} on")
      first.kill()
      started.ended()
    self.goes_on()  # the lock went with its process


class LoopTest(Case):
  """Starts that fail again and again, or hang."""

  @pytest.mark.slow
  @pytest.mark.fault(
    "F10",
    "fails at the same step after every start, also by a fatal signal",
    "after three starts one checkpoint back, after three more stops",
  )
  def test_goes_back_a_checkpoint_then_stops(self):
    firsts = []
    for i in range(3 * event_log.TRIES):
      with self.launch(point=(0, "data" if i else "fail", "45")) as started:
        (ended,) = started.ended()
      if ended.code == exit_codes.NO_CHECKPOINT:
        break
      self.assertEqual(ended.code, exit_codes.INTERNAL, ended)
      self.assertIn("as it always does here", ended.err)
      firsts.append(int(re.search(r"tiny: (\d+) of", ended.out)[1]))
    # The first, if step 40 was seen to be saved before it failed, counts.
    self.assertEqual(firsts[:3] + firsts[-3:], [0, 40, 40, 30, 30, 30])
    self.assertBetween(len(firsts), 6, 7)
    self.assertIn("40.suspect", programs.names(self.run_))
    self.assertRegex(ended.err, "6 starts in a row failed .* always does")
    self.launch("run", "--ignore_crash_loop", wait=True)
    shutil.rmtree(self.run_ / "checkpoints" / "40.suspect")
    self.assert_whole()

  @pytest.mark.slow
  @pytest.mark.fault(
    "F08",
    "a process hangs",
    "stacks of all threads, the slowest process and its step; exits 124",
  )
  def test_a_hanging_step_is_ended_with_stacks(self):
    point = (0, "hang", "20")
    with self.launch(
      "run", f"--watchdog_timeout={STUCK_S}", point=point
    ) as started:
      self.assert_one_goes_on(
        started,
        exit_codes.STUCK,
        r"dying.py.* in hang",
        rf"process 0: no progress for {STUCK_S} s after step 1[89] was",
      )


class StorageTest(Case):
  """Disks that are full or cannot be written."""

  def limit(self, process, n_bytes):
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

  def check_full(self, code, *more):
    with self.launch("run", *more) as started:
      started.until(self.after_step(21, "20"))
      saved = programs.saved(self.run_, 20)
      self.limit(started.processes[0], 30_000)  # rows need less, arrays more
      (ended,) = started.ended()
    self.assertEqual(ended.code, code, ended)
    self.assertNotIn("Traceback", ended.err)
    self.assertEqual(programs.saved(self.run_, 20), saved)
    self.assertEmpty([n for n in programs.names(self.run_) if "tmp" in n])
    return ended

  @pytest.mark.fault(
    "F12",
    "disk full during a save, by limit and on a tmpfs",
    "error at the next step, no partial file, last good checkpoint "
    "retained; stops, or continues and reports at the end that it is "
    "not saved",
  )
  @pytest.mark.fault("F21")
  @pytest.mark.slow
  def test_a_full_disk_is_said_at_the_next_step(self):
    ended = self.check_full(exit_codes.INTERNAL)
    self.assertRegex(
      ended.err, r"checkpoints/\d+ could not be saved: .*File too large"
    )
    self.assertLess(self.steps()[-1], 60)
    self.goes_on()

  @pytest.mark.slow
  @pytest.mark.fault("F12")
  def test_or_the_run_goes_on_and_says_that_its_end_is_not_saved(self):
    ended = self.check_full(
      exit_codes.INTERNAL, "--set=checkpoint.on_error=continue", "--steps=60"
    )
    self.assertEqual(self.steps()[-1], 60)
    self.assertRegex(ended.out, "could not be saved: .*; training continues")
    self.assertRegex(ended.err, "the last step is not saved")
    self.launch(wait=True)
    self.assert_whole()

  def mounted(self, *options):
    """A small file system of its own, where that is allowed."""
    folder = self.root / "mounted"
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
      self.skipTest("only root may mount")
    self.addCleanup(subprocess.run, ["umount", str(folder)], check=True)
    (folder / "run").mkdir()
    self.run_.symlink_to(folder / "run")
    self.addCleanup(self.run_.unlink)
    return folder

  @pytest.mark.slow
  @pytest.mark.fault("F12")
  def test_a_full_file_system(self):
    folder = self.mounted("size=900k")
    with self.launch() as started:
      (ended,) = started.ended()
    self.assertEqual(ended.code, exit_codes.INTERNAL, ended)
    self.assertRegex(ended.err, "error: .*No space left on device")
    self.assertNotIn("Traceback", ended.err)
    subprocess.run(["mount", "-o", "remount,size=9m", folder], check=True)
    self.goes_on()

  @pytest.mark.slow
  @pytest.mark.fault(
    "F13",
    "workdir read-only, or below a file",
    "refused before compiling; exits 2",
  )
  def test_a_file_system_that_cannot_be_written(self):
    folder = self.mounted("size=9m")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    with self.launch() as started:
      (ended,) = started.ended()
    self.assertEqual(ended.code, exit_codes.BAD_INPUT, ended)
    self.assertRegex(ended.err, "cannot be written: .*Read-only")

  @pytest.mark.slow
  @pytest.mark.fault("F14")
  def test_a_damaged_checkpoint_is_quarantined(self):
    self.launch("run", "--steps=30", wait=True)
    folder = self.run_ / "checkpoints" / "30"
    largest = max(folder.rglob("d/*"), key=lambda p: p.stat().st_size)
    os.truncate(largest, 10)
    ended = self.launch(wait=True)
    self.assertRegex(ended[0].out, "tiny: 20 of 100")
    self.assertRegex(ended[0].err, "quarantined: .*30.corrupt: .*: 10 bytes")
    shutil.rmtree(self.run_ / "checkpoints" / "30.corrupt")
    self.assertEqual(
      programs.saved(self.run_, 100), programs.saved(self.whole[self.N], 100)
    )


@pytest.mark.fault(
  "F26", "other intervals of checkpoints and evaluations", "bitwise identical"
)
class IntervalsTest(Case):
  """Intervals of evaluations and checkpoints."""

  @pytest.mark.slow
  def test_changes_nothing(self):
    self.launch(
      "run",
      "--set=checkpoint.every=7",
      "--set=checkpoint.keep=1",
      "--set=evaluate.every=9",
      wait=True,
    )
    whole = self.whole[1]
    self.assertEqual(programs.saved(self.run_, 100), programs.saved(whole, 100))
    steps = lambda rows: [row for row in rows if "loss" in row]
    self.assertEqual(
      steps(programs.rows(self.run_)), steps(programs.rows(whole))
    )


class TwoTest(Case):
  """Faults of one of two processes."""

  N, MESH = 2, "data=2"

  def check_lost(self, index, number, says):
    with self.launch() as started:
      started.until(self.after_step(23))
      started.processes[index].send_signal(number)
      others = [i for i in range(self.N) if i != index]
      for each in started.ended(*others):
        self.assertEqual(each.code, exit_codes.INTERNAL, each)
        self.assertRegex(each.err, f"error: process {index} {says}.*{RESTART}")
        self.assertNotIn("Traceback", each.err)
    self.goes_on()

  @pytest.mark.fault(
    "F06",
    "SIGTERM to one of two and of four processes",
    "all save the same step and exit 75",
  )
  @pytest.mark.slow
  def test_one_is_told_to_leave_and_all_do(self):
    with self.launch() as started:
      started.until(self.after_step(23))
      started.processes[-1].terminate()
      ended = started.ended()
    steps = set()
    for each in ended:
      self.assertEqual(each.code, exit_codes.PREEMPTED, each)
      (step,) = re.findall(r"preempted; step (\d+) is saved", each.err)
      steps.add(step)
    self.assertLen(steps, 1)
    self.goes_on()

  @pytest.mark.fault(
    "F07",
    "SIGKILL or SIGSTOP of one of two and of four processes, the first "
    "or another; an error in one",
    "all exit and name it, a silent one after the heartbeat timeout; the end is"
    " bitwise identical",
  )
  @pytest.mark.slow
  def test_another_is_killed(self):
    self.check_lost(self.N - 1, signal.SIGKILL, "disconnected")

  @pytest.mark.slow
  @pytest.mark.fault("F07")
  def test_the_first_is_killed(self):
    self.check_lost(0, signal.SIGKILL, "disconnected")

  @pytest.mark.slow
  @pytest.mark.fault("F07")
  def test_another_is_stopped(self):
    self.check_lost(1, signal.SIGSTOP, f"sent no heartbeat for {HEARTBEAT_S} s")

  @pytest.mark.slow
  @pytest.mark.fault("F07")
  def test_the_first_is_stopped(self):
    self.check_lost(0, signal.SIGSTOP, f"sent no heartbeat for {HEARTBEAT_S} s")

  @pytest.mark.slow
  @pytest.mark.fault("F08")
  def test_one_hangs(self):
    point = (1, "hang", "20")
    with self.launch(
      "run", f"--watchdog_timeout={STUCK_S}", point=point
    ) as started:
      for each in started.ended():
        self.assertEqual(each.code, exit_codes.STUCK, each)
        self.assertRegex(
          each.err,
          f"process 1: no progress for {STUCK_S} s after step 1[89] was",
        )
        self.assertIn("most recent call first", each.err)
    self.goes_on()

  @pytest.mark.slow
  @pytest.mark.fault("F07")
  def test_one_fails(self):
    with self.launch(point=(1, "fail", "20")) as started:
      ended = started.ended()
    for each in ended:
      self.assertEqual(each.code, exit_codes.INTERNAL, each)
      self.assertIn("as it always does here", each.err)
    self.goes_on()


@pytest.mark.slow
class FourTest(TwoTest):
  """Faults of one of four processes."""

  N, MESH = 4, "data=4"


if __name__ == "__main__":
  absltest.main()

"""Tests of the ways to start several processes that the documents show."""

import pathlib
import re
import shlex
import shutil
import subprocess

import testing
from absl import flags
from absl.testing import absltest, flagsaver

from dsv3_jax.trainer import distributed
from experiments import cli, pretrain

ROOT = pathlib.Path(__file__).parents[2]
SLURM = ROOT / "scripts" / "slurm.sh"

# A node list of two, and both processes of a job one after the other.
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames list-of-this-job" ] && printf 'alpha\\nbeta\\n'
"""
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
for i in 0 1; do SLURM_PROCID=$i "$@"; done
"""
PYTHON = """#!/usr/bin/env bash
printf '%s\\t' "$@"
echo
"""


def commands(text):
  """The flags of each experiments.pretrain in a page, lines joined."""
  for line in text.replace("\\\n", " ").splitlines():
    _, found, rest = line.partition("-m experiments.pretrain")
    if found:
      yield shlex.split(rest.rstrip("'"))


def understood(arguments):
  """The command that the arguments stand for; all must be good."""
  with flagsaver.flagsaver():
    flags.FLAGS.unparse_flags()
    problems = cli.parse_flags(["program", *arguments])
    command, more = cli._command(pretrain.variants())
  assert not problems + more, (arguments, problems + more)
  return command


class SlurmTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = testing.folder(self)
    self.bash = shutil.which("bash")
    for name, text in (
      ("bin/scontrol", SCONTROL),
      ("bin/srun", SRUN),
      (".venv/bin/python", PYTHON),
    ):
      path = self.root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
      path.chmod(0o755)
    (self.root / "scripts").symlink_to(SLURM.parent)

  def submit(self, *arguments, **job):
    env = {"PATH": f"{self.root / 'bin'}:/usr/bin:/bin"} | job
    return subprocess.run(
      [self.bash, SLURM, *arguments],
      env=env,
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )

  def test_starts_a_process_a_node_that_know_each_other(self):
    done = self.submit(
      "--steps=7",
      "--set=data.path=a b",
      SLURM_SUBMIT_DIR=str(self.root),
      SLURM_JOB_NODELIST="list-of-this-job",
      SLURM_JOB_ID="123456",
      SLURM_NTASKS="2",
    )
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    lines = done.stdout.splitlines()
    self.assertLen(lines, 2)
    for i, line in enumerate(lines):
      dash_m, module, *arguments, _ = line.split("\t")
      self.assertEqual((dash_m, module), ("-m", "experiments.pretrain"))
      command = understood(arguments)
      self.assertEqual(
        command.processes, distributed.Processes("alpha:23456", 2, i)
      )
      self.assertEqual(command.stop, 7)
      self.assertEqual(command.run.data.path, "a b")

  def test_says_how_to_start_it(self):
    done = self.submit()
    self.assertEqual(done.returncode, 1)
    self.assertIn("start it with sbatch", done.stderr)

  def test_all_that_sbatch_reads_stands_before_what_bash_runs(self):
    lines = SLURM.read_text().splitlines()
    asked = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    run = [i for i, line in enumerate(lines) if re.match(r"[^#\s]", line)]
    self.assertLess(max(asked), min(run))
    self.assertIn("#SBATCH --no-requeue", lines)

  def test_bash_can_read_it(self):
    subprocess.run([self.bash, "-n", SLURM], check=True, timeout=60)


class PageTest(absltest.TestCase):
  def test_its_commands_are_understood(self):
    text = (ROOT / "docs" / "processes.md").read_text()
    found = [understood(arguments) for arguments in commands(text)]
    who = [(c.processes.coordinator, c.processes.index) for c in found]
    self.assertEqual(who, [("alpha:12345", 0), ("alpha:12345", 1), ("auto", 0)])


if __name__ == "__main__":
  absltest.main()

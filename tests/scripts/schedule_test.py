"""Tests of the script that shows a schedule."""

import json
import pathlib
import subprocess
import sys

import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.parallel.pipeline import schedules
from scripts import schedule as script

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
  """Exit code, output and errors of the script."""
  return testing.command_line(script.main, *arguments)


class ScriptTest(parameterized.TestCase):
  def test_json_is_what_is_promised(self):
    command = [sys.executable, "-m", "scripts.schedule", "--json"]
    sizes = ["--schedule=dualpipe", "--ranks=4", "--microbatches=8"]
    done = subprocess.run(
      [*command, *sizes, "--times=F=1,B=2,W=1,FB=3"],
      capture_output=True,
      check=True,
      cwd=ROOT,
    )
    found = json.loads(done.stdout)
    self.assertEqual(
      list(found), ["ops", "makespan", "idle", "peak_activations"]
    )
    self.assertEqual(
      " ".join(found["ops"][1]),
      "F0 F1 F0 F1 F0 B1 F1&B0 F0&B1 F1&B0 B1 B0 I1 I0 W W",
    )
    self.assertEqual(found["makespan"], 26)
    self.assertEqual(found["idle"], [2] * 4)
    self.assertEqual(found["peak_activations"], [5] * 4)

  def test_json_has_no_rounding_errors(self):
    code, out, _ = run("--json", "--times=FB=2.4")
    self.assertEqual(code, 0)
    self.assertEqual(json.loads(out)["idle"][3], 4.2)

  def test_text_tells_what_runs_and_what_it_comes_to(self):
    code, out, _ = run("--ranks=4", "--microbatches=8")
    self.assertEqual(code, 0)
    lines = [line.split() for line in out.splitlines()]
    self.assertIn("7 F0:3&B1:1 | | F1:3&B0:1".split(), lines)
    self.assertIn("10 . | | .".split(), lines)
    self.assertIn("1 1, 2 2 5".split(), lines)
    self.assertIn("makespan 26, of which a rank is idle 2 at most (7.7%)", out)
    self.assertIn("without communication: 2\n16 ticks in lock-step", out)

  def test_communication_is_counted(self):
    sizes = "--schedule=1f1b", "--ranks=2", "--microbatches=1"
    _, out, _ = run(*sizes, "--comm=0.5", "--json")
    self.assertEqual(json.loads(out)["makespan"], 7)

  def test_every_problem_is_listed(self):
    code, out, err = run(
      "--schedule=dualpip",
      "--ranks=x",
      "--tims=F=1",
      "--comm=-1",
      "stray",
      "--times=Q=1,W=y,B=0",
      "--png=/no/such/folder/a.png",
    )
    self.assertEqual(code, 2)
    self.assertEmpty(out)
    for line, expected in zip(
      err.splitlines(),
      (
        "unknown flag '--tims=F=1'; did you mean --times?",
        "stray argument 'stray'",
        "--ranks=x: expected a whole number",
        "schedule 'dualpip': one of",
        "--times=Q=1: must be one of F, B, W, FB",
        "--times=W=y: expected a number",
        "Times.B=0.0: must be above 0",
        "Times.comm=-1.0: must be at least 0",
        "--png=/no/such/folder/a.png: must be a .png file in a folder",
      ),
      strict=True,
    ):
      self.assertStartsWith(line, f"error: {expected}")

  @parameterized.parameters(
    (["--ranks=5", "--microbatches=9"], "5 ranks: must be even"),
    (["--ranks=4", "--microbatches=6"], "6 micro-batches: must be even"),
    (["--json=maybe"], "--json=maybe: expected true or false"),
    (["--ranks"], "Missing value"),
  )
  def test_bad_flags_exit_2(self, arguments, message):
    code, out, err = run(*arguments)
    self.assertEqual((code, out), (2, ""))
    self.assertIn(message, err)

  def test_help(self):
    code, out, _ = run("--help")
    self.assertEqual(code, 0)
    self.assertIn("--microbatches", out)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_the_picture_is_drawn_at_its_size(name, tmp_path):
  path = tmp_path / "schedule.png"
  sizes = "--ranks=2", "--microbatches=4"
  code, out, err = run(f"--schedule={name}", *sizes, f"--png={path}", "--json")
  assert (code, err) == (0, "")
  json.loads(out)
  png = path.read_bytes()
  assert png.startswith(b"\x89PNG")
  width, height = (int.from_bytes(png[i : i + 4]) for i in (16, 20))
  assert (width, height) == (1080, 351)


if __name__ == "__main__":
  absltest.main()

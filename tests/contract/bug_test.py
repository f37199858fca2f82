"""Tests that a bug is shown as one: exit code 70, with file and line."""

import pathlib
import shutil
import subprocess
import sys

import programs
import testing
from absl.testing import absltest

from dsv3_jax.trainer import exit_codes, terminal

GOOD = "  experts = jax.lax.top_k(biased, cfg.top_k)[1]\n"
# NumPy's and JAX's errors of shapes are ValueErrors.
BAD = "  biased = jnp.where(biased > 0, biased, jnp.ones(3))\n"


class BugTest(absltest.TestCase):
  def test_shapes_that_do_not_fit_in_the_router_show_file_and_line(self):
    root = testing.folder(self)
    for name in ("dsv3_jax", "experiments"):
      shutil.copytree(programs.ROOT / name, root / name)
    path = root / "dsv3_jax" / "model" / "router.py"
    before, after = path.read_text().split(GOOD)
    path.write_text(before + BAD + GOOD + after)
    line = before.count("\n") + 1
    text = root / "text.txt"
    text.write_text("".join(programs.PROSE.format(i) for i in range(200)))
    settings = (*programs.SETTINGS, f"data.path={text}")
    done = subprocess.run(
      [sys.executable, "-m", "experiments.pretrain", "--variant=tiny"]
      + [f"--workdir={root / 'run'}", "--mesh=data=1", "--steps=2"]
      + [f"--set={setting}" for setting in settings],
      cwd=root,
      env=programs.environment() | {"PYTHONPATH": str(root)},
      capture_output=True,
      text=True,
      timeout=programs.TIMEOUT_S,
    )
    log = pathlib.Path(root / "run" / terminal.LOG).read_text()
    self.assertEqual(done.returncode, exit_codes.INTERNAL, done.stderr)
    for shown in (done.stderr, log):
      self.assertIn(f'File "{path}", line {line}', shown)
      self.assertIn("ValueError: Incompatible shapes for broadcasting", shown)


if __name__ == "__main__":
  absltest.main()

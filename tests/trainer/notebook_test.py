"""Tests of `Trainer(run, workdir).fit()` in notebooks and other programs."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import numpy as np
import programs
import pytest
import testing
from absl.testing import absltest

from dsv3_jax import config, train
from dsv3_jax.config import presets
from dsv3_jax.trainer import (
  Trainer,
  event_log,
  metrics_writer,
  terminal,
  trainer,
)

PROGRAM = """
import sys
from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.trainer import Trainer

run = config.override(presets.TINY, *sys.argv[1:])
result = Trainer(run, "run", stop=2).fit()
assert int(result.state.step) == result.metrics["step"] == 2
print(sorted(result.heldout))
"""


# Runs the code cells of a notebook as IPython does; shows what each ends in.
CELLS = """
import ast, json, sys

names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
  if cell["cell_type"] == "code":
    body, last = ast.parse("".join(cell["source"])).body, None
    if isinstance(body[-1], ast.Expr):
      last = ast.Expression(body.pop().value)
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    shown = last and eval(compile(last, "cell", "eval"), names)
    for name in ("_repr_html_", "_repr_png_", "__repr__"):
      if hasattr(shown, name):
        assert getattr(shown, name)(), name
"""


class QuickstartTest(absltest.TestCase):
  @pytest.mark.slow
  @pytest.mark.timeout(1200)  # it trains twice
  def test_every_cell_runs_as_written(self):
    folder = testing.folder(self)
    name = programs.ROOT / "examples" / "quickstart.ipynb"
    # In a folder of its own, as `runs/` beside the notebook may be a user's.
    notebook = shutil.copy(name, folder)
    done = subprocess.run(
      [sys.executable, "-c", CELLS, notebook],
      cwd=folder,
      env=programs.environment() | {"XLA_FLAGS": "", "MPLBACKEND": "agg"},
      capture_output=True,
      text=True,
      timeout=1100,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, r"softplus +\d\.\d{3} +\d\.\d\d\n$")


class ShowTest(absltest.TestCase):
  """Things that a notebook shows."""

  def test_a_trainer_is_a_table(self):
    folder = testing.folder(self)
    run = Trainer(presets.TINY, folder, stop=7, variant="<mine>")
    self.assertEmpty(run.metrics())
    self.assertRegex(repr(run), r"^Trainer\n  variant +<mine>\n")
    self.assertRegex(repr(run), r"step +0 of 7")
    lines = '{"step": 3, "loss": 1.25, "max_vio": null}\n{"step": 4, "torn'
    (folder / metrics_writer.METRICS).write_text(lines)
    self.assertRegex(repr(run), r"step +3 of 7\n  loss +1.25$")
    self.assertIn("<th>variant</th><td>&lt;mine&gt;</td>", run._repr_html_())

  def test_a_result_is_a_table(self):
    state = mock.Mock(step=np.int32(4))
    result = trainer.FitResult(state, {"loss": 2.0}, {"heldout_bpb": 1.5})
    self.assertRegex(
      repr(result), r"^FitResult\n  step +4\n  loss +2\n  heldout_bpb +1.5$"
    )


class NotebookTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    text = self.folder / "text.txt"
    text.write_text("".join(programs.PROSE.format(i) for i in range(200)))
    self.settings = (*programs.SETTINGS, f"data.path={text}")

  def trainer(self, stop):
    run = config.override(presets.TINY, *self.settings)
    return Trainer(run, str(self.folder / "run"), stop=stop, mesh={"data": 2})

  @pytest.mark.slow  # package_test.py imports it there
  def test_runs_from_another_folder(self):
    done = subprocess.run(
      [sys.executable, "-c", PROGRAM, *self.settings],
      cwd=self.folder,
      env=programs.environment(),
      capture_output=True,
      text=True,
      timeout=programs.TIMEOUT_S,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn("heldout_bpb", done.stdout)
    self.assertLen(programs.rows(self.folder / "run"), 3)

  def enter_mesh_of_two(self):
    """A process of tests has more devices than the run uses."""
    make_mesh = lambda sizes: trainer.distributed.device_mesh.make_mesh(sizes)
    self.enter_context(
      mock.patch.object(trainer.distributed, "mesh", make_mesh)
    )

  def test_a_second_trainer_resumes_and_signals_stay(self):
    self.enter_mesh_of_two()
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    before = set(threading.enumerate())
    self.assertEqual(int(self.trainer(2).fit().state.step), 2)
    result = self.trainer(4).fit()
    self.assertEqual(result.metrics["step"], 4)
    self.assertIn("heldout_bpb", result.heldout)
    starts = [
      event["step"]
      for event in event_log.read(self.folder / "run")
      if event["event"] == "start"
    ]
    self.assertEqual(starts, [0, 2])
    self.assertEqual(
      handlers, [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    )
    self.assert_threads_end(before)

  def test_an_error_leaves_no_thread_lock_or_open_file(self):
    self.enter_mesh_of_two()
    self.trainer(1).fit()
    before, files = set(threading.enumerate()), self.open_files()
    error = None  # with its traceback, as a notebook keeps it
    with mock.patch.object(train, "make_step", side_effect=ValueError("bug")):
      try:
        self.trainer(2).fit()
      except ValueError as e:
        error = e
    self.assertEqual(str(error), "bug")
    self.assert_threads_end(before)
    self.assertEqual(self.open_files(), files)
    log = (self.folder / "run" / terminal.LOG).read_text()
    self.assertIn("ValueError: bug", log)
    self.assertEqual(int(self.trainer(2).fit().state.step), 2)

  def assert_threads_end(self, before):
    """All but the threads before end within seconds, if not at once.

    Orbax closes the event loop of each save and restore without waiting for its
    threads, asyncio_0 and so on, which end a moment later, error or not.
    """
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
      time.sleep(0.01)
    self.assertEmpty(set(threading.enumerate()) - before)

  def open_files(self):
    links = []
    for link in pathlib.Path("/proc/self/fd").iterdir():
      try:
        links.append(os.readlink(link))
      except FileNotFoundError:  # of the listing itself
        pass
    return sorted(name for name in links if str(self.folder) in name)


if __name__ == "__main__":
  absltest.main()

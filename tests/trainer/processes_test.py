"""Tests of several processes that train as one, as they are really started."""

import re
import shutil

import numpy as np
import programs
import pytest
import testing
from absl.testing import absltest

from dsv3_jax import config, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.config import presets
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import metrics_writer, terminal
from experiments import cli

STEPS = 4
# What takes longer to compile.
MORE = (
  "n_layers=2",
  "n_dense_layers=1",
  "dense_ffn_dim=24",
  "mtp.depth=1",
  "evaluate.sample_tokens=4",
)


class Programs(programs.Programs):
  """Runs that are compared with the one in one process."""

  def rows(self, name):
    return metrics_writer.read(self.root / name / metrics_writer.METRICS)

  def assert_same_steps(self, name, steps):
    """The rows of steps are those of the run in one process."""
    of = lambda rows, key: {r["step"]: r[key] for r in rows if key in r}
    actual, expected = self.rows(name), self.rows("one")
    for key in ("loss", "main_loss", "mtp_loss", "grad_norm", "heldout_loss"):
      got, want = of(actual, key), of(expected, key)
      self.assertTrue(want.keys() & steps)
      for step in want.keys() & steps:
        np.testing.assert_allclose(got[step], want[step], rtol=1e-6)
    for key in ("load", "max_vio", "max_vio_per_layer"):
      got, want = of(actual, key), of(expected, key)
      self.assertEqual(want.keys(), set(range(1, STEPS + 1)))
      for step in steps:
        self.assertEqual(got[step], want[step])

  def assert_written_once(self, name, ended):
    folder = self.root / name
    rows = [row["step"] for row in self.rows(name) if "loss" in row]
    self.assertEqual(rows, list(range(1, STEPS + 1)))
    log = (folder / terminal.LOG).read_text()
    for line in ("tiny: 0 of 4 steps done", "step 4/4  loss", "held-out loss"):
      self.assertEqual(log.count(line), 1, log)
    self.assertLen(list((folder / metrics_writer.EVENTS).iterdir()), 1)
    for file in ("config.json", "env.json", "summary.json"):
      self.assertLen(list(folder.rglob(file)), 1)
    self.assertEmpty(list(folder.rglob("*.partial")))
    self.assertIn("held-out loss", ended[0].out)
    for other in ended[1:]:  # says nothing of its own
      # Gloo's threads may write a line and its end apart.
      lines = filter(None, other.out.splitlines())
      # Of Gloo's message, pieces of which processes write in turns.
    pieces = "[Gloo]", "connected peer ranks"
    for line in lines:
      self.assertTrue(any(piece in line for piece in pieces), line)

  def check_one_goes_on(self):
    """One process, one device, from what two have saved in the middle."""
    shutil.copytree(self.root / "two", self.root / "after")
    shutil.rmtree(self.root / "after" / "checkpoints" / "4")
    self.train("after", "data=1")
    log = (self.root / "after" / terminal.LOG).read_text()
    self.assertIn("tiny: 2 of 4 steps done", log)
    self.assert_same_steps("after", {3, 4})


@pytest.mark.fault("F24")
class TwoProcessesTest(Programs):
  def test_train_as_one(self):
    self.train("one", "data=2,expert=2")
    ended = self.train("two", "data=2,expert=2", n=2)
    self.assert_same_steps("two", {1, 2, 3, 4})
    self.assert_written_once("two", ended)
    self.check_first_save("two")

  def check_first_save(self, name):
    """It holds, on one device, the state that one device begins with."""
    run = config.override(presets.TINY, *self.settings)
    mesh = device_mesh.make_mesh({})
    folder = self.root / name / "checkpoints"
    checkpoints = checkpointer.Checkpointer(folder, run.checkpoint)
    self.addCleanup(checkpoints.close)
    self.assertEqual(checkpoints.steps(), [0, 2, 4])
    like = train.abstract_state(run, mesh)
    saved = checkpoints.restore(0, like)
    self.assertEqual(checkpoints.metadata(0)["rows"], 0)
    first = train.make_state(run, mesh, seed=0)
    testing.assert_same(testing.host(saved), testing.host(first))
    rows = checkpoints.metadata(2)["rows"]
    self.assertEqual(rows, 2 * run.train.batch_size)


@pytest.mark.slow
class FourProcessesTest(Programs):
  SETTINGS = (*programs.SETTINGS, *MORE)

  def test_train_as_one_on_two_nodes(self):
    self.train("one", "node=2,expert=2")
    ended = self.train("four", "node=2,expert=2", n=4)
    self.assert_same_steps("four", {1, 2, 3, 4})
    self.assert_written_once("four", ended)


@pytest.mark.slow
class PipelineTest(Programs):
  SETTINGS = (*programs.SETTINGS, *MORE, "train.micro_batches=4")

  def test_stages_train_as_one_device_does_which_goes_on(self):
    self.train("one", "data=1")
    schedule = "--set=parallel.schedule=dualpipe"
    ended = self.train("two", "pipe=2,expert=2", schedule, n=2)
    self.assert_same_steps("two", {1, 2, 3, 4})
    self.assert_written_once("two", ended)
    self.check_one_goes_on()


@pytest.mark.fault("F25")
class RowsTest(absltest.TestCase):
  def test_each_row_is_read_by_one_process(self):
    script = (
      "import sys\n"
      "from dsv3_jax.parallel import device_mesh\n"
      "from dsv3_jax.trainer import distributed\n"
      "address, n, i = sys.argv[1], *map(int, sys.argv[2:])\n"
      "distributed.use_virtual_devices(2, spare_threads=True)\n"
      "distributed.Processes(address, n, i, 60).join()\n"
      "mesh = distributed.mesh({'data': 2, 'expert': 2})\n"
      "print(device_mesh.local_rows(8, mesh))\n"
    )
    address = f"127.0.0.1:{testing.free_port()}"
    ended = programs.together(
      *(["-c", script, address, "2", str(i)] for i in range(2)), timeout_s=60
    )
    for each in ended:
      self.assertEqual(each.code, 0, each)
    rows = [set(map(int, re.findall(r"\d+", each.out))) for each in ended]
    self.assertEqual(rows, [{0, 1, 2, 3}, {4, 5, 6, 7}])


@pytest.mark.fault(
  "F09",
  "a process never joins, joins twice, expects another number; port in use",
  "bounded wait; names the process; exits 2",
)
class MissingTest(absltest.TestCase):
  def test_processes_that_never_come_are_named(self):
    root = testing.folder(self)
    ended = programs.together(
      *(
        [
          "-m",
          "experiments.pretrain",
          "--variant=tiny",
          f"--workdir={root / 'run'}",
          "--mesh=data=4",
          "--join_timeout=5",
          *flags,
        ]
        for flags in programs.members(4)
        if flags[-1] in ("--process=0", "--process=3")
      ),
      timeout_s=60,
    )
    for each in ended:
      self.assertEqual((each.code, each.out), (cli.BAD_INPUT, ""), each)
      self.assertEqual(
        each.err,
        "error: --processes=4: 1, 2 did not join within 5 s; start them, or"
        " raise --join_timeout\n",
      )
    self.assertFalse((root / "run").exists())


if __name__ == "__main__":
  absltest.main()

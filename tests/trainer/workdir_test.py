"""Tests of the folder of a run."""

import json
import pathlib
import socket
import sys
import tempfile
from unittest import mock

import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, io
from dsv3_jax.config import overrides, presets
from dsv3_jax.errors import InputError
from dsv3_jax.interop import open_run
from dsv3_jax.trainer import workdir

RUN = config.override(
  presets.TINY, "mtp.input_state=pre_norm", "data.heldout_fraction=0.125"
)


class OldNamesTest(absltest.TestCase):
  """A config.json whose settings have the names of an earlier version."""

  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    facts = workdir.run_identity("tiny", 0, RUN)
    old = {new: old for old, new in overrides.RENAMED.items()}
    facts["settings"] = {
      self.old_name(path, old): value
      for path, value in facts["settings"].items()
    }
    (self.folder / open_run.CONFIG).write_text(json.dumps(facts))

  def old_name(self, path, old):
    short = path.removeprefix("model.")
    for new, name in old.items():
      if f"{short}.".startswith(f"{new}."):
        return path.replace(new, name)
    return path

  def test_is_the_same_run(self):
    written = (self.folder / open_run.CONFIG).read_text()
    self.assertIn('"model.mtp.hidden": "pre_norm"', written)
    workdir.check_same(self.folder, workdir.run_identity("tiny", 0, RUN))

  def test_gives_the_same_settings(self):
    facts = open_run.read_config(self.folder)
    self.assertEqual(open_run.run_from_config(facts), RUN)

  def test_a_warm_up_in_steps_is_a_share(self):
    path = self.folder / open_run.CONFIG
    facts = json.loads(path.read_text())
    del facts["settings"]["schedule.warmup_until"]
    facts["settings"]["schedule.warmup_steps"] = 40
    path.write_text(json.dumps(facts))
    self.test_gives_the_same_settings()
    workdir.check_same(self.folder, workdir.run_identity("tiny", 0, RUN))

  def test_another_value_is_another_run(self):
    other = config.override(RUN, "data.heldout_fraction=0.25")
    with self.assertRaisesRegex(
      ValueError, "data.heldout_fraction: 0.125 -> 0.25"
    ):
      workdir.check_same(self.folder, workdir.run_identity("tiny", 0, other))


class EnvironmentTest(absltest.TestCase):
  def test_the_command_line_is_that_of_a_process_of_its_own(self):
    folder = testing.folder(self)
    argv = ["/usr/bin/python3", "-m", "experiments.pretrain", "--set=a=b c"]
    with mock.patch.object(sys, "orig_argv", argv):
      for own_process, expected in (
        (True, "python -m experiments.pretrain '--set=a=b c'"),
        (False, None),
      ):
        workdir.write_environment(folder, own_process=own_process)
        written = io.read_json_object(folder / workdir.ENV)
        self.assertEqual(written.get("command"), expected)
        self.assertEqual(written["host"], socket.gethostname())


class ForeignTest(parameterized.TestCase):
  """Folders without config.json, in which a run may begin or not."""

  @parameterized.parameters("notes.md", "src/", "model.safetensors", "train.py")
  def test_a_folder_of_something_else_is_refused(self, name):
    folder = testing.folder(self) / "mine"
    (folder / name).parent.mkdir(parents=True)
    if name.endswith("/"):
      (folder / name).mkdir()
    else:
      (folder / name).touch()
    kind = "folder" if name.endswith("/") else "file"
    with self.assertRaisesRegex(
      InputError,
      f"mine: holds no run .* the {kind} {name.strip('/')}; .*=.*mine/run$",
    ):
      workdir.check_or_create(folder, {})
    self.assertLen(list(folder.iterdir()), 1)

  @parameterized.parameters(
    (),
    ("train.log", "slurm-7.out", "stderr.txt"),
    (".probe", ".nfs000"),
    # Left by a start that was killed before it wrote config.json.
    ("lock", "log.txt", "data", "env.json", "fatal.txt"),
    ("checkpoints",),
  )
  def test_a_new_folder_or_a_started_one_is_taken(self, *names):
    folder = testing.folder(self) / "mine"
    folder.mkdir()
    for name in names:
      (folder / name).touch()
    workdir.check_or_create(folder, {})


if __name__ == "__main__":
  absltest.main()

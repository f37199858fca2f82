"""Fine-tuning from the command line."""

import json
import pathlib
import sys
import tempfile
from unittest import mock

import micro
import numpy as np
import pytest
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.data import chat
from dsv3_jax.interop import open_run
from dsv3_jax.report import page
from dsv3_jax.trainer import metrics_writer
from experiments import cli, sft


def write(path, n=60):
  rows = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(n)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def configured(*argv):
  """Returns the run of a command line, or raises InputError."""
  with flagsaver.flagsaver():
    flags.FLAGS.unparse_flags()
    problems = cli.parse_flags(["sft", *argv])
    assert not problems, problems
    name = flags.FLAGS.variant or "sft"
    return sft.configure(name, presets.TINY, flags.FLAGS.set)


class ConfigureTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.source, _, _ = micro.make(cls.folder / "source", "data.seq_len=32")
    cls.data = write(cls.folder / "data.jsonl")

  def flags(self, *more):
    return (
      f"--init_from={self.folder / 'source'}",
      f"--data={self.data}",
      *more,
    )

  def test_recipe_of_the_report(self):
    run = configured(*self.flags())
    self.assertEqual(run.model.d_model, self.source.model.d_model)
    self.assertTrue(run.data.supervised and run.data.segment_mask)
    rates = [run.optim.peak_lr, run.optim.min_lr, run.optim.final_lr]
    self.assertEqual(rates, [5e-6, 1e-6, 1e-6])
    self.assertEqual(run.data.template, "plain")
    one = configured(*self.flags("--set=train.batch_size=1"))
    half = configured(*self.flags("--set=train.batch_size=1", "--epochs=1"))
    self.assertEqual(one.total_steps, 2 * half.total_steps)

  def test_each_variant_is_a_whole_run(self):
    for name in presets.SFT:
      run = configured(*self.flags(f"--variant={name}"))
      self.assertGreaterEqual(run.total_steps, 1)

  @parameterized.parameters(
    (("--epochs=0",), "--epochs=0"),
    (("--epochs=nan",), "--epochs=nan"),
    (("--template=v4",), "--template=v4.*plain"),
    (("--set=optim.lr=1",), "--set: .*peak_lr"),
    (("--data=",), "--data is missing"),
    (("--data=no_such_file",), "no_such_file"),
    (("--set=data.seq_len=2",), r"data.jsonl:1: has \d+ tokens"),
  )
  def test_wrong_flags(self, more, problem):
    with self.assertRaisesRegex(Exception, problem):
      configured(*self.flags(*more))

  def test_missing_flags_are_listed_together(self):
    with self.assertRaisesRegex(Exception, "--init_from.*\n--data"):
      configured()

  def test_run_is_served_with_its_template(self):
    folder = self.folder / "served"
    run = configured(*self.flags("--template=r1"))
    folder.mkdir()
    metadata = {"variant": "sft", "seed": 0, "settings": config.flatten(run)}
    (folder / "config.json").write_text(json.dumps(metadata))
    defaults = open_run.read_defaults(folder)
    self.assertEqual(defaults.template, chat.TEMPLATES["r1"])

  @pytest.mark.slow
  def test_trains_resumes_and_reports(self):
    """A run that stops and goes on ends in the bits of one that does not."""
    argv = self.flags(
      "--variant=sft_tiny",
      "--set=evaluate.every=4",
      "--set=evaluate.answers=8",
      "--set=data.seq_len=32",
      "--epochs=10",
      "--compile_cache=",
      "--mesh=data=4,expert=4",
      "--set=train.batch_size=16",
    )

    def train(name, *more):
      folder = self.folder / name
      command = ["sft", *argv, f"--workdir={folder}", *more]
      with (
        flagsaver.flagsaver(),
        mock.patch.object(sys, "argv", command),
        mock.patch.object(cli, "start_jax"),  # it runs
      ):
        flags.FLAGS.unparse_flags()
        with self.assertRaises(SystemExit) as end:
          sft.main()
      self.assertEqual(end.exception.code, 0)
      return metrics_writer.read(folder / metrics_writer.METRICS)

    whole = train("whole")
    train("parts", "--steps=3")
    parts = train("parts")
    losses = [
      [row["loss"] for row in rows if "loss" in row] for rows in (whole, parts)
    ]
    self.assertEqual(*losses)
    last = whole[-1]
    self.assertIn("heldout_exact_match", last)
    self.assertLess(last["heldout_loss"], whole[0]["loss"])
    shares = [row["supervised_share"] for row in whole if "loss" in row]
    self.assertTrue(all(0 < share < 1 for share in shares))
    text = page.write(self.folder / "whole").read_text()
    self.assertIn("Exact match", text)
    self.assertIn("Supervised share", text)
    self.assertTrue(np.isfinite(last["heldout_prompt_loss"]))


if __name__ == "__main__":
  absltest.main()

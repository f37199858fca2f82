"""Reinforcement learning from the command line."""

import importlib.util
import pathlib
import sys
import tempfile
from unittest import mock

import micro
import numpy as np
import pytest
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from dsv3_jax.config import presets
from dsv3_jax.posttrain import rollout
from dsv3_jax.report import page
from dsv3_jax.trainer import metrics_writer
from experiments import cli, grpo

TASKS = "chain_sum:max_terms=2:min_digits=1:max_digits=1:prompt=short:n=60"
needs_package = pytest.mark.skipif(
  not importlib.util.find_spec("reasoning_gym"), reason="needs reasoning-gym"
)


def configured(*argv):
  """Returns the run of a command line, or raises InputError."""
  with flagsaver.flagsaver():
    flags.FLAGS.unparse_flags()
    problems = cli.parse_flags(["grpo", *argv])
    assert not problems, problems
    name = flags.FLAGS.variant or "grpo"
    return grpo.configure(name, presets.TINY, flags.FLAGS.set)


@needs_package
class GrpoTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.source, _, _ = micro.make(cls.folder / "source", "data.seq_len=32")

  def flags(self, *more):
    return (f"--init_from={self.folder / 'source'}", f"--tasks={TASKS}", *more)

  def test_recipe(self):
    run = configured(*self.flags())
    self.assertEqual(run.model.d_model, self.source.model.d_model)
    self.assertFalse(run.model.mtp.trains_trunk)
    self.assertEqual(run.grpo.group_size, 16)
    self.assertEqual(run.grpo.kl_weight, 0.001)
    self.assertEqual(run.total_steps, presets.GRPO_ITERATIONS["grpo"])
    run = configured(*self.flags("--iterations=7", "--set=grpo.updates=2"))
    self.assertEqual(run.total_steps, 14)

  def test_each_variant_is_a_whole_run(self):
    for name in presets.GRPO:
      quick = configured(*self.flags(f"--variant={name}", "--quick"))
      self.assertEqual(quick.total_steps, 5)

  @parameterized.parameters(
    ("--set=grpo.group_size=1", "group_size=1.*at least 2"),
    ("--set=grpo.staleness=-1", "staleness=-1.*at least 0"),
    ("--set=grpo.temperature=0", "temperature=0.*above 0"),
    ("--set=grpo.prompts=0", "prompts=0: must be at least 1"),
    ("--set=grpo.updates=3", "updates=3: must divide prompts=32"),
    ("--set=grpo.kl=k4", "Grpo.kl=.k4"),
    ("--set=grpo.rewards=exct=1", "exct=1: must be one of exact"),
    ("--set=grpo.dual_clip=1.1", "dual_clip=1.1: must be above"),
    ("--set=grpo.importance_cap=2", "needs old_policy=trainer"),
    ("--set=grpo.filter_low=2", "must be below"),
    ("--set=grpo.overlong_tokens=100", "must be at most"),
    ("--tasks=no_such_task", "is no task"),
    ("--iterations=0", "--iterations=0"),
  )
  def test_wrong_flags(self, more, problem):
    with self.assertRaisesRegex(Exception, problem):
      configured(*self.flags(more))

  def test_drafts_need_a_module(self):
    micro.make(self.folder / "without", "data.seq_len=32", "mtp.depth=0")
    flag = f"--init_from={self.folder / 'without'}"
    with self.assertRaisesRegex(Exception, "n_drafts=1.*no MTP module"):
      configured(*self.flags(flag, "--set=grpo.n_drafts=1"))

  def test_missing_flags_are_listed_together(self):
    with self.assertRaisesRegex(Exception, "--init_from.*\n--tasks"):
      configured()

  def run_main(self, name, *more):
    folder = self.folder / name
    argv = ["grpo", *self.flags(f"--workdir={folder}"), *more]
    with (
      flagsaver.flagsaver(),
      mock.patch.object(sys, "argv", argv),
      mock.patch.object(cli, "start_jax"),  # it runs
    ):
      flags.FLAGS.unparse_flags()
      with self.assertRaises(SystemExit) as end:
        grpo.main()
    return end.exception.code, folder

  def train(self, name, *more):
    code, folder = self.run_main(
      name,
      "--variant=grpo_tiny",
      "--compile_cache=",
      "--mesh=data=4,expert=4",
      *(
        f"--set={setting}"
        for setting in (
          "data.seq_len=32",
          "train.batch_size=16",
          "evaluate.every=3",
          "evaluate.answers=4",
          "evaluate.batch_size=16",
          "grpo.prompts=4",
          "grpo.group_size=4",
          "grpo.answer_tokens=4",
          "grpo.rewards=random=1",
          "grpo.slots=4",
          "grpo.top_k=50",
          "optim.peak_lr=1e-2",
        )
      ),
      *more,
    )
    self.assertEqual(code, 0)
    rows = metrics_writer.read(folder / metrics_writer.METRICS)
    return [row for row in rows if "loss" in row], rows[-1], folder

  @parameterized.parameters(
    ((),),
    (("--set=grpo.updates=2", "--set=grpo.staleness=1"),),
    (
      (
        "--set=grpo.old_policy=trainer",
        "--set=grpo.importance_cap=2",
        "--set=grpo.updates=2",
        "--set=grpo.n_drafts=1",
      ),
    ),
  )
  @pytest.mark.slow
  def test_trains_resumes_and_reports(self, more):
    """A run that stops anywhere ends in the bits of one that does not."""
    name = f"{len(more)}"
    steps, last, whole = self.train(f"whole{name}", "--iterations=4", *more)
    self.train(f"parts{name}", "--iterations=4", "--steps=1", *more)
    self.train(f"parts{name}", "--iterations=4", "--steps=3", *more)
    parts, _, _ = self.train(f"parts{name}", "--iterations=4", *more)
    for key in ("loss", "grad_norm", "kl", "entropy", "mtp_loss", "load"):
      values = [[row.get(key) for row in rows] for rows in (steps, parts)]
      self.assertEqual(*values, key)
    self.assertIn("heldout_accuracy", last)
    self.assertIn("heldout_accuracy/chain_sum", last)
    self.assertTrue(any(row["grad_norm"] > 0 for row in steps))
    first = steps[0]
    for key in "reward length entropy kl clip_share ratio_mean".split():
      self.assertIn(key, first)
    if not more:  # the sampler has the weights that are trained
      self.assertLess(max(abs(row["ratio_mean"] - 1) for row in steps), 1e-5)
      self.assertEqual({row["ratio_outside"] for row in steps}, {0})
      self.assertEqual({row["routes_replaced"] for row in steps}, {0})
    file = sorted((whole / "rollouts").glob("*.npz"))[-1]
    read = rollout.load(file)
    self.assertLen(read.rollouts, 16)
    self.assertTrue(np.isfinite(read.rewards).all())
    text = page.write(whole).read_text()
    self.assertIn("Policy and sampler", text)

  @pytest.mark.slow
  def test_no_room(self):
    code, _ = self.run_main(
      "room", "--set=data.seq_len=32", "--set=grpo.answer_tokens=30"
    )
    self.assertEqual(code, 2)
    code, _ = self.run_main(
      "reach", "--set=data.seq_len=32", "--set=grpo.answer_tokens=1"
    )
    self.assertEqual(code, 2)


if __name__ == "__main__":
  absltest.main()

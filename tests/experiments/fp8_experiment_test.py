"""Tests of the comparison of training in FP8 with training in BF16."""

import json
from unittest import mock

import numpy as np
import pytest
import testing
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import distributed, metrics_writer, run_args, trainer
from experiments import cli, fp8

PROSE = "It was a bright cold day, and {} clocks were striking thirteen.\n"
SMALL = config.override(
  presets.TINY,
  "vocab_size=300",
  "d_model=32",
  "n_layers=2",
  "dense_ffn_dim=32",
  "attention.n_heads=2",
  "attention.q_rank=32",
  "attention.kv_rank=32",
  "moe.ffn_dim=16",
  "precision.tile=16",
  "precision.counters=true",
  "data.seq_len=32",
  "train.batch_size=4",
  "train.tokens=640",
  "schedule.warmup_until=0.4",
  "checkpoint.every=5",
  "evaluate.every=5",
)


def losses(**arms):
  return {arm: np.array(values, np.float64) for arm, values in arms.items()}


class CompareTest(parameterized.TestCase):
  def test_smoothed_is_a_mean_with_weights_that_decay(self):
    loss = np.random.default_rng(0).normal(size=(2, 30))
    found = fp8.smoothed(loss)
    for t in (0, 1, 29):
      weights = 0.9 ** np.arange(t, -1, -1)
      expected = loss[:, : t + 1] @ weights / weights.sum()
      np.testing.assert_allclose(found[:, t], expected, rtol=1e-12)

  def test_gaps_are_relative_and_of_the_mean_over_seeds(self):
    base = np.full((2, 10), 4.0)
    other = base * np.array([[1.003], [0.999]])
    row = fp8.compare(losses(bf16=base, fp8=other), warmup=3)["fp8"]
    np.testing.assert_allclose(row["gap"], 0.001)
    np.testing.assert_allclose(row["worst_seed"], 0.003)
    np.testing.assert_allclose(row["last"], 0.001)

  def test_the_warm_up_does_not_count(self):
    base = np.full((1, 100), 4.0)
    other = base.copy()
    other[:, :10] = 5
    found = losses(bf16=base, fp8=other)
    self.assertGreater(fp8.compare(found, 10)["fp8"]["gap"], fp8.BAR)
    # Forgotten with 0.9 to the power of 70.
    self.assertLess(fp8.compare(found, 80)["fp8"]["gap"], fp8.BAR)

  @parameterized.parameters(np.nan, np.inf)
  def test_a_loss_that_is_not_finite_is_never_within(self, bad):
    base = np.full((2, 10), 4.0)
    other = base.copy()
    other[1, 5] = bad
    rows = fp8.compare(losses(bf16=base, fp8=other), warmup=3)
    self.assertFalse(np.isfinite(rows["fp8"]["gap"]))
    self.assertIn("NOT within", fp8.table(rows))


class ExecuteTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(flagsaver.flagsaver())
    flags.FLAGS.mark_as_parsed()
    self.enter_context(
      mock.patch.object(distributed, "mesh", device_mesh.make_mesh)
    )
    self.folder = testing.folder(self)
    text = self.folder / "text.txt"
    text.write_text("".join(PROSE.format(i) for i in range(100)))
    self.run_config = config.override(SMALL, f"data.path={text}")

  def command(self, stop=5, **changes):
    values = {
      "variant": "tiny",
      "run": self.run_config,
      "workdir": self.folder / "runs",
      "seed": 3,
      "stop": stop,
      "mesh": {"data": 1},
    }
    return run_args.RunArgs(**values | changes)

  @parameterized.parameters(
    ({"arms": ["bf16", "fp9"]}, "--arms=fp9: one of bf16, fp8"),
    ({"arms": ["fp8"]}, "--arms: needs bf16"),
    ({"seeds": 0}, "--seeds=0"),
  )
  def test_refuses(self, flags, message):
    with (
      flagsaver.flagsaver(**flags),
      self.assertRaisesRegex(ValueError, message),
    ):
      fp8.execute(self.command())

  def test_refuses_runs_that_end_within_the_warm_up(self):
    with self.assertRaisesRegex(ValueError, "--steps=2: must be more than"):
      fp8.execute(self.command(stop=2))

  def test_the_baseline_again_is_the_same_mathematics(self):
    run = fp8._run(self.run_config, "again")
    base = fp8._run(self.run_config, "bf16")
    self.assertEqual(run.precision, base.precision)
    self.assertEqual(run.train.batch_size, base.train.batch_size)
    self.assertEqual(run.train.micro_batches, 2 * base.train.micro_batches)

  def test_refuses_to_write_nowhere(self):
    with self.assertRaisesRegex(ValueError, "--workdir is missing"):
      fp8.execute(self.command(workdir=None))

  @pytest.mark.slow
  def test_trains_the_same_run_in_both_and_compares(self):
    self.enter_context(flagsaver.flagsaver(seeds=1, arms=["bf16", "fp8"]))
    self.enter_context(mock.patch.object(cli, "start_jax"))
    fp8.execute(self.command())
    runs = self.folder / "runs"
    first = {}
    for arm in ("bf16", "fp8"):
      rows = metrics_writer.read(runs / f"{arm}-3" / metrics_writer.METRICS)
      steps = [row for row in rows if "main_loss" in row]
      self.assertLen(steps, 5)
      first[arm] = steps[0]
      classes = {name.split("_")[1] for name in steps[0] if "fp8_" in name}
      asked_for = ("activation", "gradient", "weight") if arm == "fp8" else ()
      self.assertEqual(classes, set(asked_for))
    # The same weights and batch, but not the same roundings.
    a, b = (row["main_loss"] for row in first.values())
    self.assertNotEqual(a, b)
    self.assertAlmostEqual(a, b, delta=0.01 * a)
    facts = json.loads((runs / "comparison.json").read_text())
    self.assertEqual(facts["warmup_steps"], 2)
    self.assertLess(facts["arms"]["fp8"]["gap"], 0.01)
    self.assertStartsWith(
      (runs / "loss.png").read_bytes().hex(), b"\x89PNG".hex()
    )

  @pytest.mark.slow
  def test_what_is_not_finite_is_told_with_its_path(self):
    run = config.override(
      self.run_config,
      "precision.recipe=fp8",
      "optim.peak_lr=1e30",
      "train.max_bad_steps=0",
    )
    with self.assertRaisesRegex(FloatingPointError, "not finite"):
      trainer.fit(self.command(run=run))
    log = (self.folder / "runs" / "log.txt").read_text()
    self.assertRegex(
      log, r"(?m)step \d: moe/\S+, layer 0: \d+ tiles of the \w+ are not"
    )
    self.assertRegex(log, r"step \d was skipped")


if __name__ == "__main__":
  absltest.main()

"""Tests of the extension of the context."""

import json
from unittest import mock

import pytest
import testing
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from dsv3_jax import config, optim
from dsv3_jax.data import corpus, text_files
from dsv3_jax.evals import needles
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import distributed, run_args
from experiments import cli, context

TINY = config.override(
  context.VARIANTS["tiny"],
  "d_model=16",
  "n_layers=2",
  "dense_ffn_dim=16",
  "attention.n_heads=2",
  "attention.q_rank=8",
  "attention.kv_rank=8",
  "moe.ffn_dim=8",
  "router.n_experts=4",
  "router.top_k=2",
  "router.n_groups=1",
  "router.top_groups=1",
  "mtp.depth=0",
  "data.seq_len=128",
  "train.batch_size=4",
  "train.tokens=2560",
  "schedule.warmup_until=0.2",
)


class PhasesTest(parameterized.TestCase):
  def test_yarn_is_the_same_in_all_phases(self):
    run = context.VARIANTS["tiny"]
    short, *longer = context.phases(run, [2048, 8192], without_yarn=False)
    self.assertEqual(short.run, run)
    self.assertEqual([p.run.data.seq_len for p in longer], [2048, 8192])
    self.assertEqual([p.start for p in longer], ["short", "yarn-2048"])
    for phase in longer:
      yarn = phase.run.model.attention.yarn
      self.assertEqual((yarn.factor, yarn.original_len), (32, 256))
      self.assertEqual(phase.run.data.seq_len % 2048, 0)

  @parameterized.parameters((0.5, 0.1, 0.0), (1, 0.3, 0.003))
  def test_lambda_and_gamma_go_on_as_they_ended(self, until, weight, speed):
    run = config.override(
      context.VARIANTS["tiny"],
      f"schedule.mtp_until={until}",
      f"schedule.bias_update_until={until}",
    )
    short, *longer = context.phases(run, [2048, 8192], without_yarn=True)
    last = short.run.total_steps - 1
    values = [(last, run), *((0, p.run) for p in longer)]
    values += [(p.run.total_steps - 1, p.run) for p in longer]
    for step, of in values:
      self.assertAlmostEqual(float(optim.mtp_weight(step, of)), weight, 6)
      self.assertAlmostEqual(float(optim.bias_speed(step, of)), speed, 6)

  def test_the_arm_without_it_differs_in_nothing_else(self):
    found = context.phases(context.VARIANTS["tiny"], [2048], without_yarn=True)
    yarn, plain = found[1:]
    changes = config.diff(config.flatten(plain.run), config.flatten(yarn.run))
    self.assertLen(changes, 2)
    self.assertEqual(plain.start, "short")


class ExecuteTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(flagsaver.flagsaver())
    flags.FLAGS.mark_as_parsed()
    self.folder = testing.folder(self)

  def command(self, **changes):
    values = {
      "variant": "tiny",
      "run": TINY,
      "workdir": self.folder / "runs",
      "seed": 3,
      "stop": 5,
      "mesh": {"data": 1},
    }
    return run_args.RunArgs(**values | changes)

  @parameterized.parameters(
    ({"lengths": ["128"]}, "--lengths=128: expected rising"),
    ({"lengths": ["512", "256"]}, "--lengths=512,256: expected rising"),
    ({"lengths": ["1k"]}, "--lengths=1k: expected rising"),
    ({"lengths": []}, "--lengths: needs at least one"),
    ({"questions": 0}, "--questions=0"),
  )
  def test_refuses(self, flags, message):
    with (
      flagsaver.flagsaver(**flags),
      self.assertRaisesRegex(ValueError, message),
    ):
      context.execute(self.command())

  def test_refuses_devices_that_a_later_phase_cannot_use(self):
    with self.assertRaisesRegex(ValueError, "does not divide 2 sequences"):
      context.execute(self.command(mesh={"data": 4}))
    self.assertFalse((self.folder / "runs").exists())

  @parameterized.parameters(
    ({"workdir": None}, "--workdir is missing"),
    ({"stop": 3}, "--steps: phases end"),
    ({"init_from": "runs"}, "--init_from: this experiment"),
    ({"run": config.override(TINY, "data.path=x")}, "data.path: this"),
  )
  def test_refuses_commands(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      context.execute(self.command(**changes))

  def test_texts_are_seen_once_and_fill_their_rows(self):
    path = context.write_texts(TINY, self.folder, 0)
    texts = text_files.read_documents(str(path), "error")
    n_rows = TINY.train.tokens // TINY.data.seq_len
    train, _ = corpus.split(texts, TINY.data.heldout_fraction)
    self.assertGreaterEqual(len(train), n_rows)
    sizes = [needles.size(d.text) for d in texts]
    self.assertBetween(min(sizes), 128 - needles.SPARE - 12, 128)
    self.assertLessEqual(max(sizes), 128 - needles.SPARE)

  @pytest.mark.slow
  def test_extends_and_asks(self):
    self.enter_context(
      mock.patch.object(distributed, "mesh", device_mesh.make_mesh)
    )
    self.enter_context(mock.patch.object(cli, "start_jax"))
    self.enter_context(mock.patch.object(context, "PHASE_TOKENS", 2560))
    self.enter_context(mock.patch.object(context, "DEPTHS", (0.0, 1.0)))
    self.enter_context(
      flagsaver.flagsaver(lengths=["256"], questions=1, without_yarn=True)
    )
    with mock.patch.object(context, "WARMUP_STEPS", 1):
      context.execute(self.command())
    facts = json.loads((self.folder / "runs" / "needles.json").read_text())
    self.assertEqual(facts["lengths"], [128, 256])
    self.assertEqual(
      list(facts["right"]),
      ["short", "YaRN, not trained", "to 256", "to 256, without YaRN"],
    )
    last = self.folder / "runs" / "yarn-256"
    self.assertIn("Needles in a haystack", (last / "report.html").read_text())
    self.assertTrue((self.folder / "runs" / "needles.png").exists())


if __name__ == "__main__":
  absltest.main()

"""Tests of models and runs at the corners of what validation allows."""

import dataclasses
import functools
import math
from unittest import mock

import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, optim, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.config import fields, presets
from dsv3_jax.errors import InputError
from dsv3_jax.model import mla
from dsv3_jax.parallel import device_mesh, layout_check
from dsv3_jax.plan import flops
from dsv3_jax.trainer import Trainer, distributed
from experiments import cli, sample
from scripts import convert

ONE_EXPERT = (
  "router.n_experts=1 router.top_k=1 router.n_groups=1 router.top_groups=1"
)
# Ends of the ranges of settings that shape a model or a step.
CORNERS = {
  "dense": "n_dense_layers=2 mtp.depth=0",
  "dense, MTP": "n_dense_layers=2",
  "no dense layer": "n_dense_layers=0 mtp.depth=0",
  "one layer": "n_layers=1 n_dense_layers=1 mtp.depth=0",
  "deep MTP": "mtp.depth=7",
  "one expert": ONE_EXPERT,
  "all experts": "router.top_k=8 router.n_groups=1 router.top_groups=1",
  "groups of one": "router.n_groups=8 router.top_groups=2",
  "softmax": "router.score=softmax router.renormalize=false",
  "no shared expert": "moe.n_shared=0",
  "queries not compressed": "attention.q_rank=0",
  "one of each": "attention.n_heads=1 attention.nope_dim=1 attention.v_dim=1"
  " attention.rope_dim=2 attention.q_rank=1 attention.kv_rank=1 moe.ffn_dim=1"
  f" dense_ffn_dim=1 d_model=1 {ONE_EXPERT}",
  "one token": "data.seq_len=1 mtp.depth=0 train.batch_size=1",
  "YaRN": "attention.yarn.factor=9 attention.yarn.original_len=1"
  " evaluate.sample_tokens=8",
  "remat": "train.remat=block train.micro_batches=8 train.scan_layers=false",
  "bfloat16": "precision.recipe=bf16 optim.moments=bfloat16",
}


def make(corner):
  return testing.run(*CORNERS[corner].split())


# The largest and the smallest number of float32 that is not 0.
LARGEST, SMALLEST = 3e38, 2e-38


def numeric(cfg, prefix=""):
  """Yields path, type and limits of every numeric setting."""
  for field in dataclasses.fields(cfg):
    value, path = getattr(cfg, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from numeric(value, path + ".")
    elif type(value) in (int, float):
      yield path, type(value), field.metadata


SETTINGS = {path: rest for path, *rest in numeric(testing.run())}


def ends(kind, limits):
  """Values at and near the ends of a range, and the extremes of its type."""
  extremes = [1, 2, fields.LARGEST]
  if kind is float:
    extremes = [0.0, SMALLEST, 1.0, LARGEST]
    for limit in filter(None, (limits.get("above"), limits.get("below"))):
      near = np.nextafter(np.float32(limit), np.float32([-9, 9]))
      extremes += near.tolist()
  return {limits.get("low"), limits.get("high"), *extremes} - {None}


def plan(run):
  """Everything that is computed of settings before a step is traced."""
  if not layout_check.validate(run, {}):
    layout_check.validate(run, {"data": 3, "expert": 5})
    flops.forward_flops(run.model, 8, 1)
  for step in (0, run.total_steps - 1):
    optim.learning_rate(step, run)
    optim.bias_speed(step, run)
    optim.mtp_weight(step, run)
    run.rows_before(step)
  assert np.isfinite(mla.frequencies(run.model.attention)).all()
  assert math.isfinite(run.model.attention.softmax_divisor)


class CornersTest(parameterized.TestCase):
  @parameterized.parameters(*CORNERS)
  def test_a_step_traces(self, corner):
    run = make(corner)
    self.assertEmpty(layout_check.validate(run, {}))
    flops.parameter_counts(run.model)
    train.trace_step(run, device_mesh.abstract_mesh({}))

  @parameterized.parameters(*SETTINGS)
  def test_no_allowed_number_ends_in_a_traceback(self, path):
    for value in ends(*SETTINGS[path]):
      for run in (testing.run("attention.yarn.factor=4"), presets.V3_671B):
        try:
          run = config.override(run, f"{path}={value!r}")
        except InputError:
          continue
        plan(run)

  @parameterized.parameters("dense", "one layer")
  def test_arrays_without_elements_are_saved_and_restored(self, corner):
    run, folder = make(corner), testing.folder(self)
    store = checkpointer.Checkpointer(folder, run.checkpoint)
    self.addCleanup(store.close)
    state = testing.state(run)
    store.save(state, {})
    store.wait()
    like = train.abstract_state(run, device_mesh.make_mesh({}))
    restored = store.restore(0, like)
    self.assertEqual(restored.router_bias.shape, (0, 8))
    testing.assert_same(testing.host(restored), testing.host(state))
    store.verify(0)

  # Minutes each: compiles a run, its resumption, and decoding.
  @parameterized.parameters(*CORNERS)
  @pytest.mark.slow
  def test_trains_saves_resumes_samples_and_exports(self, corner):
    folder = testing.folder(self)
    (folder / "text.txt").write_text("It was a bright cold day in April. " * 99)
    run = config.override(make(corner), f"data.path={folder / 'text.txt'}")
    one_device = lambda sizes: device_mesh.make_mesh({})
    self.enter_context(mock.patch.object(distributed, "mesh", one_device))
    fit = functools.partial(Trainer, run, folder / "run")
    fit(stop=1).fit()
    result = fit(stop=2).fit()
    self.assertEqual((result.state.step, result.state.skipped), (2, 0))
    at = f"--workdir={folder / 'run'}"
    code, out, err = testing.command_line(
      functools.partial(cli.run_main, sample._sample),
      *(at, "--prompt=It", "--max_tokens=3", "--temperature=0"),
    )
    self.assertEqual(code, cli.OK, err)
    hf = f"--hf={folder / 'hf'}"
    program = functools.partial(cli.run_main, convert.execute)
    for line in (("--mode=export", at, hf), ("--mode=verify", hf)):
      code, out, err = testing.command_line(program, *line)
      # An export may be refused in words: other software has fewer corners.
      self.assertIn(code, (cli.OK, cli.BAD_INPUT), out + err)
      if code:
        break


if __name__ == "__main__":
  absltest.main()

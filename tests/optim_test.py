"""Tests of AdamW and the schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, optim, param_spec
from dsv3_jax.config import presets
from dsv3_jax.model import transformer

V3 = presets.V3_671B


def step_at(tokens: float) -> int:
  """The first step before which at least so many tokens were consumed."""
  full = V3.batch_phases[-1]
  rows = tokens / V3.data.seq_len - full.first_row
  return full.first_step + int(np.ceil(rows / full.batch_size))


class LearningRateTest(parameterized.TestCase):
  # Section 4.2; the cosine's values are worked out by hand.

  @parameterized.parameters(
    (0, 2.2e-4 / 2000),
    (999, 1.1e-4),
    (1999, 2.2e-4),
    (2000, 2.2e-4),
    (step_at(10e12) - 1, 2.2e-4),
    (step_at(14.3e12), 2.2e-5),
    (step_at(14.633e12) - 1, 2.2e-5),
    (step_at(14.633e12), 7.3e-6),
    (V3.total_steps - 1, 7.3e-6),
  )
  def test_flat_parts_and_warm_up(self, step, expected):
    rate = optim.learning_rate(step, V3)
    # A handful of float32 operations.
    np.testing.assert_allclose(rate, expected, rtol=8 * testing.EPS)

  @parameterized.parameters(
    (1.075e12, 1.9100e-4, 5e-9),
    (2.15e12, 1.2100e-4, 5e-9),
    (3.225e12, 5.0996e-5, 5e-10),
  )
  def test_cosine(self, after, expected, half_digit):
    step = step_at(10e12 + after)
    # The step is rounded up: by one, at the cosine's steepest.
    slope = np.pi / 2 * (2.2e-4 - 2.2e-5) * V3.tokens_per_step / 4.3e12
    rate = optim.learning_rate(step, V3)
    np.testing.assert_allclose(rate, expected, rtol=0, atol=half_digit + slope)

  @parameterized.parameters(
    # Section 2 of the reports of V2: 0.316 at two shares of the tokens.
    (presets.V2_236B, 2.4e-4, 0.6, 0.9),
    (presets.V2_LITE_16B, 4.2e-4, 0.8, 0.9),
  )
  def test_v2_falls_in_two_steps(self, run, peak, first, second):
    self.assertEqual(run.warmup_steps, 2000)
    rows = np.array([2e-3, first - 1e-3, first + 1e-3, second - 1e-3, 0.999])
    last = run.batch_phases[-1]
    rows = np.maximum(rows, 0.03) * run.train.tokens / run.data.seq_len
    steps = last.first_step + (rows - last.first_row) // last.batch_size
    rates = [optim.learning_rate(int(step), run) for step in steps]
    factors = [1, 1, 0.316, 0.316, 0.316**2]
    expected = peak * np.array(factors)
    np.testing.assert_allclose(rates, expected, rtol=8 * testing.EPS)

  @parameterized.parameters(*presets.PRESETS)
  def test_warm_up_scales_with_the_budget(self, name):
    run = presets.PRESETS[name]
    half = config.override(run, f"train.tokens={run.train.tokens // 2}")
    # Ramps of the batch are shares of the tokens too.
    self.assertAlmostEqual(half.warmup_steps, run.warmup_steps / 2, delta=1)

  def test_never_rises_after_warm_up(self):
    steps = np.linspace(2000, V3.total_steps - 1, 5000, dtype=np.int32)
    rates = jax.vmap(lambda s: optim.learning_rate(s, V3))(steps)
    rise = np.diff(np.asarray(rates)).max()
    self.assertLessEqual(rise, 8 * testing.EPS * 2.2e-4)

  def test_no_warm_up_and_no_decay(self):
    run = testing.run(
      "schedule.warmup_until=0",
      "schedule.constant_until=1",
      "schedule.decay_until=1",
      "schedule.tail_from=1",
    )
    for step in (0, run.total_steps - 1):
      np.testing.assert_allclose(
        optim.learning_rate(step, run), run.optim.peak_lr, rtol=testing.EPS
      )


class ProgressTest(absltest.TestCase):
  def test_is_the_share_of_rows(self):
    run = testing.run(
      "train.micro_batches=4",
      "train.first_batch_size=2",
      "train.ramp_sizes=3",
      "schedule.ramp_until=0.5",
    )
    self.assertLen(run.batch_phases, 4)
    steps = range(run.total_steps + 1)
    found = jax.vmap(lambda s: optim.progress(s, run))(jnp.array(steps))
    rows = np.array([run.rows_before(step) for step in steps])
    share = rows * run.data.seq_len / run.train.tokens
    np.testing.assert_allclose(found, share, rtol=4 * testing.EPS)


class SwitchTest(parameterized.TestCase):
  @parameterized.parameters(
    (optim.bias_speed, 14.3e12, 0.001, 0.0), (optim.mtp_weight, 10e12, 0.3, 0.1)
  )
  def test_switches_once(self, schedule, at, early, late):
    step = step_at(at)
    for when, expected in ((0, early), (step - 1, early), (step, late)):
      self.assertEqual(schedule(when, V3), np.float32(expected), when)
    self.assertEqual(schedule(V3.total_steps - 1, V3), np.float32(late))


class DecayTest(parameterized.TestCase):
  @parameterized.parameters("v3_671b", "v2_lite_16b")
  def test_spares_norm_gains_alone(self, name):
    specs = transformer.specs(presets.PRESETS[name].model)
    spared = {
      path
      for path, decayed in param_spec.flatten_with_paths(
        optim.decayed(specs)
      ).items()
      if not decayed
    }
    gains = {
      path
      for path, spec in param_spec.flatten_with_paths(specs).items()
      if spec.axes[-1] == "norm"
    }
    self.assertEqual(spared, gains)
    self.assertGreater(len(gains), 4)


class AdamWTest(parameterized.TestCase):
  PARAMS = {"w": np.array([[1.0, -2.0]]), "norm": np.array([0.5])}
  GRADS = (
    {"w": np.array([[3.0, -4.0]]), "norm": np.array([12.0])},  # norm 13
    {"w": np.array([[0.1, 0.2]]), "norm": np.array([-0.3])},  # not clipped
  )

  def test_two_steps_by_hand(self):
    adamw = optim.make(
      testing.run("optim.clip_norm=6.5", "optim.weight_decay=0.1")
    )
    params = jax.tree.map(jnp.float32, self.PARAMS)
    state = adamw.init(params)
    m, v = dict.fromkeys(self.PARAMS, 0.0), dict.fromkeys(self.PARAMS, 0.0)
    clips = (0.5, 1.0)
    for t, (grads, clip) in enumerate(zip(self.GRADS, clips, strict=True), 1):
      updates, state = adamw.update(
        jax.tree.map(jnp.float32, grads), state, params
      )
      expected = {}
      for name, g in grads.items():
        m[name] = 0.9 * m[name] + 0.1 * clip * g
        v[name] = 0.95 * v[name] + 0.05 * (clip * g) ** 2
        root = np.sqrt(v[name] / (1 - 0.95**t))
        expected[name] = m[name] / (1 - 0.9**t) / (root + 1e-8)
      expected["w"] += 0.1 * self.PARAMS["w"]  # no norm gain
      # 1 - 0.95^t in float32 loses up to 1 / 0.05 of its digits.
      testing.assert_close(updates, expected, 40)

  def test_moments_are_stored_in_bfloat16_and_computed_in_float32(self):
    params, grads = jax.tree.map(jnp.float32, (self.PARAMS, self.GRADS[0]))
    updates = {}
    for dtype in ("float32", "bfloat16"):
      adamw = optim.make(testing.run(f"optim.moments={dtype}"))
      updates[dtype], state = adamw.update(grads, adamw.init(params), params)
      adam = optax.tree.get(state, "ScaleByAdamState")
      dtypes = {leaf.dtype for leaf in jax.tree.leaves((adam.mu, adam.nu))}
      self.assertEqual(dtypes, {jnp.dtype(dtype)})
      self.assertEqual(adam.count, 1)
      self.assertEqual(adam.count.dtype, jnp.int32)
    # The first update reads zeros, which both store exactly.
    jax.tree.map(np.testing.assert_array_equal, *updates.values())


if __name__ == "__main__":
  absltest.main()

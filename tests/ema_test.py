"""Tests of the average of the parameters, on one and on several devices."""

import functools
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, ema, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.parallel import device_mesh

pytestmark = pytest.mark.fault("F29")
DECAY = 0.9
GOOD = jnp.array(True)


def placed(seed=0, spec=("data", None)):
  """Two parameters on two devices, one divided, one on both."""
  mesh = device_mesh.make_mesh({"data": 2})
  w = jax.device_put(
    testing.normal(4, 6, seed=seed), jax.NamedSharding(mesh, jax.P(*spec))
  )
  gain = testing.normal(5, seed=seed + 100)
  whole = jax.NamedSharding(mesh, jax.P())
  return {"w": w, "gain": jax.device_put(gain, whole)}


def reference(seeds):
  """Computes the average in float64."""
  params = [jax.tree.map(np.float64, jax.device_get(placed(s))) for s in seeds]
  average = params[0]
  for step, new in enumerate(params[1:], start=1):
    d = min(DECAY, (1 + step) / (10 + step))
    average = jax.tree.map(lambda a, b, d=d: d * a + (1 - d) * b, average, new)
  return average


class AverageTest(parameterized.TestCase):
  def average(self, params):
    made = ema.Average(params, DECAY)
    self.addCleanup(made.close)
    return made

  def test_is_the_reference(self):
    average = self.average(placed(0))
    for step in range(1, 30):
      average.update(step, placed(step), GOOD)
    found = jax.device_get(average.params())
    # An update rounds three times, and forgets a tenth of what was before.
    testing.assert_close(found, reference(range(30)), 3 * 10)

  def test_is_the_same_in_any_blocks(self):
    new = np.arange(20, dtype=np.float32).reshape(4, 5)
    whole, parts = np.ones_like(new), np.ones_like(new)
    ema._mix(whole, new, np.float32(0.3))
    with mock.patch.object(ema, "BLOCK", 7):
      ema._mix(parts, new, np.float32(0.3))
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_allclose(whole, 1 + 0.3 * (new - 1), rtol=1e-6)

  def test_lies_in_host_memory_divided_like_the_parameters(self):
    params = placed()
    found = self.average(params).params()
    for a, b in zip(*map(jax.tree.leaves, (found, params)), strict=True):
      self.assertEqual(a.sharding.memory_kind, "pinned_host")
      self.assertEqual(a.sharding.spec, b.sharding.spec)
      np.testing.assert_array_equal(a, b)

  def test_survives_donation(self):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(params):
      return jax.tree.map(lambda a: a + 1, params)

    params, expected = placed(), jax.device_get(placed())
    average = self.average(params)
    for i in range(1, 6):
      params = step(params)
      average.update(i, params, GOOD)
    d = [ema.decay_at(i, DECAY) for i in range(1, 6)]
    above = 0.0
    for i, decay in enumerate(d, start=1):
      above = decay * above + (1 - decay) * i
    expected = jax.tree.map(lambda a: np.float64(a) + above, expected)
    testing.assert_close(jax.device_get(average.params()), expected, 3 * 10)

  def test_does_not_wait_for_what_it_starts(self):
    held, mix = threading.Event(), ema._mix

    def mix_when_set(*args):
      assert held.wait(60), "update() waited for the average"
      mix(*args)

    w = testing.normal(3)
    average = self.average(w)
    with mock.patch.object(ema, "_mix", mix_when_set):
      average.update(1, w + 1, GOOD)
      held.set()
      self.assertGreater(float((average.params() - w).min()), 0)

  def test_a_bad_step_changes_nothing(self):
    average = self.average(placed(0))
    average.update(1, placed(1), jnp.array(False))
    testing.assert_same(
      jax.device_get(average.params()), jax.device_get(placed(0))
    )

  def test_what_was_handed_out_does_not_change(self):
    average = self.average(placed(0))
    before = average.params()
    average.update(1, placed(1), GOOD)
    after = average.params()
    testing.assert_same(jax.device_get(before), jax.device_get(placed(0)))
    self.assertTrue(np.all(np.asarray(after["w"]) != np.asarray(before["w"])))

  def test_an_error_comes_out_at_the_next_update(self):
    average = self.average(placed(0))
    bad = mock.MagicMock(__bool__=mock.Mock(side_effect=OSError("no disk")))
    average.update(1, placed(1), bad)
    with self.assertRaisesRegex(OSError, "no disk"):
      average.update(2, placed(2), GOOD)

  def test_is_saved_and_goes_on_divided_otherwise(self):
    average = self.average(placed(0))
    average.update(1, placed(1), GOOD)
    run = testing.run()
    checkpoints = checkpointer.Checkpointer(
      testing.folder(self) / "checkpoints", config.Checkpoint()
    )
    self.addCleanup(checkpoints.close)
    state = testing.state(run)
    checkpoints.save(state, {}, average.params())
    checkpoints.wait()
    abstract = train.abstract_state(run, device_mesh.make_mesh({}))
    like = jax.tree.map(ema.in_host_memory, placed(0, (None, "data")))
    restored, _ = checkpoints.restore_parameters(
      0, abstract.replace(params=like), average=True
    )
    self.assertEqual(restored["w"].sharding, like["w"].sharding)
    testing.assert_same(*map(jax.device_get, (restored, average.params())))
    other = self.average(restored)
    for a, spec in ((average, ("data", None)), (other, (None, "data"))):
      a.update(2, placed(2, spec), GOOD)
    testing.assert_same(
      jax.device_get(average.params()), jax.device_get(other.params())
    )
    # The state does not know of it.
    checkpoints.restore(0, abstract)


class DecayTest(absltest.TestCase):
  def test_rises_to_its_value(self):
    self.assertEqual(ema.decay_at(1, 0.999), 2 / 11)
    self.assertEqual(ema.decay_at(10**6, 0.999), 0.999)


if __name__ == "__main__":
  absltest.main()

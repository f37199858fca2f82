"""Tests of saving and restoring."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest
from absl.testing import parameterized

from dsv3_jax import checkpoint
from dsv3_jax import config
from dsv3_jax import train

RUN = testing.run("optim.moments=bfloat16")
FACTS = {"data": {"seed": 3, "train_text": "5f"}, "rows": 40}


def noisy_state(run=RUN, step=0):
  """A state whose every float differs from every initial one."""
  shapes = jax.eval_shape(lambda: train.init_state(run, jax.random.key(0)))
  rng = np.random.default_rng(step)

  def leaf(s):
    if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
      return jax.random.key(9)
    return jnp.asarray(rng.normal(size=s.shape, scale=9), s.dtype)

  return jax.tree.map(leaf, shapes).replace(step=jnp.int32(step))


def assert_same(actual, expected):
  bits = lambda s: s.replace(key=jax.random.key_data(s.key))
  actual, expected = jax.device_get((bits(actual), bits(expected)))
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  assert jax.tree.map(lambda a: a.dtype, actual) == jax.tree.map(
      lambda a: a.dtype, expected
  )


class CheckpointTest(parameterized.TestCase):

  def folder(self):
    return pathlib.Path(self.create_tempdir()) / "checkpoints"

  def manager(self, folder, **settings):
    checkpoints = checkpoint.manager(folder, config.Checkpoint(**settings))
    self.addCleanup(checkpoints.close)
    return checkpoints

  def saved(self, *steps, **settings):
    folder = self.folder()
    checkpoints = self.manager(folder, **settings)
    for step in steps:
      checkpoint.save(checkpoints, noisy_state(step=step), FACTS)
    checkpoints.wait_until_finished()
    return folder

  def test_restores_every_bit_and_the_facts(self):
    checkpoints = self.manager(self.saved(40))
    self.assertEqual(checkpoints.latest_step(), 40)
    state, facts = checkpoint.restore(checkpoints, RUN, 40)
    assert_same(state, noisy_state(step=40))
    self.assertEqual(facts, FACTS)

  def test_the_restored_key_draws_the_same(self):
    checkpoints = self.manager(self.saved(1))
    state, _ = checkpoint.restore(checkpoints, RUN, 1)
    np.testing.assert_array_equal(
        jax.random.bits(state.key), jax.random.bits(jax.random.key(9))
    )

  def test_keeps_the_newest(self):
    checkpoints = self.manager(self.saved(1, 2, 3, keep=2))
    self.assertEqual(checkpoints.all_steps(), [2, 3])

  @parameterized.parameters(
      "d_model=32", "n_layers=3", "mtp.depth=2", "mtp.depth=0", "mla.q_rank=0"
  )
  def test_refuses_another_architecture(self, change):
    checkpoints = self.manager(self.saved(1))
    with self.assertRaisesRegex(ValueError, "checkpoint .*/1 cannot be read"):
      checkpoint.restore(checkpoints, config.override(RUN, change), 1)

  def test_refuses_a_damaged_file(self):
    folder = self.saved(1)
    largest = max(
        (f for f in folder.rglob("*") if f.is_file()),
        key=lambda f: f.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with self.assertRaisesRegex(ValueError, "checkpoint .*/1 cannot be read"):
      checkpoint.restore(self.manager(folder), RUN, 1)

  def test_an_empty_folder_has_no_step(self):
    self.assertIsNone(self.manager(self.folder()).latest_step())


if __name__ == "__main__":
  absltest.main()

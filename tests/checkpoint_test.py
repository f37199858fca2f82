"""Tests of saving and restoring."""

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest
from absl.testing import parameterized

from dsv3_jax import checkpoint
from dsv3_jax import config
from dsv3_jax import train
from dsv3_jax.parallel import topology

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


def restore(checkpoints, step, run=RUN):
  like = train.abstract_state(run, topology.mesh({}))
  return checkpoint.restore(checkpoints, step, like)


class CheckpointTest(parameterized.TestCase):

  def manager(self, folder, **settings):
    checkpoints = checkpoint.manager(folder, config.Checkpoint(**settings))
    self.addCleanup(checkpoints.close)
    return checkpoints

  def saved(self, *steps, **settings):
    folder = testing.folder(self) / "checkpoints"
    checkpoints = self.manager(folder, **settings)
    for step in steps:
      checkpoint.save(checkpoints, noisy_state(step=step), FACTS)
    checkpoints.wait_until_finished()
    return folder

  def test_restores_every_bit_and_the_facts(self):
    checkpoints = self.manager(self.saved(40))
    self.assertEqual(checkpoints.latest_step(), 40)
    state, facts = restore(checkpoints, 40)
    testing.assert_same(
        testing.host(state), testing.host(noisy_state(step=40))
    )
    self.assertEqual(facts, FACTS)

  def test_the_restored_key_draws_the_same(self):
    checkpoints = self.manager(self.saved(1))
    state, _ = restore(checkpoints, 1)
    np.testing.assert_array_equal(
        jax.random.bits(state.key), jax.random.bits(jax.random.key(9))
    )

  def test_keeps_the_newest(self):
    checkpoints = self.manager(self.saved(1, 2, 3, keep=2))
    self.assertEqual(checkpoints.all_steps(), [2, 3])

  @parameterized.parameters("mla.q_rank=0", "mtp.depth=0")
  def test_refuses_another_architecture(self, change):
    checkpoints = self.manager(self.saved(1))
    with self.assertRaisesRegex(ValueError, "checkpoint .*/1 cannot be read"):
      restore(checkpoints, 1, config.override(RUN, change))

  def test_refuses_a_damaged_file(self):
    folder = self.saved(1)
    (damaged,) = folder.glob("1/state/_METADATA")
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with self.assertRaisesRegex(ValueError, "checkpoint .*/1 cannot be read"):
      restore(self.manager(folder), 1)

  def test_an_empty_folder_has_no_step(self):
    checkpoints = self.manager(testing.folder(self) / "checkpoints")
    self.assertIsNone(checkpoints.latest_step())


if __name__ == "__main__":
  absltest.main()

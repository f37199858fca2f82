"""The MTP loss trains its modules alone with `mtp.trains_trunk=false`."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, train
from dsv3_jax.data.batch import make_batch
from dsv3_jax.parallel import device_mesh


class _Zero:
  """A main loss without gradient, so that the MTP loss is alone."""

  metrics = ()

  def __call__(self, hidden, head, data):
    del head, data
    return 0 * hidden.sum(), {}


def _gradients(sizes, *assignments):
  run = testing.run(
    "n_layers=3", "mtp.depth=2", "router.balance_weight=0", *assignments
  )
  n = run.train.micro_batches
  mesh = device_mesh.make_mesh(sizes)
  rows = testing.tokens(n, 8 // n, 9, vocab_size=300)
  batch = dataclasses.replace(make_batch(rows), objective=_ZERO)
  batch = device_mesh.make_global_batch(batch, 8 // n, mesh, dim=1)
  state = jax.device_put(testing.state(run), train.shardings(run, mesh))
  compute = jax.jit(functools.partial(train.gradients, run=run, mesh=mesh))
  return jax.device_get(compute(state, batch)).grads


_ZERO = _Zero()


class TrunkTest(parameterized.TestCase):
  def test_is_trained_by_default(self):
    self.assertTrue(config.MTP().trains_trunk)

  @parameterized.parameters(
    ({}, ()),
    ({}, ("mtp.input_state=pre_norm",)),
    ({"data": 2}, ("parallel.layout=fsdp", "train.remat=block")),
    ({"pipe": 2}, ("train.micro_batches=4", "parallel.schedule=1f1b")),
  )
  @pytest.mark.slow
  def test_has_no_gradient_and_that_of_modules_is_as_before(
    self, sizes, settings
  ):
    default = _gradients(sizes, *settings)
    alone = _gradients(sizes, *settings, "mtp.trains_trunk=false")
    testing.assert_same(alone.pop("mtp"), default.pop("mtp"))
    if "mtp.input_state=pre_norm" in settings:
      default["norm"] = 1.0  # which the modules' input does not pass
    for group in jax.tree.leaves(default):
      self.assertGreater(np.abs(group).max(), 0)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), alone)


if __name__ == "__main__":
  absltest.main()

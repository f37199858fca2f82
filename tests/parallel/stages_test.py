"""Tests of the layers of a stage, and of the exchange of their parameters."""

import jax
import numpy as np
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.config import presets
from dsv3_jax.parallel import device_mesh
from dsv3_jax.parallel.pipeline import schedules, stages

MODEL = testing.tiny("n_layers=7", "n_dense_layers=2")  # 4 stages: 2 2 2 1


class StagesTest(parameterized.TestCase):
  def test_671b_on_16_ranks(self):
    schedule = schedules.dualpipe(16, 64)
    result = stages.assign_stages(schedule, presets.V3_671B.model)
    dense, moe = result.stacks["dense"], result.stacks["moe"]
    self.assertEqual(dense.count.tolist(), [3] + [0] * 15)
    self.assertEqual(moe.count.tolist(), [1] + [4] * 12 + [3] * 3)
    self.assertEqual(moe.first.tolist()[:4], [0, 1, 5, 9])
    self.assertEqual((dense.size, moe.size), (3, 4))

  @parameterized.product(
    name=tuple(schedules.SCHEDULES), n_ranks=(2, 4), n_dense=(0, 1, 4, 16)
  )
  def test_every_layer_is_on_as_many_ranks_as_its_stage(
    self, name, n_ranks, n_dense
  ):
    model = testing.tiny("n_layers=16", f"n_dense_layers={n_dense}")
    schedule = schedules.SCHEDULES[name](n_ranks, 2 * n_ranks)
    result = stages.assign_stages(schedule, model)
    copies = 2 if name == "dualpipe" else 1
    n_layers = {"dense": n_dense, "moe": 16 - n_dense}
    self.assertEqual(set(result.stacks), {k for k, n in n_layers.items() if n})
    for kind in result.stacks.values():
      times = np.bincount(kind.layers.ravel(), minlength=kind.n_layers + 1)
      self.assertEqual(times[:-1].tolist(), [copies] * kind.n_layers)
      self.assertEqual(kind.count.sum(), kind.n_layers)


class ToRanksTest(parameterized.TestCase):
  @parameterized.product(
    name=("zb1p", "dualpipe", "dualpipev"),
    kind=("dense", "moe"),
    sliced=(True, False),
  )
  def test_there_and_back(self, name, kind, sliced):
    n_ranks = 2 if name == "dualpipev" else 4
    schedule = schedules.SCHEDULES[name](n_ranks, 8)
    result = stages.assign_stages(schedule, MODEL).stacks[kind]
    mesh = device_mesh.make_mesh({"pipe": n_ranks})
    dim, spec = (1, jax.P(None, "pipe")) if sliced else (None, jax.P())

    def local(a):
      own = stages.to_ranks(a, result, dim)
      back = stages.from_ranks(own, result, dim)
      return own[None], back if sliced else jax.lax.psum(back, "pipe")

    run = jax.shard_map(
      local, mesh=mesh, in_specs=spec, out_specs=(jax.P("pipe"), spec)
    )
    a = np.arange(result.n_layers * 8.0).reshape(result.n_layers, 8) + 1
    own, back = jax.jit(run)(jax.device_put(a, jax.NamedSharding(mesh, spec)))
    with_empty = np.concatenate([a, np.zeros((1, 8))])
    np.testing.assert_array_equal(own, with_empty[result.layers])
    # The gradients of a layer that two ranks hold are added.
    np.testing.assert_array_equal(back, a * (2 if name == "dualpipe" else 1))


if __name__ == "__main__":
  absltest.main()

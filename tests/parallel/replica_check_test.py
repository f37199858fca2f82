"""Tests of the comparison of replicas."""

from unittest import mock

import jax
import jax.numpy as jnp
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import checksum, train
from dsv3_jax.parallel import device_mesh, replica_check

SIZES = {"data": 2, "expert": 4}
MESH = device_mesh.make_mesh(SIZES)


def placed(array, *spec):
  return jax.device_put(array, jax.NamedSharding(MESH, jax.P(*spec)))


def last_bit(a):
  flat = a.reshape(-1).view(f"u{a.dtype.itemsize}")
  flat[-1] ^= 1
  return a


def swap(a):
  a[[0, 1]] = a[[1, 0]]
  return a


class CheckTest(parameterized.TestCase):
  def test_says_nothing_of_equal_copies(self):
    run = testing.run()
    state = jax.device_put(testing.state(run), train.shardings(run, MESH))
    replica_check.check_replicas(state, MESH)

  def test_is_compiled_once(self):
    tree = [placed(jnp.zeros(37)), placed(jnp.zeros((5, 7)))]
    with mock.patch.object(
      checksum, "compute", side_effect=checksum.compute
    ) as of:
      for _ in range(3):
        replica_check.check_replicas(tree, MESH)
    self.assertEqual(of.call_count, len(tree))

  @parameterized.parameters("float32", "bfloat16", "int32", "uint8")
  def test_one_bit_on_one_device(self, dtype):
    replicated = placed(jnp.arange(24, dtype=dtype).reshape(4, 6))
    tree = {
      "a": {"b": testing.with_other_copy(replicated, 5, last_bit)},
      "c": replicated,
    }
    with self.assertRaises(replica_check.DivergedError) as caught:
      replica_check.check_replicas(tree, MESH)
    self.assertEqual(
      str(caught.exception),
      "a/b: the copy of devices 5 (process 0) differs from the copy of"
      " devices "
      + ", ".join(f"{i} (process 0)" for i in (0, 1, 2, 3, 4, 6, 7)),
    )

  def test_elements_that_changed_places(self):
    replicated = placed(jnp.arange(6.0))
    with self.assertRaisesRegex(replica_check.DivergedError, "devices 2 "):
      replica_check.check_replicas(
        [testing.with_other_copy(replicated, 2, swap)], MESH
      )

  def test_compares_a_part_with_its_own_copies_only(self):
    # Over `expert`, device 6 holds what device 2 holds, and no other does.
    parts = placed(jnp.arange(8.0), "expert")
    replica_check.check_replicas([parts], MESH)
    with self.assertRaisesRegex(
      replica_check.DivergedError, r"devices \d \(.*\) differs .* \d \(.*\)$"
    ):
      replica_check.check_replicas(
        [testing.with_other_copy(parts, 6, last_bit)], MESH
      )

  def test_what_one_device_holds_alone_cannot_differ(self):
    parts = placed(jnp.arange(8.0), ("data", "expert"))
    replica_check.check_replicas(
      [testing.with_other_copy(parts, 6, last_bit)], MESH
    )

  def test_a_scalar_and_a_key(self):
    tree = placed(jnp.int32(3)), placed(jax.random.key(0))
    replica_check.check_replicas(tree, MESH)
    other = testing.with_other_copy(tree[0], 7, lambda a: a + 1)
    with self.assertRaisesRegex(
      replica_check.DivergedError, "^0: .* devices 7 "
    ):
      replica_check.check_replicas((other, tree[1]), MESH)


if __name__ == "__main__":
  absltest.main()

"""Tests of the latent cache: what it holds, its size, its growth."""

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import param_spec
from dsv3_jax.config import presets
from dsv3_jax.infer import kvcache


class SpecsTest(parameterized.TestCase):
  # Bytes of a position in BF16: layers, then rank and rotated key, two each.
  @parameterized.parameters(
    ("v3_671b", False, 70_272),  # 61 * (512 + 64) * 2
    ("v3_671b", True, 71_424),  # the MTP module is one layer more
    ("v2_236b", False, 69_120),
    ("v2_lite_16b", False, 31_104),
  )
  def test_bytes_of_a_position_are_those_published(self, name, drafting, n):
    cfg = presets.PRESETS[name].model

    def nbytes(n_slots, length, dtype):
      tree = kvcache.specs(cfg, n_slots, length, dtype, drafting=drafting)
      return param_spec.nbytes(tree)

    self.assertEqual(nbytes(1, 1, jnp.bfloat16), n)
    self.assertEqual(nbytes(1, 1, "float32"), 2 * n)
    self.assertEqual(nbytes(3, 160, jnp.bfloat16), 3 * 160 * n)

  def test_holds_one_array_a_layer(self):
    cfg = testing.tiny()
    tree = kvcache.specs(cfg, 2, 5, "float32")
    self.assertEqual(list(tree), ["main"])
    self.assertEqual([s.shape for s in tree["main"]], [(2, 5, 16 + 8)] * 4)
    self.assertEqual(tree["main"][0].axes, ("slots", "positions", "latent"))
    # However many modules there are, one drafts.
    deeper = testing.tiny("mtp.depth=2")
    tree = kvcache.specs(deeper, 2, 5, "float32", drafting=True)
    self.assertLen(tree["main"], 4)
    self.assertEqual([s.shape for s in tree["mtp"]], [(2, 5, 16 + 8)])


class CacheTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16")
  def test_is_empty_at_first(self, dtype):
    tree = kvcache.specs(testing.tiny(), 2, 5, dtype, drafting=True)
    cache = kvcache.empty(tree)
    self.assertEqual(kvcache.length(cache), 5)
    for array in (*cache["main"], *cache["mtp"]):
      np.testing.assert_array_equal(array, np.zeros((2, 5, 24)))
      self.assertEqual(array.dtype, jnp.dtype(dtype))
    self.assertLen(cache["main"], 4)

  @parameterized.parameters(
    (1, 16),
    (15, 16),
    (16, 16),
    (17, 32),
    (32, 32),
    (33, 64),
    (64, 64),
    (65, 100),
    (100, 100),
  )
  def test_lengths_are_few_and_enough(self, n, expected):
    self.assertEqual(kvcache.bucket(n, 100), expected)
    self.assertEqual(kvcache.bucket(min(n, 7), 7), 7)

  @parameterized.parameters((3, 9), (5, 4), (5, 9), (3, 4))
  def test_growing_keeps_what_was_there(self, n_rows, length):
    kept = testing.normal(3, 4, 6), testing.normal(3, 4, 6, seed=1)
    cache = {"main": kept[:1], "mtp": kept[1:]}
    empty = jax.tree.map(lambda _: jnp.full((n_rows, length, 6), 7.0), cache)
    grown = kvcache.grow(cache, empty)
    self.assertEqual(kvcache.length(grown), length)
    for name, before in zip(("main", "mtp"), kept, strict=True):
      after = np.full((n_rows, length, 6), 7.0)
      after[:3, :4] = before
      np.testing.assert_array_equal(grown[name][0], after)


if __name__ == "__main__":
  absltest.main()

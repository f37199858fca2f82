"""Tests of what is folded over a spec tree."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from dsv3_jax import param_spec

TREE = {
  "embed": param_spec.weight(0.5, vocab=40, embed=50),
  "block": {
    "norm": param_spec.norm_scale(7),
    "up": param_spec.weight(0.1, embed=7, ffn=3),
  },
}
KEY = jax.random.key(1)


class SchemaTest(absltest.TestCase):
  def test_a_parameter_is_drawn_by_its_name(self):
    before = param_spec.flatten_with_paths(param_spec.init(TREE, KEY))
    more = TREE | {
      "block": {"a": param_spec.weight(1.0, embed=2, ffn=2)} | TREE["block"],
      "zz": param_spec.norm_scale(3),
    }
    after = param_spec.flatten_with_paths(param_spec.init(more, KEY))
    self.assertEqual(after.keys() - before.keys(), {"block/a", "zz"})
    for name, value in before.items():
      np.testing.assert_array_equal(after[name], value, name)

  def test_names_draw_differently(self):
    twins = {name: param_spec.weight(1.0, embed=5, ffn=5) for name in "ab"}
    params = param_spec.init(twins, KEY)
    self.assertFalse(np.isclose(params["a"], params["b"]).any())

  def test_weights_are_normal_and_gains_one(self):
    params = param_spec.init(TREE, KEY)
    w = np.asarray(params["embed"])
    # 2,000 draws: five standard errors of mean and of standard deviation.
    self.assertLess(abs(w.mean()), 5 * 0.5 / w.size**0.5)
    self.assertLess(abs(w.std() - 0.5), 5 * 0.5 / (2 * w.size) ** 0.5)
    np.testing.assert_array_equal(params["block"]["norm"], np.ones(7))

  def test_abstract_paths_and_count_agree_with_init(self):
    params, abstract = param_spec.init(TREE, KEY), param_spec.abstract(TREE)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    self.assertEqual(shapes(params), shapes(abstract))
    names = ["block/norm", "block/up", "embed"]
    self.assertEqual(list(param_spec.flatten_with_paths(params)), names)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
    self.assertEqual(param_spec.count(TREE), sizes)

  def test_stack_adds_a_leading_dim(self):
    up = param_spec.stack(TREE, 4)["block"]["up"]
    self.assertEqual(up.shape, (4, 7, 3))
    self.assertEqual(up.axes, ("layers", "embed", "ffn"))
    self.assertEqual(up.dtype, jnp.float32)
    four = param_spec.count(param_spec.stack(TREE, 4))
    self.assertEqual(four, 4 * param_spec.count(TREE))


if __name__ == "__main__":
  absltest.main()

"""Tests of what is folded over a spec tree."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from dsv3_jax import schema

TREE = {
    "embed": schema.weight(0.5, vocab=40, embed=50),
    "block": {"norm": schema.gain(7), "up": schema.weight(0.1, embed=7, ffn=3)},
}
KEY = jax.random.key(1)


class SchemaTest(absltest.TestCase):

  def test_a_parameter_is_drawn_by_its_name(self):
    before = schema.paths(schema.init(TREE, KEY))
    more = TREE | {
        "block": {"a": schema.weight(1.0, embed=2, ffn=2)} | TREE["block"],
        "zz": schema.gain(3),
    }
    after = schema.paths(schema.init(more, KEY))
    self.assertEqual(after.keys() - before.keys(), {"block/a", "zz"})
    for name, value in before.items():
      np.testing.assert_array_equal(after[name], value, name)

  def test_names_draw_differently(self):
    twins = {name: schema.weight(1.0, embed=5, ffn=5) for name in "ab"}
    params = schema.init(twins, KEY)
    self.assertFalse(np.isclose(params["a"], params["b"]).any())

  def test_weights_are_normal_and_gains_one(self):
    params = schema.init(TREE, KEY)
    w = np.asarray(params["embed"])
    # 2,000 draws: five standard errors of mean and of standard deviation.
    self.assertLess(abs(w.mean()), 5 * 0.5 / w.size**0.5)
    self.assertLess(abs(w.std() - 0.5), 5 * 0.5 / (2 * w.size) ** 0.5)
    np.testing.assert_array_equal(params["block"]["norm"], np.ones(7))

  def test_abstract_paths_and_count_agree_with_init(self):
    params, abstract = schema.init(TREE, KEY), schema.abstract(TREE)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    self.assertEqual(shapes(params), shapes(abstract))
    names = ["block/norm", "block/up", "embed"]
    self.assertEqual(list(schema.paths(params)), names)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
    self.assertEqual(schema.count(TREE), sizes)

  def test_stack_adds_a_leading_dim(self):
    up = schema.stack(TREE, 4)["block"]["up"]
    self.assertEqual(up.shape, (4, 7, 3))
    self.assertEqual(up.axes, ("layers", "embed", "ffn"))
    self.assertEqual(up.dtype, jnp.float32)
    four = schema.count(schema.stack(TREE, 4))
    self.assertEqual(four, 4 * schema.count(TREE))


if __name__ == "__main__":
  absltest.main()

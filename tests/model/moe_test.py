import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.model import experts, moe

V2 = ("router.score=softmax", "router.renormalize=false", "router.scale=16")
# The longest contraction path: router, up, down (or the shared up and down),
# sums over choices, experts and time.
TERMS = 64 + 64 + 2 * 32 + 4 + 16 + 9


def _setup(*assignments):
  cfg = testing.tiny(*assignments)
  p = testing.draw(moe.specs(cfg))
  x = testing.normal(2, 9, cfg.d_model)
  bias = testing.normal(16, seed=1, scale=0.1)
  return cfg, p, x, bias, jax.jit(moe.moe, static_argnums=3)


class MoeTest(parameterized.TestCase):
  @parameterized.parameters(
    (), ("moe.n_shared=0",), ("moe.n_shared=2",), V2, ("router.n_groups=4",)
  )
  def test_matches_the_reference(self, *assignments):
    cfg, p, x, bias, run = _setup(*assignments)
    y, stats = run(p, x, bias, cfg)
    load, balance = stats.load, stats.balance
    want_y, want_load, want_balance = reference.moe(
      *reference.f64((p, x, bias)), cfg
    )
    np.testing.assert_array_equal(load, want_load)
    testing.assert_close((y, balance), (want_y, want_balance), TERMS)

  @pytest.mark.slow
  def test_experts_read_in_their_stack_have_the_same_bits(self):
    cfg, p, x, bias, _ = _setup()
    stack = jax.tree.map(lambda a: jnp.stack([-a, a, 2 * a]), p)

    @functools.partial(jax.jit, static_argnums=1)
    def run(stack, in_place):
      def total(stack):
        layer = jax.tree.map(lambda a: a[1], stack)
        if in_place:
          layer = moe.read_from_stack(layer, stack, jnp.int32(1))
        y, _ = moe.moe(layer, x, bias, cfg)
        return (y**2).sum(), y

      return jax.value_and_grad(total, has_aux=True)(stack)

    jax.tree.map(
      np.testing.assert_array_equal, run(stack, True), run(stack, False)
    )

  def test_shared_expert_is_not_scaled(self):
    cfg, p, x, bias, run = _setup()
    silent = p | {"experts": jax.tree.map(np.zeros_like, p["experts"])}
    y, _ = run(silent, x, bias, cfg)
    expected = reference.swiglu(*reference.f64((p["shared"], x)))
    testing.assert_close(y, expected, 64 + 32)

  def test_bias_that_changes_no_choice_changes_no_bit(self):
    cfg, p, x, bias, run = _setup()
    before = run(p, x, bias, cfg)
    after = run(p, x, bias + np.float32(0.5), cfg)
    jax.tree.map(np.testing.assert_array_equal, before, after)

  def test_the_experts_are_an_argument(self):
    cfg, p, x, bias, run = _setup()
    y, _ = run(p, x, bias, cfg)
    dense = moe.Experts(experts.dense_ffn)
    other, _ = moe.moe(p, x, bias, cfg, dense)
    testing.assert_close(y, other, TERMS)

  def test_all_tokens_to_the_same_experts(self):
    cfg, p, x, _, _ = _setup()
    bias = 100 * (jnp.arange(16) < 4).astype(jnp.float32)

    def f(p, x, bias):
      y, stats = moe.moe(p, x, bias, cfg)
      return (y * y).sum() + stats.balance, stats.load

    gradients, load = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(p, x, bias)
    np.testing.assert_array_equal(load, [18] * 4 + [0] * 12)
    np.testing.assert_array_equal(gradients[2], np.zeros(16))
    for leaf in jax.tree.leaves(gradients):
      self.assertTrue(np.isfinite(leaf).all())
    for leaf in gradients[0]["experts"].values():
      self.assertEqual(np.abs(leaf[4:]).max(), 0)
      self.assertGreater(np.abs(leaf[:4]).min(axis=0).max(), 0)


if __name__ == "__main__":
  absltest.main()

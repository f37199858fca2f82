import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import param_spec
from dsv3_jax.model import experts, swiglu

APART = functools.partial(experts.grouped_ffn, split_wgrad=True)
FORMS = (experts.grouped_ffn, APART, experts.dense_ffn)
# M tokens, E experts, K of them chosen, widths D and F.
SIZES = (
  (1, 1, 1, 3, 5),
  (1, 16, 1, 5, 3),
  (7, 3, 3, 7, 5),
  (7, 16, 4, 3, 1),
  (130, 1, 1, 1, 3),
  (130, 16, 4, 7, 9),
  (600, 3, 2, 3, 5),
  (600, 3, 3, 3, 5),
)
EDGE = (130, 5, 1, 3, 7)  # for the cases of one shape


def _inputs(m, e, k, d, f):
  specs = param_spec.stack(swiglu.specs(d, f, 0.1), e, "experts")
  p = jax.tree.map(lambda w: 4 * w, testing.draw(specs))
  rng = np.random.default_rng(m + e + k)
  chosen = np.array([rng.permutation(e)[:k] for _ in range(m)], np.int32)
  gates = rng.uniform(0.1, 1, (m, k)).astype(np.float32)
  return p, testing.normal(m, d), chosen, gates


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(form, p, x, chosen, gates, dy):
  y, vjp = jax.vjp(lambda p, x, gates: form(p, x, chosen, gates), p, x, gates)
  return y, vjp(dy)


def _check(form, p, x, chosen, gates):
  m, (_, d, _, f) = len(x), p["gate_up"].shape
  dy = testing.normal(*x.shape, seed=1)
  y, gradients = _value_and_gradients(form, p, x, chosen, gates, dy)
  p, x, gates, dy = reference.f64((p, x, gates, dy))
  # Up, down, the sum over choices; backwards both again, then over tokens.
  terms = 2 * (d + f) + chosen.shape[1] + m
  testing.assert_close(y, reference.expert_ffn(p, x, chosen, gates), terms)
  expected = reference.expert_ffn_gradients(p, x, chosen, gates, dy)
  testing.assert_close(gradients, expected, terms)
  return gradients


@pytest.mark.fault(
  "F34",
  "all tokens to one expert; experts and devices with no token",
  "no NaN, no hang, zero gradients",
)
class GroupedFfnTest(parameterized.TestCase):
  @parameterized.parameters(*SIZES)
  def test_values_and_gradients_match_the_reference(self, *size):
    _check(experts.grouped_ffn, *_inputs(*size))

  @parameterized.parameters(*FORMS)
  def test_every_form_matches_it(self, form):
    _check(form, *_inputs(*EDGE))

  def test_even_loads(self):
    p, x, chosen, gates = _inputs(*EDGE)
    even = np.arange(chosen.size, dtype=np.int32) % 5
    _check(experts.grouped_ffn, p, x, even.reshape(chosen.shape), gates)

  @parameterized.parameters(*FORMS)
  def test_all_tokens_to_one_expert_and_none_to_the_others(self, form):
    p, x, chosen, gates = _inputs(*EDGE)
    dp, _, _ = _check(form, p, x, np.full_like(chosen, 3), gates)
    for gradient in dp.values():
      idle = np.delete(gradient, 3, axis=0)
      np.testing.assert_array_equal(idle, np.zeros_like(idle))

  def test_loads_from_none_to_all_of_the_tokens(self):
    # Expert e is chosen by about e / 16 of the tokens, the last by all: from no
    # block to several of both sizes.
    p, x, _, gates = _inputs(200, 16, 4, 3, 5)
    wanted = np.random.default_rng(0).uniform(size=(200, 16)) * np.arange(16)
    wanted[:, 15] = 16
    chosen = np.argsort(-wanted, axis=1)[:, :4].astype(np.int32)
    plan = experts._plan(200, 4, 16, chosen.size)
    self.assertEqual(plan.blocks, (16, 8))
    large, small = experts._layout(jnp.asarray(chosen), 16, plan).blocks
    self.assertGreater(int(large.used), 16)
    self.assertGreater(int(small.used), 4)
    _check(experts.grouped_ffn, p, x, chosen, gates)

  @parameterized.parameters(*FORMS)
  def test_an_expert_without_tokens(self, form):
    p, x, chosen, gates = _inputs(*EDGE)
    dp, _, _ = _check(form, p, x, np.where(chosen == 2, 4, chosen), gates)
    for gradient in dp.values():
      self.assertEqual(np.abs(gradient[2]).max(), 0)
      self.assertGreater(np.abs(gradient[4]).max(), 0)

  @parameterized.parameters(*FORMS)
  def test_a_gate_of_zero_still_has_a_gradient(self, form):
    p, x, chosen, gates = _inputs(*EDGE)
    _, _, dgates = _check(form, p, x, chosen, 0 * gates)
    self.assertGreater(np.abs(dgates).min(), 0)

  @parameterized.parameters(*FORMS)
  def test_choices_of_none_count_for_nothing(self, form):
    p, x, chosen, gates = _inputs(130, 5, 3, 3, 7)
    rng = np.random.default_rng(0)
    none = rng.random(chosen.shape) < 0.6
    none[:20], none[20:40] = True, False
    # The reference knows no such choice: there, a gate of 0 stands for it.
    dy = testing.normal(*x.shape, seed=1)
    y, (dp, dx, dgates) = _value_and_gradients(
      form, p, x, np.where(none, 5, chosen), gates, dy
    )
    args = reference.f64((p, x, np.where(none, 0, gates), dy))
    args = (*args[:2], chosen, *args[2:])
    terms = 2 * (3 + 7) + 3 + 130
    testing.assert_close(y, reference.expert_ffn(*args[:4]), terms)
    want = reference.expert_ffn_gradients(*args)
    want_dgates = np.where(none, 0, want[2])
    testing.assert_close((dp, dx, dgates), (*want[:2], want_dgates), terms)

  # From all hidden states made again backwards to none.
  @parameterized.product(n_slots=(1, 17, 40, 130), split_wgrad=(False, True))
  def test_the_number_of_choices_expected_changes_nothing(
    self, n_slots, split_wgrad
  ):
    p, x, chosen, gates = _inputs(*EDGE)
    form = functools.partial(
      experts.grouped_ffn, n_slots=n_slots, split_wgrad=split_wgrad
    )
    _check(form, p, x, chosen, gates)

  def test_no_tokens(self):
    p, x, chosen, gates = _inputs(0, 3, 2, 3, 5)
    y, (dp, dx, dgates) = _value_and_gradients(
      experts.grouped_ffn, p, x, chosen, gates, x
    )
    shapes = (y.shape, dx.shape, dgates.shape)
    self.assertEqual(shapes, ((0, 3), (0, 3), (0, 2)))
    for gradient in dp.values():
      self.assertEqual(np.abs(gradient).max(), 0)

  def test_eager_is_compiled(self):
    p, x, chosen, gates = jax.tree.map(jnp.asarray, _inputs(7, 3, 2, 5, 3))
    eager = experts.grouped_ffn(p, x, chosen, gates)
    compiled = jax.jit(experts.grouped_ffn)(p, x, chosen, gates)
    testing.assert_close(eager, compiled, terms=5 + 3 + 2)


class FewFfnTest(parameterized.TestCase):
  def check(self, p, x, chosen, gates):
    y = jax.jit(experts.slotwise_ffn)(p, x, chosen, gates)
    dense = jax.jit(experts.dense_ffn)(p, x, chosen, gates)
    # In the reference a gate of 0 stands for a choice of none.
    n = len(p["down"])
    none = chosen >= n
    expected = reference.expert_ffn(
      *reference.f64((p, x)),
      np.where(none, 0, chosen),
      np.where(none, 0, np.float64(gates)),
    )
    terms = x.shape[1] + p["down"].shape[1] + chosen.shape[1]
    testing.assert_close(y, expected, terms)
    testing.assert_close(y, np.asarray(dense), 2 * terms)
    return y

  @parameterized.parameters(
    (1, 1, 1, 3, 5), (1, 16, 8, 5, 3), (2, 16, 4, 7, 9), (8, 3, 1, 3, 5)
  )
  def test_is_the_reference(self, *size):
    self.check(*_inputs(*size))

  def test_choices_of_none_count_for_nothing(self):
    p, x, chosen, gates = _inputs(4, 5, 2, 3, 7)
    # All of a token, the first or the last, and no choice of the fourth.
    chosen[0], chosen[1, 0], chosen[2, 1] = 5, 5, 5
    y = self.check(p, x, chosen, gates)
    np.testing.assert_array_equal(y[0], np.zeros(3))

  def test_choices_of_the_same_expert_add_up(self):
    p, x, chosen, gates = _inputs(4, 5, 2, 3, 7)
    chosen[:3] = 3  # by several tokens, and twice by each
    self.check(p, x, chosen, gates)

  def test_keeps_the_type_of_its_input(self):
    p, x, chosen, gates = _inputs(4, 5, 2, 3, 7)
    p, x = jax.tree.map(jnp.bfloat16, (p, x))
    y = experts.slotwise_ffn(p, x, chosen, gates)
    self.assertEqual(y.dtype, jnp.bfloat16)


if __name__ == "__main__":
  absltest.main()

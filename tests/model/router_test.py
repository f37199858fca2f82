import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.model import router

V3 = config.Router(n_experts=16, top_k=4, n_groups=8, top_groups=4)
V2 = dataclasses.replace(
  V3, n_groups=4, top_groups=2, score="softmax", renormalize=False, scale=16.0
)
CONFIGS = (
  V3,
  V2,
  dataclasses.replace(V3, n_groups=1, top_groups=1),
  dataclasses.replace(V3, n_groups=4, top_groups=1),
  dataclasses.replace(V3, n_groups=16, top_groups=5),
  config.Router(n_experts=1, top_k=1),
  config.Router(n_experts=9, top_k=9, n_groups=3, top_groups=3),
)


SELECT = jax.jit(router.select, static_argnums=2)
BALANCE = jax.jit(router.balance_loss, static_argnums=2)


def _grid(steps, *shape, seed=0):
  """Multiples of 1 / steps in (0, 1]: sums of them are exact, and they tie."""
  rng = np.random.default_rng(seed)
  return (rng.integers(1, steps + 1, shape) / steps).astype(np.float32)


class GoldenTest(absltest.TestCase):
  """Vectors worked out by hand."""

  def test_selection_with_and_without_bias(self):
    cfg = config.Router(n_experts=8, top_k=3, n_groups=4, top_groups=2)
    scores = jnp.float32([0.9, 0.1, 0.6, 0.5, 0.55, 0.45, 0.8, 0.05])
    bias = jnp.float32([-0.3, 0, 0, 0.05, 0.1, 0, -0.2, 0])
    experts, gates = router.select(scores, bias, cfg)
    np.testing.assert_array_equal(experts, [4, 2, 3])
    np.testing.assert_allclose(gates, [0.8333, 0.9091, 0.7576], atol=5e-5)
    # Groups 0 and 2 tie at 1.0, and the lower one is kept.
    experts, gates = router.select(scores, 0 * bias, cfg)
    np.testing.assert_array_equal(experts, [0, 2, 3])
    np.testing.assert_allclose(gates, [1.125, 0.75, 0.625], rtol=1e-6)

  def test_bias_step(self):
    bias = router.update_bias(jnp.zeros(4), jnp.int32([5, 3, 4, 4]), 0.001)
    np.testing.assert_array_equal(bias, np.float32([-0.001, 0.001, 0, 0]))

  def test_balance_loss(self):
    cfg = config.Router(n_experts=4, top_k=2, balance_weight=1.0)
    scores = jnp.float32([[[0.8, 0.4, 0.2, 0.1], [0.7, 0.6, 0.1, 0.2]]])
    experts = jnp.int32([[[0, 1], [0, 1]]])
    # Printed with five digits, each counted twice.
    self.assertAlmostEqual(
      router.balance_loss(scores, experts, cfg), 1.6125, delta=2e-5
    )


@pytest.mark.fault("F33")
class SelectTest(parameterized.TestCase):
  @parameterized.product(cfg=CONFIGS, steps=(4, 4096))
  def test_is_the_reference_exactly_ties_included(self, cfg, steps):
    scores = _grid(steps, 64, cfg.n_experts)
    bias = _grid(steps, cfg.n_experts, seed=1) - np.float32(0.5)
    experts, gates = SELECT(scores, bias, cfg)
    for t in range(64):
      want, want_gates = reference.select(
        *reference.f64((scores[t], bias)), cfg
      )
      np.testing.assert_array_equal(experts[t], want)
      testing.assert_close(gates[t], want_gates, cfg.top_k)

  @parameterized.product(cfg=CONFIGS, seed=(0, 1, 2))
  def test_invariants(self, cfg, seed):
    scores = testing.normal(64, cfg.n_experts, seed=seed)
    scores = np.asarray(jax.nn.sigmoid(scores))
    bias = testing.normal(cfg.n_experts, seed=seed + 9)
    experts, gates = SELECT(scores, bias, cfg)
    group_size = cfg.n_experts // cfg.n_groups
    for chosen in np.asarray(experts):
      self.assertLen(set(chosen), cfg.top_k)
      self.assertLessEqual(len(set(chosen // group_size)), cfg.top_groups)
    if cfg.renormalize:
      np.testing.assert_allclose(
        gates.sum(-1), cfg.scale, rtol=cfg.top_k * testing.EPS
      )
    else:
      chosen_scores = np.take_along_axis(scores, np.asarray(experts), -1)
      np.testing.assert_array_equal(gates, cfg.scale * chosen_scores)

  @parameterized.parameters(*CONFIGS[:4])
  def test_bias_changes_the_choice_and_never_the_gates(self, cfg):
    scores = _grid(4096, cfg.n_experts)
    bias = _grid(4096, cfg.n_experts, seed=1)
    experts, gates = SELECT(scores, bias, cfg)
    # Lifting just the chosen experts cannot change who is chosen.
    lifted = bias + np.isin(np.arange(cfg.n_experts), experts)
    for other in (lifted, bias - 3):
      other_experts, other_gates = SELECT(scores, other.astype(np.float32), cfg)
      np.testing.assert_array_equal(other_experts, experts)
      np.testing.assert_array_equal(other_gates, gates)
    if cfg.top_k < cfg.n_experts:
      unchosen = np.setdiff1d(np.arange(cfg.n_experts), experts)[0]
      tilted = bias + 10 * (np.arange(cfg.n_experts) == unchosen)
      self.assertIn(unchosen, SELECT(scores, tilted.astype(np.float32), cfg)[0])

  @parameterized.parameters(V3, V2)
  def test_no_gradient_to_bias_and_one_to_the_chosen_scores(self, cfg):
    scores, bias = _grid(4096, 5, 16), _grid(4096, 16, seed=1)
    probe = testing.normal(5, cfg.top_k)

    def f(scores, bias):
      return (SELECT(scores, bias, cfg)[1] * probe).sum()

    dscores, dbias = jax.jit(jax.grad(f, (0, 1)))(scores, bias)
    np.testing.assert_array_equal(dbias, np.zeros(16))
    experts, _ = SELECT(scores, bias, cfg)
    hot = np.zeros((5, 16), bool)
    np.put_along_axis(hot, np.asarray(experts), True, axis=-1)
    np.testing.assert_array_equal(dscores != 0, hot)

  @parameterized.parameters(V3, V2)
  def test_masked_groups_lose_to_negative_scores(self, cfg):
    # Every biased score is below 0: with a mask of 0 the masked ones would win.
    scores, bias = _grid(4096, 40, 16), np.full(16, -5, np.float32)
    experts, _ = SELECT(scores, bias, cfg)
    without, _ = SELECT(scores, 0 * bias, cfg)
    np.testing.assert_array_equal(experts, without)

  def test_groups_rank_by_two_best_or_in_v2_by_the_best(self):
    # Group 0 has the single best expert, group 1 the best pair.
    scores = jnp.float32([0.9, 0.0, 0.1, 0.1, 0.6, 0.6, 0.1, 0.1])
    base = dict(n_experts=8, top_k=2, n_groups=4, top_groups=1)
    pair, _ = SELECT(scores, 0 * scores, config.Router(**base))
    np.testing.assert_array_equal(pair, [4, 5])
    v2 = config.Router(**base, score="softmax", renormalize=False)
    single, gates = SELECT(scores, 0 * scores, v2)
    np.testing.assert_array_equal(single, [0, 1])
    np.testing.assert_array_equal(gates, 2.5 * scores[:2])

  def test_a_thousandth_of_a_large_bias_decides(self):
    bias = jnp.float32([5, 5.001, 4.999, 5])
    cfg = config.Router(n_experts=4, top_k=2)
    experts, _ = SELECT(jnp.full(4, 0.5), bias, cfg)
    np.testing.assert_array_equal(experts, [1, 0])

  def test_all_equal_chooses_the_lowest_indices(self):
    experts, gates = SELECT(jnp.full((3, 16), 0.5), jnp.zeros(16), V3)
    np.testing.assert_array_equal(experts, [[0, 1, 2, 3]] * 3)
    np.testing.assert_allclose(gates, 2.5 / 4, rtol=4 * testing.EPS)


@pytest.mark.fault(
  "F33",
  "router scores that underflow, tie, or lose to a negative bias",
  "finite; lowest index wins; never a masked expert",
)
class RouteTest(parameterized.TestCase):
  @parameterized.parameters(V3, V2)
  def test_scores_and_load(self, cfg):
    w, x = testing.normal(24, 16, scale=0.2), testing.normal(2, 9, 24, seed=1)
    routing = jax.jit(router.route, static_argnums=3)(w, x, jnp.zeros(16), cfg)
    expected = reference.scores_of(*reference.f64((w, x)), cfg)
    testing.assert_close(routing.scores, expected, 24 + 16)
    self.assertEqual(routing.load.dtype, jnp.int32)
    counts = np.bincount(np.ravel(routing.experts), minlength=16)
    np.testing.assert_array_equal(routing.load, counts)
    self.assertEqual(routing.load.sum(), 2 * 9 * cfg.top_k)

  def test_bfloat16_activations_are_routed_in_float32(self):
    w = testing.normal(24, 16)
    x = jnp.asarray(testing.normal(2, 9, 24, seed=1), jnp.bfloat16)
    low = router.route(w, x, jnp.zeros(16), V3)
    full = router.route(w, x.astype(jnp.float32), jnp.zeros(16), V3)
    self.assertEqual(low.gates.dtype, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, low, full)

  # sigmoid(-200) is 0 in float32; sigmoid(-46) is 1e-20, whose square is not
  # a normal float32.
  @parameterized.product(cfg=(V3, V2))
  def test_scores_that_underflow_stay_finite(self, cfg):
    w = np.ones((4, 16), np.float32)
    logits = [-200.0, -104.0, -88.0, -60.0, -46.0, -44.0, -40.0, -30.0]
    x = np.reshape(logits, (2, 4, 1)).repeat(4, -1).astype(np.float32) / 4

    def f(w, x):
      routing = router.route(w, x, jnp.zeros(16), cfg)
      balance = BALANCE(routing.scores, routing.experts, cfg)
      probe = jnp.arange(1.0, 1.0 + cfg.top_k).reshape(1, 1, -1)
      return (routing.gates * probe).sum() + balance, routing

    run = jax.jit(jax.grad(f, (0, 1), has_aux=True))
    gradients, routing = run(w, x)
    for leaf in jax.tree.leaves((gradients, routing)):
      self.assertTrue(np.isfinite(leaf).all(), leaf)
    np.testing.assert_array_equal(routing.load[:4], [8] * 4)


class BalanceLossTest(parameterized.TestCase):
  @parameterized.product(
    cfg=(V3, V2), balance_map=("scores", "routed"), alpha=(1e-4, 1.0)
  )
  def test_matches_the_reference(self, cfg, balance_map, alpha):
    cfg = dataclasses.replace(
      cfg, balance_map=balance_map, balance_weight=alpha
    )
    scores, experts = _grid(4096, 2, 9, 16), _grid(4096, 2, 9, 16, seed=1)
    experts = np.argsort(experts, axis=-1)[..., : cfg.top_k]
    actual = BALANCE(scores, experts, cfg)
    expected = [
      reference.balance_loss(s, e, cfg)
      for s, e in zip(reference.f64(scores), experts, strict=True)
    ]
    testing.assert_close(actual, np.mean(expected), terms=16 + 9 + 16 + 2)

  def test_is_alpha_under_uniform_routing(self):
    # Token t prefers experts 4t .. 4t + 3, so every expert is chosen once.
    scores = np.where(np.repeat(np.eye(4), 4, axis=1), 0.75, 0.25)
    scores = scores.astype(np.float32)[None]
    experts = SELECT(scores, jnp.zeros(16), V3)[0]
    np.testing.assert_array_equal(np.sort(np.ravel(experts)), np.arange(16))
    alpha = BALANCE(scores, experts, V3)
    np.testing.assert_allclose(alpha, 1e-4, rtol=(16 + 4) * testing.EPS)

  def test_counts_each_sequence_by_itself(self):
    # One sequence likes the first half, the other the second: balanced over
    # the batch, not in a sequence, where f is 2 for those that have all of P.
    half = np.repeat([[0.75, 0.0]], 8, axis=1).astype(np.float32)
    scores = np.stack([half.repeat(6, 0), half[:, ::-1].repeat(6, 0)])
    cfg = dataclasses.replace(V3, top_k=8, balance_weight=1.0)
    np.testing.assert_allclose(
      BALANCE(scores, None, cfg), 2, rtol=20 * testing.EPS
    )

  def test_gradient_takes_the_counts_as_constants(self):
    cfg = dataclasses.replace(V3, balance_weight=1.0)
    scores = _grid(4096, 2, 9, 16)
    gradient = jax.jit(jax.grad(router.balance_loss), static_argnums=2)(
      scores, None, cfg
    )
    s = reference.f64(scores)
    for b in range(2):
      f = np.zeros(16)
      for row in s[b]:
        f[reference.top(row, 4)] += 16 / (4 * 9)
      total = s[b].sum(-1, keepdims=True)
      # d/ds_i of sum_j f_j s_j / total, a mean over 9 tokens and 2 sequences.
      expected = (f - (s[b] @ f)[:, None] / total) / total / 9 / 2
      testing.assert_close(gradient[b], expected, terms=16 + 16 + 9)


class UpdateBiasTest(absltest.TestCase):
  def test_compares_with_a_mean_that_is_no_integer(self):
    load = jnp.int32([[5, 3, 4, 5], [0, 0, 0, 1]])
    bias = router.update_bias(jnp.ones((2, 4)), load, 0.25)
    np.testing.assert_array_equal(
      bias, [[0.75, 1.25, 1.25, 0.75], [1.25, 1.25, 1.25, 0.75]]
    )

  def test_counts_beyond_float32_are_told_apart(self):
    load = jnp.int32([2**24 + 1, 2**24, 2**24 - 1])
    bias = router.update_bias(jnp.zeros(3), load, 1.0)
    np.testing.assert_array_equal(bias, [-1, 0, 1])

  def test_speed_zero_changes_nothing(self):
    bias = testing.normal(8)
    load = jnp.arange(8, dtype=jnp.int32)
    np.testing.assert_array_equal(router.update_bias(bias, load, 0.0), bias)

  def test_max_violation(self):
    load = jnp.int32([[4, 4, 4, 4], [16, 0, 0, 0], [5, 3, 4, 4], [0, 0, 0, 0]])
    np.testing.assert_allclose(router.max_violation(load), [0, 3, 0.25, 0])

  def test_loop_balances_a_skewed_router(self):
    # Affinities differ by up to 3 between experts; tokens add noise to them.
    skew = np.linspace(-1.5, 1.5, 16, dtype=np.float32)

    @jax.jit
    def balance(speed):
      def step(bias, key):
        noise = jax.random.normal(key, (256, 16))
        scores = jax.nn.sigmoid(noise + skew.reshape(1, -1))
        experts, _ = SELECT(scores, bias, V3)
        load = jnp.bincount(experts.reshape(-1), length=16)
        return router.update_bias(bias, load, speed), load

      keys = jax.random.split(jax.random.key(0), 400)
      return jax.lax.scan(step, jnp.zeros(16), keys)[1]

    off, on = balance(0.0), balance(0.01)
    before = router.max_violation(off[-100:].sum(0))
    after = router.max_violation(on[-100:].sum(0))
    self.assertGreater(before, 1)
    # 100 steps give 6400 slots an expert: sampling noise of 1.25 %, the
    # largest of 16 within three of them.
    self.assertLess(after, 3 * 0.0125)


if __name__ == "__main__":
  absltest.main()

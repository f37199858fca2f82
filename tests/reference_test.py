"""The oracle against vectors worked out by hand, before it judges anything."""

import types

import numpy as np
import reference
from absl.testing import absltest


def _router(**fields):
  defaults = dict(
    score="sigmoid", renormalize=True, scale=2.5, balance_map="scores"
  )
  return types.SimpleNamespace(**defaults | fields)


class ReferenceTest(absltest.TestCase):
  def test_router(self):
    cfg = _router(n_experts=8, n_groups=4, top_groups=2, top_k=3)
    scores = np.array([0.9, 0.1, 0.6, 0.5, 0.55, 0.45, 0.8, 0.05])
    bias = np.array([-0.3, 0, 0, 0.05, 0.1, 0, -0.2, 0])
    experts, gates = reference.select(scores, bias, cfg)
    self.assertEqual(experts, [4, 2, 3])
    np.testing.assert_allclose(gates, [0.8333, 0.9091, 0.7576], atol=5e-5)
    experts, gates = reference.select(scores, 0 * bias, cfg)
    self.assertEqual(experts, [0, 2, 3])
    np.testing.assert_allclose(gates, [1.125, 0.75, 0.625], atol=1e-12)

  def test_bias_step(self):
    step = reference.update_bias([0, 0, 0, 0], [5, 3, 4, 4], 0.001)
    self.assertEqual(step, [-0.001, 0.001, 0, 0])

  def test_balance_loss(self):
    cfg = _router(top_k=2, balance_weight=1.0)
    scores = np.array([[0.8, 0.4, 0.2, 0.1], [0.7, 0.6, 0.1, 0.2]])
    # P is printed with five digits; f is 2 for each of the two that count.
    self.assertAlmostEqual(
      reference.balance_loss(scores, None, cfg), 1.6125, delta=2e-5
    )

  def test_mtp_targets(self):
    self.assertEqual(
      reference.mtp_targets("abcde", 0),
      [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")],
    )
    self.assertEqual(
      reference.mtp_targets("abcde", 1), [("b", "c"), ("c", "d"), ("d", "e")]
    )

  def test_gradients_are_those_of_central_differences(self):
    rng = np.random.default_rng(0)
    p = {
      "gate_up": rng.normal(size=(3, 4, 2, 5)),
      "down": rng.normal(size=(3, 5, 4)),
    }
    x, gates, dy = (rng.normal(size=s) for s in ((6, 4), (6, 2), (6, 4)))
    chosen = np.array([rng.permutation(3)[:2] for _ in range(6)])
    dp, dx, dgates = reference.expert_ffn_gradients(p, x, chosen, gates, dy)
    for array, gradient in (
      (p["gate_up"], dp["gate_up"]),
      (p["down"], dp["down"]),
      (x, dx),
      (gates, dgates),
    ):
      direction, h = rng.normal(size=array.shape), 1e-6
      values = []
      for sign in (1, -1):
        array += sign * h * direction
        values.append((dy * reference.expert_ffn(p, x, chosen, gates)).sum())
        array -= sign * h * direction
      slope = (values[0] - values[1]) / (2 * h)
      # Truncation h^2 and rounding 1e-16 / h: about 1e-10 of the value.
      self.assertAlmostEqual(slope, (gradient * direction).sum(), delta=1e-6)


if __name__ == "__main__":
  absltest.main()

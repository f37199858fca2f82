"""GRPO's objective against enumeration: a policy with 15 possible answers.

Answers have 1 to 3 tokens of 3; token 0 ends one. The policy, the sampler, the
reference and an older policy are tables of logits, a row for each of the 7
prefixes. An expectation is a sum over all answers or all groups of answers.
"""

import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, train
from dsv3_jax.config import grpo
from dsv3_jax.data.batch import IGNORE, Batch
from dsv3_jax.parallel import device_mesh
from dsv3_jax.posttrain import objectives

MAX_TOKENS = 3
PREFIXES = [(), *itertools.product((1, 2), repeat=1)]
PREFIXES += itertools.product((1, 2), repeat=2)
ANSWERS = [
  (*prefix, token)
  for prefix in PREFIXES
  for token in range(3)
  if token == 0 or len(prefix) == MAX_TOKENS - 1
]
LENGTHS = np.array([len(answer) for answer in ANSWERS])
# Rows of the tables and columns, [15, 3], of the tokens of answers; -1: none.
STATES, TOKENS = np.full((2, len(ANSWERS), MAX_TOKENS), -1)
for number, answer in enumerate(ANSWERS):
  for t, token in enumerate(answer):
    STATES[number, t] = PREFIXES.index(answer[:t])
    TOKENS[number, t] = token
VALID = STATES >= 0
REWARDS = np.random.default_rng(7).normal(size=len(ANSWERS)).round(1)


def log_softmax(logits):
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def table(seed, scale=0.5):
  draw = np.random.default_rng(seed).normal(size=(len(PREFIXES), 3))
  return log_softmax(scale * draw)


POLICY, OLD, SAMPLER, REFERENCE = map(table, range(4))


def at_tokens(logprobs):
  """Log-probabilities of the tokens of answers, [15, 3]; 0 after the end."""
  return np.where(VALID, logprobs[STATES, TOKENS], 0)


def answer_probabilities(logprobs):
  return np.exp(at_tokens(logprobs).sum(-1))


def gradient(per_token):
  """Gradient by logits [7, 3] of what has these slopes at tokens [15, 3]."""
  result = np.zeros_like(POLICY)
  for i, t in zip(*np.nonzero(VALID), strict=True):
    one_hot = np.eye(3)[TOKENS[i, t]]
    direction = one_hot - np.exp(POLICY[STATES[i, t]])
    result[STATES[i, t]] += per_token[i, t] * direction
  return result


def groups(n):
  """All groups of n answers, [15^n, n]."""
  return np.array(list(itertools.product(range(len(ANSWERS)), repeat=n)))


def by_answer(sums, members):
  """Adds slopes of groups [G, n, 3] to those of their answers, [15, 3]."""
  result = np.zeros((len(ANSWERS), MAX_TOKENS))
  np.add.at(result, members.reshape(-1), sums.reshape(-1, MAX_TOKENS))
  return result


def slopes(function, *arrays):
  """Slopes of a function of arrays [...] by the first, at each place."""
  with jax.enable_x64(True):
    first, *others = map(jnp.asarray, arrays)
    total = lambda a: function(a, *others).sum()
    return np.asarray(jax.grad(total)(first))


class AdvantageTest(parameterized.TestCase):
  REWARDS = np.array([[1.0, 0, 0, 1, 0.5], [0, 0, 0.2, 0, 0]])

  def test_are_as_defined(self):
    for rewards in (self.REWARDS, 1e-9 * self.REWARDS):
      found = {k: objectives.advantages(rewards, k) for k in grpo.ADVANTAGES}
      for g, row in enumerate(rewards):
        for i, reward in enumerate(row):
          centered = reward - row.mean()
          others = np.delete(row, i).mean()
          expected = {
            "mean": centered,
            "mean_std": centered / row.std(),
            "leave_one_out": reward - others,
            "batch": centered / rewards.std(),
          }
          for kind, value in expected.items():
            np.testing.assert_allclose(found[kind][g, i], value, rtol=1e-12)

  @parameterized.parameters(*grpo.ADVANTAGES)
  def test_failed_reward_is_as_if_it_were_not_there(self, kind):
    whole = objectives.advantages(self.REWARDS, kind)
    rewards = np.insert(self.REWARDS, 2, np.nan, axis=1)
    found = objectives.advantages(rewards, kind)
    np.testing.assert_array_equal(found[:, 2], 0)
    np.testing.assert_allclose(np.delete(found, 2, 1), whole, rtol=1e-12)

  @parameterized.parameters(*grpo.ADVANTAGES)
  def test_is_0_without_another_answer_or_spread(self, kind):
    nan = np.nan
    rewards = [[nan, nan, nan], [nan, 2, nan], [0.1, 0.1, 0.1], [0.7, nan, 0.7]]
    np.testing.assert_array_equal(objectives.advantages(rewards, kind), 0)
    found = objectives.advantages([*rewards, [0, 0, 1]], kind)
    np.testing.assert_array_equal(found[:4], 0)
    self.assertTrue(found[4].all())

  def test_groups_are_kept_by_mean_reward(self):
    nan = np.nan
    rewards = [[0, 0], [0, 1], [1, 1], [1, nan], [nan, nan], [0.1, 0.2]]
    found = objectives.keep_groups(rewards, 0, 1)
    np.testing.assert_array_equal(found, [0, 1, 0, 0, 0, 1])
    equal = objectives.keep_groups([[0.1] * 3, [0.7] * 3], 0.1, 0.7)
    np.testing.assert_array_equal(equal, False)

  def test_overlong_penalty_counts_tokens(self):
    lengths = [1, 6, 7, 8, 9, 10]
    found = objectives.overlong_penalty(lengths, 10, 4)
    np.testing.assert_allclose(found, [0, 0, -0.25, -0.5, -0.75, -1])
    found = objectives.overlong_penalty(lengths, 10, 0)
    np.testing.assert_array_equal(found, 0)

  def test_weights_have_one_denominator(self):
    lengths, counted = np.array([1, 2, 5, 4]), np.array([1, 1, 0, 1], bool)
    expected = {
      "sequence": [1 / 3, 1 / 6, 0, 1 / 12],
      "token": [1 / 7, 1 / 7, 0, 1 / 7],
      "fixed": [1 / 24, 1 / 24, 0, 1 / 24],
    }
    self.assertEqual(set(expected), set(grpo.AGGREGATIONS))
    for kind, value in expected.items():
      found = objectives.token_weights(lengths, counted, kind, 8)
      np.testing.assert_allclose(found, value)
      found = objectives.token_weights(lengths, counted & False, kind, 8)
      np.testing.assert_array_equal(found, 0)


class DivergenceTest(absltest.TestCase):
  def test_estimators_have_the_gradients_of_the_ledger(self):
    theta, old = np.array([0.5, -0.3, 0.2]), np.array([0.2, 0.1, -0.1])
    policy, reference = log_softmax(theta), np.full(3, np.log(1 / 3))
    p = np.exp(policy)
    exact = p * (policy - reference - p @ (policy - reference))
    np.testing.assert_allclose(exact, [0.12127, -0.10964, -0.01163], atol=5e-6)
    zero, k3 = np.zeros(3), [0.12326, -0.12817, 0.00492]
    printed = {
      "k1": (zero, [-0.0786, 0.1368, -0.0582]),
      "k2": (exact, None),
      "k3": (k3, None),
      "weighted_k1": (exact, exact),
      "weighted_k2": (None, None),
      "weighted_k3": (exact, exact),
      "fixed_k1": (zero, zero),
      "fixed_k2": (exact, exact),
      "fixed_k3": (k3, k3),
    }
    self.assertEqual(set(printed), set(grpo.KL))
    self.assertEqual(set(printed), set(objectives.KL_ESTIMATORS))
    for on, sampler in enumerate((log_softmax(old), policy)):
      for kind, values in printed.items():
        terms = functools.partial(objectives.kl_terms, kind)
        slope = np.exp(sampler) * slopes(terms, policy, reference, sampler)
        found = slope - p * slope.sum()
        expected = values[1 - on]
        if expected is not None:
          digits = 5e-5 if kind == "k1" and not on else 5e-6
          np.testing.assert_allclose(found, expected, atol=digits)
        estimator = objectives.KL_ESTIMATORS[kind]
        tag = estimator.on_policy if on else estimator.off_policy
        is_exact = np.abs(found - exact).max() < 1e-12
        self.assertEqual(is_exact, tag == objectives.EXACT, kind)
        inert = np.abs(found).max() < 1e-12
        self.assertEqual(inert, tag == objectives.INERT, kind)

  def test_k3_pulls_back_from_far_away(self):
    policy = np.array([-9.0, -0.5, 0.0])
    terms = functools.partial(objectives.kl_terms, "k3")
    found = slopes(terms, policy, np.zeros(3), np.zeros(3))
    np.testing.assert_allclose(found, 1 - np.exp(-policy), rtol=1e-6)

  def test_gradient_over_answers_is_that_of_the_stated_expectation(self):
    """Sums over prefixes that the sampler visits, a divergence each."""
    x = at_tokens(POLICY) - at_tokens(REFERENCE)
    for sampler in (SAMPLER, POLICY):
      w = np.exp(at_tokens(POLICY) - at_tokens(sampler))
      r = np.exp(-x)
      k = {"k1": x, "k2": x**2 / 2, "k3": r - 1 + x}
      slope = {"k1": np.ones_like(x), "k2": x, "k3": 1 - r}
      chance = answer_probabilities(sampler)[:, None]
      visits = np.zeros(len(PREFIXES))
      np.add.at(visits, STATES[VALID], (chance * VALID)[VALID])
      p, log_ratio = np.exp(POLICY), POLICY - REFERENCE
      kl = (p * log_ratio).sum(-1, keepdims=True)
      exact = visits[:, None] * p * (log_ratio - kl)
      for kind, estimator in objectives.KL_ESTIMATORS.items():
        shape = estimator.shape
        expected = {
          "plain": slope[shape],
          "weighted": w * (slope[shape] + k[shape]),
          "fixed": w * slope[shape],
        }[estimator.weighting]
        slopes_at = slopes(
          functools.partial(objectives.kl_terms, kind),
          *map(at_tokens, (POLICY, REFERENCE, sampler)),
        )
        found, expected = (gradient(chance * a) for a in (slopes_at, expected))
        np.testing.assert_allclose(found, expected, atol=1e-12)
        if kind in ("weighted_k3", "fixed_k2"):  # at each token, not on average
          np.testing.assert_allclose(slopes_at, w * x, atol=1e-12)
        on = sampler is POLICY
        tag = estimator.on_policy if on else estimator.off_policy
        is_exact = np.abs(found - exact).max() < 1e-12
        self.assertEqual(is_exact, tag == objectives.EXACT, (kind, on))
        inert = np.abs(found).max() < 1e-12
        self.assertEqual(inert, tag == objectives.INERT, (kind, on))


def enumerated(kind, aggregation, settings, sampler, old, n=2):
  """Slopes at tokens of the expected objective, [15, 3], of groups of n.

  Returns those of the functions, and naive ones.
  """
  members = groups(n)
  chance = answer_probabilities(sampler)[members].prod(-1)
  rewards, lengths = REWARDS[members], LENGTHS[members]
  # Each group is a batch of its own.
  if kind == "batch":
    advantage = np.stack(
      [objectives.advantages(row[None], kind)[0] for row in rewards]
    )
  else:
    advantage = objectives.advantages(rewards, kind)
  weights = np.stack(
    [
      objectives.token_weights(row, row > 0, aggregation, MAX_TOKENS)
      for row in lengths
    ]
  )
  weights = (chance[:, None] * weights)[..., None] * VALID[members]
  logs = [at_tokens(a)[members] for a in (POLICY, old, sampler)]
  advantage = np.broadcast_to(advantage[..., None], weights.shape)

  def objective(policy, old, sampler, advantage, weights):
    terms, _ = objectives.policy_terms(policy, old, advantage, settings)
    cap = settings.importance_cap
    return weights * terms * objectives.importance_weights(old, sampler, cap)

  found = slopes(objective, *logs, advantage, weights)
  naive = np.zeros_like(found)
  for place in np.ndindex(*found.shape):
    now, before, drawn = (a[place] for a in logs)
    a, ratio = advantage[place], np.exp(now - before)
    limited = np.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
    value = min(ratio * a, limited * a)
    acts = value != ratio * a
    if settings.dual_clip and a < 0 and value < settings.dual_clip * a:
      acts = True
    weight = np.exp(before - drawn)
    cap = settings.importance_cap
    weight = min(weight, cap) if cap else 1
    naive[place] = 0 if acts else weights[place] * a * ratio * weight
  return by_answer(found, members), by_answer(naive, members)


CLIPS = {
  "symmetric": {},
  "clip_higher": {"clip_high": 0.4},
  "dual": {"clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.2},
  "capped": {"old_policy": "trainer", "importance_cap": 1.1},
  "wide": {"clip_high": 10.0, "clip_low": 1.0},
}


class PolicyGradientTest(parameterized.TestCase):
  @parameterized.parameters(*grpo.ADVANTAGES)
  def test_advantage_and_aggregation(self, kind):
    for aggregation in grpo.AGGREGATIONS:
      for sampler in (POLICY, SAMPLER):
        found, naive = enumerated(
          kind, aggregation, config.Grpo(), sampler, sampler
        )
        np.testing.assert_allclose(found, naive, atol=1e-12)
        self.assertGreater(np.abs(gradient(naive)).max(), 1e-3)

  @parameterized.named_parameters(*CLIPS.items())
  def test_clip(self, settings):
    settings = config.Grpo(**settings)
    old = OLD if settings.importance_cap else SAMPLER
    found, naive = enumerated("mean_std", "sequence", settings, SAMPLER, old)
    np.testing.assert_allclose(found, naive, atol=1e-12)

  def test_leave_one_out_is_the_policy_gradient_and_mean_a_part_of_it(self):
    chance = answer_probabilities(POLICY)
    exact = gradient((chance * REWARDS)[:, None] * VALID)
    for n in (2, 3):
      share = {"leave_one_out": 1, "mean": (n - 1) / n}
      for kind, part in share.items():
        slope, _ = enumerated(kind, "fixed", config.Grpo(), POLICY, POLICY, n)
        np.testing.assert_allclose(
          MAX_TOKENS * gradient(slope), part * exact, atol=1e-12
        )

  def test_without_clip_the_ratio_leads_back_to_the_policy(self):
    """Answers have one token here, so that their prefix has no ratio."""
    settings = config.Grpo(clip_low=1.0, clip_high=1e6)
    policy, sampler = (np.exp(a[0]) for a in (POLICY, SAMPLER))
    rewards = np.array([1.0, 0, 0.3])
    members = np.array(list(itertools.product(range(3), repeat=2)))
    advantage = objectives.advantages(rewards[members], "leave_one_out")

    def terms(logs, old, advantage):
      return objectives.policy_terms(logs, old, advantage, settings)[0]

    logs = np.log(policy)[members], np.log(sampler)[members]
    slope = slopes(terms, *logs, advantage)
    slope = slope * sampler[members].prod(-1, keepdims=True) / 2
    total = np.bincount(members.reshape(-1), slope.reshape(-1), 3)
    found = total - policy * total.sum()
    exact = policy * (rewards - policy @ rewards)
    # The other answer is the sampler's, its mean a constant for this one.
    np.testing.assert_allclose(found, exact, atol=1e-12)


class LedgerTest(parameterized.TestCase):
  """docs/objectives.md against the code and enumeration."""

  def test_page_has_every_estimator_with_its_tags(self):
    page = pathlib.Path(__file__).parents[2] / "docs" / "objectives.md"
    rows = [
      [cell.strip(" *") for cell in line.strip("|").split("|")]
      for line in page.read_text("utf-8").splitlines()
      if line.startswith("|")
    ]
    for name, estimator in objectives.KL_ESTIMATORS.items():
      ((_, on, off),) = (
        r for r in rows if r[0].split("`")[1:2] == [name] and len(r) == 3
      )
      self.assertStartsWith(on, estimator.on_policy)
      self.assertStartsWith(off, estimator.off_policy)

  @parameterized.parameters(
    ("leave_one_out", "fixed", 0, 0),
    ("leave_one_out", "token", 3.4, 2.8),
    ("leave_one_out", "sequence", 12.6, 20.0),
    ("mean", "fixed", 0, 0),
    ("mean", "token", 3.4, 2.8),
    ("mean", "sequence", 12.6, 20.0),
    ("mean_std", "fixed", 18.0, 0),
    ("mean_std", "token", 21.5, 2.8),
    ("mean_std", "sequence", 29.2, 20.0),
  )
  def test_angles_to_the_policy_gradient(self, kind, aggregation, *expected):
    members, chance = groups(4), answer_probabilities(POLICY)
    lengths = LENGTHS[members]
    # Of `token_weights`, for all groups at once.
    denominator = {
      "sequence": lengths,
      "token": lengths.sum(-1, keepdims=True),
      "fixed": 1,
    }[aggregation]
    weights = chance[members].prod(-1)[..., None] / denominator
    for rewards, angle in zip(
      (REWARDS, np.float64(REWARDS > 0.3)), expected, strict=True
    ):
      advantage = objectives.advantages(rewards[members], kind)
      slope = (weights * advantage).reshape(-1)
      slope = np.bincount(members.reshape(-1), slope, len(ANSWERS))
      found = gradient(slope[:, None] * VALID)
      exact = gradient((chance * rewards)[:, None] * VALID)
      cosine = (found * exact).sum() / (norm(found) * norm(exact))
      degrees = np.degrees(np.arccos(min(cosine, 1)))
      self.assertAlmostEqual(degrees, angle, delta=0.06)


class RangeTest(absltest.TestCase):
  def test_no_ratio_overflows(self):
    logs = np.float32([-1e-3, -1, -200])
    policy, other = map(np.ravel, np.meshgrid(logs, logs))
    reference = other[::-1].copy()
    for kind in grpo.KL:
      terms = functools.partial(objectives.kl_terms, kind)
      value, slope = jax.vjp(lambda x, f=terms: f(x, reference, other), policy)
      for a in (value, *slope(np.ones_like(policy))):
        self.assertTrue(np.isfinite(a).all(), kind)
    for sign in (-1.0, 0.0, 1.0):

      def gain(x, sign=sign):
        advantage = np.full_like(policy, sign)
        settings = config.Grpo()
        return objectives.policy_terms(x, other, advantage, settings)[0]

      value, slope = jax.vjp(gain, policy)
      for a in (value, *slope(np.ones_like(policy))):
        self.assertTrue(np.isfinite(a).all(), sign)

  def test_the_cap_holds_the_importance_weight(self):
    weight = lambda old: objectives.importance_weights(old, np.zeros(3), 2.0)
    old = np.log(np.array([0.5, 1.5, 3]))
    value, slope = jax.vjp(weight, old)
    np.testing.assert_allclose(value, [0.5, 1.5, 2], rtol=1e-6)
    np.testing.assert_array_equal(*slope(np.ones_like(value)), 0)


class MaskTest(absltest.TestCase):
  def test_is_by_answer_of_mean_and_of_negative_advantage(self):
    labels = np.array([[7, 7, 7, IGNORE, 7, 7, IGNORE, 7], [7] * 8])
    segments = np.array([[1, 1, 1, 2, 2, 2, 3, 3], [1] * 4 + [2] * 4])
    away = np.array(
      [[0.9, 0.0, 0.0, 9, 0.2, 0.1, 9, 0.3], [0.1] * 4 + [0.3] * 4]
    )
    sign = np.array([[-1] * 6 + [1] * 2, [-1] * 8])
    data = Batch(labels, labels, segments)
    args = np.zeros((2, 8)), away, sign
    found = objectives.masked_answers(*args, data, 0.2)
    np.testing.assert_array_equal(found, [[1] * 3 + [0] * 5, [0] * 4 + [1] * 4])
    self.assertFalse(objectives.masked_answers(*args, data, 0.0).any())
    rows = objectives.masked_answers(*args, data.replace(segments=None), 0.19)
    np.testing.assert_array_equal(rows, [[1] * 6 + [0] * 2, [1] * 8])


class TokenLogprobsTest(absltest.TestCase):
  def test_equals_float64_over_chunks(self):
    self.enter_context(testing.mock.patch("dsv3_jax.losses.CHUNK", 3))
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(7, 5)), rng.normal(size=(5, 19))
    labels = np.array([3, IGNORE, 18, 0, 8, IGNORE, 16])
    mask = rng.random((7, 19)) < 0.5
    mask[np.arange(7), labels.clip(0)] = True
    mask[5] = False  # padding
    kept = np.packbits(mask, axis=1, bitorder="little")
    weights = rng.normal(size=7)
    counted = labels != IGNORE
    arrays = jnp.float32(hidden), jnp.float32(head)
    for bits, among in ((kept, mask), (None, np.ones_like(mask))):

      def total(hidden, head, bits=bits):
        logprobs, entropy = objectives.token_logprobs(
          hidden, head, jnp.asarray(labels), 0.7, bits
        )
        return (weights * logprobs + entropy).sum(), (logprobs, entropy)

      (_, found), slopes = jax.value_and_grad(total, (0, 1), has_aux=True)(
        *arrays
      )
      logits = hidden @ head / 0.7
      e = np.where(among, np.exp(logits), 1e-300)
      p = e / e.sum(-1, keepdims=True)
      logprobs = np.log(p[np.arange(7), labels.clip(0)]) * counted
      entropy = -(p * np.log(p)).sum(-1) * counted
      dlogits = (weights * counted)[:, None] / 0.7
      dlogits = dlogits * (np.eye(19)[labels.clip(0)] - p)
      testing.assert_close(found, (logprobs, entropy), 100)
      expected = dlogits @ head.T, hidden.T @ dlogits
      testing.assert_close(slopes, expected, 100)

  def test_a_label_that_is_not_kept_is_impossible(self):
    bits = np.array([[0b01]], np.uint8)
    logprobs, _ = objectives.token_logprobs(
      jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.array([1]), 1.0, bits
    )
    self.assertEqual(logprobs[0], -np.inf)


T, VOCAB, WIDTH = 12, 300, 6


@dataclasses.dataclass
class Sample:
  """A prompt and an answer, with the inputs of the objective."""

  tokens: np.ndarray  # [prompt + answer]
  n_prompt: int
  targets: dict[str, np.ndarray]  # [answer, *]


def make_samples(aggregation):
  """Four groups of three answers, 1 to 4 tokens, the longest ones cut.

  The second group is left out, the third has no spread, a reward of the fourth
  failed; answers with negative advantage of the first are far from the policy.
  """
  rng = np.random.default_rng(3)
  rewards = np.array([[1, 0, 0], [1, 1, 1], [0.5] * 3, [np.nan, 1, 0]])
  counted = ~np.isnan(rewards)
  counted &= objectives.keep_groups(rewards, 0, 1)[:, None]
  advantage = objectives.advantages(rewards, "mean_std").reshape(-1)
  lengths = rng.integers(1, 5, 12)
  counted = counted.reshape(-1)
  weights = objectives.token_weights(lengths, counted, aggregation, 4)
  samples = []
  for i, n in enumerate(lengths):
    prompt = int(rng.integers(1, 3))
    tokens = rng.integers(VOCAB, size=prompt + n)
    mask = rng.random((n, VOCAB)) < 0.7
    mask[np.arange(n), tokens[prompt:]] = True
    logs = -5.5 + rng.normal(size=(3, n)) + 3 * (i in (1, 2))
    # What is left out may hold anything.
    logs[:, :] = logs if counted[i] else [[np.nan], [np.inf], [-np.inf]]
    targets = {
      "advantages": np.full(n, advantage[i]),
      "weights": np.full(n, weights[i]),
      "token_share": np.full(n, counted[i] / lengths[counted].sum()),
      "sampler_logprobs": logs[0],
      "old_logprobs": logs[1],
      "ref_logprobs": logs[2],
      "kept": np.packbits(mask, axis=1, bitorder="little"),
    }
    samples.append(Sample(tokens, prompt, targets))
  return samples


def make_rows(samples, policy, per_row, shape, order=None):
  """A batch [*shape, T] of rows with `per_row` samples; the rest is empty."""
  order = np.arange(len(samples)) if order is None else order
  n = int(np.prod(shape))
  tokens = np.zeros((n, T), np.int32)
  labels, segments = np.full((n, T), IGNORE, np.int32), np.zeros((n, T), int)
  targets = {
    k: np.zeros((n, T, *a.shape[1:]), np.uint8 if k == "kept" else np.float32)
    for k, a in samples[0].targets.items()
  }
  fill = np.zeros(n, int)
  for i, sample in enumerate(samples[j] for j in order):
    row, at = i // per_row, fill[i // per_row]
    end = at + len(sample.tokens)
    answer = slice(at + sample.n_prompt - 1, end - 1)
    tokens[row, at:end] = sample.tokens
    labels[row, answer] = sample.tokens[sample.n_prompt :]
    segments[row, at:end] = i % per_row + 1
    for k, a in sample.targets.items():
      targets[k][row, answer] = a
    fill[row] = end
  batch = Batch(
    tokens,
    labels,
    segments.astype(np.int32),
    segments != 0,
    targets=targets,
    objective=policy,
  )
  return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), batch)


SETTINGS = config.Grpo(
  old_policy="trainer",
  importance_cap=2.0,
  mask_threshold=1.0,
  kl_weight=0.1,
  temperature=0.8,
)


class SumTest(absltest.TestCase):
  """The objective is a sum over tokens: no split changes it."""

  def test_no_split_order_or_packing_changes_it(self):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    head = np.float32(0.3 * rng.normal(size=(WIDTH, VOCAB)))
    policy = objectives.Policy(SETTINGS)
    samples = make_samples("sequence")

    @jax.jit
    def whole(params, batch):
      table, head = params

      def total(params, row):
        table, head = params
        return policy(table[row.tokens], head, row)

      def add(sums, row):
        row = jax.tree.map(lambda a: a[None], row)
        one = jax.value_and_grad(total, has_aux=True)(params, row)
        return jax.tree.map(jnp.add, sums, one), None

      empty = jax.tree.map(lambda a: jnp.zeros_like(a[0])[None], batch)
      value = jax.value_and_grad(total, has_aux=True)
      zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(value, params, empty),
      )
      return jax.lax.scan(add, zeros, batch)[0], value(params, batch)

    params, results = (table, head), []
    for per_row in (1, 2):
      order = rng.permutation(12) if per_row == 2 else None
      batch = make_rows(samples, policy, per_row, (13 - per_row,), order)
      results += whole(params, batch)
    (_, metrics), grads = results[0]
    self.assertEqual(set(metrics), set(policy.metrics))
    for name in ("masked_share", "clip_share", "ratio_outside", "kl"):
      self.assertGreater(metrics[name], 0, name)
    for result in results[1:]:
      testing.assert_close(result, results[0], 30)
    self.assertTrue(all(np.abs(g).max() > 1e-4 for g in grads))

    # Naive, in float64: only what counts has a slope.
    found = naive_loss(samples, table, head)
    testing.assert_close(results[0][0][0], found, 300)


def naive_loss(samples, table, head):
  """The loss of SETTINGS, a token at a time."""
  total = 0.0
  for sample in samples:
    t, prompt = sample.targets, sample.n_prompt
    if not t["weights"][0]:
      continue
    n = len(t["weights"])
    hidden = table[sample.tokens[prompt - 1 : -1]].astype(np.float64)
    logits = hidden @ head / SETTINGS.temperature
    mask = np.unpackbits(t["kept"], axis=1, bitorder="little")[:, :VOCAB]
    e = np.exp(logits) * mask
    now = np.log(e[np.arange(n), sample.tokens[prompt:]] / e.sum(-1))
    sampler, old, ref = (
      t[k] for k in ("sampler_logprobs", "old_logprobs", "ref_logprobs")
    )
    a, ratio = t["advantages"], np.exp(now - old)
    limited = np.clip(ratio, 1 - SETTINGS.clip_low, 1 + SETTINGS.clip_high)
    gain = np.minimum(ratio * a, limited * a)
    gain *= np.minimum(np.exp(old - sampler), SETTINGS.importance_cap)
    if a[0] < 0 and (sampler - now).mean() > SETTINGS.mask_threshold:
      gain *= 0
    k3 = np.exp(ref - now) - (ref - now) - 1
    kl = np.exp(now - sampler) * k3
    total -= (t["weights"] * (gain - SETTINGS.kl_weight * kl)).sum()
  return total


@pytest.mark.slow
class DivisorTest(parameterized.TestCase):
  """No hidden divisor in the whole step, from tokens to gradients."""

  def test_gradient_is_the_same_however_the_batch_is_divided(self):
    run = testing.run(
      "precision.recipe=fp32",
      "mtp.depth=0",
      "router.balance_weight=0",
      f"data.seq_len={T}",
    )
    state, policy = testing.state(run), objectives.Policy(SETTINGS)
    rng = np.random.default_rng(0)
    cases = [((n, 16 // n), 1, 1) for n in (1, 2, 4, 8)]
    cases += [((1, 16), 2, 1), ((2, 8), 4, 1), ((1, 8), 1, 2), ((4, 2), 2, 2)]
    for aggregation in grpo.AGGREGATIONS:
      samples, expected = make_samples(aggregation), None
      for shape, shards, per_row in cases:
        order = rng.permutation(12)
        batch = make_rows(samples, policy, per_row, shape, order)
        found = gradients(run, state, batch, shards)
        expected = expected or found
        (grads, *sums), (first, *others) = found, expected
        away = jax.tree.map(np.subtract, grads, first)
        self.assertLessEqual(norm(away), 1e-6 * norm(first), shape)
        testing.assert_close(sums, others, 100)
        self.assertGreater(np.abs(found[0]["head"]).max(), 0)


def norm(tree):
  return np.linalg.norm([np.linalg.norm(a) for a in jax.tree.leaves(tree)])


def gradients(run, state, batch, shards):
  """Gradient, loss and metrics on `shards` devices."""
  mesh = None
  if shards > 1:
    mesh = device_mesh.make_mesh({"data": shards})
    state = jax.device_put(state, train.shardings(run, mesh))
    rows = batch.tokens.shape[1]
    batch = device_mesh.make_global_batch(batch, rows, mesh, dim=1)
  sums = compiled(run, mesh)(state, batch)
  return jax.device_get((sums.grads, sums.losses.main, sums.losses.metrics))


@functools.cache
def compiled(run, mesh):
  return jax.jit(functools.partial(train.gradients, run=run, mesh=mesh))


class NotesTest(parameterized.TestCase):
  def test_defaults_have_none(self):
    self.assertEmpty(objectives.notes(config.Grpo()))

  @parameterized.parameters(
    ({"kl": "k1"}, ["inert", "biased"]),
    ({"kl": "k3"}, ["biased"]),
    ({"kl": "k1", "kl_weight": 0.0}, ["no effect"]),
    ({"clip_high": 0.3}, ["grpo.clip_high=0.3", "ratio is 1"]),
    ({"mask_threshold": 0.1}, ["no answer is masked"]),
    ({"old_policy": "trainer"}, ["ratio is 1", "importance_cap=0"]),
    ({"filter_groups": True}, ["biased"]),
    ({"filter_low": 0.2}, ["without filter_groups"]),
    ({"top_p": 0.9, "replay_mask": False}, ["truncated"]),
  )
  def test_says_what_is_biased_or_does_nothing(self, settings, words):
    text = "\n".join(objectives.notes(config.Grpo(**settings)))
    for word in words:
      self.assertIn(word, text)

  @parameterized.parameters(
    {"kl": "fixed_k2"},
    {"kl_weight": 0.0},
    {"clip_high": 0.3, "updates": 2, "prompts": 2},
    {"mask_threshold": 0.1, "staleness": 1},
    {"top_p": 0.9},
  )
  def test_but_not_of_others(self, **settings):
    self.assertEmpty(objectives.notes(config.Grpo(**settings)))


if __name__ == "__main__":
  absltest.main()

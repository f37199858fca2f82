"""Tests of what tokens are drawn from, and of drawing them."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.infer import sampling
from dsv3_jax.infer.request import GenerationRequest


def jitted():
  return jax.jit(
    lambda logits, how, mode: sampling.probabilities(logits, how, mode),
    static_argnums=2,
  )


probabilities = jitted()


@functools.partial(jax.jit, static_argnames=("purpose", "mode"))
def draw(p, seed, position, purpose=sampling.FINAL, mode=sampling.UNTRUNCATED):
  return sampling.draw(p, seed, position, purpose, mode)


@functools.partial(jax.jit, static_argnames="purpose")
def uniform(seed, position, purpose):
  return sampling.uniform(seed, position, purpose)


def request(temperature, top_p, top_k, seed=0):
  return GenerationRequest((), 1, temperature, top_p, top_k, seed)


def rows_of(settings):
  """Stacks rows of (temperature, top_p, top_k)."""
  return sampling.stack_params([request(*row) for row in settings])


def distribution(logits, temperature, top_p, top_k):
  """Returns the distribution of one row of float64 logits [C], and a margin.

  Returns:
    Probabilities [C], and the least distance of top_p from a share at which
    another token would be kept.
  """
  if not temperature:
    return np.eye(len(logits))[np.argmax(logits)], 1.0
  order = reference.top(logits, top_k or len(logits))
  share = reference.softmax(logits[order] / temperature)
  before = np.concatenate([[0], np.cumsum(share)[:-1]])
  kept = order if top_p == 1 else np.array(order)[before < top_p]
  p = np.zeros_like(logits)
  p[kept] = reference.softmax(logits[kept] / temperature)
  close = 1.0 if top_p == 1 else np.abs(before - top_p).min()
  return p, close


def p_value(counts, p, least=5):
  """Returns the p-value of counts drawn from p; rare ones are pooled.

  The sum of (count - expected)^2 / expected has a chi-square distribution with
  one degree of freedom less than there are terms, if each expects a few.
  """
  counts, p = np.ravel(counts), np.ravel(np.float64(p))
  assert not counts[p == 0].any(), "what has no probability was drawn"
  expected = counts.sum() * p / p.sum()
  order = np.argsort(expected)
  enough = np.searchsorted(np.cumsum(expected[order]), least) + 1
  n = max(enough, (expected < least).sum())
  groups = [order[:n], *order[n:, None]]
  found, due = (
    np.array([a[g].sum() for g in groups]) for a in (counts, expected)
  )
  assert len(groups) > 1, "nothing to compare"
  statistic = ((found - due) ** 2 / due).sum()
  return float(jax.scipy.stats.chi2.sf(statistic, len(groups) - 1))


def joint(*columns, size):
  """Counts of tuples of numbers below size."""
  index = np.ravel_multi_index(columns, (size,) * len(columns))
  return np.bincount(index.ravel(), minlength=size ** len(columns))


class MostLikelyTest(parameterized.TestCase):
  @parameterized.parameters(
    ([3, 1, 2], 0),
    ([1, 2, 3], 2),
    ([1, 3, 3], 1),  # of equals the first
    ([2, 2, 2], 0),
    ([-np.inf, -np.inf, -5], 2),
    ([-np.inf, -np.inf, -np.inf], 0),
    ([1, np.inf, 2], 1),
  )
  def test_is_the_first_of_the_largest(self, scores, expected):
    scores = np.float32([[scores]])
    found = sampling.most_likely(scores)
    self.assertEqual(found.dtype, np.int32)
    np.testing.assert_array_equal(found, [[expected]])

  def test_is_argmax(self):
    scores = testing.normal(5, 3, 40).round(1)  # with ties
    np.testing.assert_array_equal(
      sampling.most_likely(scores), np.argmax(scores, -1)
    )

  def test_is_a_token_even_where_scores_are_none(self):
    scores = np.full((1, 2, 7), np.nan, np.float32)
    scores[0, 1, 3] = 1
    for found in sampling.most_likely(scores)[0]:
      self.assertBetween(int(found), 0, 6)


class ModeTest(parameterized.TestCase):
  @parameterized.parameters(
    ([(0, 1, 0)], sampling.GREEDY),
    ([(0, 0.5, 3), (0, 1, 0)], sampling.GREEDY),
    ([(1, 1, 0)], sampling.UNTRUNCATED),
    ([(0, 0.5, 3), (0.1, 1, 0)], sampling.UNTRUNCATED),
    ([(1, 1, 0), (1, 0.99, 0)], sampling.TRUNCATED),
    ([(1, 1, 1)], sampling.TRUNCATED),
    ([], sampling.GREEDY),
  )
  def test_is_what_the_rows_need(self, rows, expected):
    requests = [request(*row) for row in rows]
    self.assertEqual(sampling.mode(requests), expected)


class ProbabilitiesTest(parameterized.TestCase):
  # Each alone, both cuts together in both orders of severity, and none.
  SETTINGS = (
    (0, 1, 0),
    (0, 0.5, 2),
    (1, 1, 0),
    (0.3, 1, 0),
    (2.5, 1, 0),
    (1, 0.6, 0),
    (0.5, 0.9, 0),
    (2, 0.05, 0),
    (1, 1, 1),
    (0.7, 1, 4),
    (1, 1, 50),
    (1, 0.9, 6),
    (3, 0.4, 9),
    (1.3, 0.99, 3),
  )
  T, C = 5, 11

  def test_are_those_of_the_definition(self):
    logits = testing.normal(len(self.SETTINGS), self.T, self.C, scale=2)
    how = rows_of(self.SETTINGS)
    found = probabilities(logits, how, sampling.TRUNCATED)
    self.assertEqual(found.dtype, np.float32)
    for row, settings, p in zip(
      np.float64(logits), self.SETTINGS, found, strict=True
    ):
      for z, got in zip(row, p, strict=True):
        expected, close = distribution(z, *settings)
        self.assertGreater(close, 1e-4)
        np.testing.assert_array_equal(got > 0, expected > 0)
        # Division, then sums; an error of a logit is one of its weight.
        terms = self.C + 4 * np.abs(z).max() / (settings[0] or 1)
        testing.assert_close(got, expected, terms)

  @parameterized.parameters(sampling.GREEDY, sampling.UNTRUNCATED)
  def test_what_needs_no_cut_is_the_same_without_sorting(self, mode):
    rows = [
      row for row in self.SETTINGS if sampling.mode([request(*row)]) == mode
    ]
    rows += [row for row in self.SETTINGS if row[0] == 0]
    self.assertGreater(len(rows), 2)
    logits = testing.normal(len(rows), self.T, self.C, scale=2)
    how = rows_of(rows)
    plain, cut = (
      probabilities(logits, how, m) for m in (mode, sampling.TRUNCATED)
    )
    np.testing.assert_array_equal(plain > 0, cut > 0)
    # As above, twice; the lowest temperature is 0.3.
    terms = 2 * (self.C + 4 * np.abs(logits).max() / 0.3)
    testing.assert_close(plain, np.asarray(cut), terms)

  def test_of_equally_likely_tokens_the_first_are_kept(self):
    logits = np.float32([[[1, 0, 1, 1, 0]]])
    for settings, expected in (
      ((0, 1, 0), [1, 0, 0, 0, 0]),
      ((1, 1, 2), [1, 0, 1, 0, 0]),
      ((1, 0.5, 0), [1, 0, 1, 0, 0]),
      ((1, 1, 4), [1, 1 / np.e, 1, 1, 0]),
    ):
      p = probabilities(logits, rows_of([settings]), sampling.TRUNCATED)[0, 0]
      np.testing.assert_allclose(p, np.array(expected) / sum(expected), 1e-6)

  def test_a_share_reached_exactly_is_enough(self):
    # Sums of powers of two are exact: 1/2, 3/4, 7/8, 1.
    logits = np.log(np.float32([[[1 / 8, 1 / 2, 1 / 8, 1 / 4]]]))
    how = rows_of([(1, 0.75, 0)])
    p = probabilities(np.float32(logits), how, sampling.TRUNCATED)
    np.testing.assert_allclose(p, [[[0, 2 / 3, 0, 1 / 3]]], 1e-6)

  def test_a_share_of_one_cuts_nothing(self):
    # The sum of the first few is 1 in float32; the others are still there.
    logits = np.float32([[np.linspace(0, -30, 11)]])
    p = probabilities(logits, rows_of([(1, 1, 0)]), sampling.TRUNCATED)
    self.assertTrue((np.asarray(p) > 0).all())
    p = probabilities(logits, rows_of([(1, 1, 9)]), sampling.TRUNCATED)
    np.testing.assert_array_equal(p[0, 0] > 0, np.arange(11) < 9)

  def test_the_smallest_share_keeps_the_most_likely_token(self):
    logits = testing.normal(1, 4, 9)
    p = probabilities(logits, rows_of([(1, 1e-30, 0)]), sampling.TRUNCATED)
    np.testing.assert_array_equal(p, np.eye(9)[np.argmax(logits, -1)])

  def test_rows_have_settings_of_their_own(self):
    logits = testing.normal(1, self.T, self.C, scale=2)
    together = probabilities(
      np.repeat(logits, len(self.SETTINGS), 0),
      rows_of(self.SETTINGS),
      sampling.TRUNCATED,
    )
    for settings, p in zip(self.SETTINGS, together, strict=True):
      alone = probabilities(logits, rows_of([settings]), sampling.TRUNCATED)
      np.testing.assert_array_equal(p, alone[0])

  def test_a_very_low_temperature_is_nearly_none(self):
    logits = testing.normal(1, 4, 9)
    p = probabilities(logits, rows_of([(1e-6, 1, 0)]), sampling.UNTRUNCATED)
    np.testing.assert_array_equal(p, np.eye(9)[np.argmax(logits, -1)])


class FewSortedTest(ProbabilitiesTest):
  """The same, where the best three are sorted first, and mostly suffice."""

  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.object(sampling, "_BEST", 3))
    self.enter_context(mock.patch.dict(globals(), probabilities=jitted()))

  def test_sorts_no_more_where_few_are_enough(self):
    logits = np.float32([[np.linspace(0, -30, 11)]])
    n_sorted, top_k = [], jax.lax.top_k

    def counted(x, n):
      jax.debug.callback(lambda: n_sorted.append(n))
      return top_k(x, n)

    for settings, expected in (
      ((1, 0.9, 0), [3]),
      ((1, 1, 2), [3]),
      ((1, 1, 0), [3]),
      ((0, 0.9, 5), [3]),
      ((1, 1, 3), [3]),
      ((1, 0.1, 4), [3, 11]),
      ((30, 0.9, 0), [3, 11]),
    ):
      with mock.patch.object(jax.lax, "top_k", counted):
        jitted()(logits, rows_of([settings]), sampling.TRUNCATED)
      jax.effects_barrier()
      self.assertEqual(n_sorted, expected, settings)
      n_sorted.clear()


class DrawTest(parameterized.TestCase):
  SEEDS, POSITIONS = 500, 240  # 120,000 draws

  def drawn(self, p, purpose=sampling.FINAL, mode=sampling.UNTRUNCATED):
    """Tokens [SEEDS, POSITIONS], of p [C]."""
    shape = self.SEEDS, self.POSITIONS
    return np.asarray(
      draw(
        jnp.broadcast_to(jnp.float32(p), (*shape, len(p))),
        jnp.arange(self.SEEDS, dtype=jnp.uint32),
        jnp.broadcast_to(jnp.arange(self.POSITIONS), shape),
        purpose,
        mode,
      )
    )

  # The second is not of sum 1, the third has what never comes.
  @parameterized.parameters(
    ((0.3, 0.1, 0.05, 0.35, 0.2),),
    ((3e-5, 1e-5, 5e-6, 4e-5),),
    ((0, 0.7, 0, 0.299, 0.001, 0),),
  )
  def test_draws_as_often_as_it_should(self, *p):
    tokens = self.drawn(*p)
    self.assertEqual(tokens.dtype, np.int32)
    counts = np.bincount(tokens.ravel(), minlength=len(*p))
    self.assertGreater(p_value(counts, *p), 1e-4)

  def test_draws_are_independent(self):
    p = np.array([0.3, 0.1, 0.25, 0.35])
    tokens, draft = self.drawn(p), self.drawn(p, sampling.DRAFT)
    both = np.outer(p, p)
    for name, a, b in (
      ("positions", tokens[:, ::2], tokens[:, 1::2]),
      ("seeds", tokens[::2], tokens[1::2]),
      # Another purpose, also at the next position.
      ("purposes", tokens, draft),
      ("places", tokens[:, 1:], draft[:, :-1]),
      # seed + position is not what counts.
      ("diagonals", tokens[1:, :-1], tokens[:-1, 1:]),
    ):
      with self.subTest(name):
        self.assertGreater(p_value(joint(a, b, size=4), both), 1e-4)

  def test_numbers_are_uniform_and_independent_of_draws(self):
    p = np.array([0.3, 0.1, 0.25, 0.35])
    shape = self.SEEDS, self.POSITIONS
    u = uniform(
      jnp.arange(self.SEEDS, dtype=jnp.uint32),
      jnp.broadcast_to(jnp.arange(self.POSITIONS), shape),
      sampling.ACCEPT,
    )
    self.assertEqual((u.shape, u.dtype), (shape, np.float32))
    self.assertBetween(float(u.min()), 0, float(u.max()))
    self.assertLess(float(u.max()), 1)
    tenth = np.int32(10 * u)
    counts = np.bincount(tenth.ravel(), minlength=10)
    self.assertGreater(p_value(counts, np.full(10, 0.1)), 1e-4)
    for purpose in (sampling.DRAFT, sampling.FINAL):
      counts = joint(tenth, self.drawn(p, purpose), size=10)
      both = np.outer(np.full(10, 0.1), np.pad(p, (0, 6)))
      self.assertGreater(p_value(counts, both), 1e-4)

  def test_a_row_does_not_depend_on_the_others(self):
    p = testing.normal(5, 6, 40) ** 2
    seed = np.uint32([3, 0, 2**32 - 1, 17, 3])
    position = testing.tokens(5, 6, vocab_size=1000)
    tokens = draw(p, seed, position)
    for b in range(5):
      row = slice(b, b + 1)
      np.testing.assert_array_equal(
        draw(p[row], seed[row], position[row]), tokens[row]
      )
      for t in range(6):
        place = row, slice(t, t + 1)
        np.testing.assert_array_equal(
          draw(p[place], seed[row], position[place]), tokens[place]
        )

  def test_numbers_are_exact_in_both_tails(self):
    # The words are all that is random, so their numbers are the distribution.
    rng = np.random.default_rng(0)
    size = 2 ** rng.uniform(0, 64, 10_000)
    numbers = np.append(size.astype(np.uint64), np.uint64([1, 2, 2**63]))
    words = (numbers % 2**32).astype(np.uint32), numbers >> np.uint64(32)
    got = np.float64(sampling.exponential(words[0], np.uint32(words[1])))
    v = (np.float64(numbers) + 0.5) / 2**65
    exact = np.where(numbers % 2, -np.log(v), -np.log1p(-v))
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    self.assertLess(got.min(), 1e-18)
    self.assertGreater(got.max(), 40)

  @parameterized.parameters(1e-3, 1e-8, 1e-12, 1e-15)
  def test_a_rare_token_is_drawn_by_its_share(self, share):
    # Its number is small with the probability that the words say: it wins for
    # all below the one where its score is that of the other token.
    mode = sampling.UNTRUNCATED
    other = np.uint64(2**63)  # an even word: -log1p(-v), v = 1/4
    limit = int(-np.expm1(np.log1p(-0.25) * share) * 2.0**65)
    for number, wins in ((limit * 0.999, True), (limit * 1.001, False)):
      number = np.uint64(int(number) // 2 * 2)
      both = np.array([other, number])
      words = lambda key, shape, dtype, both=both: jnp.stack(
        [jnp.uint32(both % 2**32), jnp.uint32(both >> np.uint64(32))]
      )
      with mock.patch.object(jax.random, "bits", words):
        p = np.float32([[[1, share]]])
        token = sampling.draw(
          p, np.uint32([0]), np.int32([[0]]), sampling.FINAL, mode
        )
      self.assertEqual(int(token[0, 0]), wins)

  def test_without_temperature_nothing_is_random(self):
    p = np.float32([[[0.4, 0.6, 0]]])
    tokens = {
      int(
        draw(p, np.uint32([seed]), np.int32([[7]]), mode=sampling.GREEDY)[0, 0]
      )
      for seed in range(20)
    }
    self.assertEqual(tokens, {1})
    # Among rows that are random it is a one.
    self.assertEqual(set(self.drawn([0, 0, 1, 0]).ravel()), {2})


class SettingsTest(parameterized.TestCase):
  def test_are_joined_in_order(self):
    rows = [(0.5, 0.9, 3, 2**32 - 1), (0, 1, 0, 7)]
    how = sampling.stack_params([request(*row) for row in rows])
    fields = how.temperature, how.top_p, how.top_k, how.seed
    self.assertEqual(
      [str(a.dtype) for a in fields], ["float32", "float32", "int32", "uint32"]
    )
    for column, values in zip(fields, zip(*rows, strict=True), strict=True):
      np.testing.assert_allclose(column, values, 1e-7)

  @parameterized.parameters(
    (0, 1, 0, 0), (1e9, 1e-9, 10**6, 2**32 - 1), (0.7, 0.9, 50, 1)
  )
  def test_these_are_good(self, *settings):
    self.assertEqual(request(*settings).validate(), [])

  @parameterized.parameters(
    (-0.1, "temperature=-0.1: must be at least 0, and at most 1e+30"),
    (float("inf"), "temperature=inf: must be at least 0, and at most 1e+30"),
    (float("nan"), "temperature=nan: must be at least 0, and at most 1e+30"),
  )
  def test_refuses_a_temperature(self, value, message):
    self.assertEqual(request(value, 1, 0).validate(), [message])

  @parameterized.parameters(0, -1, 1.01, float("nan"))
  def test_refuses_a_share(self, value):
    self.assertEqual(
      request(1, value, 0).validate(),
      [f"top_p={value}: must be above 0 and at most 1"],
    )

  def test_refuses_the_others_and_names_all(self):
    self.assertEqual(
      request(1, 1, -1, 2**32).validate(),
      [
        "top_k=-1: must be in [0, 2^31), where 0 is no limit",
        "seed=4294967296: must be in [0, 2^32)",
      ],
    )
    self.assertLen(request(-1, 0, -1, -1).validate(), 4)


if __name__ == "__main__":
  absltest.main()

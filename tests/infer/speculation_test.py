"""Tests of speculative decoding: what is written is of the main model alone."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from sampling_test import joint, p_value, probabilities, request, rows_of

from dsv3_jax.infer import sampling, speculation

DRAWS = 100_000


verify_drafts = jax.jit(speculation.verify_drafts, static_argnames="mode")


def same_rows(n, temperature, top_p, top_k):
  """Settings of n rows that differ in their seeds."""
  columns = np.float32(temperature), np.float32(top_p), np.int32(top_k)
  return sampling.SamplingParams(
    *(jnp.full(n, c) for c in columns), jnp.arange(n, dtype=jnp.uint32)
  )


def tables(seed, c, settings, mode):
  """Probabilities [C, C] of the next token after each, of target and draft."""
  rng = np.random.default_rng(seed)
  logits = 1.5 * rng.normal(size=(2, c, c))
  logits[1] = (logits[1] + logits[0]) / 2  # it learned something of the target
  how = rows_of([settings] * 2)
  return probabilities(jnp.float32(logits), how, mode)


@functools.partial(jax.jit, static_argnames=("k", "mode"))
def markov_cycle(p, q, last, how, position, k, mode):
  """A cycle where the next token depends on the one before alone.

  Args:
    p, q: [C, C], of target and draft.
    last: [B] known tokens, before `position` [B].
    how: settings of the rows.
    position: of the first draft.
    k: drafts.
    mode: of all rows.
  """
  known, given = [last], []
  for i in range(k):
    given.append(q[known[-1]])
    drawn = sampling.draw(
      given[-1][:, None], how.seed, position[:, None] + i, sampling.DRAFT, mode
    )
    known.append(drawn[:, 0])
  target = p[jnp.stack(known, 1)]
  drafts = jnp.stack(known[1:], 1)
  return verify_drafts(
    target, jnp.stack(given, 1), drafts, how.seed, position, mode
  )


def texts_of(p, q, how, k, mode, length):
  """Draws texts of the Markov chain p after a first token 0, with drafts of q.

  Returns:
    Tokens [B, length], and how many drafts each cycle kept, [cycles, B].
  """
  b, kept = len(how.seed), []
  found, n = np.zeros((b, length), np.int32), np.zeros(b, np.int32)
  last = np.zeros(b, np.int32)
  for _ in range(length):
    tokens, new = map(np.asarray, markov_cycle(p, q, last, how, n + 1, k, mode))
    row, place = np.nonzero(np.arange(k + 1) < new[:, None])
    here = n[row] + place < length
    row, place = row[here], place[here]
    found[row, n[row] + place] = tokens[row, place]
    last, n = tokens[np.arange(b), new - 1], n + new
    kept.append(new - 1)
  return found, np.array(kept)


class JudgeTest(parameterized.TestCase):
  # (temperature, top_p, top_k), drafts, size of the vocabulary.
  CASES = (
    ((1, 1, 0), 1, 5),
    ((0.6, 1, 0), 2, 5),
    ((2, 0.9, 0), 2, 5),
    ((1.3, 0.95, 3), 2, 5),
  )

  @parameterized.parameters(*CASES)
  def test_texts_have_the_distribution_of_the_target(self, settings, k, c):
    mode = sampling.mode([request(*settings)])
    p, q = tables(k, c, settings, mode)
    how = same_rows(DRAWS, *settings)
    length = min(k + 1, 3)
    found, kept = texts_of(p, q, how, k, mode, length)
    exact = np.float64(p)
    expected = exact[0]
    for _ in range(length - 1):
      expected = expected[..., None] * exact
    counts = joint(*found.T, size=c)
    self.assertGreater(p_value(counts, expected), 1e-4)
    # In the first cycle as many drafts are kept as can be: x with probability
    # min(p(x), q(x)), and the next one behind it.
    both = np.minimum(exact, np.float64(q))
    mean, chain = 0, np.eye(c)[0]
    for _ in range(k):
      chain = chain @ both
      mean += chain.sum()
    error = 5 * kept[0].std() / np.sqrt(DRAWS)
    self.assertAlmostEqual(kept[0].mean(), mean, delta=error)
    self.assertEqual(set(kept[0]), {*range(k + 1)})

  def test_drafts_of_the_target_itself_are_all_kept(self):
    p, _ = tables(0, 5, (1, 1, 0), sampling.UNTRUNCATED)
    how = same_rows(DRAWS, 1, 1, 0)
    found, kept = texts_of(p, p, how, 2, sampling.UNTRUNCATED, 3)
    self.assertEqual(kept.min(), 2)
    exact = np.float64(p)
    expected = exact[0][:, None, None] * exact[:, :, None] * exact
    self.assertGreater(p_value(joint(*found.T, size=5), expected), 1e-4)

  def test_drafts_that_cannot_be_are_all_rejected(self):
    p, q = np.zeros((2, 5, 5), np.float32)
    p[:, :3], q[:, 3:] = (0.5, 0.2, 0.3), (0.1, 0.9)
    how = same_rows(DRAWS, 1, 1, 0)
    found, kept = texts_of(p, q, how, 2, sampling.UNTRUNCATED, 2)
    self.assertEqual(kept.max(), 0)
    expected = np.outer(p[0], p[0])
    self.assertGreater(p_value(joint(*found.T, size=5), expected), 1e-4)

  def test_in_place_of_a_rejected_draft_comes_what_it_was_short_of(self):
    # 0 is drafted too often, 1 as often as it should, 2 too seldom.
    p, q = np.float32([0.1, 0.3, 0.6]), np.float32([0.5, 0.3, 0.2])
    how = same_rows(DRAWS, 1, 1, 0)
    for draft, share in ((0, 0.2), (1, 1), (2, 1)):
      tokens, n = verify_drafts(
        np.broadcast_to(p, (DRAWS, 2, 3)),
        np.broadcast_to(q, (DRAWS, 1, 3)),
        np.full((DRAWS, 1), draft, np.int32),
        how.seed,
        np.ones(DRAWS, np.int32),
        sampling.UNTRUNCATED,
      )
      tokens, kept = np.asarray(tokens), np.asarray(n) == 2
      error = 5 * np.sqrt(share * (1 - share) / DRAWS)
      self.assertAlmostEqual(kept.mean(), share, delta=error)
      np.testing.assert_array_equal(tokens[kept, 0], draft)
      # Behind a kept one the target's own; else what is missing: 2 alone.
      counts = np.bincount(tokens[kept, 1], minlength=3)
      self.assertGreater(p_value(counts, p), 1e-4)
      np.testing.assert_array_equal(tokens[~kept, 0], 2)

  def test_the_target_is_drawn_where_rounding_leaves_nothing(self):
    # A p of too small a sum has nowhere more than q.
    p = np.float32([0.25, 0.15, 0.1, 0])
    tokens, n = verify_drafts(
      np.broadcast_to(p, (DRAWS, 2, 4)),
      np.broadcast_to(2 * p, (DRAWS, 1, 4)),
      np.zeros((DRAWS, 1), np.int32),
      same_rows(DRAWS, 1, 1, 0).seed,
      np.ones(DRAWS, np.int32),
      sampling.UNTRUNCATED,
    )
    drawn = np.asarray(tokens)[np.asarray(n) == 1, 0]
    self.assertBetween(len(drawn), 0.4 * DRAWS, 0.6 * DRAWS)
    counts = np.bincount(drawn, minlength=4)
    self.assertGreater(p_value(counts, p), 1e-4)

  def test_what_cannot_be_is_not_kept_by_the_least_number(self):
    p, q = np.float32([[[0, 1], [0.5, 0.5]], [[1, 0], [0.5, 0.5]]])
    zero = lambda seed, position, purpose: jnp.zeros(position.shape)
    with mock.patch.object(sampling, "uniform", zero):
      tokens, n = speculation.verify_drafts(
        np.stack([p, p]),
        np.stack([q[:1], p[:1]]),
        np.int32([[0], [1]]),
        same_rows(2, 1, 1, 0).seed,
        np.int32([3, 3]),
        sampling.UNTRUNCATED,
      )
    self.assertEqual(n.tolist(), [1, 2])
    self.assertEqual(tokens[:, 0].tolist(), [1, 1])

  @parameterized.parameters(
    # Target and draft of the tokens; the draft; its probability to be accepted.
    ((1, 1e-9), (1, 0), 0, 1 - 1e-9),  # 1 - 1e-9 is 1 in float32
    ((1, 1e-12), (1, 0), 0, 1 - 1e-12),
    ((1e-9, 1), (0.5, 0.5), 0, 2e-9),
    ((1e-12, 1), (0.5, 0.5), 0, 2e-12),
    # Rounding gives the draft 6e-8 more than the others are short of.
    ((0.5, 0.5, 1e-9), (0.5 + 2**-24, 0.5, 0), 0, 1 - 1e-9 / 0.5),
  )
  def test_rare_tokens_come_by_their_share(self, p, q, draft, share):
    rejects = 1 - share < share
    edge = 1 - share if rejects else share
    for u, below in ((edge * 0.99, True), (edge * 1.01, False)):
      fixed = lambda seed, position, purpose, u=u: jnp.full(position.shape, u)
      with mock.patch.object(sampling, "uniform", fixed):
        tokens, n = speculation.verify_drafts(
          np.float32([[p, p]]),
          np.float32([[q]]),
          np.int32([[draft]]),
          np.uint32([0]),
          np.int32([3]),
          sampling.UNTRUNCATED,
        )
      self.assertEqual(int(n[0]) == 2, below != rejects, u)
      if int(n[0]) == 1:  # in its place comes what it was short of
        short = np.argmax(np.float32(p) - np.float32(q))
        self.assertEqual(int(tokens[0, 0]), short)

  # Ones in place of probabilities: of the target, then drafts.
  @parameterized.parameters(
    ((3, 1, 4), (3, 1), (3, 1, 4)),
    ((3, 1, 4), (3, 2), (3, 1)),
    ((3, 1, 4), (2, 1), (3,)),
    ((0, 0, 0), (0, 0), (0, 0, 0)),
    ((0, 5, 2), (5, 5), (0,)),
  )
  def test_without_temperature_it_compares(self, target, drafts, expected):
    one = lambda tokens: np.eye(6, dtype=np.float32)[list(tokens)][None]
    how = same_rows(1, 0, 1, 0)
    for mode in (sampling.GREEDY, sampling.UNTRUNCATED):
      tokens, n = verify_drafts(
        one(target),
        one(drafts),
        np.int32([drafts]),
        how.seed,
        np.int32([7]),
        mode,
      )
      self.assertEqual(int(n[0]), len(expected))
      self.assertEqual(tuple(tokens[0, : int(n[0])].tolist()), expected)

  def test_a_row_does_not_depend_on_the_others(self):
    settings = (1, 1, 0)
    p, q = tables(3, 5, settings, sampling.UNTRUNCATED)
    rng, how = np.random.default_rng(0), same_rows(DRAWS, *settings)
    last, position = rng.integers((5, 90), size=(DRAWS, 2), dtype=np.int32).T
    rows = last, how, position
    expected = markov_cycle(p, q, *rows, 2, sampling.UNTRUNCATED)
    order = rng.permutation(DRAWS)
    rows = jax.tree.map(lambda a: a[order], rows)
    found = markov_cycle(p, q, *rows, 2, sampling.UNTRUNCATED)
    for one, other in zip(found, expected, strict=True):
      np.testing.assert_array_equal(one, other[order])


class LogprobsTest(absltest.TestCase):
  def test_are_of_the_softmax(self):
    logits = np.log(np.float32([[[0.1, 0.2, 0.7], [3, 3, 6]]]))
    found = speculation.token_logprobs(logits, np.int32([[2, 1]]))
    np.testing.assert_allclose(found, np.log([[0.7, 0.25]]), 1e-6)


if __name__ == "__main__":
  absltest.main()

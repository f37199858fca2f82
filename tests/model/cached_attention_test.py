"""Tests of attention against a cache: blocks of keys, chunks of queries."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.model import cached_attention

N, X, V = 2, 5, 3

C = 7  # numbers that a cache keeps of a position
UP_K, UP_V = testing.normal(N, X, C, seed=4), testing.normal(N, V, C, seed=5)


def expand(block):
  """Keys [N, s, X] and values [N, V, s] of what a cache keeps [s, C]."""
  return (
    jnp.einsum("SC,NXC->NSX", block, UP_K),
    jnp.einsum("SC,NVC->NVS", block, UP_V),
  )


def all_at_once(q, kept, start):
  """Attention of queries to the keys up to their own, in float64."""
  q, kept, up_k, up_v = (
    np.asarray(a, np.float64) for a in (q, kept, UP_K, UP_V)
  )
  k = np.einsum("BSC,NXC->BNSX", kept, up_k)
  v = np.einsum("BSC,NVC->BNSV", kept, up_v)
  scores = np.einsum("BNTX,BNSX->BNTS", q, k)
  query = np.asarray(start)[:, None] + np.arange(q.shape[2])
  seen = np.arange(kept.shape[1]) <= query[..., None]
  scores = np.where(seen[:, None], scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return np.einsum("BNTS,BNSV->BTNV", p, v)


class ExtendTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    for name, size in (("CHUNK", 4), ("KEYS", 6)):
      self.enter_context(mock.patch.object(cached_attention, name, size))

  def extend(self, q, kept, start):
    run = jax.jit(lambda *args: cached_attention.extend(*args, expand))
    return run(q, kept, np.int32(start))

  # Positions of the cache: less than a block, one, one and a bit, two whole
  # ones, a ragged third. Queries: part of a chunk, one, several. They begin at
  # the front, in the middle of a block, and end with the cache.
  @parameterized.parameters(
    (3, 1, (0, 2)),
    (3, 3, (0, 0)),
    (6, 4, (0, 2)),
    (7, 1, (6, 5)),
    (7, 4, (0, 3)),
    (12, 8, (0, 4)),
    (16, 3, (0, 13)),
    (16, 12, (1, 4)),
    (17, 16, (0, 1)),
  )
  def test_is_attention_to_all_before(self, length, t, start):
    q = testing.normal(2, N, t, X)
    kept = testing.normal(2, length, C, seed=1)
    out = self.extend(q, kept, start)
    self.assertEqual(out.dtype, np.float32)
    # Keys, scores, a softmax with its blocks joined, values and their sum.
    terms = C + X + 2 * length + C + length
    testing.assert_close(out, all_at_once(q, kept, start), terms)

  def test_weights_of_blocks_are_joined_whichever_has_the_largest_score(self):
    # Scores that rise, and that fall, by far more than a softmax can see.
    scale = np.geomspace(1, 40, 16)
    kept = testing.normal(2, 16, C, seed=1)
    kept = kept * jnp.float32([scale, scale[::-1]])[..., None]
    q, start = testing.normal(2, N, 4, X), (12, 12)
    scores = np.einsum("BNTX,BNSX->BNTS", q, jax.vmap(expand)(kept)[0])
    self.assertGreater(np.ptp(scores, axis=-1).min(), 50)
    # An error of a score is one of its weight, in shares of it.
    terms = (C + X) * np.abs(scores).max() + 3 * 16 + C
    testing.assert_close(
      self.extend(q, kept, start), all_at_once(q, kept, start), terms
    )

  def test_blocks_behind_the_last_query_are_not_read(self):
    q, kept = testing.normal(2, N, 4, X), testing.normal(2, 16, C, seed=1)
    start, expanded = (2, 5), []
    expected = all_at_once(q, kept, start)
    # Row 0 reads the first block alone, row 1 two.
    kept = kept.at[0, 6:].set(np.nan).at[1, 12:].set(np.nan)
    kept = kept.at[1, 9:12].set(9)

    def told(block):
      jax.debug.callback(lambda: expanded.append(len(block)))
      return expand(block)

    run = jax.jit(lambda *args: cached_attention.extend(*args, told))
    out = run(q, kept, np.int32(start))
    jax.effects_barrier()
    self.assertEqual(expanded, [6, 6, 6])
    testing.assert_close(out, expected, C + X + 2 * 16 + C + 16)

  def test_queries_behind_the_end_harm_nobody(self):
    q, kept = testing.normal(2, N, 8, X), testing.normal(2, 10, C, seed=1)
    out = self.extend(q, kept, (5, 12))
    expected = all_at_once(q, kept, (5, 12))
    testing.assert_close(out[0, :5], expected[0, :5], C + X + 30 + C + 16)
    self.assertTrue(np.isfinite(out).all())

  @parameterized.parameters(5, 6, 9)
  def test_refuses_chunks_that_are_not_whole(self, t):
    q, kept = testing.normal(2, N, t, X), testing.normal(2, 16, C)
    with self.assertRaisesRegex(
      ValueError, f"^{t} queries: must be at most 4 or a multiple of it$"
    ):
      self.extend(q, kept, (0, 0))


if __name__ == "__main__":
  absltest.main()

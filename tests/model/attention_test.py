"""Tests of attention over chunks and blocks of queries, and of its memory."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.model import attention

N, X, V = 2, 5, 3


def inputs(t):
  q, k = (testing.normal(2, N, t, X, seed=seed) for seed in (0, 1))
  v = testing.normal(2, N, t, V, seed=2)
  dout = testing.normal(2, t, N, V, seed=3)
  return q, k, v, dout


def whole(q, k, v, dout, segments=None):
  """Attention and its gradients with all probabilities, in float64."""
  q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
  scores = np.einsum("BNTX,BNSX->BNTS", q, k)
  t = q.shape[2]
  seen = np.tri(t, dtype=bool)
  if segments is not None:
    seen = seen & (segments[:, None, :, None] == segments[:, None, None])
  scores = np.where(seen, scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  out = np.einsum("BNTS,BNSV->BTNV", p, v)
  dp = np.einsum("BTNV,BNSV->BNTS", dout, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True))
  return out, (
    np.einsum("BNTS,BNSX->BNTX", ds, k),
    np.einsum("BNTS,BNTX->BNSX", ds, q),
    np.einsum("BNTS,BTNV->BNSV", p, dout),
  )


def with_gradients(q, k, v, dout):
  out, vjp = jax.vjp(attention.attend, q, k, v)
  return out, vjp(dout)


class AttendTest(parameterized.TestCase):
  # Chunks of 4 in 2 blocks: a chunk a block, several, ragged ones.
  @parameterized.parameters(1, 3, 4, 5, 8, 9, 13, 16, 17, 24, 31)
  def test_is_the_reference(self, t):
    args = inputs(t)
    with (
      mock.patch.object(attention, "CHUNK", 4),
      mock.patch.object(attention, "BLOCKS", 2),
    ):
      found = jax.jit(lambda *args: with_gradients(*args))(*args)
    # Scores, a softmax, a sum over keys; and back, over queries.
    testing.assert_close(found, whole(*args), 2 * (X + t + V + t))

  @parameterized.parameters(1, 7, 16, 31)
  def test_segments_do_not_see_each_other(self, t):
    args = inputs(t)
    rng = np.random.default_rng(t)
    segments = np.cumsum(rng.random((2, t)) < 0.2, axis=1, dtype=np.int32)

    def masked(q, k, v, dout, segments):
      of = lambda q, k, v: attention.attend(q, k, v, segments)
      out, vjp = jax.vjp(of, q, k, v)
      return out, vjp(dout)

    with (
      mock.patch.object(attention, "CHUNK", 4),
      mock.patch.object(attention, "BLOCKS", 2),
    ):
      found = jax.jit(lambda *args: masked(*args))(*args, segments)
    expected = whole(*args, segments)
    testing.assert_close(found, expected, 2 * (X + t + V + t))

  def test_blocks_are_of_whole_chunks_and_few(self):
    for t in (1, 127, 128, 129, 1024, 1025, 5000, 8192, 131_072):
      spans = attention._blocks(t)
      self.assertLessEqual(len(spans), attention.BLOCKS)
      self.assertEqual(
        [start for start, _ in spans[1:]], [end for _, end in spans[:-1]]
      )
      self.assertEqual((spans[0][0], spans[-1][1]), (0, t))
      for start, end in spans[:-1]:
        self.assertEqual((end - start) % attention.CHUNK, 0)
    self.assertLen(attention._blocks(1024), 8)

  @parameterized.parameters("forward", "backward")
  def test_memory_is_linear_in_the_length(self, way):

    def bytes_of(t):
      shape = jax.ShapeDtypeStruct((1, N, t, 16), jnp.float32)
      dout = jax.ShapeDtypeStruct((1, t, N, 16), jnp.float32)
      if way == "forward":
        lowered = jax.jit(attention.attend).lower(shape, shape, shape)
      else:
        lowered = jax.jit(with_gradients).lower(shape, shape, shape, dout)
      stats = lowered.compile().memory_analysis()
      return stats.temp_size_in_bytes + stats.output_size_in_bytes

    sizes = [bytes_of(t) for t in (2048, 4096, 8192)]
    # A line: twice as much more for twice as many more tokens.
    more, still_more = np.diff(sizes)
    self.assertBetween(still_more / more, 1.9, 2.1)
    self.assertLess(sizes[2] / sizes[1], 2.1)


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
      self.enter_context(mock.patch.object(attention, name, size))

  def extend(self, q, kept, start):
    run = jax.jit(lambda *args: attention.extend(*args, expand))
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

    run = jax.jit(lambda *args: attention.extend(*args, told))
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

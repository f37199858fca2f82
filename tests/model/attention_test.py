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


if __name__ == "__main__":
  absltest.main()

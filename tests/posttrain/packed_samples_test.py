"""Packed samples have the loss and the gradients of the samples alone."""

import functools

import jax
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import losses, train
from dsv3_jax.data import packing, tokenizer
from dsv3_jax.data.batch import IGNORE, make_batch
from dsv3_jax.model import rope
from dsv3_jax.parallel import device_mesh

N, LENGTH = 16, 32  # samples, and tokens of a row
# Two samples a row, or one; no loss mixes samples: no balance loss of rows.
SETTINGS = (
  "data.source=conversations",
  "data.segment_mask=true",
  f"data.seq_len={LENGTH}",
  "train.batch_size=8",
  "train.tokens=1e6",
  "router.balance_weight=0",
  "n_layers=4",
)
LAYOUTS = {
  "micro_batches": (("train.micro_batches=2",), {}),
  "data": ((), {"data": 2}),
  "expert": ((), {"expert": 2}),
  "pipe": (("train.micro_batches=4", "parallel.schedule=1f1b"), {"pipe": 2}),
  "dualpipev": (
    ("train.micro_batches=4", "parallel.schedule=dualpipev"),
    {"pipe": 2},
  ),
}


def samples():
  """Returns (ids, supervised) of N conversations of one or two answers."""
  rng = np.random.default_rng(1)
  result = []
  for i in range(N):
    n = int(rng.integers(6, LENGTH // 2 + 1))
    ids = rng.integers(8, 300, n).astype(np.int32)
    ids[0], ids[-1] = tokenizer.BOS_ID, tokenizer.EOS_ID
    supervised = np.arange(n) >= n - int(rng.integers(1, 4))
    if i % 2 and n > 8:
      supervised[2:4] = True  # the answer of an earlier turn
    result.append((ids, supervised))
  return result


def rows_of(parts):
  """Packs lists of samples into rows; returns ids, segments, supervised."""
  arrays = np.zeros((3, len(parts), LENGTH + 1), np.int32)
  arrays[0] = tokenizer.PAD_ID
  for row, part in enumerate(parts):
    at = 0
    for segment, (ids, supervised) in enumerate(part, 1):
      here = slice(at, at + len(ids))
      arrays[:, row, here] = ids, np.full_like(ids, segment), supervised
      at += len(ids)
  return arrays[0], arrays[1], arrays[2].astype(bool)


def batch_of(parts, n_micro):
  rows = (a.reshape(n_micro, -1, LENGTH + 1) for a in rows_of(parts))
  return make_batch(*rows, segment_mask=True)


PACKED = [samples()[i : i + 2] for i in range(0, N, 2)]
SINGLE = [[sample] for sample in samples()]


@functools.cache
def single():
  """Returns the sums of samples that have a row each."""
  run = testing.run(*SETTINGS, f"train.batch_size={N}")
  state = testing.state(run)
  compute = jax.jit(train.gradients, static_argnums=(2,))
  return jax.device_get(compute(state, batch_of(SINGLE, 1), run))


class PackedTest(parameterized.TestCase):
  def check(self, settings, sizes, of=PACKED):
    run = testing.run(*SETTINGS, *settings)
    mesh = device_mesh.make_mesh(sizes)
    state = jax.device_put(testing.state(run), train.shardings(run, mesh))
    batch = batch_of(of, run.train.micro_batches)
    n_rows = batch.tokens.shape[1]
    batch = device_mesh.make_global_batch(batch, n_rows, mesh, dim=1)
    compute = jax.jit(train.gradients, static_argnums=(2, 3))
    sums = jax.device_get(compute(state, batch, run, mesh))
    self.assertGreater(sums.losses.mtp, 0.1)
    for name in ("total", "main", "mtp"):
      value, expected = (getattr(s.losses, name) for s in (sums, single()))
      np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(sums.stats.load, single().stats.load)
    leaves = jax.tree.leaves_with_path(single().grads)
    for (path, expected), value in zip(
      leaves, jax.tree.leaves(sums.grads), strict=True
    ):
      error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
      self.assertLess(error, 1e-6, jax.tree_util.keystr(path))

  @parameterized.named_parameters(
    (name, *layout) for name, layout in LAYOUTS.items()
  )
  @pytest.mark.slow
  def test_equals_single_samples(self, settings, sizes):
    self.check(settings, sizes)

  def test_equals_single_samples_on_one_device(self):
    self.check((), {})

  def test_naive_packing_differs(self):
    """Samples that see each other have other losses: the test would see it."""
    run = testing.run(*SETTINGS)
    state = testing.state(run)
    batch = batch_of(PACKED, 1)
    seen = batch.replace(segments=(batch.segments > 0).astype(np.int32))
    compute = jax.jit(train.gradients, static_argnums=(2,))
    main = compute(state, seen, run).losses.main
    self.assertGreater(abs(main - single().losses.main), 1e-4)


class LabelTest(absltest.TestCase):
  def test_answers_alone_are_labels(self):
    batch = batch_of(PACKED, 1)
    expected = sum(int(supervised.sum()) for _, supervised in samples())
    self.assertEqual((batch.labels != IGNORE).sum(), expected)
    ends = sum(int((ids == tokenizer.EOS_ID).sum()) for ids, _ in samples())
    self.assertEqual((batch.labels == tokenizer.EOS_ID).sum(), ends)

  def test_mtp_target_lies_in_the_answer_of_the_label_before(self):
    """Depth k has no target in a prompt, or across two answers or samples."""
    batch = batch_of(PACKED, 1)
    for depth, weights in enumerate(losses.token_weights(batch, 2)):
      # An answer of n tokens has n - depth targets at that depth.
      expected = 0
      for _, supervised in samples():
        edges = np.flatnonzero(np.diff(np.pad(supervised, 1).astype(int)))
        for start, end in edges.reshape(-1, 2):
          expected += max(end - start - depth, 0)
      self.assertEqual((np.asarray(weights) > 0).sum(), expected)
      np.testing.assert_allclose(np.asarray(weights).sum(), 1, rtol=1e-6)


class PositionTest(absltest.TestCase):
  def test_positions_begin_anew_in_each_segment(self):
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [3, 4, 4, 4, 4, 4, 0]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 0]]
    np.testing.assert_array_equal(rope.positions(7, segments), expected)
    np.testing.assert_array_equal(rope.positions(7), np.arange(7))


class FlagTest(absltest.TestCase):
  def test_rows_hold_whole_samples_and_their_flags(self):
    self.assertEqual(packing.n_rows([20, 20, 12, 5], 33), 2)


if __name__ == "__main__":
  absltest.main()

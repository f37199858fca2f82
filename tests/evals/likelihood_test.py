"""Tests of held-out loss and bits per byte."""

import jax
import numpy as np
import reference
import testing
from absl.testing import absltest

from dsv3_jax import config
from dsv3_jax.data.batch import make_batch
from dsv3_jax.evals import hidden, likelihood
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, layouts

RUN = testing.run("evaluate.batch_size=2")
VOCAB, SEQ_LEN, N_BYTES = RUN.model.vocab_size, RUN.data.seq_len, 77
# Attention, FFN and head of two layers, as in transformer_test.
TERMS = 2 * (6 * 16 + SEQ_LEN + 24) + 16 + VOCAB


class HeldoutTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    cfg = RUN.model
    self.params = testing.draw(transformer.specs(cfg))
    self.bias = testing.normal(cfg.n_routers, 8, seed=1, scale=0.1)
    self.rows = testing.tokens(3, SEQ_LEN + 1, vocab_size=VOCAB)
    rng = np.random.default_rng(2)
    self.mask = rng.random((3, SEQ_LEN)) < 0.6

  def heldout(
    self, *, params=None, rows=None, segments=None, run=RUN, shards=1
  ):
    mesh = device_mesh.make_mesh({"data": shards})
    params = self.params if params is None else params
    places = layouts.make_layout(run, mesh.shape).specs
    params = jax.tree.map(
      lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec)),
      params,
      places,
    )
    bias = jax.device_put(self.bias, jax.NamedSharding(mesh, jax.P()))
    model = hidden.EvalModel(params, bias, run, mesh)
    rows = self.rows if rows is None else rows
    batch = make_batch(rows, segments, segment_mask=segments is not None)
    return likelihood.heldout(model, batch, self.mask, N_BYTES).row("")

  def expected_nats(self):
    params, bias = reference.f64((self.params, self.bias))
    tokens, labels = self.rows[:, :-1], self.rows[:, 1:]
    states, *_ = reference.forward(params, bias, tokens, RUN.model)
    logits = states @ params["head"]
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    return -chosen[self.mask].sum()

  def test_matches_the_reference(self):
    # Three rows in batches of two: one of padding, which must not count.
    result, nats = self.heldout(), self.expected_nats()
    loss = np.float64(nats / self.mask.sum())
    testing.assert_close(result["heldout_loss"], loss, TERMS)
    testing.assert_close(
      result["heldout_bpb"], np.float64(nats / np.log(2) / N_BYTES), TERMS
    )

  def test_devices_share_the_rows(self):
    result, expected = self.heldout(shards=2), self.heldout()
    nats = np.float64(expected["heldout_loss"])
    testing.assert_close(result["heldout_loss"], nats, TERMS)

  def test_batch_size_does_not_matter(self):
    one_batch = config.override(RUN, "evaluate.batch_size=100")
    result, expected = self.heldout(run=one_batch), self.heldout()
    for key, value in expected.items():
      testing.assert_close(result[key], np.float64(value), TERMS)

  def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(self):
    head = np.zeros_like(self.params["head"])
    result = self.heldout(params=self.params | {"head": head})
    nats = np.log(VOCAB)
    testing.assert_close(result["heldout_loss"], np.float64(nats), VOCAB)
    bits = nats / np.log(2) * self.mask.sum() / N_BYTES
    testing.assert_close(result["heldout_bpb"], np.float64(bits), VOCAB)

  def test_what_is_not_scored_changes_nothing_before_it(self):
    rows = self.rows.copy()
    self.mask[:, -1] = False
    expected = self.heldout()
    rows[:, -1] = (rows[:, -1] + 1) % VOCAB
    self.assertEqual(self.heldout(rows=rows), expected)

  def test_a_segment_is_scored_without_those_before_it(self):
    segments = np.broadcast_to(np.arange(SEQ_LEN + 1) > 3, self.rows.shape)
    rows, segments = self.rows.copy(), 1 + segments.astype(np.int32)
    rows[:, :4] = (rows[:, :4] + 1) % VOCAB
    self.mask[:, 3] = True  # from the other segment: not scored
    self.mask[:, :3] = False
    expected = self.heldout(segments=segments)
    self.assertEqual(self.heldout(rows=rows, segments=segments), expected)
    self.mask[:, 3] = False
    self.assertEqual(self.heldout(segments=segments), expected)

  def test_domains_are_told_together_and_apart(self):
    found = likelihood.metrics(
      {
        "a": likelihood.Likelihood(10.0, 4, 20),
        "b": likelihood.Likelihood(30.0, 4, 5),
      }
    )
    bits = 40 / np.log(2)
    self.assertEqual(found["heldout_loss"], 5.0)
    self.assertEqual(found["heldout_loss/b"], 7.5)
    np.testing.assert_allclose(found["heldout_bpb"], bits / 25)
    np.testing.assert_allclose(found["heldout_bpb/a"], bits / 80)
    one = likelihood.metrics({"": likelihood.Likelihood(1.0, 1, 1)})
    self.assertLen(one, 2)


if __name__ == "__main__":
  absltest.main()

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import losses
from dsv3_jax.data import tokenizer
from dsv3_jax.data.batch import IGNORE, Batch, make_batch
from dsv3_jax.model import moe, transformer

VOCAB = 37


def _case(m, d=12):
  rng = np.random.default_rng(m)
  labels = jnp.asarray(rng.integers(VOCAB, size=m), jnp.int32)
  weights = jnp.asarray(rng.uniform(0, 1, m), jnp.float32)
  return testing.normal(m, d), testing.normal(d, VOCAB), labels, weights


class CrossEntropyTest(parameterized.TestCase):
  # One token, part of a chunk, a whole one, and a remainder.
  @parameterized.parameters(
    1, 7, losses.CHUNK, losses.CHUNK + 1, 2 * losses.CHUNK + 3
  )
  def test_value_and_gradients_match_the_reference(self, m):
    hidden, head, labels, weights = _case(m)
    run = jax.jit(jax.value_and_grad(losses.cross_entropy, (0, 1)))
    value, gradients = run(hidden, head, labels, weights)
    plain = jax.jit(losses.cross_entropy)(hidden, head, labels, weights)
    hidden, head, weights = reference.f64((hidden, head, weights))
    labels = np.asarray(labels)
    expected = reference.cross_entropy(hidden, head, labels, weights)
    # Logits, the normaliser, the sum over tokens.
    terms = 12 + VOCAB + m
    testing.assert_close((value, plain), (expected, expected), terms)
    expected = reference.cross_entropy_gradients(hidden, head, labels, weights)
    testing.assert_close(gradients, expected, terms)

  def test_gradient_is_scaled_by_what_comes_after(self):
    case = _case(7)
    one = jax.grad(losses.cross_entropy, (0, 1))(*case)
    three = jax.grad(lambda *a: 3 * losses.cross_entropy(*a), (0, 1))(*case)
    testing.assert_close(three, jax.tree.map(lambda g: 3 * g, one), terms=2)

  def test_ignored_labels_leave_value_and_gradient_alone(self):
    hidden, head, labels, _ = _case(9)
    ignored = labels.at[2:5].set(IGNORE)
    (weights,) = losses.token_weights(Batch(ignored, ignored), depth=0)
    np.testing.assert_allclose(weights, [1 / 6] * 2 + [0] * 3 + [1 / 6] * 4)
    run = jax.value_and_grad(losses.cross_entropy, (0, 1))
    value, (dhidden, dhead) = run(hidden, head, ignored, weights)
    kept = np.array([0, 1, 5, 6, 7, 8])
    want, (want_dhidden, want_dhead) = run(
      hidden[kept], head, labels[kept], jnp.full(6, 1 / 6, jnp.float32)
    )
    testing.assert_close(
      (value, dhidden[kept], dhead),
      (want, want_dhidden, want_dhead),
      12 + VOCAB + 9,
    )
    self.assertEqual(np.abs(dhidden[2:5]).max(), 0)

  @pytest.mark.fault("F35", "a batch without labels", "a loss of zero")
  def test_all_labels_ignored_is_zero(self):
    hidden, head, labels, _ = _case(9)
    ignored = jnp.full_like(labels, IGNORE)
    (weights,) = losses.token_weights(Batch(ignored, ignored), depth=0)
    run = jax.value_and_grad(losses.cross_entropy, (0, 1))
    for leaf in jax.tree.leaves(run(hidden, head, ignored, weights)):
      np.testing.assert_array_equal(leaf, np.zeros_like(leaf))

  def test_huge_logits_stay_finite(self):
    hidden, head, labels, weights = _case(9)
    run = jax.value_and_grad(losses.cross_entropy, (0, 1))
    result = run(1e4 * hidden, 1e4 * head, labels, weights)
    for leaf in jax.tree.leaves(result):
      self.assertTrue(np.isfinite(leaf).all())

  def test_logits_of_all_tokens_never_exist(self):
    m = 8 * losses.CHUNK
    shapes = (m, 12), (12, VOCAB), (m,), (m,)
    dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    arguments = map(jax.ShapeDtypeStruct, shapes, dtypes)
    run = jax.jit(jax.value_and_grad(losses.cross_entropy, (0, 1)))
    text = run.lower(*arguments).as_text()
    self.assertIn(f"tensor<{losses.CHUNK}x{VOCAB}xf32>", text)
    self.assertNotIn(f"tensor<{m}x{VOCAB}x", text)
    self.assertNotIn(f"tensor<8x{losses.CHUNK}x{VOCAB}x", text)


def _model(*assignments):
  cfg = testing.tiny(
    "vocab_size=41", "n_layers=2", "router.balance_weight=0.1", *assignments
  )
  params = testing.draw(transformer.specs(cfg))
  bias = testing.normal(cfg.n_routers, 16, seed=1, scale=0.1)
  return cfg, params, bias, testing.tokens(2, 8, vocab_size=41)


def _gradients(params, bias, rows, cfg, kept):
  """Gradients of the total loss, and the load."""
  data = make_batch(rows)
  weights = losses.token_weights(data, cfg.mtp.depth)
  ctx = transformer.ForwardContext(saved_activations=kept)

  def total(params):
    out, stats = losses.loss(
      params, bias, data, weights, cfg.mtp.weight, cfg, ctx
    )
    return out.total, stats.load

  return jax.jit(jax.grad(total, has_aux=True))(params)


class LossTest(parameterized.TestCase):
  def test_mtp_labels_golden(self):
    # Row a b c d e: depth 1 reads b c d, predicts c d e, divides by 4.
    row, head = np.array([[0, 1, 2, 3, 4]]), testing.normal(6, 5)
    state = testing.normal(1, 3, 6, seed=1)
    hidden = testing.normal(1, 4, 6, seed=2)
    seen = {}

    def forward(params, bias, tokens, cfg, ctx, *masks):
      seen["tokens"] = tokens
      stats = moe.MoEStats(jnp.zeros((2, 16), jnp.int32), jnp.zeros(2), None)
      return transformer.Output(hidden, (state,), stats)

    cfg = testing.tiny("d_model=6", "vocab_size=5")
    data = make_batch(row)
    fake = types.SimpleNamespace(forward=forward)
    with absltest.mock.patch.object(losses, "transformer", fake):
      out, _ = losses.loss(
        {"head": head}, None, data, losses.token_weights(data, 1), 0.3, cfg
      )
    np.testing.assert_array_equal(seen["tokens"], [[0, 1, 2, 3]])
    head, state = reference.f64((head, state))
    want = reference.cross_entropy(state[0], head, [2, 3, 4], np.ones(3)) / 4
    testing.assert_close(out.mtp, want, terms=6 + 5 + 3)
    testing.assert_close(out.total, out.main + 0.3 * out.mtp, terms=3)

  def test_segments_are_as_if_alone(self):
    cfg, params, bias, _ = _model("mtp.depth=2", "router.balance_weight=0")
    start, lengths = 0, (5, 1, 7, 4)
    rng = np.random.default_rng(0)
    documents = [
      np.r_[start, rng.integers(1, 41, n - 1)].astype(np.int32) for n in lengths
    ]
    # Padded at the end, where nothing is predicted and no expert is chosen.
    joined = [
      np.pad(np.concatenate(arrays), (0, 1))[None]
      for arrays in (documents, list(map(np.full, lengths, (1, 2, 3, 4))))
    ]
    apart = [
      np.stack([np.pad(a, (0, 10 - len(a))) for a in arrays])
      for arrays in (documents, [np.ones_like(d) for d in documents])
    ]

    def losses_of(rows, segment_mask):
      data = make_batch(*rows, segment_mask=segment_mask)
      weights = losses.token_weights(data, cfg.mtp.depth)
      weights = tuple((w > 0).astype(np.float32) for w in weights)

      def total(params):
        out, stats = losses.loss(params, bias, data, weights, 0.3, cfg)
        return out.main + out.mtp, (out.main, out.mtp, stats.load)

      return total

    def with_gradients(total):
      run = jax.jit(jax.value_and_grad(total, has_aux=True))
      (value, (*terms, load)), gradients = run(params)
      return (value, terms, gradients), load

    # Sums of the same terms in another order.
    expected, want_load = with_gradients(losses_of(apart, False))
    result, load = with_gradients(losses_of(joined, True))
    terms = 17 + 2 * 3 * 465
    testing.assert_close(result, expected, terms)
    np.testing.assert_array_equal(load, want_load)
    _, (*unmasked, _) = jax.jit(losses_of(joined, False))(params)
    self.assertGreater(np.abs(np.subtract(unmasked, expected[1])).min(), 1e-2)

  @parameterized.parameters("scores", "routed")
  def test_padding_is_no_load(self, balance_map):
    cfg, params, bias, rows = _model(
      "mtp.depth=2", f"router.balance_map={balance_map}"
    )
    lengths = 5, 8  # of the row's 9, of which 8 are tokens
    segments = np.int32(np.arange(9) < np.reshape(lengths, (2, 1)))
    rows = np.where(segments, np.pad(rows, ((0, 0), (0, 1))), tokenizer.PAD_ID)

    @jax.jit
    def run(params, data):
      def total(params):
        weights = losses.token_weights(data, 2)
        out, stats = losses.loss(params, bias, data, weights, 0.3, cfg)
        return out.total, (out, stats)

      return jax.grad(total, has_aux=True)(params)

    gradients, (out, stats) = run(params, make_batch(rows, segments))
    other = np.where(segments, rows, 17)
    jax.tree.map(
      np.testing.assert_array_equal,
      run(params, make_batch(other, segments)),
      (gradients, (out, stats)),
    )
    # As if each row were as short as its text.
    params, bias = reference.f64((params, bias))
    _, _, loads, balances = zip(
      *(
        reference.forward(params, bias, row[None, :n], cfg)
        for row, n in zip(rows, lengths, strict=True)
      ),
      strict=True,
    )
    np.testing.assert_array_equal(stats.load, sum(loads))
    testing.assert_close(out.balance, np.mean(balances), 3 * 465)

  @parameterized.parameters((1, 3), (1, 4), (2, 4), (2, 32))
  def test_segments_have_the_mean_of_what_they_predict(self, depth, length):
    # Uniform predictions: the mean is log(vocabulary), whatever is left out.
    cfg = testing.tiny("d_model=6", "vocab_size=41", f"mtp.depth={depth}")
    segments = np.arange(97) // length + 1
    segments[90:] = 0  # padding
    rows = testing.tokens(2, 97, vocab_size=41)
    segments = np.stack([segments, np.where(segments > 1, segments, 0)])
    data = make_batch(rows, segments, segment_mask=True)
    weights = losses.token_weights(data, depth)
    for k in range(depth + 1):
      counted = [
        segments[b, i] == segments[b, i + 1 + k] != 0
        for b in range(2)
        for i in range(96 - k)
      ]
      expected = np.reshape(counted, (2, 96 - k)) / np.float32(sum(counted))
      np.testing.assert_array_equal(weights[k], expected)
    states = [jnp.zeros((2, 96 - k, 6)) for k in range(depth + 1)]
    stats = moe.MoEStats(None, jnp.zeros(2), None)
    out = transformer.Output(states[0], tuple(states[1:]), stats)
    head = {"head": jnp.zeros((6, 41))}
    terms = losses._losses(head, out, data, weights, 0.3, cfg)
    expected = np.log(np.float64(41))
    testing.assert_close((terms.main, terms.mtp), (expected,) * 2, 41 + 192)

  def test_matches_the_reference(self):
    depth = 2
    cfg, params, bias, rows = _model(f"mtp.depth={depth}", "n_layers=1")
    data = make_batch(rows)
    weights = losses.token_weights(data, depth)
    out, stats = jax.jit(losses.loss, static_argnums=5)(
      params, bias, data, weights, cfg.mtp.weight, cfg
    )
    params, bias = reference.f64((params, bias))
    main, ahead, balance = reference.losses(params, bias, rows, cfg)
    total = reference.total_loss(params, bias, rows, cfg)
    # A layer and the modules, see transformer_test; head and vocabulary.
    terms = (1 + depth) * 465 + 64 + 41 + 14
    testing.assert_close(
      (out.total, out.main, out.mtp, out.balance),
      (total, main, np.mean(ahead), balance),
      terms,
    )
    # Two rows, 7 - k positions at depth k, four experts each.
    np.testing.assert_array_equal(stats.load.sum(-1), [2 * 6 * 4, 2 * 5 * 4])

  def test_gradients_are_the_slopes_of_the_reference(self):
    cfg, params, bias, rows = _model()
    gradients, _ = _gradients(params, bias, rows, cfg, ())
    # Forwards and backwards through two layers, the module and the head.
    terms = 2 * (3 * 465 + 64 + 41) + 14
    params, bias = reference.f64((params, bias))
    testing.assert_slopes(
      lambda p: reference.total_loss(p, bias, rows, cfg),
      params,
      gradients,
      terms,
    )


if __name__ == "__main__":
  absltest.main()

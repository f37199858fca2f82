"""Tests of generation and of choosing a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference
import testing
from absl.testing import absltest
from absl.testing import parameterized

from dsv3_jax.infer import decoding
from dsv3_jax.infer import sampling
from dsv3_jax.model import transformer

VOCAB = 61
# Of a layer of the tiny model, see transformer_test; the absorbed products are
# over the latent, of 16, twice more. Then the head.
LAYER_TERMS = 465 + 2 * 16


def model(*assignments):
  cfg = testing.tiny(f"vocab_size={VOCAB}", "n_layers=2", *assignments)
  params = testing.draw(transformer.specs(cfg))
  bias = testing.normal(cfg.n_routers, 16, seed=1, scale=0.1)
  return cfg, params, bias


def full_logits(cfg, params, bias, tokens):
  """Logits of every position in float64, without any cache."""
  params, bias = reference.f64((params, bias))
  hidden, *_ = reference.forward(params, bias, tokens, cfg)
  return hidden @ params["head"]


class CacheTest(parameterized.TestCase):

  @parameterized.parameters(
      (("n_dense_layers=1",), (4, 1, 1, 1, 1, 4)),
      (("n_dense_layers=0", "mla.q_rank=0", "mtp.depth=0"), (1, 1, 6)),
      (("n_dense_layers=2", "mtp.depth=0"), (5, 1, 1)),
  )
  def test_any_pieces_give_the_logits_of_a_full_pass(self, settings, pieces):
    cfg, params, bias = model(*settings)
    n = sum(pieces)
    tokens = testing.tokens(2, n, vocab_size=VOCAB)
    # Room to spare, which nothing may read.
    cache = decoding.empty_cache(cfg, 2, n + 3, jnp.float32)
    read = jax.jit(functools.partial(decoding.step, cfg=cfg))
    logits, start = [], 0
    for size in pieces:
      piece = tokens[:, start : start + size]
      out, cache = read(params, bias, cache, piece, jnp.int32(start))
      logits.append(out)
      start += size
    testing.assert_close(
        jnp.concatenate(logits, axis=1),
        full_logits(cfg, params, bias, tokens),
        cfg.n_layers * LAYER_TERMS + 64,
    )


class GenerateTest(parameterized.TestCase):
  PROMPT = (5, 9, 2, 33, 17)

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = model()

  def generate(self, prompt=PROMPT, max_tokens=6, seed=0, **options):
    cfg, params, bias = self.model
    key = jax.random.key(seed)
    return list(
        decoding.generate(params, bias, prompt, max_tokens, key, cfg, **options)
    )

  def test_greedy_takes_the_most_likely_token_each_time(self):
    made = self.generate(temperature=0, seed=1)
    self.assertLen(made, 6)
    self.assertEqual(self.generate(temperature=0, seed=2), made)
    text = [*self.PROMPT, *made]
    logits = full_logits(*self.model, np.array([text[:-1]]))[0]
    expected = logits[len(self.PROMPT) - 1 :].argmax(-1)
    np.testing.assert_array_equal(made, expected)

  def test_a_shorter_text_is_a_prefix(self):
    made = self.generate(temperature=0)
    self.assertEqual(self.generate(temperature=0, max_tokens=3), made[:3])

  def test_stops_before_the_stop_token(self):
    made = self.generate(temperature=0)
    stop = made[2]
    self.assertEqual(
        self.generate(temperature=0, stop=stop), made[: made.index(stop)]
    )

  def test_the_key_alone_decides_what_is_sampled(self):
    texts = [self.generate(seed=seed) for seed in (1, 1, 2)]
    self.assertEqual(texts[0], texts[1])
    self.assertNotEqual(texts[0], texts[2])
    for text in texts:
      self.assertTrue(all(0 <= token < VOCAB for token in text))

  @parameterized.parameters(
      (dict(prompt=()), "empty prompt"),
      (dict(prompt=(3, VOCAB)), r"must be in \[0, 61\)"),
      (dict(prompt=(-1,)), r"must be in \[0, 61\)"),
      (dict(temperature=-0.1), "temperature=-0.1: must be at least 0"),
      (dict(temperature=float("nan")), "temperature=nan"),
      (dict(top_p=0.0), "top_p=0.0: must be above 0 and at most 1"),
      (dict(top_p=1.1), "top_p=1.1"),
      (dict(top_p=float("nan")), "top_p=nan"),
  )
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      self.generate(**arguments)


class SampleTest(parameterized.TestCase):
  # Two rows whose tokens stand in another order.
  P = np.array([[0.1, 0.5, 0.15, 0.25], [0.25, 0.15, 0.1, 0.5]])
  DRAWS = 4000

  def frequencies(self, temperature, top_p):
    logits = jnp.tile(jnp.log(jnp.float32(self.P)), (self.DRAWS, 1))
    drawn = sampling.sample(logits, jax.random.key(0), temperature, top_p)
    drawn = np.asarray(drawn).reshape(self.DRAWS, 2)
    return np.stack([np.bincount(row, minlength=4) for row in drawn.T])

  @parameterized.parameters(
      # Temperature, nucleus, which probabilities are left.
      (1.0, 1.0, 0.0),
      (1.0, 0.8, 0.15),  # 0.5 + 0.25 is not enough
      (1.0, 0.7, 0.25),
      (1.0, 0.4, 0.5),
      (1.0, 1e-6, 0.5),
      (0.5, 1.0, 0.0),
      (2.0, 0.6, 0.25),  # p is taken of the distribution at temperature 2
  )
  def test_draws_as_often_as_it_should(self, temperature, top_p, least):
    p = np.where(self.P >= least, self.P, 0) ** (1 / temperature)
    p /= p.sum(-1, keepdims=True)
    drawn = self.frequencies(temperature, top_p)
    # Five standard errors of a binomial count; what has p = 0 never comes.
    error = 5 * np.sqrt(self.DRAWS * p * (1 - p))
    self.assertTrue((abs(drawn - self.DRAWS * p) <= error).all(), drawn)

  def test_zero_temperature_is_greedy(self):
    drawn = self.frequencies(0, 0.5)
    np.testing.assert_array_equal(drawn, self.DRAWS * (self.P == 0.5))


if __name__ == "__main__":
  absltest.main()

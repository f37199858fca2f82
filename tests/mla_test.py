import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import reference
import testing
from absl.testing import absltest
from absl.testing import parameterized

from dsv3_jax import config
from dsv3_jax.model import attention
from dsv3_jax.model import mla

D_MODEL = 24
CFG = config.MLA(
  n_heads=3, q_rank=10, kv_rank=14, nope_dim=6, rope_dim=4, v_dim=8
)


def _run(cfg, n_tokens, seed=0):
  p = testing.draw(mla.specs(cfg, D_MODEL, 0.1), seed)
  x = testing.normal(2, n_tokens, D_MODEL, seed=seed)
  return p, x, jax.jit(lambda p, x: mla.mla(p, x, cfg))


class MlaTest(parameterized.TestCase):
  # Chunks of queries attend together: one token, part of a chunk, one token
  # more than a chunk.
  @parameterized.product(n_tokens=(1, 7, attention.CHUNK + 1), q_rank=(0, 10))
  def test_matches_the_reference(self, n_tokens, q_rank):
    cfg = dataclasses.replace(CFG, q_rank=q_rank)
    p, x, run = _run(cfg, n_tokens)
    expected = reference.mla(*reference.f64((p, x)), cfg)
    # Down, up, scores, values and out; a score is off by its angles too.
    terms = D_MODEL + 14 + (6 + 4) + n_tokens + 3 * 8 + n_tokens
    testing.assert_close(run(p, x), expected, terms)

  @parameterized.parameters(1, 9)
  def test_extended_contexts(self, n_tokens):
    yarn = config.Yarn(factor=5, original_len=400, mscale=0.7)
    cfg = dataclasses.replace(CFG, yarn=yarn)
    p, x, run = _run(cfg, n_tokens)
    expected = reference.mla(*reference.f64((p, x)), cfg)
    terms = D_MODEL + 14 + (6 + 4) + n_tokens + 3 * 8 + n_tokens
    testing.assert_close(run(p, x), expected, terms)
    cache = jnp.zeros((2, n_tokens, 14)), jnp.zeros((2, n_tokens, 4))
    y, _ = mla.absorbed(p, x, cache, 0, cfg)
    testing.assert_close(y, expected, terms + 14)

  def test_temperature_of_v3_golden(self):
    cfg = config.MLA(
      n_heads=1,
      kv_rank=1,
      q_rank=0,
      nope_dim=128,
      rope_dim=64,
      v_dim=1,
      yarn=config.Yarn(factor=40),
    )
    self.assertAlmostEqual(1 / cfg.divisor, 0.1352338, places=7)
    plain = dataclasses.replace(cfg, yarn=config.Yarn())
    self.assertAlmostEqual(plain.divisor / cfg.divisor, 1.8738542, places=7)
    v2 = dataclasses.replace(cfg, yarn=config.Yarn(factor=40, mscale=0.707))
    self.assertAlmostEqual(plain.divisor / v2.divisor, 1.5896262, places=7)

  def test_gradients_are_the_slopes_of_the_reference_over_chunks(self):
    n_tokens = attention.CHUNK + 2
    p, x, run = _run(CFG, n_tokens)
    probe = testing.normal(*x.shape, seed=5)
    gradients = jax.jit(jax.grad(lambda px: (run(*px) * probe).sum()))((p, x))

    def f(px):
      return (reference.mla(*px, CFG) * reference.f64(probe)).sum()

    # Forwards and backwards as above; weights sum over all tokens.
    terms = 2 * (D_MODEL + 24 + 10 + 2 * n_tokens + 24) + 2 * n_tokens
    testing.assert_slopes(f, reference.f64((p, x)), gradients, terms)

  @parameterized.parameters(0, 10)
  def test_absorbed_form_is_the_naive_one(self, q_rank):
    cfg = dataclasses.replace(CFG, q_rank=q_rank)
    p, x, _ = _run(cfg, 9)
    # Room for more positions than are used: those must not be seen.
    cache = jnp.full((2, 12, 14), 7.0), jnp.full((2, 12, 4), 7.0)
    step = jax.jit(lambda x, cache, t: mla.absorbed(p, x, cache, t, cfg))
    parts, t = [], 0
    for size in (4, 1, 3, 1):
      y, cache = step(x[:, t : t + size], cache, t)
      parts.append(y)
      t += size
    expected = reference.mla(*reference.f64((p, x)), cfg)
    terms = D_MODEL + 14 + (6 + 14 + 4) + 9 + 14 + 24
    testing.assert_close(jnp.concatenate(parts, axis=1), expected, terms)

  def test_no_output_depends_on_a_later_input(self):
    p, x, run = _run(CFG, 7)
    # [t, s]: size of d out_t / d x_s, first sequence.
    jacobian = jax.jacrev(lambda x: run(p, x).sum(-1)[0])(x)[:, 0]
    size = np.abs(jacobian).sum(-1)
    np.testing.assert_array_equal(size > 0, np.tri(7, dtype=bool))

  def test_sequences_do_not_see_each_other(self):
    p, x, run = _run(CFG, 7)
    jacobian = jax.jacrev(lambda x: run(p, x)[0].sum())(x)
    self.assertGreater(np.abs(jacobian[0]).max(), 0)
    self.assertEqual(np.abs(jacobian[1]).max(), 0)

  def test_rope_key_is_not_normalised_and_the_latent_is(self):
    p, x, run = _run(CFG, 7)
    before = run(p, x)
    latent = p | {"kv_down": p["kv_down"].at[:, :14].multiply(2)}
    key = p | {"kv_down": p["kv_down"].at[:, 14:].multiply(2)}
    # eps is 1e-6 of mean squares near 24 * 0.12^2 = 0.35.
    np.testing.assert_allclose(run(latent, x), before, atol=2e-5)
    self.assertGreater(np.abs(run(key, x) - before).max(), 1e-3)

  def test_large_scores_stay_finite(self):
    p, x, run = _run(CFG, 7)
    big = p | {"q_up": 1e4 * p["q_up"]}
    gradients = jax.grad(lambda p: run(p, x).sum())(big)
    for leaf in jax.tree.leaves(gradients):
      self.assertTrue(np.isfinite(leaf).all())


if __name__ == "__main__":
  absltest.main()

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.model import attention, cached_attention, mla, mla_decode

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
    self.assertAlmostEqual(1 / cfg.softmax_divisor, 0.1352338, places=7)
    plain = dataclasses.replace(cfg, yarn=config.Yarn())
    self.assertAlmostEqual(
      plain.softmax_divisor / cfg.softmax_divisor, 1.8738542, places=7
    )
    v2 = dataclasses.replace(cfg, yarn=config.Yarn(factor=40, mscale=0.707))
    self.assertAlmostEqual(
      plain.softmax_divisor / v2.softmax_divisor, 1.5896262, places=7
    )

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


FORMS = {"decode": mla_decode.decode, "prefill": mla_decode.prefill}
YARN = dataclasses.replace(
  CFG, q_rank=0, yarn=config.Yarn(factor=5, original_len=400, mscale=0.7)
)
LENGTH, ROOM = 9, 12  # positions of the texts, and of the cache
# Down, up, into the latent and out of it, scores with their angles, a softmax,
# values and out.
TERMS = D_MODEL + 14 + (6 + 14 + 4) + 2 * LENGTH + 14 + 3 * 8


def pieces(x, start, size):
  """x [B, T, D] of each row from its own position on."""
  rows = zip(x, start, strict=True)
  return jnp.stack([row[i : i + size] for row, i in rows])


def latents(p, x, cfg):
  """Cache content of a text from position 0, in float64."""
  down = x @ p["kv_down"]
  latent = reference.rms_norm(p["kv_norm"], down[..., :14], cfg.norm_eps)
  turns = reference.frequencies(4, cfg.rope_theta)
  turn = np.outer(np.arange(x.shape[1]), turns)
  return np.concatenate(
    [latent, reference.rotate(down[..., 14:], turn)], axis=-1
  )


class CacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # Several chunks of queries, and blocks of the cache of which the last one
    # overlaps the one before.
    for name, size in (("CHUNK", 2), ("KEYS", 5)):
      self.enter_context(mock.patch.object(cached_attention, name, size))

  def read(self, form, cfg):
    """(x, kept, start) -> as the form; and x [2, LENGTH, D] and what is due."""
    p, x, _ = _run(cfg, LENGTH)
    served = mla_decode.inference_params(p, cfg)
    run = jax.jit(
      lambda x, kept, start: FORMS[form](served, x, kept, start, cfg)
    )
    return run, x, reference.mla(*reference.f64((p, x)), cfg), p

  @parameterized.product(form=list(FORMS), cfg=(CFG, YARN))
  def test_any_pieces_of_rows_at_any_positions_are_the_whole(self, form, cfg):
    run, x, expected, _ = self.read(form, cfg)
    # Nothing may read the rest of the cache.
    kept = jnp.full((2, ROOM, 14 + 4), 7.0)
    # Row 1 falls behind row 0: it reads some positions again.
    for start, size in (
      ((0, 0), 4),
      ((4, 1), 1),
      ((5, 2), 1),
      ((5, 3), 4),
      ((5, 5), 4),
    ):
      start = np.int32(start)
      y, kept = run(pieces(x, start, size), kept, start)
      testing.assert_close(y, pieces(expected, start, size), TERMS)

  @parameterized.parameters(*FORMS)
  def test_writes_its_positions_and_no_others(self, form):
    run, x, _, p = self.read(form, CFG)
    before = testing.normal(2, ROOM, 14 + 4, seed=3)
    start, size = np.int32([2, 5]), 4
    _, kept = run(pieces(x, start, size), before, start)
    text = np.zeros((2, ROOM, D_MODEL))
    for row, i in enumerate(start):
      text[row, i : i + size] = x[row, i : i + size]
    new = latents(reference.f64(p), text, CFG)
    at = np.arange(ROOM) - start[:, None]
    written = ((at >= 0) & (at < size))[..., None]
    np.testing.assert_array_equal(
      np.where(written, 0, kept), np.where(written, 0, before)
    )
    # Down and the norm of the latent, then an angle.
    testing.assert_close(
      np.where(written, kept, 0), np.where(written, new, 0), D_MODEL + 14 + 9
    )

  @parameterized.parameters(*FORMS)
  def test_what_is_behind_the_end_is_dropped(self, form):
    run, x, expected, _ = self.read(form, CFG)
    kept = jnp.full((2, LENGTH, 14 + 4), 7.0)
    first = np.int32([0, 0])
    _, kept = run(x[:, :8], kept, first)
    # Row 0 ends with the cache's last position, row 1 is all behind it.
    start = np.int32([7, 9])
    more = jnp.stack([x[0, 7:], x[1, :2]])
    y, after = run(jnp.concatenate([more, more], axis=1), kept, start)
    np.testing.assert_array_equal(after[1], kept[1])
    np.testing.assert_array_equal(after[0, :7], kept[0, :7])
    self.assertTrue(np.isfinite(y).all())
    testing.assert_close(y[0, :2], expected[0, 7:], TERMS)

  def test_memory_of_a_chunk_does_not_grow_with_what_was_before(self):
    wide = dataclasses.replace(CFG, n_heads=64)
    p = mla_decode.inference_params(
      testing.draw(mla.specs(wide, D_MODEL, 0.1)), wide
    )

    def nbytes(length):
      shapes = (2, 4, D_MODEL), (2, length, 14 + 4)
      x, kept = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
      run = jax.jit(
        lambda x, kept, start: mla_decode.prefill(p, x, kept, start, wide),
        donate_argnums=1,
      )
      start = jax.ShapeDtypeStruct((2,), jnp.int32)
      compiled = run.lower(x, kept, start).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    more = nbytes(2048) - nbytes(1024)
    # A copy of what is kept at most; scores of all heads would be 28.
    self.assertLessEqual(more, 1024 * 2 * 18 * 4)


class ServedTest(absltest.TestCase):
  def test_up_projections_are_a_matrix_a_head(self):
    p = testing.draw(mla.specs(CFG, D_MODEL, 0.1))
    served = mla_decode.inference_params(p, CFG)
    self.assertEqual(set(served), set(p) - {"kv_up"} | {"up_k", "up_v"})
    for head in range(3):
      both = p["kv_up"][:, head]
      np.testing.assert_array_equal(served["up_k"][head], both[:, :6].T)
      np.testing.assert_array_equal(served["up_v"][head], both[:, 6:])
    np.testing.assert_array_equal(served["out"], p["out"])


if __name__ == "__main__":
  absltest.main()

"""Tests of reading tokens into the latent cache, in pieces of any kind."""

import jax
import jax.numpy as jnp
import numpy as np
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import param_spec
from dsv3_jax.infer import (
  cached_forward,
  inference_params,
  kvcache,
  speculation,
)
from dsv3_jax.model import experts, transformer

VOCAB, LENGTH = 61, 9
FORMS = {"decode": False, "prefill": True}
# Of a layer of the tiny model, see transformer_test; the absorbed products are
# over the latent, of 16, twice more. Then the head.
LAYER_TERMS = 465 + 2 * 16
# Row 1 falls behind row 0, and reads some positions again.
PIECES = (
  ("prefill", (0, 0), 4),
  ("decode", (4, 1), 1),
  ("decode", (5, 2), 1),
  ("prefill", (5, 3), 4),
  ("prefill", (5, 5), 4),
)


def model(*assignments):
  cfg = testing.tiny(f"vocab_size={VOCAB}", "n_layers=2", *assignments)
  params = testing.draw(transformer.specs(cfg))
  bias = testing.normal(cfg.n_routers, 16, seed=1, scale=0.1)
  return cfg, params, bias


def full(cfg, params, bias, tokens):
  """Runs the whole network on texts in float64, without any cache."""
  return reference.forward(*reference.f64((params, bias)), tokens, cfg)


def at(a, start, size):
  """[B, T, ...] of each row from its own position on."""
  rows = zip(np.asarray(a), start, strict=True)
  return np.stack([row[i : i + size] for row, i in rows])


def unread(cfg, drafting=False):
  """A cache with room to spare, filled with what nothing may read."""
  specs = kvcache.specs(cfg, 2, LENGTH + 3, "float32", drafting=drafting)
  return jax.tree.map(lambda s: jnp.full(s.shape, 7, s.dtype), specs)


class ReadTest(parameterized.TestCase):
  @parameterized.parameters(
    ("n_dense_layers=1",),
    (
      "n_layers=1",
      "n_dense_layers=0",
      "attention.q_rank=0",
      "attention.yarn.factor=5",
      "attention.yarn.original_len=400",
      "mtp.depth=0",
    ),
    ("n_layers=1", "n_dense_layers=1", "mtp.depth=0"),
  )
  def test_any_pieces_give_the_logits_of_a_full_pass(self, *settings):
    cfg, params, bias = model(*settings)
    tokens = testing.tokens(2, LENGTH, vocab_size=VOCAB)
    hidden, *_ = full(cfg, params, bias, tokens)
    expected = hidden @ reference.f64(params["head"])
    params, cache = inference_params.from_params(params, bias, cfg), unread(cfg)

    def read(params, cache, piece, start, form):
      how = cached_forward.ForwardOptions(FORMS[form])
      x, cache, _ = cached_forward.forward(
        params, cache, piece, start, cfg, how
      )
      normed = cached_forward.final_norm(params, x, cfg)
      return cached_forward.logits(params, normed), cache

    read = jax.jit(read, static_argnames="form")
    terms = cfg.n_layers * LAYER_TERMS + 64
    for form, start, size in PIECES:
      logits, cache = read(
        params, cache, at(tokens, start, size), np.int32(start), form
      )
      self.assertEqual(logits.dtype, np.float32)
      testing.assert_close(logits, at(expected, start, size), terms)

  def test_padding_goes_to_no_expert_and_changes_nothing(self):
    cfg, params, bias = model("n_layers=1", "n_dense_layers=0")
    tokens = testing.tokens(2, LENGTH, vocab_size=VOCAB)
    lengths = LENGTH, 5
    valid = np.arange(LENGTH) < np.array(lengths)[:, None]
    texts = [row[None, :n] for row, n in zip(tokens, lengths, strict=True)]
    alone = [full(cfg, params, bias, text) for text in texts]

    @jax.jit
    def read(params, cache, valid):
      how = cached_forward.ForwardOptions(True, valid)
      start = jnp.zeros(2, jnp.int32)
      x, cache, load = cached_forward.forward(
        params, cache, tokens, start, cfg, how
      )
      hidden = cached_forward.final_norm(params, x, cfg)
      ahead = jnp.roll(tokens, -1, 1)
      *_, more = cached_forward.forward_mtp(
        params, cache, hidden, ahead, start, cfg, how
      )
      return hidden, load, more

    served_params = inference_params.from_params(params, bias, cfg)
    hidden, load, more = read(served_params, unread(cfg, True), valid)
    main = [of_text[2][: cfg.n_moe_layers] for of_text in alone]
    np.testing.assert_array_equal(load.load, sum(main))
    self.assertEqual(int(more.load.sum()), sum(lengths) * cfg.router.top_k)
    for routed in (load, more):
      none = np.asarray(routed.experts == cfg.router.n_experts)
      np.testing.assert_array_equal(none.all(-1), ~valid[None])
      np.testing.assert_array_equal(none.any(-1), ~valid[None])
    for got, n, (expected, *_) in zip(hidden, lengths, alone, strict=True):
      testing.assert_close(got[:n], expected[0], LAYER_TERMS)

  def test_experts_of_another_place_may_be_given(self):
    cfg, params, bias = model("n_dense_layers=1", "mtp.depth=0")
    seen = []

    def none(p, x, chosen, gates):
      seen.append((x.shape, chosen.shape))
      return jnp.zeros_like(x)

    how = cached_forward.ForwardOptions(
      experts=cached_forward.moe.Experts(none)
    )
    params = inference_params.from_params(params, bias, cfg)
    piece = testing.tokens(2, 3, vocab_size=VOCAB)
    jax.eval_shape(
      lambda cache: cached_forward.forward(
        params, cache, piece, jnp.zeros(2, jnp.int32), cfg, how
      ),
      unread(cfg),
    )
    self.assertEqual(seen, [((6, 64), (6, 4))])

  @parameterized.parameters(1, cached_forward.FEW)
  def test_few_choices_of_experts_are_not_sorted(self, n):
    self.assertIs(cached_forward.local_experts(n).ffn, experts.slotwise_ffn)
    sorting = cached_forward.local_experts(cached_forward.FEW + n).ffn
    self.assertIs(sorting, experts.grouped_ffn)


class MtpTest(absltest.TestCase):
  def test_any_pieces_give_the_states_of_a_full_pass(self):
    cfg, params, bias = model(
      "n_layers=1",
      "n_dense_layers=1",
      "mtp.depth=2",
      "mtp.input_state=pre_norm",
    )
    tokens = testing.tokens(2, LENGTH + 2, vocab_size=VOCAB)
    state = testing.normal(2, LENGTH + 2, cfg.d_model, seed=4)
    states, *_ = reference.mtp(
      *reference.f64((params, bias, state)), tokens, cfg
    )
    expected, of_next = states[0], reference.f64(params["mtp"]["norm"][0])
    params, cache = (
      inference_params.from_params(params, bias, cfg),
      unread(cfg, True),
    )
    main = cache["main"]

    def read(params, cache, state, ahead, start, form):
      how = cached_forward.ForwardOptions(FORMS[form])
      return cached_forward.forward_mtp(
        params, cache, state, ahead, start, cfg, how
      )[:3]

    read = jax.jit(read, static_argnames="form")
    terms = 2 * 64 + LAYER_TERMS
    for form, start, size in PIECES:
      out, onward, cache = read(
        params,
        cache,
        at(state, start, size),
        at(tokens[:, 1:], start, size),
        np.int32(start),
        form,
      )
      due = at(expected, start, size)
      testing.assert_close(out, due, terms)
      # What a further module would read has not had its norm.
      self.assertGreater(np.abs(onward - out).max(), 0.1)
      normed = reference.rms_norm(
        of_next, np.asarray(onward, np.float64), cfg.norm_eps
      )
      testing.assert_close(normed, due, terms)
    for before, after in zip(main, cache["main"], strict=True):
      np.testing.assert_array_equal(before, after)

  def test_reads_the_state_that_it_was_trained_with(self):
    x, normed = np.zeros(3), np.ones(3)
    for hidden, expected in (("post_norm", normed), ("pre_norm", x)):
      cfg = testing.tiny(f"mtp.input_state={hidden}")
      self.assertIs(speculation.mtp_input(x, normed, cfg), expected)


class ServedTest(parameterized.TestCase):
  @parameterized.parameters(
    ("n_dense_layers=1", "mtp.depth=2"),
    ("n_dense_layers=0", "attention.q_rank=0", "mtp.depth=0"),
    ("n_dense_layers=2", "moe.n_shared=0"),
  )
  def test_specs_are_of_the_parameters(self, *settings):
    cfg, params, bias = model(*settings)
    made = jax.eval_shape(
      lambda p, b: inference_params.from_params(p, b, cfg), params, bias
    )
    expected = param_spec.abstract(inference_params.specs(cfg))
    self.assertEqual(
      param_spec.flatten_with_paths(
        jax.tree.map(lambda a: (a.shape, str(a.dtype)), made)
      ),
      param_spec.flatten_with_paths(
        jax.tree.map(lambda a: (a.shape, str(a.dtype)), expected)
      ),
    )

  def test_layers_and_modules_are_in_order(self):
    cfg, params, bias = model("n_dense_layers=1", "n_layers=3", "mtp.depth=2")
    made = inference_params.from_params(params, bias, cfg)
    dense, *routed = made["layers"]
    self.assertNotIn("bias", dense)
    for i, p in enumerate(routed):
      gain = params["moe"]["ffn_norm"][i]
      np.testing.assert_array_equal(p["ffn_norm"], gain)
      np.testing.assert_array_equal(p["bias"], bias[i])
    for i, p in enumerate(made["mtp"]):
      np.testing.assert_array_equal(p["proj"], params["mtp"]["proj"][i])
      np.testing.assert_array_equal(p["block"]["bias"], bias[2 + i])
    np.testing.assert_array_equal(made["head"], params["head"].T)


if __name__ == "__main__":
  absltest.main()

import jax
import jax.numpy as jnp
import numpy as np
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import param_spec
from dsv3_jax.config import presets
from dsv3_jax.model import transformer
from dsv3_jax.plan import flops

# A layer of the tiny model: MLA down, up, scores, values, out, then the router
# and an expert or the dense FFN, up and down.
LAYER_TERMS = (64 + 32 + 24 + 9 + 64) + (64 + 64 + 128 + 16)


def _setup(*assignments, n_tokens=9):
  cfg = testing.tiny(*assignments)
  params = testing.draw(transformer.specs(cfg))
  bias = testing.normal(cfg.n_routers, cfg.router.n_experts, seed=1, scale=0.1)
  tokens = testing.tokens(2, n_tokens, vocab_size=cfg.vocab_size)
  return cfg, params, bias, tokens


def _forward(cfg, **options):
  return jax.jit(
    lambda params, bias, tokens: transformer.forward(
      params, bias, tokens, cfg, transformer.ForwardContext(**options)
    )
  )


class ForwardTest(parameterized.TestCase):
  @parameterized.parameters(
    ("mtp.depth=1", "mtp.input_state=pre_norm"),
    ("n_layers=2", "n_dense_layers=0", "mtp.depth=0", "attention.q_rank=0"),
    ("n_layers=2", "n_dense_layers=2", "mtp.depth=0"),
  )
  def test_matches_the_reference(self, *assignments):
    cfg, params, bias, tokens = _setup(*assignments)
    # Layers looped over here, unrolled elsewhere.
    scan = cfg.mtp.depth > 0
    out = _forward(cfg, scan=scan)(params, bias, tokens)
    hidden, states, load, balance = reference.forward(
      *reference.f64((params, bias)), tokens, cfg
    )
    np.testing.assert_array_equal(out.stats.load, load)
    terms = LAYER_TERMS * (cfg.n_layers + cfg.mtp.depth)
    testing.assert_close(
      (out.hidden, list(out.mtp_hidden), out.stats.balance.sum()),
      (hidden, states, balance),
      terms,
    )
    logits = transformer.logits(params, out.hidden)
    self.assertEqual(logits.dtype, np.float32)
    self.assertEqual(out.stats.load.shape, (cfg.n_routers, 16))
    testing.assert_close(
      logits, hidden @ reference.f64(params["head"]), terms + 64
    )


class CausalityTest(absltest.TestCase):
  def test_gradients_reach_back_and_never_ahead(self):
    n_tokens, depth = 7, 2
    cfg, params, bias, _ = _setup(
      f"mtp.depth={depth}", "n_layers=1", "n_dense_layers=0"
    )
    # Every token is another row of the embedding.
    tokens = np.arange(3, 3 + n_tokens, dtype=np.int32)[None]
    probe = testing.normal(cfg.d_model)

    @jax.jit
    def sensitivity(embed, k, t):
      def f(embed):
        out = transformer.forward(params | {"embed": embed}, bias, tokens, cfg)
        states = (out.hidden, *out.mtp_hidden)
        values = [
          jnp.pad(state[0] @ probe, (0, depth))
          for depth, state in enumerate(states)
        ]
        return jnp.stack(values)[k, t]

      return abs(jax.grad(f)(embed)[tokens[0]]).sum(-1)

    for k in range(depth + 1):
      reached = np.array(
        [sensitivity(params["embed"], k, t) > 0 for t in range(n_tokens - k)]
      )
      # Position t of depth k has read tokens 0 .. t + k: all of those count,
      # and none after them.
      expected = np.tri(n_tokens, dtype=bool)[k:]
      np.testing.assert_array_equal(reached, expected)


class SpecsTest(parameterized.TestCase):
  # Published sizes: without router bias and MTP; of one attention, dense FFN
  # and MoE layer; active a token, head included.
  @parameterized.named_parameters(
    dict(
      testcase_name="v3",
      cfg=presets.V3_671B.model,
      total=671_026_404_352,
      mla=187_107_328,
      dense=396_361_728,
      moe=11_320_164_352,
      router=1_835_008,
      active=36_625_603_584,
      active_no_head=35_698_924_544,
    ),
    dict(
      testcase_name="v2",
      cfg=presets.V2_236B.model,
      total=235_741_434_880,
      mla=149_227_520,
      dense=188_743_680,
      moe=3_822_878_720,
      router=819_200,
      active=20_851_512_320,
      active_no_head=20_327_224_320,
    ),
    dict(
      testcase_name="v2_lite",
      cfg=presets.V2_LITE_16B.model,
      total=15_706_484_224,
      mla=13_763_072,
      dense=67_239_936,
      moe=571_080_704,
      router=131_072,
      active=2_451_435_008,
      active_no_head=2_241_719_808,
    ),
  )
  def test_published_counts(
    self, cfg, total, mla, dense, moe, router, active, active_no_head
  ):
    tree = transformer.specs(cfg)
    main = {name: part for name, part in tree.items() if name != "mtp"}
    self.assertEqual(param_spec.count(main), total)
    n_moe = cfg.n_layers - cfg.n_dense_layers
    self.assertEqual(param_spec.count(tree["moe"]["mla"]), n_moe * mla)
    self.assertEqual(param_spec.count(tree["moe"]["ffn"]), n_moe * moe)
    self.assertEqual(
      param_spec.count(tree["moe"]["ffn"]["router"]), n_moe * router
    )
    self.assertEqual(
      param_spec.count(tree["dense"]["ffn"]), cfg.n_dense_layers * dense
    )
    counts = flops.parameter_counts(cfg)
    self.assertEqual(counts["main"], total)
    self.assertEqual(counts["active"], active)
    self.assertEqual(counts["active_no_head"], active_no_head)

  def test_published_counts_of_mtp_and_bias(self):
    cfg = presets.V3_671B.model
    # The module's 256 router biases are part of the published figure.
    unique = 11_610_068_224
    self.assertEqual(
      param_spec.count(transformer.specs(cfg)["mtp"]), unique - 256
    )
    counts = flops.parameter_counts(cfg)
    self.assertEqual(counts["mtp"], unique)
    self.assertEqual(counts["router_bias"], 14_848)
    self.assertEqual(transformer.router_bias(cfg).shape, (59, 256))


if __name__ == "__main__":
  absltest.main()

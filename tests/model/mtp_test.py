import jax
import numpy as np
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.model import experts, moe, mtp, transformer

SMALL = (
  "d_model=32",
  "n_layers=1",
  "vocab_size=61",
  "attention.n_heads=2",
  "dense_ffn_dim=24",
  "moe.ffn_dim=16",
  "router.n_experts=8",
  "router.n_groups=4",
  "router.top_groups=2",
  "router.top_k=2",
)


def _setup(*assignments, n_tokens=8):
  cfg = testing.tiny(*SMALL, *assignments)
  params = testing.draw(transformer.specs(cfg))
  bias = testing.normal(cfg.n_routers, 8, seed=1, scale=0.1)
  tokens = testing.tokens(2, n_tokens, vocab_size=61)
  return cfg, params, bias, tokens


class MtpTest(parameterized.TestCase):
  @parameterized.parameters((1, "post_norm"), (2, "post_norm"))
  def test_matches_a_brute_force_loop(self, depth, hidden):
    cfg, params, bias, tokens = _setup(
      f"mtp.depth={depth}", f"mtp.input_state={hidden}"
    )
    state = testing.normal(2, 8, cfg.d_model)
    dense = moe.Experts(experts.dense_ffn)

    def block(p, x, bias):
      return transformer.moe_block(p, x, bias, cfg, dense)

    def module(p, bias, hidden, ahead):
      return mtp.module(p, bias, hidden, ahead, cfg, block)

    @jax.jit
    def run(params, bias, state):
      return mtp.predict(params, bias, state, tokens, cfg, module)

    states, stats = run(params, bias, state)
    load = np.concatenate([s.load for s in stats])
    balance = np.concatenate([s.balance for s in stats])
    want_states, want_load, want_balance = reference.mtp(
      *reference.f64((params, bias, state)), tokens, cfg
    )
    np.testing.assert_array_equal(load, want_load)
    # A depth: projection, attention (down, up, scores, values, out), MoE.
    terms = depth * (2 * 32 + (32 + 32 + 24 + 8 + 32) + (32 + 32 + 16 + 8))
    testing.assert_close(
      (list(states), balance), (want_states, np.array(want_balance)), terms
    )


if __name__ == "__main__":
  absltest.main()

"""DeepSeekMoE: shared experts and fine-grained routed ones (section 2.1.2)."""

from collections.abc import Callable

import jax

from dsv3_jax import config
from dsv3_jax import schema
from dsv3_jax.model import experts as experts_lib
from dsv3_jax.model import layers
from dsv3_jax.model import router

# (expert parameters, x [M, D], chosen [M, K], gates [M, K]) -> [M, D]
Experts = Callable[..., jax.Array]


def specs(cfg: config.Model) -> schema.Specs:
  """Router centroids, routed experts and the shared experts as one FFN."""
  d, f, std = cfg.d_model, cfg.moe.ffn_dim, cfg.init_std
  tree = {
      "router": schema.weight(std, embed=d, experts=cfg.router.n_experts),
      "experts": schema.stack(
          layers.swiglu_specs(d, f, std), cfg.router.n_experts, "experts"
      ),
  }
  if cfg.moe.n_shared:
    tree["shared"] = layers.swiglu_specs(d, cfg.moe.n_shared * f, std)
  return tree


def moe(
    p: schema.Params,
    x: jax.Array,
    bias: jax.Array,
    cfg: config.Model,
    experts: Experts = experts_lib.grouped_ffn,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One mixture layer; no token is ever dropped.

  Args:
    p: parameters of `specs`.
    x: [B, T, D].
    bias: [E] f32 router bias.
    cfg: the model.
    experts: computes the routed experts' weighted sum.

  Returns:
    y [B, T, D], load [E] int32 and the balance loss.
  """
  with jax.named_scope("router"):
    routing = router.route(p["router"], x, bias, cfg.router)
    balance = router.balance_loss(routing.scores, routing.experts, cfg.router)
  with jax.named_scope("experts"):
    k = cfg.router.top_k
    y = experts(
        p["experts"],
        x.reshape(-1, x.shape[-1]),
        routing.experts.reshape(-1, k),
        routing.gates.reshape(-1, k),
    ).reshape(x.shape)
  if "shared" in p:
    with jax.named_scope("shared"):
      y = y + layers.swiglu(p["shared"], x)
  return y, routing.load, balance

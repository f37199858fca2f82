"""DeepSeekMoE: shared experts and fine-grained routed ones (section 2.1.2)."""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import linear
from dsv3_jax.model import experts as experts_lib
from dsv3_jax.model import layers, router
from dsv3_jax.model.layers import Hidden, Valid


def _no_dispatch(chosen: jax.Array) -> jax.Array:
  return jnp.zeros_like(chosen, shape=2)


@dataclasses.dataclass(frozen=True)
class Experts:
  """Functions of the routed experts; the default has all on this device."""

  # (parameters, x [M, D], chosen [M, K], gates [M, K]) -> [M, D], `experts.py`
  ffn: Callable[..., jax.Array] = experts_lib.grouped_ffn
  # chosen [M, K] -> [2] int32, copies of tokens that cross nodes, and that
  # pass between the devices of a node
  sent: Callable[[jax.Array], jax.Array] = _no_dispatch


LOCAL = Experts()


@flax.struct.dataclass
class MoEStats:
  """Auxiliary outputs of an MoE layer."""

  load: jax.Array  # [E] int32, (token, slot) pairs an expert received
  balance: jax.Array  # [] f32, balance loss
  sent: jax.Array  # [2] int32, see `Experts`
  replayed: jax.Array | None = None  # [2] int32, see `router.Routing`


def specs(cfg: config.Model) -> param_spec.Specs:
  """Router centroids, routed experts and the shared experts as one FFN."""
  d, f, std = cfg.d_model, cfg.moe.ffn_dim, cfg.init_std
  n, expert = cfg.router.n_experts, layers.swiglu_specs(d, f, std)
  tree = {
    "router": param_spec.weight(std, embed=d, scores=n),
    "experts": param_spec.stack(expert, n, "experts"),
  }
  if cfg.moe.n_shared:
    tree["shared"] = layers.swiglu_specs(d, cfg.moe.n_shared * f, std)
  return tree


def read_from_stack(
  p: param_spec.Params, stack: param_spec.Params, layer: jax.Array
) -> param_spec.Params:
  """The parameters of a layer, with routed experts that are read in its stack.

  Experts in FP8 stay as they are.
  """

  def read(name: str, w: linear.Weight) -> linear.Weight:
    if not isinstance(w, jax.Array):
      return w
    values = jax.lax.stop_gradient(stack["experts"][name])
    return linear.StackedWeight(w, values, layer)

  return p | {"experts": {k: read(k, w) for k, w in p["experts"].items()}}


def route(
  p: param_spec.Params,
  x: Hidden,
  bias: Float[Array, " E"],
  cfg: config.Model,
  valid: Valid = None,
  routes: router.Routes = None,
) -> tuple[router.Routing, Float[Array, ""]]:
  """Chooses the experts of x [B, T, D]; also returns the balance loss.

  `routes` are taken instead, but for padding, which goes to no expert.
  """
  with jax.named_scope("router"):
    if routes is not None and valid is not None:
      routes = jnp.where(valid[..., None], routes, -1)
    routing = router.route(p["router"], x, bias, cfg.router, routes)
    balance = router.balance_loss(
      routing.scores, routing.experts, cfg.router, valid
    )
    return router.mask_invalid(routing, valid), balance


def combine(
  p: param_spec.Params,
  x: Hidden,
  routing: router.Routing,
  experts: Experts = LOCAL,
) -> Hidden:
  """Returns the outputs of the experts chosen and of the shared ones, summed.

  No token is ever dropped.
  """
  with jax.named_scope("experts"):
    rows, chosen, gates = (
      a.reshape(-1, a.shape[-1]) for a in (x, routing.experts, routing.gates)
    )
    y = experts.ffn(p["experts"], rows, chosen, gates)
    y = varying.psum_if_varying(y, "model").reshape(x.shape)
  if "shared" in p:
    with jax.named_scope("shared"):
      y = y + layers.swiglu(p["shared"], x)
  return y


def moe(
  p: param_spec.Params,
  x: Hidden,
  bias: Float[Array, " E"],
  cfg: config.Model,
  experts: Experts = LOCAL,
  valid: Valid = None,
  routes: router.Routes = None,
) -> tuple[Hidden, MoEStats]:
  """Applies an MoE layer; padding goes to no expert and is not counted."""
  routing, balance = route(p, x, bias, cfg, valid, routes)
  y = combine(p, x, routing, experts)
  chosen = routing.experts.reshape(-1, routing.experts.shape[-1])
  sent = experts.sent(chosen)
  return y, MoEStats(routing.load, balance, sent, routing.replayed)

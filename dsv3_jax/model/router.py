"""Expert choice and its balancing (arXiv:2412.19437, section 2.1.2)."""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config
from dsv3_jax.linear import linear
from dsv3_jax.model import remat
from dsv3_jax.model.layers import Hidden, Valid

Bias = Float[Array, " E"]
# Experts that the tokens take; one whose first is -1 has those chosen for it.
Routes = Int[Array, "B T K"] | None


@dataclasses.dataclass(frozen=True)
class Score:
  """A way to turn affinities into scores, and what depends on it."""

  function: Callable[[jax.Array], jax.Array]  # f32 [..., E] -> [..., E], >= 0
  group_top: int = 1  # a group ranks by the sum of so many of its best experts


# `config.Router.score` names one of these.
SCORES = {
  "sigmoid": Score(jax.nn.sigmoid, group_top=2),  # V3
  "softmax": Score(jax.nn.softmax),  # V2
}
config.ROUTER_SCORES[:] = SCORES

# Keeps a sum of scores from dividing 0 by 0 where all underflow. A gradient
# squares its inverse: with the customary 1e-20 that overflows float32.
FLOOR = 1e-18


@flax.struct.dataclass
class Routing:
  """Experts of every token, with gates, and the load of every expert."""

  experts: jax.Array  # [B, T, K] int32
  gates: jax.Array  # [B, T, K] f32
  scores: jax.Array  # [B, T, E] f32, affinities without bias
  load: jax.Array  # [E] int32, (token, slot) pairs an expert received
  # [2] int32, (token, slot) pairs whose experts were given, and those of them
  # that the router would not have chosen; None: `routes` was
  replayed: jax.Array | None = None


def select(
  scores: Float[Array, "*tokens E"], bias: Bias, cfg: config.Router
) -> tuple[Int[Array, "*tokens K"], Float[Array, "*tokens K"]]:
  """Top-k experts and their gates (eq. 12-16).

  Bias and group limit act on the choice alone; gates come from the scores.
  Groups that are not selected are masked with -inf: a biased score may be
  negative, so 0 would let a masked expert win. Ties go to the lower index. No
  gradient reaches the bias.
  """
  bias = jnp.expand_dims(bias, range(scores.ndim - 1))
  biased = jax.lax.stop_gradient(scores + bias)
  if cfg.n_groups > 1:
    groups = biased.reshape(*scores.shape[:-1], cfg.n_groups, -1)
    best = min(SCORES[cfg.score].group_top, groups.shape[-1])
    rank = jax.lax.top_k(groups, best)[0].sum(-1)
    selected_groups = jax.lax.top_k(rank, cfg.top_groups)[1]
    selected = _multi_hot(selected_groups, cfg.n_groups)
    groups = jnp.where(selected[..., None], groups, -jnp.inf)
    biased = groups.reshape(scores.shape)
  experts = jax.lax.top_k(biased, cfg.top_k)[1]
  experts = remat.named(experts, "routing")
  return experts, _gates(scores, experts, cfg)


def _gates(
  scores: jax.Array, experts: jax.Array, cfg: config.Router
) -> jax.Array:
  gates = jnp.take_along_axis(scores, experts, axis=-1)
  if cfg.renormalize:
    gates = gates / (gates.sum(-1, keepdims=True) + FLOOR)
  return cfg.scale * gates


def route(
  w: Float[Array, "D E"],
  x: Hidden,
  bias: Bias,
  cfg: config.Router,
  routes: Routes = None,
) -> Routing:
  """Routes x [B, T, D] with centroids w [D, E]; all in float32.

  Experts given by `routes` have gates from the scores as if they were chosen,
  so the centroids keep their gradient.
  """
  affinity = linear.linear(x.astype(jnp.float32), w.astype(jnp.float32))
  affinity = remat.named(affinity, "routing")
  scores = SCORES[cfg.score].function(affinity)
  experts, gates = select(scores, bias, cfg)
  replayed = None
  if routes is not None:
    experts, replayed = _replay(experts, routes)
    gates = _gates(scores, experts, cfg)
  load = _multi_hot(experts, cfg.n_experts).sum((0, 1), dtype=jnp.int32)
  return Routing(experts, gates, scores, load, replayed)


def _replay(
  chosen: jax.Array, routes: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Experts given, or else chosen [B, T, K], and the counts of `Routing`."""
  given = jnp.broadcast_to(routes[..., :1] >= 0, routes.shape)
  experts = jnp.where(given, routes, chosen)
  other = (experts[..., None] != chosen[..., None, :]).all(-1)
  return experts, jnp.stack([given.sum(), other.sum()]).astype(jnp.int32)


def mask_invalid(routing: Routing, valid: Valid) -> Routing:
  """Sends padding to no expert: index E."""
  if valid is None:
    return routing
  n_experts = routing.load.size
  experts = jnp.where(valid[..., None], routing.experts, n_experts)
  load = _multi_hot(experts, n_experts).sum((0, 1), dtype=jnp.int32)
  return routing.replace(experts=experts, load=load)


def _multi_hot(experts: jax.Array, n_experts: int) -> jax.Array:
  """[..., K] indices -> [..., E] bool."""
  return jax.nn.one_hot(experts, n_experts, dtype=jnp.bool_).any(-2)


def balance_loss(
  scores: Float[Array, "B T E"],
  experts: Int[Array, "B T K"],
  cfg: config.Router,
  valid: Valid = None,
) -> Float[Array, ""]:
  """Sequence-wise balance loss, mean over sequences (eq. 17-20).

  f_i counts the top-k of the plain scores, as written; `balance_map="routed"`
  counts the experts really chosen. It carries no gradient. A sequence is the
  tokens of a row without its padding.
  """
  if cfg.balance_map == "scores":
    experts = jax.lax.top_k(jax.lax.stop_gradient(scores), cfg.top_k)[1]
  chosen = _multi_hot(experts, cfg.n_experts).astype(jnp.float32)
  n_tokens, real = scores.shape[1], None
  if valid is not None:
    real = valid[..., None]
    n_tokens = jnp.maximum(real.sum(1), 1)
  f = chosen.sum(1, where=real) / n_tokens * (cfg.n_experts / cfg.top_k)
  f = remat.named(f, "routing")
  share = scores / (scores.sum(-1, keepdims=True) + FLOOR)
  p = share.sum(1, where=real) / n_tokens
  return cfg.balance_weight * (f * p).sum(-1).mean()


def update_bias(
  bias: Float[Array, "*layers E"],
  load: Int[Array, "*layers E"],
  speed: Float[Array, ""] | float,
) -> Float[Array, "*layers E"]:
  """Raises the bias of underloaded experts by speed, lowers the overloaded.

  Once an optimizer step, from the counts of the whole global batch; an expert
  exactly at the mean stays (section 2.1.2, gamma = speed). The comparison is in
  integers, so no count is too large for it.
  """
  total, n_experts = load.sum(-1, keepdims=True), load.shape[-1]
  over = load > total // n_experts
  under = load < -(-total // n_experts)
  return bias + speed * (under.astype(bias.dtype) - over.astype(bias.dtype))


def max_violation(load: Int[Array, "*layers E"]) -> Float[Array, "*layers"]:
  """MaxVio, (max load - mean load) / mean load, over the last dim.

  It is 0 where there is no load.
  """
  load = load.astype(jnp.float32)
  most, mean = load.max(-1), load.mean(-1)
  return (most - mean) / jnp.where(mean > 0, mean, 1)

"""Multi-token prediction (arXiv:2412.19437, section 2.2)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config, param_spec
from dsv3_jax.linear import linear
from dsv3_jax.model import layers, remat
from dsv3_jax.model.layers import Hidden


def specs(cfg: config.Model, block: param_spec.Specs) -> param_spec.Specs:
  """Specs of one module around a transformer block (eq. 21-22)."""
  d = cfg.d_model
  return {
    "embed_norm": param_spec.norm_scale(d),
    "hidden_norm": param_spec.norm_scale(d),
    "proj": param_spec.linear(cfg.init_std, pair=2 * d, embed=d),
    "block": block,
    "norm": param_spec.norm_scale(d),
  }


def module(
  p: param_spec.Params,
  bias: Float[Array, " E"] | None,
  hidden: Hidden,
  ahead: Hidden,
  cfg: config.Model,
  block: Callable[..., tuple[jax.Array, Any]],
) -> tuple[Hidden, Hidden, Any]:
  """Applies the module of one depth (eq. 21-22).

  The embedding comes first in the projection, as in the released weights.

  Args:
    p: parameters of `specs`.
    bias: of the router.
    hidden: state of the depth before.
    ahead: embeddings of the tokens that this depth reads.
    cfg: the model.
    block: (parameters, x, bias) -> (y, stats).

  Returns:
    State after the module's own norm, the state for the next depth, stats.
  """
  ahead = layers.rms_norm(p["embed_norm"], ahead, cfg.norm_eps)
  hidden = layers.rms_norm(p["hidden_norm"], hidden, cfg.norm_eps)
  concatenated = jnp.concatenate([ahead, hidden], axis=-1)
  x = remat.named(linear.linear(concatenated, p["proj"]), "residual")
  x, stats = block(p["block"], x, bias)
  normed = layers.rms_norm(p["norm"], x, cfg.norm_eps)
  return normed, normed if cfg.mtp.input_state == "post_norm" else x, stats


def predict(
  params: param_spec.Params,
  bias: Float[Array, "depth E"],
  hidden: Hidden,
  tokens: Int[Array, "B T"],
  cfg: config.Model,
  apply_module: Callable[..., tuple[jax.Array, jax.Array, Any]],
) -> tuple[tuple[Float[Array, "B _ D"], ...], list[Any]]:
  """Chains the D modules; each keeps the causal order of the one before.

  At depth k, position i joins the state of depth k - 1 with the embedding of
  token i + k, so that its output predicts token i + k + 1 (0-based).
  `apply_module` is `module`, of (parameters, bias, hidden, ahead) of a depth.

  Returns:
    States after each depth's own norm, [B, T - k, D] for k = 1..D, and their
    stats, [1, ...] each.
  """
  states, stats = [], []
  for depth in range(1, cfg.mtp.depth + 1):
    with jax.named_scope(f"mtp_{depth}"):
      p = jax.tree.map(lambda a, i=depth - 1: a[i], params["mtp"])
      with jax.named_scope("embed"):
        ahead = params["embed"][tokens[:, depth:]].astype(hidden.dtype)
      state, hidden, module_stats = apply_module(
        p, bias[depth - 1], hidden[:, :-1], ahead
      )
    states.append(state)
    stats.append(jax.tree.map(lambda a: a[None], module_stats))
  return tuple(states), stats

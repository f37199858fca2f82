"""Multi-token prediction (arXiv:2412.19437, section 2.2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax import schema
from dsv3_jax.model import layers


def specs(cfg: config.Model, block: schema.Specs) -> schema.Specs:
  """One module around the transformer block given (eq. 21-22)."""
  d = cfg.d_model
  return {
      "embed_norm": schema.gain(d),
      "hidden_norm": schema.gain(d),
      "proj": schema.weight(cfg.init_std, pair=2 * d, embed=d),
      "block": block,
      "norm": schema.gain(d),
  }


def predict(
    params: schema.Params,
    bias: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    cfg: config.Model,
    block: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
  """Chains the D modules; each keeps the causal order of the one before.

  At depth k, position i joins the state of depth k - 1 with the embedding of
  token i + k, so that its output predicts token i + k + 1 (0-based). The
  embedding comes first in the projection, as in the released weights.

  Args:
    params: all parameters of the model: embedding and `mtp` are read.
    bias: [depth, E] f32.
    hidden: [B, T, D] state of the main model.
    tokens: [B, T] int32.
    cfg: the model.
    block: (parameters, x, bias) -> (y, load, balance).

  Returns:
    States after each depth's own norm, [B, T - k, D] for k = 1..D; load
    [D, E] int32; balance loss [D].
  """
  states, loads, balances = [], [], []
  for depth in range(1, cfg.mtp.depth + 1):
    with jax.named_scope(f"mtp_{depth}"):
      p = jax.tree.map(lambda a, i=depth - 1: a[i], params["mtp"])
      ahead = params["embed"][tokens[:, depth:]]
      joined = jnp.concatenate(
          [
              layers.rms_norm(p["embed_norm"], ahead, cfg.norm_eps),
              layers.rms_norm(p["hidden_norm"], hidden[:, :-1], cfg.norm_eps),
          ],
          axis=-1,
      )
      x, load, balance = block(
          p["block"], layers.linear(joined, p["proj"]), bias[depth - 1]
      )
      normed = layers.rms_norm(p["norm"], x, cfg.norm_eps)
      hidden = normed if cfg.mtp.hidden == "post_norm" else x
    states.append(normed)
    loads.append(load)
    balances.append(balance)
  if not states:
    return (), jnp.zeros_like(bias, jnp.int32), jnp.zeros(0, jnp.float32)
  return tuple(states), jnp.stack(loads), jnp.stack(balances)

"""Parameters as prefill and decode read them: a layer each, not a stack.

A program that loops over a stack of layers copies each of them out of it, all
its experts included, for every token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax import schema
from dsv3_jax.model import mla

Served = dict[str, Any]


def params(params: schema.Params, bias: jax.Array, cfg: config.Model) -> Served:
  """{"embed", "norm", "head" [C, D], "layers", "mtp"}.

  The head is turned: products of a few rows with it are several times faster
  on CPU. Layers and MTP modules are tuples; those with a router have "bias".

  Args:
    params: of `transformer.specs`.
    bias: [n_routers, E] f32.
    cfg: the model.
  """
  n_moe = cfg.n_moe_layers
  stacks = (
      ("dense", cfg.n_dense_layers, None),
      ("moe", n_moe, bias[:n_moe]),
  )
  layers = [
      _layer(jax.tree.map(lambda a, i=i: a[i], params[kind]), i, biases, cfg)
      for kind, n, biases in stacks
      for i in range(n)
  ]
  modules = []
  for i in range(cfg.mtp.depth):
    module = jax.tree.map(lambda a, i=i: a[i], params["mtp"])
    module["block"] = _layer(module["block"], i, bias[n_moe:], cfg)
    modules.append(module)
  return {
      "embed": params["embed"],
      "norm": params["norm"],
      "head": jnp.swapaxes(params["head"], 0, 1),
      "layers": tuple(layers),
      "mtp": tuple(modules),
  }


def _layer(
    p: schema.Params, i: int, bias: jax.Array | None, cfg: config.Model
) -> schema.Params:
  p = p | {"mla": mla.served(p["mla"], cfg.mla)}
  return p if bias is None else p | {"bias": bias[i]}

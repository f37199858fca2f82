"""Parameters for prefill and decode: layers apart, not stacked.

A program that loops over stacked layers copies each layer, all its experts
included, for every token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec
from dsv3_jax.model import attentions, transformer

InferenceParams = dict[str, Any]


def from_params(
  params: param_spec.Params, bias: jax.Array, cfg: config.Model
) -> InferenceParams:
  """Converts training parameters to {"embed", "norm", "head", "layers", "mtp"}.

  The head is transposed, [C, D]: products of a few rows with it are several
  times faster on CPU. Layers and MTP modules are tuples; those with a router
  have "bias".

  Args:
    params: of `transformer.specs`.
    bias: [n_routers, E] f32.
    cfg: the model.
  """
  n_moe = cfg.n_moe_layers
  stacks = (("dense", cfg.n_dense_layers, None), ("moe", n_moe, bias[:n_moe]))
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
  p: param_spec.Params, i: int, bias: jax.Array | None, cfg: config.Model
) -> param_spec.Params:
  settings = cfg.attention
  convert = attentions.functions(settings).inference_params
  p = p | {settings.type: convert(p[settings.type], settings)}
  return p if bias is None else p | {"bias": bias[i]}


def specs(cfg: config.Model) -> param_spec.Specs:
  """Returns the specs of the parameters that `from_params` returns."""
  tree, router = transformer.specs(cfg), cfg.router.n_experts
  name = cfg.attention.type
  convert = attentions.functions(cfg.attention).inference_specs

  def bare(spec):
    return dataclasses.replace(spec, dims=spec.dims[1:])

  def layer(stacked, routed):
    p = jax.tree.map(bare, stacked)
    p = p | {name: convert(p[name], cfg.attention)}
    bias = param_spec.ParamSpec(
      (("scores", router),), jax.nn.initializers.zeros
    )
    return p | {"bias": bias} if routed else p

  layers = [
    layer(tree[kind], kind == "moe")
    for kind, n in (("dense", cfg.n_dense_layers), ("moe", cfg.n_moe_layers))
    for _ in range(n)
  ]
  modules = [
    jax.tree.map(bare, tree["mtp"])
    | {"block": layer(tree["mtp"]["block"], True)}
    for _ in range(cfg.mtp.depth)
  ]
  head = tree["head"]
  return {
    "embed": tree["embed"],
    "norm": tree["norm"],
    "head": dataclasses.replace(head, dims=head.dims[::-1]),
    "layers": tuple(layers),
    "mtp": tuple(modules),
  }


def _blocks(tree: Any) -> list[Any]:
  return [*tree["layers"], *(module["block"] for module in tree["mtp"])]


def moe_ffns(tree: Any) -> list[Any]:
  """Returns "ffn" of all blocks with a router; MTP modules come last."""
  return [block["ffn"] for block in _blocks(tree) if "bias" in block]


def replace_moe_ffns(tree: Any, new: Sequence[Any]) -> Any:
  """Returns the tree with new values of `moe_ffns`."""
  ffns = iter(new)
  blocks = iter(
    [
      block | {"ffn": next(ffns)} if "bias" in block else block
      for block in _blocks(tree)
    ]
  )
  return tree | {
    "layers": tuple(next(blocks) for _ in tree["layers"]),
    "mtp": tuple(m | {"block": next(blocks)} for m in tree["mtp"]),
  }

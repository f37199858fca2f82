"""Parameters for prefill and decode: layers apart, not stacked.

A program that loops over stacked layers copies each layer, all its experts
included, for every token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsv3_jax import config, param_spec
from dsv3_jax.model import attentions, transformer

InferenceParams = dict[str, Any]


def from_params(
  params: param_spec.Params, bias: jax.Array, cfg: config.Model
) -> InferenceParams:
  """Converts training parameters to {"embed", "norm", "head", "layers", "mtp"}.

  Those of NumPy become views of it, and nothing is compiled.

  The head is transposed, [C, D]: products of a few rows with it are several
  times faster on CPU. Layers and MTP modules are tuples; those with a router
  have "bias", their row of [n_routers, E].
  """
  convert = attentions.functions(cfg.attention).inference_params
  tree = _unstack(params, bias, cfg, lambda a, i: a[i], convert)
  return tree | {"head": params["head"].T}


def replace(old: InferenceParams, new: InferenceParams) -> InferenceParams:
  """Returns new parameters, placed so that programs of the old ones fit.

  Raises:
    ValueError: names, or the shape or dtype of a parameter, are others.
  """
  known, given = map(param_spec.flatten_with_paths, (old, new))
  if known.keys() != given.keys():
    names = ", ".join(sorted(known.keys() ^ given.keys()))
    raise ValueError(f"{names}: only in the old or only in the new parameters")
  for name, a in known.items():
    b = given[name]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
      raise ValueError(
        f"{name}: is {b.dtype}{b.shape}, must be {a.dtype}{a.shape} as before"
      )

  def placed(a, b):
    # An array that is bound to no device may be so again.
    return jax.device_put(b, a.sharding) if _is_bound(a) else b

  return jax.tree.map(placed, old, new)


def _is_bound(a: Any) -> bool:
  """Returns whether an array has been put on its devices explicitly."""
  return isinstance(a, jax.Array) and a.committed


def specs(cfg: config.Model) -> param_spec.Specs:
  """Returns the specs of the parameters that `from_params` returns."""
  stacked, dims = transformer.specs(cfg), (("scores", cfg.router.n_experts),)
  bias = param_spec.ParamSpec(dims, jax.nn.initializers.zeros)

  def row(spec, _):
    return dataclasses.replace(spec, dims=spec.dims[1:])

  convert = attentions.functions(cfg.attention).inference_specs
  tree = _unstack(stacked, [bias] * cfg.n_routers, cfg, row, convert)
  head = dataclasses.replace(tree["head"], dims=tree["head"].dims[::-1])
  return tree | {"head": head}


def _unstack(
  tree: Any,
  bias: Any,
  cfg: config.Model,
  row: Callable[[Any, int], Any],
  convert: Callable[[Any, Any], Any],
) -> dict[str, Any]:
  """Takes layers and MTP modules apart, and converts their attention.

  The function `row` returns the row of a stacked leaf with an index; `convert`
  converts the attention's part of a layer.
  """

  def unstacked(stacked, i):
    return jax.tree.map(lambda leaf: row(leaf, i), stacked)

  def block(p, *routed):
    name = cfg.attention.type
    p = p | {name: convert(p[name], cfg.attention)}
    return p | {"bias": bias[routed[0]]} if routed else p

  n_moe = cfg.n_moe_layers
  modules = [unstacked(tree["mtp"], i) for i in range(cfg.mtp.depth)]
  return {
    "embed": tree["embed"],
    "norm": tree["norm"],
    "head": tree["head"],
    "layers": (
      *(block(unstacked(tree["dense"], i)) for i in range(cfg.n_dense_layers)),
      *(block(unstacked(tree["moe"], i), i) for i in range(n_moe)),
    ),
    "mtp": tuple(
      module | {"block": block(module["block"], n_moe + i)}
      for i, module in enumerate(modules)
    ),
  }


def moe_ffns(tree: Any) -> list[Any]:
  """Returns "ffn" of all blocks with a router; MTP modules come last."""
  blocks = *tree["layers"], *(module["block"] for module in tree["mtp"])
  return [block["ffn"] for block in blocks if "bias" in block]


def replace_moe_ffns(tree: Any, new: Sequence[Any]) -> Any:
  """Returns the tree with new values of `moe_ffns`."""
  ffns = iter(new)

  def replaced(block):
    return block | {"ffn": next(ffns)} if "bias" in block else block

  return tree | {
    "layers": tuple(map(replaced, tree["layers"])),
    "mtp": tuple(m | {"block": replaced(m["block"])} for m in tree["mtp"]),
  }

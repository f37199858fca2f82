"""Forward passes of a few tokens by the decode kernel, as `cached_forward` has.

They work under jit, also in its loops; a cache that is donated is written where
it lies. Prompts of up to `MAX_TOKENS` are read by the same function; beyond
that, XLA's products are faster. A token that is not valid keeps its embedding
as state, and its position in the cache what it held.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.infer import cached_forward, kvcache
from dsv3_jax.infer.cached_forward import ForwardOptions, Routed
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.model import cached_attention, mla, mtp, rope

MAX_TOKENS = 64  # of a text in a call
_F32 = jnp.float32


def _layer(p: param_spec.Params, cfg: config.Model) -> list[jax.Array]:
  """Returns the parameters of a layer in the order in which they are read."""
  attention, ffn = p["mla"], p["ffn"]
  queries = ["q_down", "q_norm", "q_up"] if cfg.attention.q_rank else ["q"]
  names = *queries, "kv_down", "kv_norm", "up_k", "up_v", "out"
  arrays = [p["mla_norm"], *(attention[name] for name in names), p["ffn_norm"]]
  own = ffn
  if "bias" in p:
    arrays += [ffn["router"], p["bias"]]
    arrays += [ffn["experts"]["gate_up"], ffn["experts"]["down"]]
    own = ffn.get("shared")
  return arrays + ([own["gate_up"], own["down"]] if own else [])


def _attributes(cfg: config.Model) -> dict[str, np.generic]:
  a, r = cfg.attention, cfg.router
  integers = {
    "n_heads": a.n_heads,
    "q_rank": a.q_rank,
    "kv_rank": a.kv_rank,
    "nope_dim": a.nope_dim,
    "rope_dim": a.rope_dim,
    "v_dim": a.v_dim,
    "shared_experts": cfg.moe.n_shared > 0,
    "n_experts": r.n_experts,
    "top_k": r.top_k,
    "n_groups": r.n_groups,
    "top_groups": r.top_groups,
    "softmax": r.score == "softmax",
    "renormalize": r.renormalize,
  }
  numbers = {
    "gate_scale": r.scale,
    "norm_eps": cfg.norm_eps,
    "latent_norm_eps": a.norm_eps,
    "softmax_divisor": a.softmax_divisor,
  }
  attributes = {name: np.int64(value) for name, value in integers.items()}
  return attributes | {k: np.float32(value) for k, value in numbers.items()}


def _blocks(layers, x, caches, start, cfg, options):
  """Runs layers on states x [B, T, D]; returns states, caches, choices."""
  if options.experts is not None:
    raise ValueError("the decode kernel has all experts on its device")
  positions = cached_attention.new_positions(start, x)
  angle = rope.angles(positions, mla.frequencies(cfg.attention))
  valid = options.valid
  if valid is None:
    valid = jnp.ones(positions.shape, bool)
  inputs = x, jnp.cos(angle), jnp.sin(angle), start, valid
  arguments, aliases = list(inputs), {0: 0}
  for i, (p, cache) in enumerate(zip(layers, caches, strict=True)):
    aliases[len(arguments)] = 1 + i
    arguments += [cache, *_layer(p, cfg)]
  n_dense = sum("bias" not in p for p in layers)
  n_moe, router = len(layers) - n_dense, cfg.router
  routed = (n_moe, router.n_experts), (n_moe, *positions.shape, router.top_k)
  results = (
    jax.ShapeDtypeStruct(x.shape, _F32),
    *(jax.ShapeDtypeStruct(cache.shape, _F32) for cache in caches),
  )
  call = jax.ffi.ffi_call(
    "dsv3_forward",
    (*results, *(jax.ShapeDtypeStruct(a, jnp.int32) for a in routed)),
    input_output_aliases=aliases,
  )
  sizes = {"n_layers": len(layers), "n_dense_layers": n_dense}
  sizes = {name: np.int64(size) for name, size in sizes.items()}
  x, *filled, load, experts = call(*arguments, **sizes, **_attributes(cfg))
  return x, tuple(filled), Routed(load, experts)


def forward(
  params: InferenceParams,
  cache: kvcache.Cache,
  tokens: jax.Array,
  start: jax.Array,
  cfg: config.Model,
  options: ForwardOptions = cached_forward.DECODE,
) -> tuple[jax.Array, kvcache.Cache, Routed]:
  """Runs the main model, as `cached_forward.forward` does."""
  x = params["embed"][tokens]
  x, filled, routed = _blocks(
    params["layers"], x, cache["main"], start, cfg, options
  )
  return x, cache | {"main": filled}, routed


def forward_mtp(
  params: InferenceParams,
  cache: kvcache.Cache,
  hidden: jax.Array,
  ahead: jax.Array,
  start: jax.Array,
  cfg: config.Model,
  options: ForwardOptions = cached_forward.DECODE,
) -> tuple[jax.Array, jax.Array, kvcache.Cache, Routed]:
  """Runs the first MTP module, as `cached_forward.forward_mtp` does."""

  def block(p, x, bias):
    del bias  # with the others
    x, *told = _blocks([p], x, cache["mtp"], start, cfg, options)
    return x, told

  out, onward, (filled, routed) = mtp.module(
    params["mtp"][0], None, hidden, params["embed"][ahead], cfg, block
  )
  return out, onward, cache | {"mtp": filled}, routed


def logits(
  params: InferenceParams, hidden: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
  """Returns logits [..., C] of normed states [..., D].

  Those of states that are not valid, [...] bool, are 0.
  """
  *lead, d = hidden.shape
  valid = jnp.ones(lead, bool) if valid is None else valid
  rows, head = hidden.reshape(-1, d), params["head"]
  result = jax.ShapeDtypeStruct((len(rows), len(head)), _F32)
  call = jax.ffi.ffi_call("dsv3_logits", result)
  return call(rows, valid.reshape(-1), head).reshape(*lead, -1)

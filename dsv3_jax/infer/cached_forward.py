"""Forward pass with a KV cache, of a prompt's chunk or of the next few tokens.

The functions are pure; `compiled.py` jits them and donates the cache.
`forward_form.py` chooses between them and faster ones.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec
from dsv3_jax.infer import kvcache
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.linear import dot
from dsv3_jax.model import attentions, layers, moe, mtp
from dsv3_jax.model import experts as experts_lib

FEW = 8  # (token, expert) pairs that are faster without sorting


def local_experts(n_slots: int) -> moe.Experts:
  """Returns the experts of one device for n_slots (token, expert) pairs."""
  ffn = experts_lib.slotwise_ffn if n_slots <= FEW else experts_lib.grouped_ffn
  return moe.Experts(ffn)


@flax.struct.dataclass
class Routed:
  """Choices of the routers of n layers."""

  load: jax.Array  # [n, E] int32, tokens of each expert
  # [n, B, T, K] int32, experts of each token; E for a token that is not valid
  experts: jax.Array


def _block(
  p: param_spec.Params,
  x: jax.Array,
  cache: jax.Array,
  start: jax.Array,
  cfg: config.Model,
  options: "ForwardOptions",
) -> tuple[jax.Array, jax.Array, Routed | None]:
  """Returns a layer's output, its cache, and its router's choice, n = 1."""
  name = cfg.attention.type
  attention = attentions.functions(cfg.attention)
  attend = options.prefill and attention.prefill or attention.decode
  h = layers.rms_norm(p[f"{name}_norm"], x, cfg.norm_eps)
  y, cache = attend(p[name], h, cache, start, cfg.attention)
  x = x + y
  h = layers.rms_norm(p["ffn_norm"], x, cfg.norm_eps)
  if "bias" not in p:
    return x + layers.swiglu(p["ffn"], h), cache, None
  n_slots = x.shape[0] * x.shape[1] * cfg.router.top_k
  experts = options.experts or local_experts(n_slots)
  routing, _ = moe.route(p["ffn"], h, p["bias"], cfg, options.valid)
  y = moe.combine(p["ffn"], h, routing, experts)
  return x + y, cache, Routed(routing.load[None], routing.experts[None])


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
  """Options of a forward pass with a cache."""

  prefill: bool = False  # many tokens of each row: a chunk of a prompt
  valid: jax.Array | None = None  # [B, T] bool: the others go to no expert
  experts: moe.Experts | None = None  # None: all on this device


DECODE = ForwardOptions()


def forward(
  params: InferenceParams,
  cache: kvcache.Cache,
  tokens: jax.Array,
  start: jax.Array,
  cfg: config.Model,
  options: ForwardOptions = DECODE,
) -> tuple[jax.Array, kvcache.Cache, Routed]:
  """Runs the main model on the next tokens [B, T] int32 of B slots.

  Row b begins at position start[b].

  Returns:
    States after the last layer, [B, T, D], before the final norm; the cache
    with those positions filled; the choices of the MoE layers' routers.
  """
  x, filled, router = params["embed"][tokens], [], cfg.router
  none = (0, router.n_experts), (0, *tokens.shape, router.top_k)
  routed = [Routed(*(jnp.zeros(shape, jnp.int32) for shape in none))]
  for p, kept in zip(params["layers"], cache["main"], strict=True):
    x, kept, chosen = _block(p, x, kept, start, cfg, options)
    filled.append(kept)
    if chosen is not None:
      routed.append(chosen)
  routed = jax.tree.map(lambda *a: jnp.concatenate(a), *routed)
  return x, cache | {"main": tuple(filled)}, routed


def forward_mtp(
  params: InferenceParams,
  cache: kvcache.Cache,
  hidden: jax.Array,
  ahead: jax.Array,
  start: jax.Array,
  cfg: config.Model,
  options: ForwardOptions = DECODE,
) -> tuple[jax.Array, jax.Array, kvcache.Cache, Routed]:
  """Runs the first MTP module on the next positions (section 2.2).

  Args:
    hidden: [B, T, D], the state that the module reads at its positions.
    ahead: [B, T] int32, the token after each position.

  Returns:
    States after the module's norm, which the head reads, [B, T, D]; the states
    that a further module would read; the cache; its router's choice, n = 1.
  """
  (kept,) = cache["mtp"]

  def block(p, x, bias):
    del bias  # with the others
    x, *told = _block(p, x, kept, start, cfg, options)
    return x, told

  out, onward, (kept, routed) = mtp.module(
    params["mtp"][0], None, hidden, params["embed"][ahead], cfg, block
  )
  return out, onward, cache | {"mtp": (kept,)}, routed


def final_norm(
  params: InferenceParams, x: jax.Array, cfg: config.Model
) -> jax.Array:
  """Applies the final norm to states [..., D]."""
  return layers.rms_norm(params["norm"], x, cfg.norm_eps)


def logits(
  params: InferenceParams, hidden: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
  """Returns next-token logits [..., C] in float32 of normed states [..., D].

  Those of rows that are not valid, [...] bool, may be anything.
  """
  del valid  # all rows are one product
  rows = hidden.reshape(-1, hidden.shape[-1])
  # The transpose is materialized: the product is much faster so on CPU.
  columns = jax.lax.optimization_barrier(rows.T)
  result = dot.matmul(
    params["head"], columns, preferred_element_type=jnp.float32
  )
  return result.T.reshape(*hidden.shape[:-1], -1)

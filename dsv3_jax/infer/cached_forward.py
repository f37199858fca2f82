"""Forward pass with a KV cache, of a prompt's chunk or of the next few tokens.

The functions are pure; `compiled.py` jits them and donates the cache.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec
from dsv3_jax.infer import inference_params, kvcache
from dsv3_jax.model import experts as experts_lib
from dsv3_jax.model import layers, mla, moe, mtp, swiglu

FEW = 8  # (token, expert) pairs that are faster without sorting

Attention = Callable[..., tuple[jax.Array, jax.Array]]


def local_experts(n_slots: int) -> moe.Experts:
  """Returns the experts of one device for n_slots (token, expert) pairs."""
  few = n_slots <= FEW
  return moe.Experts(
    experts_lib.slotwise_ffn if few else experts_lib.grouped_ffn
  )


def _block(
  p: param_spec.Params,
  x: jax.Array,
  kept: jax.Array,
  start: jax.Array,
  cfg: config.Model,
  options: "ForwardOptions",
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns a layer's output, its cache, and the load [E] of its experts."""
  h = layers.rms_norm(p["mla_norm"], x, cfg.norm_eps)
  y, kept = options.attend(p["mla"], h, kept, start, cfg.mla)
  x = x + y
  h = layers.rms_norm(p["ffn_norm"], x, cfg.norm_eps)
  if "bias" not in p:
    return x + swiglu.swiglu(p["ffn"], h), kept, None
  n_slots = x.shape[0] * x.shape[1] * cfg.router.top_k
  experts = options.experts or local_experts(n_slots)
  y, stats = moe.moe(p["ffn"], h, p["bias"], cfg, experts, options.valid)
  return x + y, kept, stats.load


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
  """Options of a forward pass with a cache."""

  attend: Attention = mla.absorbed  # or `mla.chunk`, for many of each row
  valid: jax.Array | None = None  # [B, T] bool: the others go to no expert
  experts: moe.Experts | None = None  # None: all on this device


ABSORBED = ForwardOptions()


def forward(
  params: inference_params.InferenceParams,
  cache: kvcache.Cache,
  tokens: jax.Array,
  start: jax.Array,
  cfg: config.Model,
  options: ForwardOptions = ABSORBED,
) -> tuple[jax.Array, kvcache.Cache, jax.Array]:
  """Runs the main model on the next tokens of every slot.

  Args:
    params: of `inference_params.from_params`.
    cache: of B slots.
    tokens: [B, T] int32; row b begins at position start[b].
    start: [B] int32.
    cfg: the model.
    options: attention, valid tokens and experts.

  Returns:
    States after the last layer, [B, T, D], before the final norm; the cache
    with those positions filled; load of the experts, [n_moe_layers, E] int32.
  """
  x, filled, loads = params["embed"][tokens], [], []
  for p, kept in zip(params["layers"], cache["main"], strict=True):
    x, kept, load = _block(p, x, kept, start, cfg, options)
    filled.append(kept)
    if load is not None:
      loads.append(load)
  none = jnp.zeros((0, cfg.router.n_experts), jnp.int32)
  load = jnp.stack(loads) if loads else none
  return x, cache | {"main": tuple(filled)}, load


def forward_mtp(
  params: inference_params.InferenceParams,
  cache: kvcache.Cache,
  hidden: jax.Array,
  ahead: jax.Array,
  start: jax.Array,
  cfg: config.Model,
  options: ForwardOptions = ABSORBED,
) -> tuple[jax.Array, jax.Array, kvcache.Cache, jax.Array]:
  """Runs the first MTP module on the next positions (section 2.2).

  Args:
    params, cache, start, cfg, options: as in `forward`.
    hidden: [B, T, D], the state that the module reads at its positions.
    ahead: [B, T] int32, the token after each position.

  Returns:
    States after the module's norm, which the head reads, [B, T, D]; the states
    that a further module would read; the cache; load of its experts, [E] int32.
  """
  (kept,) = cache["mtp"]

  def block(p, x, bias):
    del bias  # with the others
    x, *told = _block(p, x, kept, start, cfg, options)
    return x, told

  out, onward, (kept, load) = mtp.module(
    params["mtp"][0], None, hidden, params["embed"][ahead], cfg, block
  )
  return out, onward, cache | {"mtp": (kept,)}, load


def final_norm(
  params: inference_params.InferenceParams, x: jax.Array, cfg: config.Model
) -> jax.Array:
  """Applies the final norm to states [..., D]."""
  return layers.rms_norm(params["norm"], x, cfg.norm_eps)


def logits(
  params: inference_params.InferenceParams, hidden: jax.Array
) -> jax.Array:
  """Returns next-token logits [..., C] in float32 of normed states [..., D]."""
  rows = hidden.reshape(-1, hidden.shape[-1])
  # The transpose is materialized: the product is much faster so on CPU.
  columns = jax.lax.optimization_barrier(rows.T)
  result = jnp.matmul(
    params["head"], columns, preferred_element_type=jnp.float32
  )
  return result.T.reshape(*hidden.shape[:-1], -1)

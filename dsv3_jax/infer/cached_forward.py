"""Reading tokens into the latent cache: many of a prompt, or the next few.

`prefill` and `decode` are pure; what jits them gives them static shapes and
donates the cache.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec
from dsv3_jax.infer import inference_params, kvcache
from dsv3_jax.model import experts as experts_lib
from dsv3_jax.model import layers, mla, moe, mtp, swiglu

FEW = 8  # choices of experts for which sorting does not pay

Attention = Callable[..., tuple[jax.Array, jax.Array]]


def local_experts(n_slots: int) -> moe.Experts:
  """The routed experts of one device, for so many (token, expert) choices."""
  few = n_slots <= FEW
  return moe.Experts(experts_lib.few_ffn if few else experts_lib.grouped_ffn)


def _block(
  p: param_spec.Params,
  x: jax.Array,
  kept: jax.Array,
  start: jax.Array,
  cfg: config.Model,
  options: "ForwardOptions",
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """A layer's output, its cache, and the load [E] of its experts."""
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
  """How tokens are read."""

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
  """Reads the next tokens of every slot with the main model.

  Args:
    params: of `served.params`.
    cache: of as many slots.
    tokens: [B, T] int32; row b is at positions start[b] ...
    start: [B] int32.
    cfg: the model.
    options: in which way.

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
  """The same with the first MTP module (section 2.2).

  Args:
    params, cache, start, cfg, options: as in `forward`.
    hidden: [B, T, D], the state that the module reads at its positions.
    ahead: [B, T] int32, the token after each of them.

  Returns:
    States after its own norm, which the head reads, [B, T, D]; the states that
    a further module would read; the cache; load of its experts, [E] int32.
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
  """The final norm of states [..., D]."""
  return layers.rms_norm(params["norm"], x, cfg.norm_eps)


def logits(
  params: inference_params.InferenceParams, hidden: jax.Array
) -> jax.Array:
  """Next-token logits [..., C] in float32 of normed states [..., D]."""
  rows = hidden.reshape(-1, hidden.shape[-1])
  # As columns, really turned: the product is much faster so on CPU.
  columns = jax.lax.optimization_barrier(rows.T)
  found = jnp.matmul(
    params["head"], columns, preferred_element_type=jnp.float32
  )
  return found.T.reshape(*hidden.shape[:-1], -1)

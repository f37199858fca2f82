"""Autoregressive generation over the latent cache (section 2.1.1)."""

import functools
from collections.abc import Iterator
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax import schema
from dsv3_jax.infer import sampling
from dsv3_jax.model import layers
from dsv3_jax.model import mla
from dsv3_jax.model import moe
from dsv3_jax.model import swiglu
from dsv3_jax.model import transformer

Layer = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Cache:
  """Latents and rotated keys of layers of one kind, S positions each."""

  dense: Layer  # [layers, B, S, R], [layers, B, S, H]
  moe: Layer


def empty_cache(
    cfg: config.Model, batch_size: int, length: int, dtype: jnp.dtype
) -> Cache:
  """A cache for `length` positions."""

  def layer(n):
    shape = (n, batch_size, length)
    return (
        jnp.zeros((*shape, cfg.mla.kv_rank), dtype),
        jnp.zeros((*shape, cfg.mla.rope_dim), dtype),
    )

  return Cache(layer(cfg.n_dense_layers), layer(cfg.n_moe_layers))


def step(
    params: schema.Params,
    bias: jax.Array,
    cache: Cache,
    tokens: jax.Array,
    start: jax.Array,
    cfg: config.Model,
) -> tuple[jax.Array, Cache]:
  """Reads tokens [B, T] at positions start ..., whether prompt or new.

  Returns:
    Logits [B, T, C] in float32 and the cache with those positions filled.
  """
  eps = cfg.norm_eps

  def block(x, layer, ffn):
    p, kept = layer
    h = layers.rms_norm(p["mla_norm"], x, eps)
    y, kept = mla.absorbed(p["mla"], h, kept, start, cfg.mla)
    x = x + y
    return x + ffn(p["ffn"], layers.rms_norm(p["ffn_norm"], x, eps)), kept

  def dense(x, layer):
    return block(x, layer, swiglu.swiglu)

  def mixture(x, layer):
    p, kept, layer_bias = layer
    ffn = lambda p, h: moe.moe(p, h, layer_bias, cfg)[0]
    return block(x, (p, kept), ffn)

  x, dense_cache, moe_cache = params["embed"][tokens], cache.dense, cache.moe
  if cfg.n_dense_layers:
    x, dense_cache = jax.lax.scan(dense, x, (params["dense"], cache.dense))
  if cfg.n_moe_layers:
    main_bias = bias[: cfg.n_moe_layers]
    x, moe_cache = jax.lax.scan(
        mixture, x, (params["moe"], cache.moe, main_bias)
    )
  hidden = layers.rms_norm(params["norm"], x, eps)
  return transformer.logits(params, hidden), Cache(dense_cache, moe_cache)


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "temperature", "top_p"),
    donate_argnames="cache",
)
def _next(
    params, bias, cache, tokens, start, last, key, cfg, temperature, top_p
):
  """Samples what follows tokens[:, last]; later tokens are padding."""
  logits, cache = step(params, bias, cache, tokens, start, cfg)
  return sampling.sample(logits[:, last], key, temperature, top_p), cache


def generate(
    params: schema.Params,
    bias: jax.Array,
    prompt: Sequence[int],
    max_tokens: int,
    key: jax.Array,
    cfg: config.Model,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: int | None = None,
) -> Iterator[int]:
  """Yields up to max_tokens ids that follow the prompt, one as it is made.

  Lengths are rounded up to powers of two, so that few programs are compiled.
  Padding behind the prompt writes cache positions that are overwritten before
  anything can see them.

  Args:
    params: parameters of the model.
    bias: [n_routers, E] f32.
    prompt: token ids, at least one.
    max_tokens: how many to make.
    key: PRNG key.
    cfg: the model.
    temperature: 0 is greedy.
    top_p: nucleus, in (0, 1].
    stop: id that ends the text; not yielded.

  Raises:
    ValueError: an empty prompt, an id outside the vocabulary, or a temperature
      or top_p outside its range.
  """
  ids = np.asarray(prompt, np.int32)
  if not ids.size:
    raise ValueError("empty prompt: at least one token is needed")
  if ids.min() < 0 or ids.max() >= cfg.vocab_size:
    raise ValueError(f"prompt ids must be in [0, {cfg.vocab_size})")
  if not temperature >= 0:
    raise ValueError(f"temperature={temperature}: must be at least 0")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
  padded = max(8, 1 << (ids.size - 1).bit_length())
  length = 1 << (padded + max_tokens - 1).bit_length()
  cache = empty_cache(cfg, 1, length, params["embed"].dtype)
  tokens = np.pad(ids, (0, padded - ids.size))[None]
  start, last = 0, ids.size - 1
  for i in range(max_tokens):
    token, cache = _next(
        params,
        bias,
        cache,
        tokens,
        start,
        last,
        jax.random.fold_in(key, i),
        cfg,
        temperature,
        top_p,
    )
    if int(token[0]) == stop:
      return
    yield int(token[0])
    start, last, tokens = ids.size + i, 0, token[:, None]

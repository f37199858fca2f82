"""The whole network: embedding, blocks, head and MTP modules."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec
from dsv3_jax.model import attentions, layers, moe, mtp, remat, swiglu


@flax.struct.dataclass
class Output:
  """What a forward pass returns."""

  hidden: jax.Array  # [B, T, D], after the final norm
  mtp_hidden: tuple[jax.Array, ...]  # depth k: [B, T - k, D], after its norm
  stats: moe.Stats  # [n_routers, ...], of MoE layers, then of MTP modules


def block_specs(cfg: config.Model, ffn: param_spec.Specs) -> param_spec.Specs:
  """A pre-norm block around the feed-forward given."""
  name = cfg.attention.type
  attention = attentions.functions(cfg.attention)
  return {
    f"{name}_norm": param_spec.gain(cfg.d_model),
    name: attention.specs(cfg.attention, cfg.d_model, cfg.init_std),
    "ffn_norm": param_spec.gain(cfg.d_model),
    "ffn": ffn,
  }


def specs(cfg: config.Model) -> param_spec.Specs:
  """Every parameter; layers of one kind are stacked."""
  d, c, std = cfg.d_model, cfg.vocab_size, cfg.init_std
  dense = swiglu.specs(d, cfg.dense_ffn_dim, std)
  tree = {
    "embed": param_spec.weight(std, vocab=c, embed=d),
    "norm": param_spec.gain(d),
    "head": param_spec.weight(std, embed=d, vocab=c),
  }
  if cfg.n_dense_layers:
    block = block_specs(cfg, dense)
    tree["dense"] = param_spec.stack(block, cfg.n_dense_layers)
  if cfg.n_moe_layers:
    block = block_specs(cfg, moe.specs(cfg))
    tree["moe"] = param_spec.stack(block, cfg.n_moe_layers)
  if cfg.mtp.depth:
    module = mtp.specs(cfg, block_specs(cfg, moe.specs(cfg)))
    tree["mtp"] = param_spec.stack(module, cfg.mtp.depth)
  return tree


def router_bias(cfg: config.Model) -> jax.Array:
  """The initial router bias, [n_routers, E] f32 zeros; not a parameter."""
  return jnp.zeros((cfg.n_routers, cfg.router.n_experts), jnp.float32)


def dense_block(
  p: param_spec.Params,
  x: jax.Array,
  cfg: config.Model,
  segments: jax.Array | None = None,
) -> jax.Array:
  """h += attention(norm(h)); h += SwiGLU(norm(h))."""
  x = _attention(p, x, cfg, segments)
  h = layers.rms_norm(p["ffn_norm"], x, cfg.norm_eps)
  return x + swiglu.swiglu(p["ffn"], h)


def moe_block(
  p: param_spec.Params,
  x: jax.Array,
  bias: jax.Array,
  cfg: config.Model,
  experts: moe.Experts,
  segments: jax.Array | None = None,
) -> tuple[jax.Array, moe.Stats]:
  """h += attention(norm(h)); h += MoE(norm(h)); and what the mixture tells."""
  x = _attention(p, x, cfg, segments)
  h = layers.rms_norm(p["ffn_norm"], x, cfg.norm_eps)
  y, stats = moe.moe(p["ffn"], h, bias, cfg, experts)
  return x + y, stats


def _attention(
  p: param_spec.Params,
  x: jax.Array,
  cfg: config.Model,
  segments: jax.Array | None,
) -> jax.Array:
  name = cfg.attention.type
  attention = attentions.functions(cfg.attention)
  with jax.named_scope(name):
    h = layers.rms_norm(p[f"{name}_norm"], x, cfg.norm_eps)
    x = x + attention.forward(p[name], h, cfg.attention, segments)
    return remat.named(x, "residual")


def _unrolled(step, carry, stacked):
  """`lax.scan` as a Python loop."""
  leaves, structure = jax.tree.flatten(stacked)
  # Split once: its transpose joins the layers' gradients in one copy.
  outs = []
  for layer in zip(*map(jnp.unstack, leaves), strict=True):
    carry, out = step(carry, jax.tree.unflatten(structure, layer))
    outs.append(out)
  return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *outs)


def as_stored(kind: str, p: param_spec.Params) -> param_spec.Params:
  """The parameters of a layer where every device holds them whole."""
  del kind
  return p


def forward(
  params: param_spec.Params,
  bias: jax.Array,
  tokens: jax.Array,
  cfg: config.Model,
  *,
  kept: remat.Kept = None,
  scan: bool = True,
  segment_start: int | None = None,
  experts: moe.Experts = moe.LOCAL,
  gather: Callable[[str, param_spec.Params], param_spec.Params] = as_stored,
) -> Output:
  """Hidden states of the main model and of every MTP depth.

  Args:
    params: parameters of `specs`.
    bias: [n_routers, E] f32 router bias.
    tokens: [B, T] int32, T above the MTP depth.
    cfg: the model.
    kept: names of what layers keep for the backward pass; None: everything.
    scan: loop over the layers of one kind; else unroll them, which compiles
      for longer and, on CPU, saves copying what the backward pass needs.
    segment_start: a token that begins a segment, which attention does not
      leave; None: it sees all that was before.
    experts: how the routed experts are computed.
    gather: makes the parameters of a layer of a kind (`dense`, `moe`, `mtp`)
      whole, where they are stored in slices.
  """
  segments = segments_of(tokens, segment_start)
  over_layers = jax.lax.scan if scan else _unrolled
  keeping = functools.partial(remat.keeping, kept, in_loop=scan)

  @keeping
  def dense(h, p):
    return dense_block(gather("dense", p), h, cfg, segments), None

  @keeping
  def mixture(h, layer):
    p, layer_bias = layer
    whole = gather("moe", p)
    return moe_block(whole, h, layer_bias, cfg, experts, segments)

  x = embed(params, tokens)
  stats = [_no_stats(bias)]
  if cfg.n_dense_layers:
    x, _ = over_layers(dense, x, params["dense"])
  if cfg.n_moe_layers:
    layer = params["moe"], bias[: cfg.n_moe_layers]
    x, told = over_layers(mixture, x, layer)
    stats.append(told)
  out = predict(
    params,
    bias[cfg.n_moe_layers :],
    x,
    tokens,
    cfg,
    kept=kept,
    segment_start=segment_start,
    experts=experts,
    gather=gather,
  )
  stats.append(out.stats)
  return out.replace(stats=_joined(stats))


def segments_of(tokens: jax.Array, start: int | None) -> jax.Array | None:
  """The segment of each token [B, T], which begins with `start`, if given."""
  if start is None:
    return None
  return jnp.cumsum(tokens == start, axis=1, dtype=jnp.int32)


def embed(params: param_spec.Params, tokens: jax.Array) -> jax.Array:
  """[B, T] int32 -> [B, T, D]."""
  with jax.named_scope("embed"):
    return params["embed"][tokens]


def predict(
  params: param_spec.Params,
  bias: jax.Array,
  x: jax.Array,
  tokens: jax.Array,
  cfg: config.Model,
  *,
  kept: remat.Kept = None,
  segment_start: int | None = None,
  experts: moe.Experts = moe.LOCAL,
  gather: Callable[[str, param_spec.Params], param_spec.Params] = as_stored,
) -> Output:
  """What follows the last layer: the final norm and the MTP modules.

  Args:
    params: all parameters but those of layers are read.
    bias: [depth, E] f32, of the MTP modules' routers.
    x: [B, T, D], from the last layer.
    tokens: [B, T] int32.
    cfg: the model.
    kept: as in `forward`.
    segment_start: as in `forward`.
    experts: as in `forward`.
    gather: as in `forward`.

  Returns:
    The hidden states, with the stats of the MTP modules.
  """

  segments = segments_of(tokens, segment_start)

  def module(p, layer_bias, hidden, ahead):
    own = None if segments is None else segments[:, : hidden.shape[1]]
    how = {"cfg": cfg, "experts": experts, "segments": own}
    block = functools.partial(moe_block, **how)
    return mtp.module(gather("mtp", p), layer_bias, hidden, ahead, cfg, block)

  hidden = layers.rms_norm(params["norm"], x, cfg.norm_eps)
  start = hidden if cfg.mtp.input_state == "post_norm" else x
  one = remat.keeping(kept, module)
  states, told = mtp.predict(params, bias, start, tokens, cfg, one)
  return Output(hidden, states, _joined([_no_stats(bias), *told]))


def _no_stats(bias: jax.Array) -> moe.Stats:
  """Of no router."""
  load = bias[:0].astype(jnp.int32)
  return moe.Stats(load, load.sum(-1, dtype=bias.dtype), load[:, :2])


def _joined(stats: list[moe.Stats]) -> moe.Stats:
  return jax.tree.map(lambda *s: jnp.concatenate(s), *stats)


def logits(params: param_spec.Params, hidden: jax.Array) -> jax.Array:
  """Next-token logits [..., C] in float32 of hidden states [..., D]."""
  return jnp.einsum(
    "...D,DC->...C",
    hidden,
    params["head"],
    preferred_element_type=jnp.float32,
  )

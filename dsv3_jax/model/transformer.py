"""The whole network: embedding, blocks, head and MTP modules."""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config, param_spec
from dsv3_jax.linear import dot
from dsv3_jax.model import attentions, layers, moe, mtp, remat, router
from dsv3_jax.model.layers import Hidden, Segments, Valid

Routes = Int[Array, "B T routers K"] | None  # as `data.batch.Batch.routes`


@flax.struct.dataclass
class Output:
  """Hidden states of a forward pass, and its router statistics."""

  hidden: jax.Array  # [B, T, D], after the final norm
  mtp_hidden: tuple[jax.Array, ...]  # depth k: [B, T - k, D], after its norm
  stats: moe.MoEStats  # [n_routers, ...], of MoE layers, then of MTP modules


def block_specs(cfg: config.Model, ffn: param_spec.Specs) -> param_spec.Specs:
  """A pre-norm block around the feed-forward given."""
  name = cfg.attention.type
  attention = attentions.functions(cfg.attention)
  return {
    f"{name}_norm": param_spec.norm_scale(cfg.d_model),
    name: attention.specs(cfg.attention, cfg.d_model, cfg.init_std),
    "ffn_norm": param_spec.norm_scale(cfg.d_model),
    "ffn": ffn,
  }


def specs(cfg: config.Model) -> param_spec.Specs:
  """Every parameter; layers of a group are stacked."""
  d, c, std = cfg.d_model, cfg.vocab_size, cfg.init_std
  dense = layers.swiglu_specs(d, cfg.dense_ffn_dim, std)
  tree = {
    "embed": param_spec.weight(std, vocab=c, embed=d),
    "norm": param_spec.norm_scale(d),
    "head": param_spec.weight(std, embed=d, vocab=c),
  }
  if cfg.reward_head:
    tree["reward"] = param_spec.weight(std, embed=d, scores=1)
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


def router_bias(cfg: config.Model) -> Float[Array, "routers E"]:
  """The initial router bias, [n_routers, E] f32 zeros; not a parameter."""
  return jnp.zeros((cfg.n_routers, cfg.router.n_experts), jnp.float32)


def dense_block(
  p: param_spec.Params, x: Hidden, cfg: config.Model, segments: Segments = None
) -> Hidden:
  """h += attention(norm(h)); h += SwiGLU(norm(h))."""
  x = _attention(p, x, cfg, segments)
  with jax.named_scope("dense"):
    h = layers.rms_norm(p["ffn_norm"], x, cfg.norm_eps)
    return x + layers.swiglu(p["ffn"], h)


def moe_block(
  p: param_spec.Params,
  x: Hidden,
  bias: Float[Array, " E"],
  cfg: config.Model,
  experts: moe.Experts,
  segments: Segments = None,
  valid: Valid = None,
  routes: router.Routes = None,
) -> tuple[Hidden, moe.MoEStats]:
  """h += attention(norm(h)); h += MoE(norm(h)); also returns its stats."""
  x = _attention(p, x, cfg, segments)
  h = layers.rms_norm(p["ffn_norm"], x, cfg.norm_eps)
  y, stats = moe.moe(p["ffn"], h, bias, cfg, experts, valid, routes)
  return x + y, stats


def _attention(
  p: param_spec.Params, x: Hidden, cfg: config.Model, segments: Segments
) -> Hidden:
  name = cfg.attention.type
  attention = attentions.functions(cfg.attention)
  with jax.named_scope(name):
    h = layers.rms_norm(p[f"{name}_norm"], x, cfg.norm_eps)
    x = x + attention.forward(p[name], h, cfg.attention, segments)
    return remat.named(x, "residual")


def _unrolled(step, carry, stacked):
  """`lax.scan` as a Python loop."""
  leaves, structure = jax.tree.flatten(stacked)
  # Unstacked at once: the transpose stacks the gradients in one copy.
  outs = []
  for layer in zip(*map(jnp.unstack, leaves), strict=True):
    carry, out = step(carry, jax.tree.unflatten(structure, layer))
    outs.append(out)
  return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *outs)


def _unsharded(group: str, p: param_spec.Params) -> param_spec.Params:
  """The parameters of a layer, which every device holds in full."""
  del group
  return p


@dataclasses.dataclass(frozen=True)
class ForwardContext:
  """Options of a forward pass that do not change what it computes."""

  # Names of the activations that layers save for the backward pass.
  saved_activations: remat.SavedNames = None  # None: all
  # Loop over the layers of a group; unrolled they compile for longer and, on
  # CPU, need no copy of what the backward pass reads.
  scan: bool = True
  experts: moe.Experts = moe.LOCAL  # how the routed experts are computed
  dtype: jax.typing.DTypeLike | None = None  # of states; None: the embedding's
  # All-gathers the parameters of one layer of a group (`dense`, `moe`, `mtp`).
  gather: Callable[[str, param_spec.Params], param_spec.Params] = _unsharded


LOCAL = ForwardContext()  # on one device


def forward(
  params: param_spec.Params,
  bias: Float[Array, "routers E"],
  tokens: Int[Array, "B T"],
  cfg: config.Model,
  ctx: ForwardContext = LOCAL,
  segments: Segments = None,
  valid: Valid = None,
  routes: Routes = None,
) -> Output:
  """Hidden states of the main model and of every MTP depth.

  There must be more tokens in a sequence than MTP modules. Attention stays
  inside a segment; the routers leave padding out, and take the experts of
  `routes`.
  """
  over_layers = jax.lax.scan if ctx.scan else _unrolled
  rematerialize = functools.partial(
    remat.remat, ctx.saved_activations, in_loop=ctx.scan
  )

  @rematerialize
  def dense(h, p):
    return dense_block(ctx.gather("dense", p), h, cfg, segments), None

  @rematerialize
  def mixture(h, layer):
    sliced, layer_bias, i, given = layer
    p = ctx.gather("moe", sliced)
    if i is not None and p is sliced:
      ffn = moe.read_from_stack(p["ffn"], params["moe"]["ffn"], i)
      p = p | {"ffn": ffn}
    return moe_block(p, h, layer_bias, cfg, ctx.experts, segments, valid, given)

  x = embed(params, tokens)
  x = x.astype(ctx.dtype or x.dtype)
  stats = [_no_stats(bias, routes)]
  if cfg.n_dense_layers:
    x, _ = over_layers(dense, x, params["dense"])
  moe_bias, mtp_bias = jnp.split(bias, [cfg.n_moe_layers])
  if cfg.n_moe_layers:
    # Unrolled, all experts would be copied out of their stack, and the copies
    # kept for the backward pass. A loop over layers slices them anyway, and of
    # what a recomputed layer reads XLA would copy the whole stack.
    index, local = None, ctx.experts.ffn is moe.LOCAL.ffn
    if local and not ctx.scan and ctx.saved_activations is None:
      index = jnp.arange(cfg.n_moe_layers)
    given = jax.tree.map(
      lambda a: jnp.moveaxis(a[:, :, : cfg.n_moe_layers], 2, 0), routes
    )
    layers_in = params["moe"], moe_bias, index, given
    x, moe_stats = over_layers(mixture, x, layers_in)
    stats.append(moe_stats)
  out = predict(params, mtp_bias, x, tokens, cfg, ctx, segments, valid, routes)
  stats.append(out.stats)
  return out.replace(stats=_concatenated(stats))


def embed(params: param_spec.Params, tokens: Int[Array, "B T"]) -> Hidden:
  """Embeddings of tokens."""
  with jax.named_scope("embed"):
    return params["embed"][tokens]


def predict(
  params: param_spec.Params,
  bias: Float[Array, "depth E"],
  x: Hidden,
  tokens: Int[Array, "B T"],
  cfg: config.Model,
  ctx: ForwardContext = LOCAL,
  segments: Segments = None,
  valid: Valid = None,
  routes: Routes = None,
) -> Output:
  """Applies the final norm and the MTP modules to the last layer's output x.

  Reads all parameters but those of layers. The stats, like the bias, are those
  of the routers of the MTP modules; `routes` has those of all routers.
  """

  def module(p, layer_bias, hidden, ahead):
    depth = x.shape[1] - hidden.shape[1]
    here, joined = _of_depth(segments, valid, depth)
    router_index = cfg.n_moe_layers + depth - 1
    block = functools.partial(
      moe_block,
      cfg=cfg,
      experts=ctx.experts,
      segments=here,
      valid=joined,
      routes=jax.tree.map(lambda a: a[:, :-depth, router_index], routes),
    )
    p = ctx.gather("mtp", p)
    return mtp.module(p, layer_bias, hidden, ahead, cfg, block)

  hidden = layers.rms_norm(params["norm"], x, cfg.norm_eps)
  start = hidden if cfg.mtp.input_state == "post_norm" else x
  if not cfg.mtp.trains_trunk:
    start = jax.lax.stop_gradient(start)
    params = params | {"embed": jax.lax.stop_gradient(params["embed"])}
  module = remat.remat(ctx.saved_activations, module)
  states, stats = mtp.predict(params, bias, start, tokens, cfg, module)
  return Output(
    hidden, states, _concatenated([_no_stats(bias, routes), *stats])
  )


def _of_depth(
  segments: Segments, valid: Valid, depth: int
) -> tuple[Segments, Valid]:
  """Segments of an MTP depth's positions, and which of them join real tokens.

  Those that join two segments predict nothing, and are left out like padding.
  """
  if valid is not None:
    valid = valid[:, depth:]
  if segments is None:
    return None, valid
  here = segments[:, :-depth]
  same = segments[:, depth:] == here
  return here, same if valid is None else same & valid


def _no_stats(bias: jax.Array, routes: Routes) -> moe.MoEStats:
  """Stats of zero routers, to concatenate others to."""
  load = bias[:0].astype(jnp.int32)
  sent = jnp.repeat(load[:, :1], 2, axis=1)  # also of a single expert
  replayed = None if routes is None else sent
  return moe.MoEStats(load, load.sum(-1, dtype=bias.dtype), sent, replayed)


def _concatenated(stats: list[moe.MoEStats]) -> moe.MoEStats:
  return jax.tree.map(lambda *s: jnp.concatenate(s), *stats)


def logits(
  params: param_spec.Params, hidden: Float[Array, "... D"]
) -> Float[Array, "... C"]:
  """Next-token logits of hidden states, in float32."""
  return dot.einsum(
    "...D,DC->...C", hidden, params["head"], preferred_element_type=jnp.float32
  )

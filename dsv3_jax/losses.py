"""Training losses: chunked cross-entropy, and its sum with MTP and balance."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config, param_spec
from dsv3_jax.data.batch import IGNORE, Batch
from dsv3_jax.linear import dot
from dsv3_jax.model import moe, transformer

CHUNK = 1024  # tokens whose logits exist at a time


@flax.struct.dataclass
class Losses:
  """Scalars of one batch; `total` is what is minimised."""

  total: jax.Array
  main: jax.Array
  mtp: jax.Array  # mean over depths, before lambda
  balance: jax.Array  # alpha included, summed over routers
  # Of the batch's objective, sums as the losses
  metrics: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


# [*B, T - k] of the labels from k on, which depth k predicts, for k = 0 (the
# main model) to the MTP depth.
TokenWeights = tuple[Float[Array, "*B _"], ...]


def token_weights(data: Batch, depth: int) -> TokenWeights:
  """1 / (number of labels that count) for those, 0 for the others.

  A label of depth k counts if the k labels before it do: what depth k predicts
  lies, with all that it has read past its position, inside one text, or inside
  one answer of a conversation. Those of depth k are divided by all labels, as
  eq. 24 divides by T though only T - k have a prediction. Segments are texts of
  their own: there, by the labels that count at that depth.
  """
  counted, weights = data.labels != IGNORE, []
  predicted, n = counted, counted.sum()
  for k in range(depth + 1):
    if k:
      predicted = predicted[..., 1:] & counted[..., :-k]
      n = n if data.segments is None else predicted.sum()
    weights.append(predicted / jnp.maximum(n, 1).astype(jnp.float32))
  return tuple(weights)


@jax.custom_vjp
def cross_entropy(
  hidden: Float[Array, "M D"],
  head: Float[Array, "D C"],
  labels: Int[Array, " M"],
  weights: Float[Array, " M"],
) -> Float[Array, ""]:
  """Sum of weights * -log softmax(hidden @ head)[labels], in float32.

  Logits exist for one chunk of tokens at a time, and the gradient is made in
  the same pass, so that they are never computed twice. The head is cast to the
  type of the states; its gradient is in its own. No gradient reaches the
  weights. Where one is 0 the label may be anything.
  """
  head = head.astype(hidden.dtype)
  parts = chunks(hidden, labels, weights)
  return jax.lax.map(lambda c: _chunk_nll(c, head)[0], parts).sum()


def chunks(hidden: jax.Array, *per_token: jax.Array) -> tuple[jax.Array, ...]:
  """Arrays [M, ...] -> [M / chunk, chunk, ...], padded with zeros."""
  m = hidden.shape[0]
  n = -(-m // CHUNK)
  size = -(-m // n)

  def split(a):
    pad = [(0, n * size - m)] + [(0, 0)] * (a.ndim - 1)
    return jnp.pad(a, pad).reshape(n, size, *a.shape[1:])

  return tuple(split(a) for a in (hidden, *per_token))


def _chunk_nll(
  chunk: tuple[jax.Array, ...], head: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weighted loss of a chunk, its logits and their log-sum-exp."""
  hidden, labels, weights = chunk
  logits = dot.matmul(hidden, head, preferred_element_type=jnp.float32)
  lse = jax.nn.logsumexp(logits, axis=-1)
  label = jnp.clip(labels, 0)[:, None]  # IGNORE: any row, its weight is 0
  target = jnp.take_along_axis(logits, label, axis=-1)[:, 0]
  return ((lse - target) * weights).sum(), logits, lse


def _cross_entropy_fwd(hidden, head, labels, weights):
  types, head = (hidden[:0], head[:0]), head.astype(hidden.dtype)

  def step(carry, chunk):
    total, dhead = carry
    x, label, weight = chunk
    nll, logits, lse = _chunk_nll(chunk, head)
    hit = jax.nn.one_hot(label, head.shape[1], dtype=jnp.bool_)
    dlogits = (jnp.exp(logits - lse[:, None]) - hit) * weight[:, None]
    dlogits = dlogits.astype(x.dtype)
    dhead += dot.matmul(x.T, dlogits, preferred_element_type=jnp.float32)
    dx = dot.matmul(dlogits, head.T, preferred_element_type=jnp.float32)
    return (total + nll, dhead), dx

  zero = jnp.zeros_like(weights, shape=()), jnp.zeros_like(head, jnp.float32)
  parts = chunks(hidden, labels, weights)
  (total, dhead), dhidden = jax.lax.scan(step, zero, parts)
  dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
  return total, (types, (dhidden, dhead))


def _cross_entropy_bwd(residuals, dtotal):
  dhidden, dhead = (
    (g * dtotal).astype(like.dtype) for like, g in zip(*residuals, strict=True)
  )
  return dhidden, dhead, None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def loss(
  params: param_spec.Params,
  bias: Float[Array, "routers E"],
  data: Batch,
  weights: TokenWeights,
  mtp_weight: Float[Array, ""] | float,
  cfg: config.Model,
  ctx: transformer.ForwardContext = transformer.LOCAL,
) -> tuple[Losses, moe.MoEStats]:
  """Main, MTP and balance losses of a batch (eq. 17-25).

  L_main + (lambda / D) * sum_k L^k + sum of balance losses. `weights` are those
  of the labels (`token_weights`), `mtp_weight` is lambda. Also returns the
  statistics of the routers.
  """
  masks = data.segments, data.valid, data.routes
  out = transformer.forward(params, bias, data.tokens, cfg, ctx, *masks)
  return _losses(params, out, data, weights, mtp_weight, cfg), out.stats


def loss_from_last_layer(
  params: param_spec.Params,
  bias: Float[Array, "depth E"],
  x: Float[Array, "B T D"],
  data: Batch,
  weights: TokenWeights,
  mtp_weight: Float[Array, ""] | float,
  cfg: config.Model,
  ctx: transformer.ForwardContext = transformer.LOCAL,
) -> tuple[Losses, moe.MoEStats]:
  """`loss` of the last layer's output x [B, T, D].

  `bias`, balance losses and statistics are those of the MTP modules alone.
  """
  masks = data.segments, data.valid, data.routes
  out = transformer.predict(params, bias, x, data.tokens, cfg, ctx, *masks)
  return _losses(params, out, data, weights, mtp_weight, cfg), out.stats


def scores(
  params: param_spec.Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B"]:
  """Scores of a reward model at each position, in float32."""
  return dot.einsum(
    "...D,DS->...S",
    hidden,
    params["reward"],
    preferred_element_type=jnp.float32,
  )[..., 0]


def segment_scores(
  params: param_spec.Params,
  hidden: Float[Array, "B T D"],
  labels: Int[Array, "B T"],
  segments: Int[Array, "B T"],
) -> Float[Array, "B T"]:
  """Scores of the samples of each row: that of segment n at [:, n - 1].

  It is read at the end token, which is the only label of its segment; 0 where a
  row has no such segment.
  """
  # A label is the next token; the score is read from that token's own state.
  ends = jnp.pad(labels[:, :-1] != IGNORE, ((0, 0), (1, 0)))
  return _by_segment(jnp.where(ends, scores(params, hidden), 0), segments)


def _by_segment(
  values: Float[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """Sums values by segment; segment 0, padding, is dropped."""
  n = values.shape[1] + 1
  add = functools.partial(jax.ops.segment_sum, num_segments=n)
  return jax.vmap(add)(values, segments)[:, 1:]


def pairwise(
  params: param_spec.Params,
  hidden: Float[Array, "B T D"],
  data: Batch,
  weights: Float[Array, "B T"],
) -> Float[Array, ""]:
  """Mean over pairs of -log sigmoid(chosen - rejected) (section 5.2.1).

  Segments 2n + 1 and 2n + 2 of a row are the chosen and the rejected answer of
  a pair. `weights` are those of the labels, two for a pair.
  """
  values = segment_scores(params, hidden, data.labels, data.segments)
  pairs = _by_segment(weights, data.segments)
  n = values.shape[1] // 2 * 2
  margin = values[:, 0:n:2] - values[:, 1:n:2]
  return (jax.nn.softplus(-margin) * 2 * pairs[:, 1:n:2]).sum()


def _losses(params, out, data, weights, mtp_weight, cfg) -> Losses:
  """The losses of the hidden states of a forward pass."""
  balance = out.stats.balance.sum()
  if cfg.reward_head:
    main = pairwise(params, out.hidden, data, weights[0])
    return Losses(main + balance, main, jnp.zeros_like(main), balance)

  def term(hidden, depth, head):
    rows, labels = hidden.reshape(-1, cfg.d_model), data.labels[:, depth:]
    labels, weight = labels.reshape(-1), weights[depth].reshape(-1)
    return cross_entropy(rows, head, labels, weight)

  with jax.named_scope("loss"):
    head, metrics = params["head"], {}
    if data.objective:
      main, metrics = data.objective(out.hidden, head, data)
    else:
      main = term(out.hidden, 0, head)
    if not cfg.mtp.trains_trunk:
      head = jax.lax.stop_gradient(head)
    mtp = jnp.zeros((), jnp.float32)
    for depth, hidden in enumerate(out.mtp_hidden, start=1):
      mtp += term(hidden, depth, head) / cfg.mtp.depth
  total = main + mtp_weight * mtp + balance
  return Losses(total, main, mtp, balance, metrics)

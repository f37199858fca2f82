"""A float64 NumPy oracle of the model, written from the papers' equations.

It shares no code with the package: a config gives it numbers, a parameter tree
arrays, nothing else. It goes token by token where that is clearer; it is meant
to be checked by eye. Sections are those of arXiv:2412.19437.
"""

import math

import numpy as np


def f64(tree):
  """The tree with every array in float64."""
  if isinstance(tree, dict):
    return {name: f64(leaf) for name, leaf in tree.items()}
  if isinstance(tree, tuple):
    return tuple(f64(leaf) for leaf in tree)
  return np.asarray(tree, np.float64)


def layer(tree, i):
  """Parameters of layer i of a stacked tree."""
  if isinstance(tree, dict):
    return {name: layer(leaf, i) for name, leaf in tree.items()}
  return tree[i]


# --- norm, SwiGLU, rotary embedding ---


def rms_norm(gain, x, eps):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def sigmoid(x):
  return np.exp(-np.logaddexp(0, -x))


def softmax(x):
  y = np.exp(x - x.max(-1, keepdims=True))
  return y / y.sum(-1, keepdims=True)


def swiglu(p, x):
  gate, up = x @ p["gate_up"][:, 0], x @ p["gate_up"][:, 1]
  return (gate * sigmoid(gate) * up) @ p["down"]


def frequencies(dim, theta):
  return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def yarn_frequencies(dim, theta, factor, original_len, beta_fast, beta_slow):
  """Section 4.3 with the ramp of arXiv:2309.00071."""

  def pair_with(turns):  # the pair that turns so often in original_len
    wavelength = original_len / turns
    return dim / 2 * math.log(wavelength / (2 * math.pi)) / math.log(theta)

  low = max(math.floor(pair_with(beta_fast)), 0)
  high = min(math.ceil(pair_with(beta_slow)), dim - 1)
  out = []
  for i, frequency in enumerate(frequencies(dim, theta)):
    slowed = min(max((i - low) / (high - low), 0.0), 1.0)
    out.append(frequency / factor * slowed + frequency * (1 - slowed))
  return np.array(out)


def rotate(x, angle):
  """Components (2i, 2i + 1) as a complex number, turned by angle[i]."""
  turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
  out = np.empty(turned.shape[:-1] + x.shape[-1:])
  out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
  return out


# --- attention (2.1.1) ---


def mla(p, x, cfg):
  return np.stack([_mla_sequence(p, sequence, cfg) for sequence in x])


def _mla_sequence(p, x, cfg):
  n_tokens = len(x)
  yarn, turns = cfg.yarn, frequencies(cfg.rope_dim, cfg.rope_theta)
  temperature = 1.0
  if yarn.factor > 1:
    turns = yarn_frequencies(
      cfg.rope_dim,
      cfg.rope_theta,
      yarn.factor,
      yarn.original_len,
      yarn.beta_fast,
      yarn.beta_slow,
    )
    temperature = (0.1 * yarn.mscale * math.log(yarn.factor) + 1) ** 2
  turn = np.outer(np.arange(n_tokens), turns)
  down = x @ p["kv_down"]
  latent = rms_norm(p["kv_norm"], down[:, : cfg.kv_rank], cfg.norm_eps)
  k_rope = rotate(down[:, cfg.kv_rank :], turn)
  out = np.zeros_like(x)
  for n in range(cfg.n_heads):
    if cfg.q_rank:
      q = rms_norm(p["q_norm"], x @ p["q_down"], cfg.norm_eps) @ p["q_up"][:, n]
    else:
      q = x @ p["q"][:, n]
    q_nope, q_rope = q[:, : cfg.nope_dim], rotate(q[:, cfg.nope_dim :], turn)
    kv = latent @ p["kv_up"][:, n]
    k_nope, v = kv[:, : cfg.nope_dim], kv[:, cfg.nope_dim :]
    for t in range(n_tokens):
      past = slice(0, t + 1)
      scores = k_nope[past] @ q_nope[t] + k_rope[past] @ q_rope[t]
      scores = temperature * scores / math.sqrt(cfg.nope_dim + cfg.rope_dim)
      weights = softmax(scores)
      out[t] += weights @ v[past] @ p["out"][n]
  return out


# --- mixture of experts (2.1.2) ---


def top(values, k):
  """Indices of the k largest, largest first; of equals the lower index."""
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def select(scores, bias, cfg):
  """Experts and gates of one token, from its scores [E] (eq. 12-16)."""
  biased = scores + bias
  size = cfg.n_experts // cfg.n_groups
  n_best = 2 if cfg.score == "sigmoid" else 1
  ranks = [
    sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[:n_best])
    for g in range(cfg.n_groups)
  ]
  kept = top(ranks, cfg.top_groups)
  allowed = [e for e in range(cfg.n_experts) if e // size in kept]
  experts = [allowed[i] for i in top(biased[allowed], cfg.top_k)]
  return experts, gates_of(scores, experts, cfg)


def gates_of(scores, experts, cfg):
  gates = scores[experts]
  if cfg.renormalize:
    gates = gates / (gates.sum() + 1e-20)
  return cfg.scale * gates


def scores_of(w, x, cfg):
  return sigmoid(x @ w) if cfg.score == "sigmoid" else softmax(x @ w)


def balance_loss(scores, experts, cfg):
  """One sequence: scores [T, E], experts chosen [T, K] (eq. 17-20)."""
  n_tokens, n_experts = scores.shape
  counts = np.zeros(n_experts)
  for t in range(n_tokens):
    literal = cfg.balance_map == "scores"
    for e in top(scores[t], cfg.top_k) if literal else experts[t]:
      counts[e] += 1
  f = counts * n_experts / (cfg.top_k * n_tokens)
  share = np.mean([row / row.sum() for row in scores], axis=0)
  return cfg.balance_weight * sum(f * share)


def update_bias(bias, load, speed):
  mean = sum(load) / len(load)
  return [
    b + speed * float(np.sign(mean - c))
    for b, c in zip(bias, load, strict=True)
  ]


def expert_ffn(p, x, chosen, gates):
  y = np.zeros_like(x)
  for m, token in enumerate(x):
    for e, gate in zip(chosen[m], gates[m], strict=True):
      y[m] += gate * swiglu(layer(p, e), token)
  return y


def expert_ffn_gradients(p, x, chosen, gates, dy):
  """Gradients of sum(dy * expert_ffn) as (parameters, x, gates)."""
  dp = {name: np.zeros_like(leaf) for name, leaf in p.items()}
  dx, dgates = np.zeros_like(x), np.zeros_like(gates)
  for m, token in enumerate(x):
    for k, e in enumerate(chosen[m]):
      w_gate, w_up = p["gate_up"][e, :, 0], p["gate_up"][e, :, 1]
      gate, up = token @ w_gate, token @ w_up
      s = sigmoid(gate)
      act = gate * s * up
      dgates[m, k] = dy[m] @ (act @ p["down"][e])
      weighted = gates[m, k] * dy[m]
      dact = p["down"][e] @ weighted
      dgate, dup = dact * up * s * (1 + gate * (1 - s)), dact * gate * s
      dp["down"][e] += np.outer(act, weighted)
      dp["gate_up"][e, :, 0] += np.outer(token, dgate)
      dp["gate_up"][e, :, 1] += np.outer(token, dup)
      dx[m] += w_gate @ dgate + w_up @ dup
  return dp, dx, dgates


def moe(p, x, bias, cfg, routes=None):
  """x [B, T, D] -> y [B, T, D], load [E], balance loss; cfg: the model's.

  Experts are those of routes [B, T, K], but where the first is -1.
  """
  y = np.zeros_like(x)
  load, losses = np.zeros(cfg.router.n_experts, int), []
  for b, sequence in enumerate(x):
    scores = scores_of(p["router"], sequence, cfg.router)
    chosen, gates = map(
      list, zip(*(select(row, bias, cfg.router) for row in scores), strict=True)
    )
    for t, given in enumerate(() if routes is None else routes[b]):
      if given[0] >= 0:
        chosen[t], gates[t] = given, gates_of(scores[t], given, cfg.router)
    y[b] = expert_ffn(p["experts"], sequence, chosen, gates)
    if cfg.moe.n_shared:
      y[b] += swiglu(p["shared"], sequence)
    for e in np.ravel(chosen):
      load[e] += 1
    losses.append(balance_loss(scores, chosen, cfg.router))
  return y, load, np.mean(losses)


# --- the whole network ---


def block(p, x, bias, cfg, routes=None):
  """Pre-norm block: y, and load and balance loss of a mixture, else None."""
  x = x + mla(p["mla"], rms_norm(p["mla_norm"], x, cfg.norm_eps), cfg.attention)
  h = rms_norm(p["ffn_norm"], x, cfg.norm_eps)
  if "router" not in p["ffn"]:
    return x + swiglu(p["ffn"], h), None, None
  y, load, balance = moe(p["ffn"], h, bias, cfg, routes)
  return x + y, load, balance


def mtp(params, bias, h, tokens, cfg, routes=None):
  """States of every depth after its norm, loads, balance losses (2.2).

  Args:
    params: of the whole model.
    bias: [depth, E].
    h: [B, T, D] state that depth 1 reads.
    tokens: [B, T].
    cfg: the model's.
    routes: [B, T, depth, K]; position i of depth k has those at i.
  """
  states, loads, losses = [], [], []
  for k in range(1, cfg.mtp.depth + 1):
    p = layer(params["mtp"], k - 1)
    joined = [
      [
        np.concatenate(
          [
            rms_norm(
              p["embed_norm"], params["embed"][row[i + k]], cfg.norm_eps
            ),
            rms_norm(p["hidden_norm"], h[b, i], cfg.norm_eps),
          ]
        )
        @ p["proj"]
        for i in range(len(row) - k)
      ]
      for b, row in enumerate(tokens)
    ]
    joined = np.array(joined)
    given = None if routes is None else routes[:, : joined.shape[1], k - 1]
    x, load, balance = block(p["block"], joined, bias[k - 1], cfg, given)
    states.append(rms_norm(p["norm"], x, cfg.norm_eps))
    h = states[-1] if cfg.mtp.input_state == "post_norm" else x
    loads.append(load)
    losses.append(balance)
  return states, loads, losses


def forward(params, bias, tokens, cfg, routes=None):
  """hidden [B, T, D], MTP states, load [n_routers, E], summed balance loss.

  Routers take the experts of routes [B, T, n_routers, K].
  """
  x = params["embed"][tokens]
  loads, losses = [], []
  for i in range(cfg.n_dense_layers):
    x, _, _ = block(layer(params["dense"], i), x, None, cfg)
  for i in range(cfg.n_layers - cfg.n_dense_layers):
    given = None if routes is None else routes[:, :, i]
    x, load, balance = block(layer(params["moe"], i), x, bias[i], cfg, given)
    loads.append(load)
    losses.append(balance)
  hidden = rms_norm(params["norm"], x, cfg.norm_eps)
  start = hidden if cfg.mtp.input_state == "post_norm" else x
  given = None if routes is None else routes[:, :, len(loads) :]
  states, mtp_loads, mtp_losses = mtp(
    params, bias[len(loads) :], start, tokens, cfg, given
  )
  load = np.reshape(loads + mtp_loads, (-1, cfg.router.n_experts))
  return hidden, states, load, sum(losses + mtp_losses)


# --- losses ---


def cross_entropy(hidden, head, labels, weights):
  """Sum of weighted -log p(label), hidden [M, D]."""
  return sum(
    -w * np.log(softmax(h @ head)[label])
    for h, label, w in zip(hidden, labels, weights, strict=True)
  )


def cross_entropy_gradients(hidden, head, labels, weights):
  """Gradients of `cross_entropy` as (hidden, head)."""
  dhidden, dhead = np.zeros_like(hidden), np.zeros_like(head)
  for m, h in enumerate(hidden):
    dlogits = softmax(h @ head)
    dlogits[labels[m]] -= 1
    dhidden[m] = weights[m] * head @ dlogits
    dhead += weights[m] * np.outer(h, dlogits)
  return dhidden, dhead


def mtp_targets(row, k):
  """Depth k of a row of T + 1 tokens: (input, label) per position kept.

  Depth 0 is the main model, whose input is the token itself.
  """
  n_inputs = len(row) - 1
  return [(row[i + k], row[i + k + 1]) for i in range(n_inputs - k)]


def losses(params, bias, rows, cfg, routes=None):
  """(main, [L^1 .. L^D], balance) of rows [B, T + 1] (eq. 24-25)."""
  tokens = rows[:, :-1]
  hidden, states, _, balance = forward(params, bias, tokens, cfg, routes)
  terms = []
  for k, state in enumerate([hidden, *states]):
    total = 0.0
    for b, row in enumerate(rows):
      labels = [label for _, label in mtp_targets(row, k)]
      total += cross_entropy(
        state[b], params["head"], labels, np.ones(len(labels))
      )
    terms.append(total / tokens.size)
  return terms[0], terms[1:], balance


def total_loss(params, bias, rows, cfg, routes=None):
  main, ahead, balance = losses(params, bias, rows, cfg, routes)
  share = cfg.mtp.weight / cfg.mtp.depth if cfg.mtp.depth else 0.0
  return main + share * sum(ahead) + balance

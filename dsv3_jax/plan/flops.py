"""Parameter counts and matrix-product FLOPs of a model."""

import jax

from dsv3_jax import config, param_spec
from dsv3_jax.model import transformer

# Dense BF16 FLOP/s of a device, by the start of its name in JAX; from the
# vendors' data sheets, without sparsity.
PEAK_FLOPS = {
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H800": 989e12,
  "NVIDIA A100": 312e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Dense BF16 FLOP/s of a device; None if it is not in `PEAK_FLOPS`."""
  for name, peak in PEAK_FLOPS.items():
    if device_kind.startswith(name):
      return peak
  return None


def parameter_counts(cfg: config.Model) -> dict[str, int]:
  """Returns numbers of parameters as the papers count them.

  `main` excludes the MTP modules and the router biases; `mtp` is what the MTP
  modules add, their biases included, without copies of embedding and head;
  `active` is what one token meets in the main model, the head included and the
  embedding not.
  """
  specs = transformer.specs(cfg)
  total, mtp = param_spec.count(specs), param_spec.count(specs.get("mtp", {}))
  n_experts = cfg.router.n_experts
  idle = 0
  if cfg.n_moe_layers:
    routed = param_spec.count(specs["moe"]["ffn"]["experts"])
    idle = routed * (n_experts - cfg.router.top_k) // n_experts
  embed = param_spec.count({"embed": specs["embed"]})
  return {
    "main": total - mtp,
    "router_bias": cfg.n_moe_layers * n_experts,
    "mtp": mtp + cfg.mtp.depth * n_experts,
    "active": total - mtp - idle - embed,
    "active_no_head": total - mtp - idle - 2 * embed,
  }


def describe(cfg: config.Model) -> dict[str, str]:
  """Returns the sizes of a model as texts, by name, for tables."""
  counts, router = parameter_counts(cfg), cfg.router
  sizes = {
    "parameters": f"{counts['main'] + counts['mtp']:,}",
    "active": f"{counts['active']:,} for a token",
    "layers": f"{cfg.n_layers}, width {cfg.d_model}, {cfg.attention.type}",
  }
  if cfg.n_moe_layers:
    sizes["experts"] = (
      f"{router.n_experts} in each of {cfg.n_moe_layers} layers, {router.top_k}"
      f" and {cfg.moe.n_shared} shared for a token"
    )
  return sizes | {"MTP modules": str(cfg.mtp.depth)}


def active_weights(cfg: config.Model) -> int:
  """Number of matrix weights that one token is multiplied with, without MTP.

  Attention, the dense or the shared and the chosen top-k experts, router and
  head. The embedding is a lookup, and the scales of norms are no matrices.
  """
  specs = transformer.specs(cfg)
  main = {name: spec for name, spec in specs.items() if name != "mtp"}
  leaves = jax.tree.leaves(main)
  scales = [spec for spec in leaves if spec.axes[-1] == "norm"]
  return parameter_counts(cfg)["active"] - param_spec.count(scales)


def forward_flops(cfg: config.Model, n_tokens: int, n_logits: int) -> int:
  """Matrix-product FLOPs of the forward pass of one text, without MTP.

  For each token 2 per weight of `active_weights`, the head's only where its
  logits are computed; for each layer, head and pair of a token with one that
  it attends to, 2 * (qk_dim + v_dim). Keys and values count once per token, as
  if a cache held them: a cache of latents expands them again, with more FLOPs.

  Args:
    cfg: sizes of the model.
    n_tokens: tokens read, at once or one after the other.
    n_logits: tokens that the head is applied to.
  """
  head = cfg.d_model * cfg.vocab_size
  pairs = n_tokens * (n_tokens + 1) // 2
  attention = cfg.attention
  per_pair = (
    cfg.n_layers * attention.n_heads * (attention.qk_dim + attention.v_dim)
  )
  layers = n_tokens * (active_weights(cfg) - head)
  return 2 * (layers + per_pair * pairs + n_logits * head)


def train_flops(cfg: config.Model, n_tokens: int) -> int:
  """Matrix-product FLOPs of training on one text, MTP modules included.

  The backward pass is twice the forward pass; what it computes again
  (`train.remat`) does not count.

  Args:
    cfg: sizes of the model.
    n_tokens: tokens of the text, each with a loss.
  """
  main = forward_flops(cfg, n_tokens, n_tokens)
  return 3 * (main + _mtp_flops(cfg, n_tokens))


def _mtp_flops(cfg: config.Model, n_tokens: int) -> int:
  """FLOPs of the MTP modules' forward pass: projection, layer, head."""
  specs = transformer.specs(cfg).get("mtp", {})
  scales = [s for s in jax.tree.leaves(specs) if s.axes[-1] == "norm"]
  routed = specs.get("block", {}).get("ffn", {}).get("experts", {})
  n_experts = cfg.router.n_experts
  weights = param_spec.count(specs) - param_spec.count(scales)
  weights -= (
    param_spec.count(routed)
    * (n_experts - cfg.router.top_k)
    // max(n_experts, 1)
  )
  weights += cfg.mtp.depth * cfg.d_model * cfg.vocab_size
  pairs = n_tokens * (n_tokens + 1) // 2
  attention = cfg.attention
  per_pair = attention.n_heads * (attention.qk_dim + attention.v_dim)
  return 2 * (n_tokens * weights + cfg.mtp.depth * per_pair * pairs)

"""Released checkpoints to test with: small, random, written by `transformers`.

It is the oracle, from outside: nothing here uses the package.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors import torch as files

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

V3 = {
  "vocab_size": 259,
  "hidden_size": 64,
  "num_hidden_layers": 3,
  "first_k_dense_replace": 1,
  "intermediate_size": 96,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "q_lora_rank": 48,
  "kv_lora_rank": 32,
  "qk_nope_head_dim": 16,
  "qk_rope_head_dim": 8,
  "v_head_dim": 16,
  "n_shared_experts": 1,
  "moe_intermediate_size": 40,
  "n_routed_experts": 8,
  "num_experts_per_tok": 2,
  "n_group": 4,
  "topk_group": 2,
  "num_nextn_predict_layers": 0,
}
V2 = {
  name: value
  for name, value in V3.items()
  if name != "num_nextn_predict_layers"
} | {
  "num_experts_per_tok": 3,
  "n_shared_experts": 2,
  "topk_method": "group_limited_greedy",
  "routed_scaling_factor": 16.0,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 10_000.0,
  "factor": 40.0,
  "original_max_position_embeddings": 16,
  "beta_fast": 32,
  "beta_slow": 1,
  "mscale": 1.0,
  "mscale_all_dim": 1.0,
}


def model(facts=None, *, seed=0, kind="V3", std=0.05, bias_std=2.0):
  """A random model; biases of the router are far from 0."""
  torch.manual_seed(seed)
  config = getattr(transformers, f"Deepseek{kind}Config")(
    **({"V3": V3, "V2": V2}[kind] | (facts or {})),
    initializer_range=std,
    attn_implementation="eager",
  )
  made = getattr(transformers, f"Deepseek{kind}ForCausalLM")(config).eval()
  with torch.no_grad():
    for name, tensor in made.named_parameters():
      if "norm" in name:
        tensor.add_(torch.randn_like(tensor) * 0.2)
    for name, tensor in made.named_buffers():
      if "e_score_correction_bias" in name:
        tensor.normal_(std=bias_std)
  return made


def logits(model, tokens):
  with torch.no_grad():
    return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def save(model, folder, **settings):
  model.save_pretrained(folder, **settings)
  return pathlib.Path(folder)


def tensors(folder):
  """All tensors of a folder, as torch has them."""
  found = {}
  for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
    found |= files.load_file(path)
  return found


def raw(folder):
  """All tensors of a folder: {name: (dtype, shape, bytes)}."""
  return {
    name: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes())
    for name, t in tensors(folder).items()
  }


def rewrite(folder, change, facts=None):
  """Changes the tensors of a folder, as one file, and its config.json."""
  folder, found = pathlib.Path(folder), tensors(folder)
  found = change(found) or found
  for path in folder.glob("*.safetensors*"):
    path.unlink()
  found = {name: t.contiguous().clone() for name, t in found.items()}
  files.save_file(found, folder / "model.safetensors", {"format": "pt"})
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | (facts or {})))
  return folder


def with_mtp(folder, seed=0):
  """A V3 checkpoint with an MTP layer, and what computes that layer's logits.

  The last of one layer more becomes the MTP layer.
  """
  n = V3["num_hidden_layers"]
  longer = model({"num_hidden_layers": n + 1}, seed=seed)
  save(longer, folder)
  generator = torch.Generator().manual_seed(seed)
  random = lambda *shape: torch.randn(shape, generator=generator)
  d, prefix = V3["hidden_size"], f"model.layers.{n}."
  own = {name: 1 + 0.2 * random(d) for name in ("enorm", "hnorm")}
  own |= {"shared_head.norm": 1 + 0.2 * random(d)}
  own |= {"eh_proj": 0.1 * random(d, 2 * d)}

  def change(found):
    found |= {f"{prefix}{name}.weight": t for name, t in own.items()}
    found[f"{prefix}embed_tokens.weight"] = found["model.embed_tokens.weight"]
    found[f"{prefix}shared_head.head.weight"] = found["lm_head.weight"]

  facts = {"num_hidden_layers": n, "num_nextn_predict_layers": 1}
  rewrite(folder, change, facts)
  return pathlib.Path(folder), _Mtp(longer, own)


class _Mtp:
  """Section 2.2 with the layers of `transformers`."""

  def __init__(self, longer, own):
    self._longer, self._own = longer, own

  def logits(self, tokens):
    """[B, T, C] of the main model, [B, T - 1, C] of the MTP layer."""
    core, own = self._longer.model, self._own
    ids = torch.from_numpy(tokens).long()
    *layers, last = core.layers
    with torch.no_grad():
      hidden = core.norm(self._through(layers, core.embed_tokens(ids)))
      ahead = self._norm(core.embed_tokens(ids[:, 1:]), own["enorm"])
      behind = self._norm(hidden[:, :-1], own["hnorm"])
      x = torch.cat([ahead, behind], -1) @ own["eh_proj"].T
      x = self._norm(self._through([last], x), own["shared_head.norm"])
      head = self._longer.lm_head
      return head(hidden).numpy(), head(x).numpy()

  def _through(self, layers, x):
    n = x.shape[1]
    places = torch.arange(n)[None]
    mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
    angles = self._longer.model.rotary_emb(x, position_ids=places)
    for layer in layers:
      x = layer(
        x, attention_mask=mask, position_ids=places, position_embeddings=angles
      )
    return x

  @staticmethod
  def _norm(x, gain):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain


def random_tokens(*shape, vocab_size=V3["vocab_size"], seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, vocab_size, shape).astype(np.int32)


def in_fp8(folder, tile=(16, 16), seed=0):
  """Turns the layers' matrices of a folder into FP8 with random scales."""
  generator = torch.Generator().manual_seed(seed)
  layers = ("_proj.weight", "kv_a_proj_with_mqa.weight")

  def change(found):
    for name in [n for n in found if n.endswith(layers)]:
      if "eh_proj" in name:
        continue
      n_out, n_in = found[name].shape
      grid = -(-n_out // tile[0]), -(-n_in // tile[1])
      scales = 1e-3 + 1e-3 * torch.rand(grid, generator=generator)
      numbers = torch.randn(n_out, n_in, generator=generator) * 60
      found[name] = numbers.clamp(-448, 448).to(torch.float8_e4m3fn)
      found[f"{name}_scale_inv"] = scales
    return found

  how = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(tile),
  }
  return rewrite(folder, change, {"quantization_config": how})

"""Worker of `scripts.bench`: the train step of `transformers`' DeepSeek-V3.

The settings are the fastest that were found for it on CPU: grouped GEMM over
the experts, eager attention, the whole model through `torch.compile`, fused
AdamW. The environment that it likes is in `scripts.bench`. Runs in any
interpreter that has torch and transformers; JAX is not needed.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from scripts.bench import worker

Step = Callable[[], float]


def model_config(
  settings: dict[str, Any], n_positions: int, **options: Any
) -> transformers.DeepseekV3Config:
  """Configuration in transformers of a run from `config.flatten`; no MTP."""
  model = {
    path.removeprefix("model."): value
    for path, value in settings.items()
    if path.startswith("model.")
  }
  return transformers.DeepseekV3Config(
    vocab_size=model["vocab_size"],
    hidden_size=model["d_model"],
    num_hidden_layers=model["n_layers"],
    first_k_dense_replace=model["n_dense_layers"],
    intermediate_size=model["dense_ffn_dim"],
    num_attention_heads=model["attention.n_heads"],
    num_key_value_heads=model["attention.n_heads"],
    q_lora_rank=model["attention.q_rank"] or None,
    kv_lora_rank=model["attention.kv_rank"],
    qk_nope_head_dim=model["attention.nope_dim"],
    qk_rope_head_dim=model["attention.rope_dim"],
    v_head_dim=model["attention.v_dim"],
    n_shared_experts=model["moe.n_shared"],
    moe_intermediate_size=model["moe.ffn_dim"],
    n_routed_experts=model["router.n_experts"],
    num_experts_per_tok=model["router.top_k"],
    n_group=model["router.n_groups"],
    topk_group=model["router.top_groups"],
    routed_scaling_factor=model["router.scale"],
    norm_topk_prob=model["router.renormalize"],
    rms_norm_eps=model["norm_eps"],
    initializer_range=model["init_std"],
    max_position_embeddings=n_positions,
    num_mtp_layers=0,
    **options,
  )


def _train(job: dict[str, Any]) -> Step:
  """The same run as ours: model, batch, AdamW, clipping, random tokens."""
  settings = job["settings"]
  torch.manual_seed(0)
  model = transformers.DeepseekV3ForCausalLM(
    model_config(
      settings,
      settings["data.seq_len"],
      use_cache=False,
      attn_implementation="eager",
      experts_implementation="grouped_mm",
    )
  ).train()
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=settings["optim.peak_lr"],
    betas=(settings["optim.beta1"], settings["optim.beta2"]),
    eps=settings["optim.eps"],
    weight_decay=settings["optim.weight_decay"],
    fused=True,
  )
  compiled = torch.compile(model)
  shape = (settings["train.batch_size"], settings["data.seq_len"] + 1)

  def step() -> float:
    rows = torch.randint(settings["model.vocab_size"], shape)
    inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    loss = compiled(input_ids=inputs, labels=labels, shift_labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(
      model.parameters(), settings["optim.clip_norm"]
    )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return step


def _reader(
  settings: dict[str, Any], n_positions: int, use_cache: bool
) -> transformers.DeepseekV3ForCausalLM:
  torch.manual_seed(0)
  model = transformers.DeepseekV3ForCausalLM(
    model_config(
      settings,
      n_positions,
      use_cache=use_cache,
      attn_implementation="sdpa",
      experts_implementation="grouped_mm",
    )
  )
  return model.eval().requires_grad_(False)


def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
  """A program for each shape of the arguments."""
  return torch.compile(function, dynamic=False, fullgraph=True)


def _prefill(job: dict[str, Any]) -> Step:
  """The logits of the last token of the prompts."""
  prompts = torch.tensor(job["prompts"])
  model = _reader(job["settings"], prompts.shape[1], use_cache=False)

  @_compiled
  def logits(ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, logits_to_keep=1).logits

  @torch.inference_mode()
  def step() -> float:
    return logits(prompts).max().item()

  return step


def _decode(job: dict[str, Any]) -> Step:
  """Writes the most likely token, again and again, behind the prompts."""
  prompts = torch.tensor(job["prompts"])
  n_texts, n = prompts.shape
  length = n + job["new"]
  model = _reader(job["settings"], length, use_cache=True)
  cache = transformers.StaticCache(config=model.config, max_cache_len=length)
  # The last new token is not read any more.
  starts = [0, *range(n, length - 1)]
  places = [
    torch.arange(i, i + 1 if i else n).repeat(n_texts, 1) for i in starts
  ]

  @_compiled
  def following(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits = model(
      input_ids=ids, position_ids=positions, cache=cache, logits_to_keep=1
    ).logits
    return logits[:, -1].argmax(-1, keepdim=True)

  @torch.inference_mode()
  def step() -> float:
    cache.reset()
    model.set_experts_implementation("grouped_mm")
    ids = following(prompts, places[0])
    written = [ids]
    model.set_experts_implementation("batched_mm")
    for positions in places[1:]:
      ids = following(ids, positions)
      written.append(ids)
    # What is compiled is only for these shapes and settings, which stay.
    torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    return float(torch.cat(written).sum())

  with torch.inference_mode():
    model(input_ids=prompts[:, :1], cache=cache)  # makes its tensors
  return step


def prepare(job: dict[str, Any]) -> worker.Task:
  """The worker's step of `job["what"]`, on random parameters."""
  makers = {"train": _train, "prefill": _prefill, "decode": _decode}
  step = makers[job["what"]](job)
  x = torch.randn(worker.PEAK_SIZE, worker.PEAK_SIZE)
  version = (
    f"transformers {transformers.__version__}, torch {torch.__version__}"
  )
  return worker.Task(step=step, matmul=lambda: x @ x, version=version)


if __name__ == "__main__":
  worker.serve(prepare)

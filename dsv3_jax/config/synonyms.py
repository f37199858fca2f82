"""Names that settings have elsewhere, and hints where a name is wrong."""

import difflib
import itertools
from collections.abc import Iterable, Mapping

# Keys of config.json of released checkpoints, and settings of `config.Model`
# with the same value.
CONFIG_JSON = {
  "vocab_size": "vocab_size",
  "hidden_size": "d_model",
  "num_hidden_layers": "n_layers",
  "first_k_dense_replace": "n_dense_layers",
  "intermediate_size": "dense_ffn_dim",
  "rms_norm_eps": "norm_eps",
  "initializer_range": "init_std",
  "num_attention_heads": "attention.n_heads",
  "q_lora_rank": "attention.q_rank",
  "kv_lora_rank": "attention.kv_rank",
  "qk_nope_head_dim": "attention.nope_dim",
  "qk_rope_head_dim": "attention.rope_dim",
  "v_head_dim": "attention.v_dim",
  "n_shared_experts": "moe.n_shared",
  "moe_intermediate_size": "moe.ffn_dim",
  "n_routed_experts": "router.n_experts",
  "num_experts_per_tok": "router.top_k",
  "n_group": "router.n_groups",
  "topk_group": "router.top_groups",
  "norm_topk_prob": "router.renormalize",
  "routed_scaling_factor": "router.scale",
  "num_nextn_predict_layers": "mtp.depth",
}
# The same of its rope_scaling, and settings of `config.Yarn`.
CONFIG_JSON_YARN = {
  "factor": "factor",
  "original_max_position_embeddings": "original_len",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "mscale_all_dim": "mscale",
}
# Other names of papers, libraries and programs, and the setting or the --flag
# that is meant. The last word of a setting itself is not among them.
SYNONYMS = CONFIG_JSON | {
  # DeepSeek's inference code.
  "dim": "d_model",
  "inter_dim": "dense_ffn_dim",
  "moe_inter_dim": "moe.ffn_dim",
  "n_activated_experts": "router.top_k",
  "n_expert_groups": "router.n_groups",
  "n_limited_groups": "router.top_groups",
  "route_scale": "router.scale",
  "score_func": "router.score",
  "max_seq_len": "data.seq_len",
  "original_seq_len": "attention.yarn.original_len",
  "rope_factor": "attention.yarn.factor",
  # The rest of config.json.
  "scoring_func": "router.score",
  "max_position_embeddings": "data.seq_len",
  "rope_scaling": "attention.yarn.factor",
  "aux_loss_alpha": "router.balance_weight",
  "original_max_position_embeddings": "attention.yarn.original_len",
  "mscale_all_dim": "attention.yarn.mscale",
  "num_key_value_heads": "attention.n_heads",
  "torch_dtype": "precision.recipe",
  # Sizes.
  "n_embd": "d_model",
  "embed_dim": "d_model",
  "emb_dim": "d_model",
  "model_dim": "d_model",
  "width": "d_model",
  "layers": "n_layers",
  "num_layers": "n_layers",
  "n_layer": "n_layers",
  "heads": "attention.n_heads",
  "num_heads": "attention.n_heads",
  "n_head": "attention.n_heads",
  "d_ff": "dense_ffn_dim",
  "experts": "router.n_experts",
  "num_experts": "router.n_experts",
  "num_local_experts": "router.n_experts",
  "num_shared_experts": "moe.n_shared",
  "topk": "router.top_k",
  "experts_per_token": "router.top_k",
  "gamma": "router.bias_speed",
  "bias_update_speed": "router.bias_speed",
  "aux_loss_weight": "router.balance_weight",
  "lambda": "mtp.weight",
  "mtp_weight": "mtp.weight",
  "mtp_depth": "mtp.depth",
  "mtp_layers": "mtp.depth",
  "vocab": "vocab_size",
  # Data.
  "context": "data.seq_len",
  "context_length": "data.seq_len",
  "context_len": "data.seq_len",
  "block_size": "data.seq_len",
  "seq_length": "data.seq_len",
  "sequence_length": "data.seq_len",
  "max_length": "data.seq_len",
  "max_seq_length": "data.seq_len",
  "dataset": "data.path",
  "data": "data.path",
  "data_path": "data.path",
  "data_dir": "data.path",
  "corpus": "data.path",
  "train_file": "data.path",
  # Optimizer and schedules.
  "lr": "optim.peak_lr",
  "learning_rate": "optim.peak_lr",
  "max_lr": "optim.peak_lr",
  "min_learning_rate": "optim.min_lr",
  "wd": "optim.weight_decay",
  "decay": "optim.weight_decay",
  "b1": "optim.beta1",
  "adam_beta1": "optim.beta1",
  "b2": "optim.beta2",
  "adam_beta2": "optim.beta2",
  "epsilon": "optim.eps",
  "adam_eps": "optim.eps",
  "adam_epsilon": "optim.eps",
  "clip": "optim.clip_norm",
  "grad_clip": "optim.clip_norm",
  "gradient_clipping": "optim.clip_norm",
  "max_grad_norm": "optim.clip_norm",
  "optimizer": "optim.name",
  "lr_schedule": "schedule.name",
  "lr_scheduler_type": "schedule.name",
  "warmup": "schedule.warmup_until",
  "warmup_ratio": "schedule.warmup_until",
  "warmup_steps": "schedule.warmup_until",
  "lr_warmup_steps": "schedule.warmup_until",
  # Training.
  "bs": "train.batch_size",
  "batch": "train.batch_size",
  "global_batch_size": "train.batch_size",
  "train_batch_size": "train.batch_size",
  "grad_accum": "train.micro_batches",
  "gradient_accumulation_steps": "train.micro_batches",
  "micro_batch_size": "train.micro_batches",
  "epochs": "train.tokens",
  "num_epochs": "train.tokens",
  "num_train_epochs": "train.tokens",
  "max_tokens": "train.tokens",
  "total_tokens": "train.tokens",
  "gradient_checkpointing": "train.remat",
  "activation_checkpointing": "train.remat",
  "dtype": "precision.recipe",
  "bf16": "precision.recipe",
  "fp16": "precision.recipe",
  "mixed_precision": "precision.recipe",
  "pipeline_schedule": "parallel.schedule",
  "fsdp": "parallel.layout",
  "zero1": "parallel.layout",
  "save_every": "checkpoint.every",
  "save_steps": "checkpoint.every",
  "save_interval": "checkpoint.every",
  "checkpoint_every": "checkpoint.every",
  "save_total_limit": "checkpoint.keep",
  "eval_every": "evaluate.every",
  "eval_steps": "evaluate.every",
  "eval_interval": "evaluate.every",
  "eval_batch_size": "evaluate.batch_size",
  # Flags, not settings.
  "seed": "--seed",
  "steps": "--steps",
  "max_steps": "--steps",
  "num_steps": "--steps",
  "max_iters": "--steps",
  "train_steps": "--steps",
  "workdir": "--workdir",
  "output_dir": "--workdir",
  "mesh": "--mesh",
  "variant": "--variant",
}


def meant(name: str, paths: Iterable[str]) -> list[str]:
  """Lists settings, or a --flag, that a name could mean.

  `paths` are those of all settings, without a leading `model.`. A name may lack
  its group or have a wrong one, be a synonym, or be misspelt.
  """
  by_word: dict[str, list[str]] = {}
  for path in paths:
    by_word.setdefault(path.rpartition(".")[2], []).append(path)
  known = set(itertools.chain(*by_word.values()))
  for word, target in SYNONYMS.items():
    if target in known or target.startswith("--"):
      by_word.setdefault(word, [target])
  group, _, word = name.lower().replace("-", "_").rpartition(".")
  if word not in by_word:
    close = difflib.get_close_matches(word, by_word, n=1, cutoff=0.75)
    (word,) = close or [""]
  paths = by_word.get(word, [])
  return [path for path in paths if path == f"{group}.{word}"] or paths


def hint(name: str, docs: Mapping[str, str]) -> str:
  """Says what to write for a setting that there is not.

  `docs` are descriptions of all settings by path, without a leading `model.`.
  """
  match meant(name, docs):
    case []:
      return "; --list_settings shows all"
    case [flag] if flag.startswith("--"):
      return f"; use the flag {flag}"
    case [path]:
      return f"; did you mean {path!r}? ({docs[path]})"
    case paths:
      return f"; did you mean {' or '.join(map(repr, paths))}?"

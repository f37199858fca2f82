"""config.json of released checkpoints, both ways."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dsv3_jax import config
from dsv3_jax.config import model as model_lib
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError

# The key of config.json and the setting of `config.Model` that are one number.
_NUMBERS = {
  "vocab_size": "vocab_size",
  "hidden_size": "d_model",
  "num_hidden_layers": "n_layers",
  "first_k_dense_replace": "n_dense_layers",
  "intermediate_size": "dense_ffn_dim",
  "rms_norm_eps": "norm_eps",
  "initializer_range": "init_std",
  "num_attention_heads": "mla.n_heads",
  "q_lora_rank": "mla.q_rank",
  "kv_lora_rank": "mla.kv_rank",
  "qk_nope_head_dim": "mla.nope_dim",
  "qk_rope_head_dim": "mla.rope_dim",
  "v_head_dim": "mla.v_dim",
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
_NULL = {  # what null, or nothing, means
  "q_lora_rank": 0,
  "n_shared_experts": 0,
  "n_group": 1,
  "topk_group": 1,
  "num_nextn_predict_layers": 0,
  "rms_norm_eps": 1e-6,
  "initializer_range": 0.02,
  "routed_scaling_factor": 1.0,
}
_YARN = {
  "factor": "factor",
  "original_max_position_embeddings": "original_len",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "mscale_all_dim": "mscale",
}
_GATES = {  # model_type: score, default of norm_topk_prob, choice of experts
  "deepseek_v3": ("sigmoid", True, ("noaux_tc",)),
  "kimi_k2": ("sigmoid", True, ("noaux_tc",)),
  "deepseek_v2": ("softmax", False, ("greedy", "group_limited_greedy")),
}
_ONLY = {  # the one value that we compute
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "tie_word_embeddings": False,
  "moe_layer_freq": 1,
  "rope_interleave": True,
}


def read(facts: dict[str, Any]) -> config.Model:
  """The model that a config.json describes.

  Raises:
    InputError: it is none of this architecture; one line a problem.
  """
  kind = facts.get("model_type")
  if not isinstance(kind, str) or kind not in _GATES:
    raise InputError(
      f"config.json: model_type={kind!r}: must be one of {', '.join(_GATES)}"
    )
  problems = list(_unsupported(facts))
  values = {}
  for key, path in _NUMBERS.items():
    value = facts.get(key)
    if value is None:
      value = _NULL.get(key)
    if key == "norm_topk_prob" and value is None:
      value = _GATES[kind][1]
    if value is None:
      problems.append(f"config.json: {key} is missing")
    else:
      values[path] = value
  values["router.score"] = _GATES[kind][0]
  if facts.get("topk_method") == "greedy":
    values |= {"router.n_groups": 1, "router.top_groups": 1}
  try:
    max_len(facts)
    values["mla.rope_theta"], yarn = _rope(facts)
  except InputError as error:
    problems += str(error).splitlines()
  if problems:
    raise InputError("\n".join(problems))
  return _model(values, yarn)


def _unsupported(facts: dict[str, Any]) -> Iterator[str]:
  for key, only in _ONLY.items():
    if facts.get(key, only) != only:
      yield f"config.json: {key}={facts[key]!r}: only {only!r} is known here"
  score, _, methods = _GATES[facts["model_type"]]
  if facts.get("scoring_func", score) != score:
    yield (
      f"config.json: scoring_func={facts['scoring_func']!r}: with"
      f" model_type={facts['model_type']!r} only {score!r} is known here"
    )
  if facts.get("topk_method", methods[0]) not in methods:
    yield (
      f"config.json: topk_method={facts['topk_method']!r}: must be"
      f" {' or '.join(methods)}"
    )
  heads = facts.get("num_attention_heads")
  if facts.get("num_key_value_heads", heads) not in (heads, None):
    yield (
      f"config.json: num_key_value_heads={facts['num_key_value_heads']!r}:"
      f" must be num_attention_heads={heads}"
    )


def _rope(facts: dict[str, Any]) -> tuple[float, model_lib.Yarn]:
  """Base of the rotation, and its extension."""
  rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
  if not isinstance(rope, dict):
    raise InputError(f"config.json: rope_scaling={rope!r}: must be an object")
  theta = rope.get("rope_theta", facts.get("rope_theta", 10_000.0))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, model_lib.Yarn()
  if kind != "yarn":
    raise InputError(f"config.json: rope type {kind!r}: only yarn is known")
  needed = "factor", "original_max_position_embeddings", "mscale_all_dim"
  problems = [
    f"config.json: rope_scaling: {key} is missing"
    for key in needed
    if not rope.get(key)
  ]
  problems += [
    f"config.json: rope_scaling: {key}={rope[key]!r}: only {only!r} is known"
    for key, only in (("attention_factor", None), ("truncate", True))
    if rope.get(key, only) != only
  ]
  if rope.get("mscale", 0) != rope.get("mscale_all_dim", 0):
    problems.append(
      f"config.json: rope_scaling: mscale={rope.get('mscale')!r}: must equal"
      f" mscale_all_dim={rope.get('mscale_all_dim')!r}, or the rotation is"
      " scaled too, which is not known here"
    )
  if problems:
    raise InputError("\n".join(problems))
  given = {ours: rope[key] for key, ours in _YARN.items() if key in rope}
  return theta, _checked(model_lib.Yarn, given)


def _checked(cls: type, values: dict[str, Any]) -> Any:
  """A part of the model; JSON writes whole numbers without a point."""
  floats = {name for name, kind in cls.__annotations__.items() if kind is float}
  return cls(
    **{
      name: float(value) if name in floats and type(value) is int else value
      for name, value in values.items()
    }
  )


def _model(values: dict[str, Any], yarn: model_lib.Yarn) -> config.Model:
  parts = {
    "mla": model_lib.MLA,
    "moe": model_lib.MoE,
    "router": model_lib.Router,
    "mtp": model_lib.MTP,
  }
  if values["router.score"] == "softmax":  # balanced by a loss alone
    values["router.bias_speed"] = 0.0
  made, problems = {}, []
  for name, cls in parts.items():
    own = {
      path.partition(".")[2]: value
      for path, value in values.items()
      if path.startswith(f"{name}.")
    }
    if name == "mla":
      own["yarn"] = yarn
    try:
      made[name] = _checked(cls, own)
    except InputError as error:
      problems += [f"config.json: {line}" for line in str(error).splitlines()]
  if problems:
    raise InputError("\n".join(problems))
  whole = {path: value for path, value in values.items() if "." not in path}
  return _checked(config.Model, whole | made)


def max_len(facts: dict[str, Any]) -> int:
  """Tokens that the model reads."""
  length = facts.get("max_position_embeddings", 4096)
  if type(length) is not int or length < 1:
    raise InputError(
      f"config.json: max_position_embeddings={length!r}: must be a number"
      " above 0"
    )
  return length


def run(facts: dict[str, Any], model: config.Model) -> config.Run:
  """A run of the model; what is not of the network is that of preset S."""
  length = max_len(facts)
  if model.mla.yarn.factor > 1:
    length = model.mla.yarn.original_len
  data = dataclasses.replace(presets.S.data, seq_len=min(length, 4096))
  return dataclasses.replace(presets.S, model=model, data=data)


def tile(facts: dict[str, Any]) -> tuple[int, int] | None:
  """The tile of weights in FP8, outputs and inputs; None: there are none.

  Raises:
    InputError: they are quantized in another way.
  """
  how = facts.get("quantization_config")
  if how is None:
    return None
  wanted = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
  }
  problems = (
    ["must be an object"]
    if not isinstance(how, dict)
    else [
      f"{key}={how.get(key)!r}: must be {value!r}"
      for key, value in wanted.items()
      if how.get(key, value) != value or "quant_method" not in how
    ]
  )
  size = how.get("weight_block_size") if isinstance(how, dict) else None
  if not problems and not (
    isinstance(size, list)
    and len(size) == 2
    and all(type(n) is int and n > 0 for n in size)
  ):
    problems.append(f"weight_block_size={size!r}: must be two numbers above 0")
  if problems:
    raise InputError(
      "\n".join(f"config.json: quantization_config: {p}" for p in problems)
    )
  return tuple(size)


def write(run: config.Run) -> dict[str, Any]:
  """The config.json of a model, without what its files are written in.

  Raises:
    InputError: the model cannot be said in one.
  """
  model = run.model
  if model.mtp.depth and model.mtp.input_state != "post_norm":
    raise InputError(
      f"mtp.input_state={model.mtp.input_state!r}: released checkpoints,"
      " and what reads them, have 'post_norm'"
    )
  if model.mla.norm_eps != 1e-6:
    raise InputError(
      f"mla.norm_eps={model.mla.norm_eps:g}: what reads released checkpoints"
      " takes 1e-06"
    )
  if not model.n_moe_layers:
    raise InputError("a model without mixture layers has no released form")
  settings = config.flatten(model)
  facts = {key: settings[path] for key, path in _NUMBERS.items()}
  facts["q_lora_rank"] = facts["q_lora_rank"] or None
  facts["num_key_value_heads"] = facts["num_attention_heads"]
  yarn = model.mla.yarn
  longest = run.data.seq_len
  facts["rope_theta"] = model.mla.rope_theta
  if yarn.factor > 1:
    longest = int(yarn.max_len)
    facts["rope_scaling"] = {
      "type": "yarn",
      "mscale": yarn.mscale,
    } | {key: getattr(yarn, ours) for key, ours in _YARN.items()}
  v3 = model.router.score == "sigmoid"
  name = "DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"
  grouped = "group_limited_greedy" if model.router.n_groups > 1 else "greedy"
  return (
    facts
    | _ONLY
    | {
      "architectures": [name],
      "model_type": "deepseek_v3" if v3 else "deepseek_v2",
      "max_position_embeddings": longest,
      "scoring_func": model.router.score,
      "topk_method": "noaux_tc" if v3 else grouped,
      "attention_dropout": 0.0,
      "use_cache": True,
    }
  )


# What read() looks at, and what has no meaning for the network itself.
KNOWN = frozenset(_NUMBERS) | frozenset(_ONLY) | frozenset((
    "architectures", "model_type", "num_key_value_heads", "rope_theta",
    "rope_scaling", "rope_parameters", "scoring_func", "topk_method",
    "quantization_config", "auto_map", "max_position_embeddings",
    "attention_dropout", "aux_loss_alpha", "seq_aux", "bos_token_id",
    "eos_token_id", "pad_token_id", "ep_size", "pretraining_tp", "use_cache",
    "torch_dtype", "dtype", "transformers_version", "head_dim", "qk_head_dim",
    "output_router_logits", "num_local_experts", "num_experts",
))  # fmt: skip

"""Converts config.json of released checkpoints to a model, and back."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dsv3_jax import config
from dsv3_jax.config import model as model_lib
from dsv3_jax.config import presets, synonyms
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.model.router import SCORES

# Keys of config.json -> settings of `config.Model` with the same value.
_SETTINGS, _YARN = synonyms.CONFIG_JSON, synonyms.CONFIG_JSON_YARN
_NULL = {  # what null means; null of any other key is refused
  "q_lora_rank": 0,
  "n_shared_experts": 0,
  "norm_topk_prob": False,
  "num_nextn_predict_layers": 0,
}
# What a missing key means, where DeepSeek's own class of the model type and
# that of `transformers` agree; another key that is missing is refused.
_V3_DEFAULTS = {
  "q_lora_rank": 1536,
  "n_shared_experts": 1,
  "n_group": 8,
  "topk_group": 4,
  "norm_topk_prob": True,
  "routed_scaling_factor": 2.5,
  "num_nextn_predict_layers": 1,
  "rms_norm_eps": 1e-6,
  "initializer_range": 0.02,
  "max_position_embeddings": 4096,
}
_V2_DEFAULTS = {
  "q_lora_rank": 1536,
  "n_group": None,
  "topk_group": None,
  "norm_topk_prob": False,
  "routed_scaling_factor": 1.0,
  "num_nextn_predict_layers": 0,
  "rms_norm_eps": 1e-6,
  "initializer_range": 0.02,
  "max_position_embeddings": 2048,
}
# The quantization that is read and written, with tiles of `weight_block_size`.
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
_RELEASED = "a released checkpoint"  # words of messages


@dataclasses.dataclass(frozen=True)
class _ModelType:
  """The router of a `model_type`, in the terms of config.json."""

  score: str  # key of the scores in model/router.py
  group_top: int  # a group ranks by so many of its best experts
  architecture: str
  defaults: Mapping[str, Any]  # of keys that are missing
  topk_methods: tuple[str, ...]  # with one group, the default; with several
  has_bias: bool  # files have e_score_correction_bias
  # Values of norm_topk_prob of which all software has the same opinion: of V2's
  # true, `transformers` ignores it, and DeepSeek's code ignores the scale.
  renormalize: tuple[bool, ...]


_V3 = _ModelType(
  score="sigmoid",
  group_top=2,
  architecture="DeepseekV3ForCausalLM",
  defaults=_V3_DEFAULTS,
  topk_methods=("noaux_tc",),
  has_bias=True,
  renormalize=(True, False),
)
_GREEDY = "greedy"  # chooses among all experts, whatever the groups are
_V2 = _ModelType(
  score="softmax",
  group_top=1,
  architecture="DeepseekV2ForCausalLM",
  defaults=_V2_DEFAULTS,
  topk_methods=(_GREEDY, "group_limited_greedy"),
  has_bias=False,
  renormalize=(False,),
)
# A model is written with the first type that has the score of its router.
_MODEL_TYPES = {"deepseek_v3": _V3, "kimi_k2": _V3, "deepseek_v2": _V2}
_REQUIRED = {  # the only supported value
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "tie_word_embeddings": False,
  "moe_layer_freq": 1,
  "rope_interleave": True,
}


def read_model(config_json: dict[str, Any]) -> config.Model:
  """Returns the model that a config.json describes.

  Raises:
    InputError: the model is not of this architecture; lists all problems.
  """
  model_type = config_json.get("model_type")
  if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
    raise InputError(
      f"config.json: model_type={model_type!r}: must be one of"
      f" {', '.join(_MODEL_TYPES)}"
    )
  problems = list(_unsupported_settings(config_json))
  method, *_ = _MODEL_TYPES[model_type].topk_methods
  defaults = {
    key: value
    for key, value in _MODEL_TYPES[model_type].defaults.items()
    if key not in config_json
  }
  config_json = defaults | config_json
  if config_json.get("topk_method", method) == _GREEDY:
    config_json |= {"n_group": 1, "topk_group": 1}
  values = {}
  for key, path in _SETTINGS.items():
    value = config_json.get(key)
    if value is None and key in config_json:
      value = _NULL.get(key)
    if value is None:
      problems.append(f"config.json: {key} is missing or null")
    else:
      values[path] = value
  values["router.score"] = _MODEL_TYPES[model_type].score
  try:
    max_len(config_json)
    values["attention.rope_theta"], yarn = _rope(config_json)
  except InputError as error:
    problems += str(error).splitlines()
  raise_problems(problems)
  try:
    return _model(values, yarn)
  except InputError as error:
    taken = [f"{key}={value}" for key, value in defaults.items()]
    note = "\nconfig.json: defaults of missing keys: " + ", ".join(taken)
    raise InputError(f"{error}{note * bool(taken)}") from error


def _unsupported_settings(config_json: dict[str, Any]) -> Iterator[str]:
  name = config_json["model_type"]
  heads, model_type = config_json.get("num_attention_heads"), _MODEL_TYPES[name]
  score, methods = model_type.score, model_type.topk_methods
  for key, allowed, must_be in (
    *((key, (only,), f"{only!r}") for key, only in _REQUIRED.items()),
    ("scoring_func", (score,), f"{score!r} with model_type={name!r}"),
    ("topk_method", methods, " or ".join(methods)),
    ("num_key_value_heads", (heads, None), f"num_attention_heads={heads}"),
  ):
    if config_json.get(key, allowed[0]) not in allowed:
      yield f"config.json: {key}={config_json[key]!r}: must be {must_be}"
  if True not in model_type.renormalize and config_json.get("norm_topk_prob"):
    yield f"config.json: norm_topk_prob=True: must be False in {name}"


def _rope(config_json: dict[str, Any]) -> tuple[float, model_lib.Yarn]:
  """Returns the base of the rotary embedding, and its YaRN extension."""
  new, old = config_json.get("rope_parameters"), config_json.get("rope_scaling")
  rope = new or old or {}
  if not isinstance(rope, dict):
    raise InputError(f"config.json: rope_scaling={rope!r}: must be an object")
  theta = rope.get("rope_theta", config_json.get("rope_theta", 10_000.0))
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  if rope_type == "default":
    return theta, model_lib.Yarn()
  if rope_type != "yarn":
    raise InputError(
      f"config.json: rope_type={rope_type!r}: must be 'default' or 'yarn'"
    )
  raise_problems(_unsupported_yarn(rope), "config.json: rope_scaling: ")
  given = {ours: rope[key] for key, ours in _YARN.items() if key in rope}
  return theta, _construct(model_lib.Yarn, given)


def _unsupported_yarn(rope: dict[str, Any]) -> Iterator[str]:
  for key in ("factor", "original_max_position_embeddings", "mscale_all_dim"):
    if not rope.get(key):
      yield f"{key} is missing"
  for key, only in (("attention_factor", None), ("truncate", True)):
    if rope.get(key, only) != only:
      yield f"{key}={rope[key]!r}: must be {only!r}"
  if rope.get("mscale", 0) != rope.get("mscale_all_dim", 0):
    yield (
      f"mscale={rope.get('mscale')!r}: must equal"
      f" mscale_all_dim={rope.get('mscale_all_dim')!r}: a scaled rotation is"
      " not supported"
    )


def _construct(cls: type, values: dict[str, Any]) -> Any:
  """Constructs a config class; JSON may write a float as an integer."""
  types = cls.__annotations__

  def convert(name: str, value: Any) -> Any:
    is_float = types.get(name) is float and type(value) is int
    return float(value) if is_float else value

  return cls(**{name: convert(name, value) for name, value in values.items()})


def _model(values: dict[str, Any], yarn: model_lib.Yarn) -> config.Model:
  """Returns the model with values by the path of the setting."""
  classes = {
    "attention": model_lib.MLA,
    "moe": model_lib.MoE,
    "router": model_lib.Router,
    "mtp": model_lib.MTP,
  }
  values = values | {"attention.yarn": yarn}
  if not has_router_bias(values["router.score"]):  # balanced by a loss alone
    values["router.bias_speed"] = 0.0
  sections, problems = collections.defaultdict(dict), []
  for path, value in values.items():
    section, _, name = path.rpartition(".")
    sections[section][name] = value
  flat = sections.pop("")
  for name, cls in classes.items():
    try:
      flat[name] = _construct(cls, sections[name])
    except InputError as error:
      problems += [f"config.json: {line}" for line in str(error).splitlines()]
  raise_problems(problems)
  return _construct(config.Model, flat)


def max_len(config_json: dict[str, Any]) -> int:
  """Returns the longest context of the model in tokens."""
  defaults = _MODEL_TYPES[config_json["model_type"]].defaults
  length = (defaults | config_json)["max_position_embeddings"]
  if type(length) is int and length > 0:
    return length
  setting = f"max_position_embeddings={length!r}"
  raise InputError(f"config.json: {setting}: must be an integer above 0")


def make_run(config_json: dict[str, Any], model: config.Model) -> config.Run:
  """Returns a run of the model; all other settings are those of preset S."""
  length = max_len(config_json)
  if model.attention.yarn.factor > 1:
    length = model.attention.yarn.original_len
  data = dataclasses.replace(presets.S.data, seq_len=min(length, 4096))
  return dataclasses.replace(presets.S, model=model, data=data)


def read_fp8_tile(config_json: dict[str, Any]) -> tuple[int, int] | None:
  """Returns the FP8 tile of outputs and inputs; None: weights are not FP8.

  Raises:
    InputError: weights are quantized in another way.
  """
  quantization = config_json.get("quantization_config")
  if quantization is None:
    return None
  if not isinstance(quantization, dict):
    raise InputError("config.json: quantization_config: must be an object")
  given = FP8 | quantization
  given["quant_method"] = quantization.get("quant_method")  # has no default
  problems = [
    f"{key}={given[key]!r}: must be {value!r}"
    for key, value in FP8.items()
    if given[key] != value
  ]
  size = quantization.get("weight_block_size")
  is_pair = isinstance(size, list) and len(size) == 2
  is_tile = is_pair and all(type(n) is int and n > 0 for n in size)
  if not problems and not is_tile:
    problems.append(f"weight_block_size={size!r}: must be two integers above 0")
  raise_problems(problems, "config.json: quantization_config: ")
  return tuple(size)


def ignored_settings(config_json: dict[str, Any]) -> Iterator[str]:
  """Yields a note for each setting that changes nothing here."""
  rope = "rope_parameters", "rope_scaling"
  known = {"": KNOWN} | dict.fromkeys(rope, _KNOWN_ROPE)
  known["quantization_config"] = {*FP8, "weight_block_size", "scale_fmt"}
  for section in known:
    settings = config_json.get(section) if section else config_json
    prefix = f"{section}." if section else ""
    for key in sorted(set(settings or ()) - set(known[section])):
      value = settings[key]
      yield f"config.json: {prefix}{key}={value!r} is unknown and ignored"
  quantization = config_json.get("quantization_config") or {}
  if scale_fmt := quantization.get("scale_fmt"):
    yield (
      f"config.json: quantization_config.scale_fmt={scale_fmt!r} is how"
      " activations are quantized elsewhere; the scales of weights are read as"
      " they are, powers of two or not"
    )


def make_config_json(run: config.Run) -> dict[str, Any]:
  """Returns the config.json of a model, without the types of its files.

  Raises:
    InputError: config.json cannot express the model.
  """
  model = run.model
  raise_problems(_inexpressible_settings(model))
  settings = config.flatten(model)
  config_json = {key: settings[path] for key, path in _SETTINGS.items()}
  config_json["q_lora_rank"] = config_json["q_lora_rank"] or None
  config_json["num_key_value_heads"] = config_json["num_attention_heads"]
  config_json["rope_theta"] = model.attention.rope_theta
  yarn, longest = model.attention.yarn, run.data.seq_len
  if yarn.factor > 1:
    longest = int(yarn.max_len)
    config_json["rope_scaling"] = {"type": "yarn", "mscale": yarn.mscale} | {
      key: getattr(yarn, ours) for key, ours in _YARN.items()
    }
  name, model_type = _model_type(model.router.score)
  several_groups = model.router.n_groups > 1
  return config_json | {
    **_REQUIRED,
    "architectures": [model_type.architecture],
    "model_type": name,
    "max_position_embeddings": longest,
    "scoring_func": model_type.score,
    "topk_method": model_type.topk_methods[-1 if several_groups else 0],
    "attention_dropout": 0.0,
    "use_cache": True,
  }


def _model_type(score: str) -> tuple[str, _ModelType]:
  """Returns the `model_type` whose router has this score, and its settings.

  Raises:
    InputError: no released checkpoint has such a router.
  """
  for name, model_type in _MODEL_TYPES.items():
    if model_type.score == score:
      return name, model_type
  scores = " or ".join(dict.fromkeys(t.score for t in _MODEL_TYPES.values()))
  raise InputError(f"router.score={score}: must be {scores} in {_RELEASED}")


def has_router_bias(score: str) -> bool:
  """Returns whether released checkpoints of a router score have a bias."""
  return _model_type(score)[1].has_bias


def _inexpressible_settings(model: config.Model) -> Iterator[str]:
  """Yields settings that config.json has no key for, or another value."""
  attention, mtp = model.attention, model.mtp
  if not isinstance(attention, config.MLA):
    yield f"attention.type={attention.type!r}: must be 'mla' in {_RELEASED}"
    return
  if mtp.depth and mtp.input_state != "post_norm":
    yield (
      f"mtp.input_state={mtp.input_state!r}: must be 'post_norm' in {_RELEASED}"
    )
  if attention.norm_eps != 1e-6:
    yield (
      f"attention.norm_eps={attention.norm_eps:g}: must be 1e-06 in {_RELEASED}"
    )
  if attention.yarn.factor > 1 and not attention.yarn.mscale:
    yield (
      f"attention.yarn.mscale=0: must be above 0 in {_RELEASED}, 0 is read as"
      " missing; 1e-9 computes the same"
    )
  yield from _inexpressible_router(model.router)
  if not model.n_moe_layers:
    yield (
      f"n_dense_layers={model.n_dense_layers}: must be below"
      f" n_layers={model.n_layers} in {_RELEASED}"
    )


def _inexpressible_router(router: config.Router) -> Iterator[str]:
  """Yields what software that reads the router's `model_type` does not do."""
  try:
    name, model_type = _model_type(router.score)
  except InputError as error:
    yield str(error)
    return
  if router.renormalize not in model_type.renormalize:
    yield (
      f"router.renormalize={router.renormalize} with router.score="
      f"{router.score}: must be {model_type.renormalize[0]} in {_RELEASED}"
      f" of type {name}"
    )
  ours, theirs = SCORES[router.score].group_top, model_type.group_top
  differ = router.n_groups > 1 and ours != theirs
  if differ or router.n_experts // router.n_groups < theirs:
    yield (
      f"router.n_groups={router.n_groups} of n_experts={router.n_experts}: in"
      f" {_RELEASED} of type {name} groups rank by their best {theirs}"
      f" experts, here by {ours}; it must be the same number, and a group must"
      " have as many"
    )


_KNOWN_ROPE = {
  *_YARN,
  *("type", "rope_type", "rope_theta", "mscale", "attention_factor"),
  "truncate",
}
# Keys that are read, and keys that have no meaning for the model itself.
KNOWN = frozenset(_SETTINGS) | frozenset(_REQUIRED) | frozenset((
    "architectures", "model_type", "num_key_value_heads", "rope_theta",
    "rope_scaling", "rope_parameters", "scoring_func", "topk_method",
    "quantization_config", "auto_map", "max_position_embeddings",
    "attention_dropout", "aux_loss_alpha", "seq_aux", "bos_token_id",
    "eos_token_id", "pad_token_id", "ep_size", "pretraining_tp", "use_cache",
    "torch_dtype", "dtype", "transformers_version", "head_dim", "qk_head_dim",
    "output_router_logits", "num_local_experts", "num_experts",
))  # fmt: skip

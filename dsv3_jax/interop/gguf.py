"""Writes parameters as a GGUF file for llama.cpp and its derivatives.

The file holds the main model only: llama.cpp reads no MTP layers. llama.cpp
computes absorbed attention, so the up-projections of keys and values are
separate tensors with a dim for heads.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import tokenizers

from dsv3_jax import config
from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.interop import hf_mapping, hf_read, resumable
from dsv3_jax.interop.hf_mapping import Block
from dsv3_jax.interop.hf_write import ExportFormat
from dsv3_jax.interop.resumable import Advance
from dsv3_jax.interop.tokenizer_files import DEFAULTS, GenerationDefaults
from dsv3_jax.model.router import SCORES

_ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2]
_T = gguf.MODEL_TENSOR
# By the path of a parameter within its layer: one tensor, or two.
_TENSORS = {
  "embed": (_T.TOKEN_EMBD,),
  "norm": (_T.OUTPUT_NORM,),
  "head": (_T.OUTPUT,),
  "mla_norm": (_T.ATTN_NORM,),
  "mla/q": (_T.ATTN_Q,),
  "mla/q_down": (_T.ATTN_Q_A,),
  "mla/q_norm": (_T.ATTN_Q_A_NORM,),
  "mla/q_up": (_T.ATTN_Q_B,),
  "mla/kv_down": (_T.ATTN_KV_A_MQA,),
  "mla/kv_norm": (_T.ATTN_KV_A_NORM,),
  "mla/kv_up": (_T.ATTN_K_B, _T.ATTN_V_B),
  "mla/out": (_T.ATTN_OUT,),
  "ffn_norm": (_T.FFN_NORM,),
  "ffn/router": (_T.FFN_GATE_INP,),
  "ffn/gate_up": (_T.FFN_GATE, _T.FFN_UP),
  "ffn/down": (_T.FFN_DOWN,),
  "ffn/shared/gate_up": (_T.FFN_GATE_SHEXP, _T.FFN_UP_SHEXP),
  "ffn/shared/down": (_T.FFN_DOWN_SHEXP,),
  "ffn/experts/gate_up": (_T.FFN_GATE_EXP, _T.FFN_UP_EXP),
  "ffn/experts/down": (_T.FFN_DOWN_EXP,),
  hf_mapping.BIAS: (_T.FFN_EXP_PROBS_B,),
}
_GATING_FUNCTIONS = {  # by `router.score`
  "sigmoid": gguf.ExpertGatingFuncType.SIGMOID,
  "softmax": gguf.ExpertGatingFuncType.SOFTMAX,
}
_BETAS = 32.0, 1.0  # of YaRN
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024
_GROUP_TOP = 2  # llama.cpp ranks groups by so many of their best experts
_RAW_TYPES = {
  hf_read.F32: gguf.GGMLQuantizationType.F32,
  hf_read.BF16: gguf.GGMLQuantizationType.BF16,
  hf_read.F16: gguf.GGMLQuantizationType.F16,
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A tensor of the file: one of those that a block, or a stack, becomes."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  stack: list[Block]  # one block, or all experts of a layer
  i: int  # position among the tensors of the path in `_TENSORS`

  @property
  def n_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def validate(model: config.Model) -> Iterator[str]:
  """Yields the reasons why llama.cpp would refuse or misread a model."""
  attention, router = model.attention, model.router
  if not isinstance(attention, config.MLA):
    yield f"attention.type={attention.type!r}: must be 'mla'"
    return
  if bool(attention.q_rank) == _has_plain_queries(model):
    other = "no " if attention.q_rank else ""
    yield (
      f"attention.q_rank={attention.q_rank} with n_layers={model.n_layers}:"
      f" llama.cpp expects {other}compressed queries, with 26 or 27 layers"
      " (V2-Lite, Moonlight) none, else all; export to --hf instead"
    )
  if model.n_layers > _MAX_LAYERS:
    yield f"n_layers={model.n_layers}: llama.cpp has at most {_MAX_LAYERS}"
  if router.n_experts > _MAX_EXPERTS:
    yield (
      f"router.n_experts={router.n_experts}: llama.cpp has at most"
      f" {_MAX_EXPERTS}"
    )
  yarn = attention.yarn
  if yarn.factor > 1 and (yarn.beta_fast, yarn.beta_slow) != _BETAS:
    yield (
      f"attention.yarn.beta_fast={yarn.beta_fast:g}, beta_slow="
      f"{yarn.beta_slow:g}: llama.cpp has {_BETAS[0]:g} and {_BETAS[1]:g},"
      " whatever a file says; export to --hf instead"
    )
  if model.norm_eps != attention.norm_eps:
    yield (
      f"norm_eps={model.norm_eps:g}, attention.norm_eps={attention.norm_eps:g}:"
      " llama.cpp takes one number for both"
    )
  if router.score not in _GATING_FUNCTIONS:
    scores = " and ".join(_GATING_FUNCTIONS)
    yield f"router.score={router.score}: llama.cpp has only {scores}"
  elif _limits_groups(router):
    yield from _group_problems(router)
  if not model.moe.n_shared:
    yield "moe.n_shared=0: llama.cpp expects shared experts"
  if not model.n_moe_layers:
    yield "n_dense_layers=n_layers: llama.cpp expects mixture layers"


def _has_plain_queries(model: config.Model) -> bool:
  """Returns whether llama.cpp expects queries that are not compressed.

  It goes by the sizes of V2-Lite, Moonlight, and a model of 48 layers.
  """
  return model.n_layers in (26, 27) or (
    model.n_layers == 48 and model.vocab_size == 128256
  )


def _limits_groups(router: config.Router) -> bool:
  """Returns whether groups matter: llama.cpp refuses to choose all of them."""
  return router.top_groups < router.n_groups


def _group_problems(router: config.Router) -> Iterator[str]:
  """Yields why llama.cpp would choose other groups of experts."""
  setting = f"router.n_groups={router.n_groups}"
  if (ours := SCORES[router.score].group_top) != _GROUP_TOP:
    yield (
      f"{setting} with router.score={router.score}: llama.cpp ranks groups by"
      f" their best {_GROUP_TOP} experts, this score by their best {ours}"
    )
  if (size := router.n_experts // router.n_groups) < _GROUP_TOP:
    yield (
      f"{setting} of n_experts={router.n_experts}: has groups of {size},"
      f" llama.cpp ranks groups by their best {_GROUP_TOP} experts"
    )


def _path_in_layer(path: str) -> str:
  """Returns the path of a parameter within its layer."""
  return path.partition("/")[2] or path


def _stacks(model: config.Model) -> Iterator[list[Block]]:
  """Yields blocks of the main model; all experts of a layer in one list."""
  main = (b for b in hf_mapping.model_blocks(model) if b.layer < model.n_layers)

  def key(block: Block) -> tuple[int, bool, str]:
    return block.layer, len(block.index) > 1, block.path

  for _, blocks in itertools.groupby(sorted(main, key=key), key):
    yield list(blocks)


def _tensors(export_format: ExportFormat) -> Iterator[_Tensor]:
  """Yields the tensors of the file in order."""
  model = export_format.source.model
  for stack in _stacks(model):
    block = stack[0]
    path, dtype = _path_in_layer(block.path), export_format.dtypes(block)[0]
    # llama.cpp reads routers and all vectors in float32.
    if path == "ffn/router" or len(block.tensor_shape) < 2:
      dtype = hf_read.F32
    leading = (len(stack),) if len(block.index) > 1 else ()
    shapes = [(*leading, *block.tensor_shape)] * len(_TENSORS[path])
    if path == "mla/kv_up":
      mla = model.attention
      shapes = [
        (mla.n_heads, mla.kv_rank, mla.nope_dim),
        (mla.n_heads, mla.v_dim, mla.kv_rank),
      ]
    suffix = "bias" if path == hf_mapping.BIAS else "weight"
    for i, tensor in enumerate(_TENSORS[path]):
      name = gguf.TENSOR_NAMES[tensor].format(bid=block.layer)
      yield _Tensor(f"{name}.{suffix}", shapes[i], dtype, stack, i)


def _make_array(export_format: ExportFormat, tensor: _Tensor) -> np.ndarray:
  """Returns a tensor; those of experts are stacked, [E, ...]."""

  def arrays(block: Block) -> list[np.ndarray]:
    return [array for _, array in export_format.tensors(block)]

  block = tensor.stack[0]
  if _path_in_layer(block.path) == "mla/kv_up":
    mla = export_format.source.model.attention
    return _split_kv_up(*arrays(block), mla, tensor.i)
  if len(block.index) < 2:
    return arrays(block)[tensor.i].astype(tensor.dtype, copy=False)
  out = np.empty(tensor.shape, tensor.dtype)
  for expert, block in zip(out, tensor.stack, strict=True):
    expert[:] = arrays(block)[tensor.i]
  return out


def _split_kv_up(matrix: np.ndarray, mla: config.MLA, i: int) -> np.ndarray:
  """Returns the up-projection of keys (i=0), transposed, or of values (i=1)."""
  heads = matrix.reshape(mla.n_heads, -1, mla.kv_rank)
  keys, values = np.split(heads, [mla.nope_dim], axis=1)
  return np.ascontiguousarray(values if i else keys.swapaxes(1, 2))


def _describe_model(
  writer: gguf.GGUFWriter, model: config.Model, max_len: int
) -> None:
  mla, router = model.attention, model.router
  writer.add_vocab_size(model.vocab_size)
  writer.add_context_length(max_len)
  writer.add_embedding_length(model.d_model)
  writer.add_block_count(model.n_layers)
  writer.add_leading_dense_block_count(model.n_dense_layers)
  writer.add_feed_forward_length(model.dense_ffn_dim)
  writer.add_layer_norm_rms_eps(model.norm_eps)
  # All heads read one latent.
  writer.add_head_count(mla.n_heads)
  writer.add_head_count_kv(1)
  writer.add_key_length(mla.kv_rank + mla.rope_dim)
  writer.add_value_length(mla.kv_rank)
  writer.add_key_length_mla(mla.qk_dim)
  writer.add_value_length_mla(mla.v_dim)
  if mla.q_rank:
    writer.add_q_lora_rank(mla.q_rank)
  writer.add_kv_lora_rank(mla.kv_rank)
  writer.add_rope_dimension_count(mla.rope_dim)
  writer.add_rope_freq_base(mla.rope_theta)
  if mla.yarn.factor > 1:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(mla.yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(mla.yarn.original_len)
    # Of 0 llama.cpp would take another scale; this one is 1 in float32.
    writer.add_rope_scaling_yarn_log_mul(max(0.1 * mla.yarn.mscale, 1e-9))
    writer.add_rope_scaling_yarn_beta_fast(mla.yarn.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(mla.yarn.beta_slow)
  writer.add_expert_count(router.n_experts)
  writer.add_expert_used_count(router.top_k)
  writer.add_expert_shared_count(model.moe.n_shared)
  writer.add_expert_feed_forward_length(model.moe.ffn_dim)
  writer.add_expert_weights_scale(router.scale)
  writer.add_expert_weights_norm(router.renormalize)
  writer.add_expert_gating_func(_GATING_FUNCTIONS[router.score])
  if _limits_groups(router):
    writer.add_expert_group_count(router.n_groups)
    writer.add_expert_group_used_count(router.top_groups)


def _describe_tokens(
  writer: gguf.GGUFWriter,
  tok: tokenizers.Tokenizer,
  n_rows: int,
  defaults: GenerationDefaults,
) -> None:
  """Writes the tokenizer, with a name for every row of the embedding."""
  tokenizer_json = json.loads(tok.to_str())
  names = {i: name for name, i in tok.get_vocab().items()}
  added = {t["id"]: t["special"] for t in tokenizer_json["added_tokens"]}
  types = gguf.TokenType

  def token_type(i: int) -> gguf.TokenType:
    if i in added:
      return types.CONTROL if added[i] else types.USER_DEFINED
    return types.NORMAL if i in names else types.UNUSED

  pairs = tokenizer_json["model"]["merges"]
  merges = [m if isinstance(m, str) else " ".join(m) for m in pairs]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("deepseek-v3")
  writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(n_rows)])
  writer.add_token_types([token_type(i) for i in range(n_rows)])
  writer.add_token_merges(merges)
  writer.add_bos_token_id(tokenizer.BOS_ID)
  # Any of these ends a text.
  adders = writer.add_eos_token_id, writer.add_eot_token_id
  adders += (writer.add_eom_token_id,)
  if len(defaults.stop_token_ids) > len(adders):
    raise InputError(
      f"eos_token_id={list(defaults.stop_token_ids)}: a GGUF file names at most"
      f" {len(adders)} tokens that end a text"
    )
  for add, i in zip(adders, defaults.stop_token_ids, strict=False):
    add(i)
  for name, add_setting in (
    ("temperature", writer.add_sampling_temp),
    ("top_p", writer.add_sampling_top_p),
    ("top_k", writer.add_sampling_top_k),
  ):
    if name in defaults.settings:
      add_setting(defaults.settings[name])
  writer.add_pad_token_id(tokenizer.PAD_ID)
  writer.add_add_bos_token(defaults.add_bos)
  writer.add_add_eos_token(False)
  if defaults.template:
    writer.add_chat_template(defaults.template.source)


@functools.cache
def _pre_tokenizer() -> Any:
  """Returns the pre-tokenizer that llama.cpp calls `deepseek-v3`."""
  own = tokenizer.train((), 300)  # bytes and special tokens
  return json.loads(own.to_str())["pre_tokenizer"]


def validate_tokenizer(tok: tokenizers.Tokenizer) -> Iterator[str]:
  """Yields the reasons why llama.cpp would make other ids of a text."""
  found = json.loads(tok.to_str())
  model, normalizer = found["model"], found["normalizer"] or {}
  if found["pre_tokenizer"] != _pre_tokenizer():
    yield "pre_tokenizer: is not DeepSeek-V3's, the one written to GGUF"
  if normalizer.get("normalizers", normalizer):
    yield f"normalizer: {normalizer}: GGUF has none with byte-level BPE"
  if model["type"] != "BPE" or model.get("ignore_merges"):
    yield f"model: {model['type']}: must be BPE whose merges make all tokens"
  for token in found["added_tokens"]:
    if token["lstrip"] or token["rstrip"] or token["single_word"]:
      yield (
        f"added token {token['content']!r}: takes spaces beside it, or stands"
        " alone; llama.cpp has no such tokens"
      )


def total_bytes(export_format: ExportFormat) -> int:
  """Returns the size of all tensors in bytes."""
  return sum(tensor.n_bytes for tensor in _tensors(export_format))


def write(
  export_format: ExportFormat,
  tok: tokenizers.Tokenizer,
  path: pathlib.Path,
  max_len: int,
  advance: Advance,
  defaults: GenerationDefaults = DEFAULTS,
) -> None:
  """Writes a GGUF file atomically; `max_len` is the longest context in tokens.

  `defaults` are what the model's folder says about generation.

  Raises:
    InputError: llama.cpp would refuse or misread the model, the file exists,
      or the disk is full.
  """
  model = export_format.source.model
  raise_problems(validate(model))
  raise_problems(validate_tokenizer(tok), "tokenizer.json: ")
  tokenizer.check_fits(tok, model.vocab_size)
  if not path.parent.is_dir():
    raise InputError(f"{path}: there is no folder {path.parent}")
  if path.exists():
    raise InputError(f"{path}: already exists; take another name")
  tensors = list(_tensors(export_format))
  if other := {str(t.dtype) for t in tensors} - set(map(str, _RAW_TYPES)):
    raise InputError(
      f"{path}: has {', '.join(sorted(other))}: GGUF has no FP8, and is written"
      f" in {' or '.join(map(str, _RAW_TYPES))}; use --dtype=bfloat16"
    )
  resumable.check_free_space(path.parent, total_bytes(export_format))
  partial = path.with_name(f".{path.name}.partial")
  writer = gguf.GGUFWriter(partial, _ARCHITECTURE)
  _describe_model(writer, model, max_len)
  _describe_tokens(writer, tok, model.vocab_size, defaults)
  try:
    _write_tensors(writer, export_format, tensors, advance)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise resumable.disk_error(path, error) from error
  finally:
    writer.close()
  os.replace(partial, path)


def _write_tensors(
  writer: gguf.GGUFWriter,
  export_format: ExportFormat,
  tensors: list[_Tensor],
  advance: Advance,
) -> None:
  """Writes the header and all tensors."""
  for t in tensors:
    raw = _RAW_TYPES[t.dtype]
    writer.add_tensor_info(t.name, t.shape, t.dtype, t.n_bytes, raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for tensor, array in resumable.map_in_order(
    lambda t: _make_array(export_format, t), tensors, lambda t: t.n_bytes
  ):
    writer.write_tensor_data(array.view(np.uint8))
    advance(tensor.n_bytes)
  writer.flush()

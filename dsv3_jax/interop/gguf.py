"""Parameters as a GGUF file, which llama.cpp and what is built on it serve.

The main model alone: llama.cpp reads no MTP layers. Its attention is the
absorbed one, so keys' and values' up-projections are apart and by head.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator

import gguf
import numpy as np
import tokenizers

from dsv3_jax import config
from dsv3_jax.data import chat, tokenizer
from dsv3_jax.errors import InputError
from dsv3_jax.interop import hf_mapping, hf_read, hf_write, resumable

_ARCHITECTURE = gguf.MODEL_ARCH.DEEPSEEK2
_T = gguf.MODEL_TENSOR
# By a parameter's path without the kind of its layer.
_TENSORS = {
  "embed": _T.TOKEN_EMBD,
  "norm": _T.OUTPUT_NORM,
  "head": _T.OUTPUT,
  "mla_norm": _T.ATTN_NORM,
  "mla/q": _T.ATTN_Q,
  "mla/q_down": _T.ATTN_Q_A,
  "mla/q_norm": _T.ATTN_Q_A_NORM,
  "mla/q_up": _T.ATTN_Q_B,
  "mla/kv_down": _T.ATTN_KV_A_MQA,
  "mla/kv_norm": _T.ATTN_KV_A_NORM,
  "mla/out": _T.ATTN_OUT,
  "ffn_norm": _T.FFN_NORM,
  "ffn/router": _T.FFN_GATE_INP,
  "ffn/down": _T.FFN_DOWN,
  "ffn/shared/down": _T.FFN_DOWN_SHEXP,
  "ffn/experts/down": _T.FFN_DOWN_EXP,
  hf_mapping.BIAS: _T.FFN_EXP_PROBS_B,
}
_PAIRS = {
  "ffn/gate_up": (_T.FFN_GATE, _T.FFN_UP),
  "ffn/shared/gate_up": (_T.FFN_GATE_SHEXP, _T.FFN_UP_SHEXP),
  "ffn/experts/gate_up": (_T.FFN_GATE_EXP, _T.FFN_UP_EXP),
}
_SPLIT = {"mla/kv_up": (_T.ATTN_K_B, _T.ATTN_V_B)}
# Files must have these in float32, and all that is no matrix.
_FLOAT32 = ("ffn/router",)


@dataclasses.dataclass(frozen=True)
class _Tensor:
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]  # [E, ...] of experts

  @property
  def n_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def problems(model: config.Model) -> list[str]:
  """Why llama.cpp would not read a model, or would misread it."""
  found = []
  if not model.mla.q_rank and model.n_layers not in (26, 27):
    found.append(
      f"mla.q_rank=0 with n_layers={model.n_layers}: llama.cpp expects"
      " compressed queries of all but V2-Lite (27 layers) and Moonlight's"
      " like; export to --hf instead"
    )
  if model.norm_eps != model.mla.norm_eps:
    found.append(
      f"norm_eps={model.norm_eps:g}, mla.norm_eps={model.mla.norm_eps:g}:"
      " llama.cpp takes one number for both"
    )
  if model.router.score == "softmax" and model.router.n_groups > 1:
    found.append(
      f"router.n_groups={model.router.n_groups} with router.score=softmax:"
      " llama.cpp ranks groups by their two best experts, V2 by the best"
    )
  if not model.moe.n_shared:
    found.append("moe.n_shared=0: llama.cpp expects shared experts")
  if not model.n_moe_layers:
    found.append("n_dense_layers=n_layers: llama.cpp expects mixture layers")
  return found


def _of_layer(path: str) -> str:
  """The path of a parameter within its layer."""
  return path.partition("/")[2] or path


def _stacks(model: config.Model) -> Iterator[list[hf_mapping.Block]]:
  """Blocks of the main model; all experts of a layer together."""
  main = (b for b in hf_mapping.of_model(model) if b.layer < model.n_layers)
  key = lambda b: (b.layer, len(b.index) > 1, b.path)
  for _, found in itertools.groupby(sorted(main, key=key), key):
    yield list(found)


def _tensors(form: hf_write.Form) -> Iterator[_Tensor]:
  model = form.source.model
  names = gguf.TENSOR_NAMES
  for stack in _stacks(model):
    first = stack[0]
    within, n = _of_layer(first.path), len(stack)
    lead = (n,) if len(first.index) > 1 else ()
    dtype = form.dtypes(first)[0]
    if within in _FLOAT32 or len(first.shape) < 2:
      dtype = hf_read.F32

    def named(kind, first=first):
      end = "bias" if first.path == hf_mapping.BIAS else "weight"
      return f"{names[kind].format(bid=first.layer)}.{end}"

    if within in _SPLIT:
      for i, kind in enumerate(_SPLIT[within]):
        make = lambda b=first, i=i: _by_head(form, b, model.mla)[i]
        yield _Tensor(named(kind), _head_shapes(model.mla)[i], dtype, make)
    else:
      kinds = _PAIRS.get(within) or (_TENSORS[within],)
      for i, kind in enumerate(kinds):
        make = lambda s=stack, i=i, lead=lead, d=dtype: _stacked(
          form, s, i, lead, d
        )
        yield _Tensor(named(kind), (*lead, *first.shape), dtype, make)


def _parts(form: hf_write.Form, block: hf_mapping.Block) -> list[np.ndarray]:
  return [array for _, array in form.tensors(block)]


def _stacked(form, stack, i, lead, dtype) -> np.ndarray:
  if not lead:
    return _parts(form, stack[0])[i].astype(dtype, copy=False)
  out = np.empty((*lead, *stack[0].shape), dtype)
  for array, block in zip(out, stack, strict=True):
    array[:] = _parts(form, block)[i]
  return out


def _head_shapes(mla: config.MLA) -> tuple[tuple[int, ...], ...]:
  return (
    (mla.n_heads, mla.kv_rank, mla.nope_dim),
    (mla.n_heads, mla.v_dim, mla.kv_rank),
  )


def _by_head(form, block, mla) -> tuple[np.ndarray, np.ndarray]:
  """Keys' and values' up-projections; a head's keys are turned round."""
  (matrix,) = _parts(form, block)
  heads = matrix.reshape(mla.n_heads, -1, mla.kv_rank)
  keys, values = np.split(heads, [mla.nope_dim], axis=1)
  return np.ascontiguousarray(keys.swapaxes(1, 2)), np.ascontiguousarray(values)


def _describe_model(
  writer: gguf.GGUFWriter, model: config.Model, max_len: int
) -> None:
  mla, router = model.mla, model.router
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
    writer.add_rope_scaling_yarn_log_mul(0.1 * mla.yarn.mscale)
    writer.add_rope_scaling_yarn_beta_fast(mla.yarn.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(mla.yarn.beta_slow)
  writer.add_expert_count(router.n_experts)
  writer.add_expert_used_count(router.top_k)
  writer.add_expert_shared_count(model.moe.n_shared)
  writer.add_expert_feed_forward_length(model.moe.ffn_dim)
  writer.add_expert_weights_scale(router.scale)
  writer.add_expert_weights_norm(router.renormalize)
  gates = gguf.ExpertGatingFuncType
  sigmoid = router.score == "sigmoid"
  writer.add_expert_gating_func(gates.SIGMOID if sigmoid else gates.SOFTMAX)
  if router.n_groups > 1:
    writer.add_expert_group_count(router.n_groups)
    writer.add_expert_group_used_count(router.top_groups)


def _describe_tokens(
  writer: gguf.GGUFWriter, tok: tokenizers.Tokenizer, n_rows: int
) -> None:
  """The tokenizer, with a name for every row of the embedding."""
  facts = json.loads(tok.to_str())
  ids = {i: name for name, i in tok.get_vocab().items()}
  special = {t["id"] for t in facts["added_tokens"] if t["special"]}
  added = {t["id"] for t in facts["added_tokens"]}
  kinds = gguf.TokenType

  def kind(i):
    if i in special:
      return kinds.CONTROL
    if i in added:
      return kinds.USER_DEFINED
    return kinds.NORMAL if i in ids else kinds.UNUSED

  merges = facts["model"]["merges"]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("deepseek-v3")
  writer.add_token_list([ids.get(i, f"[PAD{i}]") for i in range(n_rows)])
  writer.add_token_types([kind(i) for i in range(n_rows)])
  writer.add_token_merges(
    [m if isinstance(m, str) else " ".join(m) for m in merges]
  )
  writer.add_bos_token_id(tokenizer.BOS_ID)
  writer.add_eos_token_id(tokenizer.EOS_ID)
  writer.add_pad_token_id(tokenizer.PAD_ID)
  writer.add_add_bos_token(True)
  writer.add_add_eos_token(False)
  writer.add_chat_template(chat.TEMPLATE)


def total_bytes(form: hf_write.Form) -> int:
  """Of all tensors that are written."""
  return sum(tensor.n_bytes for tensor in _tensors(form))


def write(
  form: hf_write.Form,
  tok: tokenizers.Tokenizer,
  path: pathlib.Path,
  max_len: int,
  advance: Callable[[int], None],
) -> None:
  """Writes a file, complete or not at all.

  Args:
    form: of what, and in what types; not FP8.
    tok: of the model.
    path: where to.
    max_len: tokens that the model reads.
    advance: is told the bytes of every tensor that is written.

  Raises:
    InputError: llama.cpp would not read it, there is a file already, or no
      room.
  """
  model = form.source.model
  if found := problems(model):
    raise InputError("\n".join(found))
  tokenizer.check_fits(tok, model.vocab_size)
  if not path.parent.is_dir():
    raise InputError(f"{path}: there is no folder {path.parent}")
  if path.exists():
    raise InputError(f"{path}: is there already; take another name")
  tensors = list(_tensors(form))
  if any(t.dtype == hf_read.E4M3 for t in tensors):
    raise InputError(f"{path}: GGUF has no FP8; say --dtype=bfloat16")
  resumable.check_room(path.parent, total_bytes(form))
  partial = path.with_name(f".{path.name}.partial")
  writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[_ARCHITECTURE])
  _describe_model(writer, model, max_len)
  _describe_tokens(writer, tok, model.vocab_size)
  quantizations = gguf.GGMLQuantizationType
  for t in tensors:
    raw = quantizations.F32 if t.dtype == hf_read.F32 else quantizations.BF16
    writer.add_tensor_info(t.name, t.shape, t.dtype, t.n_bytes, raw)
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    size = lambda t: t.n_bytes
    for t, array in resumable.in_order(lambda t: t.make(), tensors, size):
      writer.write_tensor_data(array.view(np.uint8))
      advance(t.n_bytes)
    writer.flush()
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise resumable.disk_error(path, error) from error
  finally:
    writer.close()
  os.replace(partial, path)

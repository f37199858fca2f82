"""Maps parameters to the tensors of released checkpoints.

A block is one layer's, or one expert's, share of a stacked parameter. In files
it is a tensor, or two (gate and up), each [outputs, inputs]; parameters are
[inputs, outputs] and have dims for heads. `convert_layout` goes both ways.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.interop import hf_config
from dsv3_jax.model import transformer

Slices = tuple[slice, ...]

BIAS = "router_bias"  # stands for a parameter's path
SCALES = "_scale_inv"  # suffix of the tensor with the scales of an FP8 tensor

_LAYER = {
  "mla_norm": "input_layernorm",
  "mla/q": "self_attn.q_proj",
  "mla/q_down": "self_attn.q_a_proj",
  "mla/q_norm": "self_attn.q_a_layernorm",
  "mla/q_up": "self_attn.q_b_proj",
  "mla/kv_down": "self_attn.kv_a_proj_with_mqa",
  "mla/kv_norm": "self_attn.kv_a_layernorm",
  "mla/kv_up": "self_attn.kv_b_proj",
  "mla/out": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn/router": "mlp.gate",
  # Of MTP layers.
  "embed_norm": "enorm",
  "hidden_norm": "hnorm",
  "proj": "eh_proj",
  "norm": "shared_head.norm",
}
_FFN = {
  "ffn": "mlp",
  "ffn/shared": "mlp.shared_experts",
  "ffn/experts": "mlp.experts.{expert}",
}
_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
UNSTACKED = {
  "embed": "model.embed_tokens.weight",
  "norm": "model.norm.weight",
  "head": "lm_head.weight",
}
# Tensors of an MTP layer that repeat one of the main model.
_MTP_COPIES = {"embed_tokens": "embed", "shared_head.head": "head"}


@dataclasses.dataclass(frozen=True)
class Block:
  """One layer's or expert's share of a parameter."""

  path: str  # path of the parameter, or BIAS
  index: tuple[int, ...]  # index of layer and expert in the leading dims
  inputs: tuple[int, ...]  # input dims, after the leading ones; a vector: none
  outputs: tuple[int, ...]  # output dims
  names: tuple[str, ...]  # names of its tensors in files
  layer: int  # layer number in files; -1: belongs to no layer
  quantized: bool  # whether DeepSeek releases it in FP8

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """[inputs, outputs] of a matrix, [outputs] of a vector."""
    inputs = (math.prod(self.inputs),) if self.inputs else ()
    return (*inputs, math.prod(self.outputs))

  @property
  def transposed(self) -> bool:
    """Returns whether files have the transpose of the parameter's matrix."""
    return len(self.matrix_shape) > 1 and self.path != "embed"

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of each of its tensors in files."""
    if not self.transposed:
      return self.matrix_shape
    return self.matrix_shape[1] // len(self.names), self.matrix_shape[0]

  def scales_shape(self, tile: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of each of its tensors in files."""
    sizes = zip(self.tensor_shape, tile, strict=True)
    return tuple(-(-n // t) for n, t in sizes)


def _file_layer(path: str, index: tuple[int, ...], cfg: config.Model) -> int:
  """Returns the layer number of a block in files; -1: belongs to no layer."""
  first = {"dense": 0, "moe": cfg.n_dense_layers, "mtp": cfg.n_layers}
  return first[path.partition("/")[0]] + index[0] if index else -1


def _tensor_names(path: str, index: tuple[int, ...], layer: int) -> list[str]:
  """Returns the names of the tensors of a block."""
  if not index:
    return [UNSTACKED[path]]
  prefix = f"model.layers.{layer}."
  within = path.partition("/")[2].removeprefix("block/")
  if within in _LAYER:
    return [f"{prefix}{_LAYER[within]}.weight"]
  ffn, _, projection = within.rpartition("/")
  inside = _FFN[ffn].format(expert=index[-1])
  return [f"{prefix}{inside}.{p}.weight" for p in _PROJECTIONS[projection]]


def _parameter_blocks(
  path: str, spec: param_spec.ParamSpec, cfg: config.Model
) -> Iterable[Block]:
  dims = spec.shape[spec.n_stack :]
  n_in = len(dims) > 1 and max(spec.n_contracted, 1)
  quantized = spec.n_contracted > 0 and path != "mtp/proj"
  for index in np.ndindex(spec.shape[: spec.n_stack]):
    layer = _file_layer(path, index, cfg)
    names = tuple(_tensor_names(path, index, layer))
    yield Block(path, index, dims[:n_in], dims[n_in:], names, layer, quantized)


def _bias_blocks(cfg: config.Model) -> Iterable[Block]:
  has_bias = hf_config.has_router_bias(cfg.router.score)
  for i in range(cfg.n_routers if has_bias else 0):
    layer = cfg.n_dense_layers + i
    name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    dims = (), (cfg.router.n_experts,)
    yield Block(BIAS, (i,), *dims, (name,), layer, False)


@functools.lru_cache(maxsize=4)
def model_blocks(cfg: config.Model) -> tuple[Block, ...]:
  """Returns all blocks of a model in the order of layers."""
  specs = param_spec.flatten_with_paths(transformer.specs(cfg))
  blocks = [
    block
    for path, spec in specs.items()
    for block in _parameter_blocks(path, spec, cfg)
  ]
  blocks += _bias_blocks(cfg)
  # All tensors of an expert follow each other.
  return tuple(sorted(blocks, key=lambda b: (b.layer, b.index[1:])))


def count_blocks(cfg: config.Model) -> int:
  """Counts the blocks of parameters; fast, however large the model is."""
  specs = jax.tree.leaves(transformer.specs(cfg))
  return sum(math.prod(spec.shape[: spec.n_stack]) for spec in specs)


def mtp_copies(cfg: config.Model) -> dict[str, str]:
  """Maps tensors of MTP layers to those of the main model that they repeat."""
  return {
    f"model.layers.{cfg.n_layers + i}.{copy}.weight": UNSTACKED[path]
    for i in range(cfg.mtp.depth)
    for copy, path in _MTP_COPIES.items()
  }


def bounding_slices(block: Block, inner: Slices) -> tuple[slice, slice]:
  """Returns the inputs, and outputs of each tensor, that a slice is within.

  `inner` slices the dims of the block, inputs then outputs.
  """
  n, pair = len(block.inputs), len(block.names) > 1
  ins = _flatten_slice(block.inputs, inner[0]) if n else slice(None)
  return ins, _flatten_slice(block.outputs[pair:], inner[n + pair])


def _flatten_slice(dims: tuple[int, ...], first: slice) -> slice:
  """Returns a slice of the first dim as a slice of all dims flattened."""
  stride, rows = math.prod(dims[1:]), range(dims[0])[first]
  return slice(rows.start * stride, rows.stop * stride)


def take_slice(block: Block, inner: Slices, matrix: np.ndarray) -> np.ndarray:
  """Cuts a slice of a block out of the matrix within its `bounding_slices`."""
  n, pair = len(block.inputs), len(block.names) > 1
  dims, remaining = [*block.inputs, *block.outputs], list(inner)
  for i in {0, n + pair}:
    dims[i], remaining[i] = len(range(dims[i])[inner[i]]), slice(None)
  return matrix.reshape(dims)[tuple(remaining)]


def convert_layout(block: Block, matrix: np.ndarray) -> np.ndarray:
  """Converts a block between the layout of files and that of parameters."""
  return transpose(matrix) if block.transposed else matrix


def transpose(matrix: np.ndarray) -> np.ndarray:
  """Returns a contiguous transpose of a matrix."""
  # Several times as fast as NumPy, which does not transpose in tiles.
  cpu = jax.local_devices(backend="cpu")[0]
  return np.asarray(jax.device_put(matrix.T, cpu))


def output_tiles(block: Block, outs: slice, size: int) -> np.ndarray:
  """Returns the tile index of each output, tensor by tensor of a block."""
  n_rows = block.tensor_shape[0]
  tiles, n_tiles = np.arange(n_rows)[outs] // size, -(-n_rows // size)
  return np.concatenate([tiles + i * n_tiles for i in range(len(block.names))])


@functools.lru_cache(maxsize=4)
def _decoded_codes(dtype: np.dtype) -> np.ndarray:
  """Returns the float32 values of all 256 codes of a one-byte type."""
  return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def dequantize(
  values: np.ndarray,
  scales: np.ndarray,
  row_tiles: np.ndarray,
  column_tiles: np.ndarray,
) -> np.ndarray:
  """Returns values [R, C] of a one-byte type times their scales, in float32.

  The scales are [row tiles, column tiles]; `row_tiles` [R] and `column_tiles`
  [C] are the tile index of each row and column.
  """
  out = _decoded_codes(values.dtype)[values.view(np.uint8)]
  across = scales.astype(np.float32)[:, column_tiles]
  for tile in np.unique(row_tiles):
    out[row_tiles == tile] *= across[tile]
  return out

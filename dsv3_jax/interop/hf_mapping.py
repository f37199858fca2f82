"""How parameters are cut into the tensors of released checkpoints.

A block is one layer's, or one expert's, share of a parameter of the schema. In
files it is a tensor, or two (gate and up), each [outputs, inputs]: the other
way round than here, and without dims such as heads. `turned` is between the
two.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.model import transformer

BIAS = "router_bias"  # as the path of a parameter
SCALES = "_scale_inv"  # a tensor's scales have its name and this; they multiply

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
}
_FFN = {
  "ffn": "mlp",
  "ffn/shared": "mlp.shared_experts",
  "ffn/experts": "mlp.experts.{expert}",
}
_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_MTP = {
  "embed_norm": "enorm",
  "hidden_norm": "hnorm",
  "proj": "eh_proj",
  "norm": "shared_head.norm",
}
_WHOLE = {
  "embed": "model.embed_tokens.weight",
  "norm": "model.norm.weight",
  "head": "lm_head.weight",
}
# What an MTP layer repeats of the main model.
_COPIES = {"embed_tokens": "embed", "shared_head.head": "head"}


@dataclasses.dataclass(frozen=True)
class Block:
  """One layer's or expert's share of a parameter."""

  path: str  # of the parameter, or BIAS
  index: tuple[int, ...]  # of layer and expert, in the parameter's leading dims
  inputs: tuple[int, ...]  # dims after those
  outputs: tuple[int, ...]  # a vector has no inputs
  names: tuple[str, ...]  # of the tensors in files
  layer: int  # of files; -1: before all of them
  quantized: bool  # whether the released weights are in FP8

  @property
  def matrix(self) -> tuple[int, ...]:
    """[inputs, outputs], or [outputs] of a vector."""
    inputs = (math.prod(self.inputs),) if self.inputs else ()
    return (*inputs, math.prod(self.outputs))

  @property
  def table(self) -> bool:
    """Whether files have it as it is here."""
    return len(self.matrix) == 1 or self.path == "embed"

  @property
  def shape(self) -> tuple[int, ...]:
    """Of each tensor in files."""
    if self.table:
      return self.matrix
    return self.matrix[1] // len(self.names), self.matrix[0]

  def scales_shape(self, tile: tuple[int, int]) -> tuple[int, int]:
    """Of the scales of each tensor in files."""
    return tuple(-(-n // t) for n, t in zip(self.shape, tile, strict=True))


def _layer_of(path: str, index: int, cfg: config.Model) -> int:
  first = {"dense": 0, "moe": cfg.n_dense_layers, "mtp": cfg.n_layers}
  return first[path.partition("/")[0]] + index


def _names(path: str, index: tuple[int, ...], cfg: config.Model) -> list[str]:
  """Of the tensors of a block of a stacked parameter."""
  within = path.partition("/")[2]
  prefix = f"model.layers.{_layer_of(path, index[0], cfg)}."
  if path.startswith("mtp/"):
    if within in _MTP:
      return [f"{prefix}{_MTP[within]}.weight"]
    within = within.removeprefix("block/")
  if within in _LAYER:
    return [f"{prefix}{_LAYER[within]}.weight"]
  ffn, _, projection = within.rpartition("/")
  expert = index[1] if len(index) > 1 else None
  inside = _FFN[ffn].format(expert=expert)
  return [f"{prefix}{inside}.{p}.weight" for p in _PROJECTIONS[projection]]


def _of_parameter(
  path: str, spec: param_spec.ParamSpec, cfg: config.Model
) -> Iterable[Block]:
  n = spec.n_stack
  dims = spec.shape[n:]
  n_in = len(dims) > 1 and max(spec.n_in, 1)
  for index in np.ndindex(spec.shape[:n]):
    whole = not index
    yield Block(
      path,
      index,
      dims[:n_in],
      dims[n_in:],
      (_WHOLE[path],) if whole else tuple(_names(path, index, cfg)),
      -1 if whole else _layer_of(path, index[0], cfg),
      spec.n_in > 0 and path != "mtp/proj",
    )


def _of_bias(cfg: config.Model) -> Iterable[Block]:
  for i in range(cfg.n_routers if cfg.router.score == "sigmoid" else 0):
    layer = cfg.n_dense_layers + i
    name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    dims = (), (cfg.router.n_experts,)
    yield Block(BIAS, (i,), *dims, (name,), layer, False)


@functools.lru_cache(maxsize=4)
def of_model(cfg: config.Model) -> tuple[Block, ...]:
  """All blocks of a model, in the order of layers."""
  specs = param_spec.paths(transformer.specs(cfg))
  found = [
    block
    for path, spec in specs.items()
    for block in _of_parameter(path, spec, cfg)
  ]
  found += _of_bias(cfg)
  # An expert's tensors one after the other.
  return tuple(sorted(found, key=lambda b: (b.layer, b.index[1:])))


def count(cfg: config.Model) -> int:
  """How many there are, of parameters; quickly, whatever the model says."""
  specs = jax.tree.leaves(transformer.specs(cfg))
  return sum(math.prod(spec.shape[: spec.n_stack]) for spec in specs)


def copies(cfg: config.Model) -> dict[str, str]:
  """Tensors of MTP layers that repeat one of the main model, and which."""
  return {
    f"model.layers.{cfg.n_layers + i}.{copy}.weight": _WHOLE[path]
    for i in range(cfg.mtp.depth)
    for copy, path in _COPIES.items()
  }


Slices = tuple[slice, ...]


def spans(block: Block, inner: Slices) -> tuple[slice, slice]:
  """Inputs, and outputs of each tensor, that a part of a block is within.

  Args:
    block: which one.
    inner: of its dims, inputs then outputs.
  """
  n, pair = len(block.inputs), len(block.names) > 1
  ins = _span(block.inputs, inner[0]) if n else slice(None)
  return ins, _span(block.outputs[pair:], inner[n + pair])


def _span(dims: tuple[int, ...], first: slice) -> slice:
  """What a slice of the first of some dims is of all of them as one."""
  rest, rows = math.prod(dims[1:]), range(dims[0])[first]
  return slice(rows.start * rest, rows.stop * rest)


def part(block: Block, inner: Slices, matrix: np.ndarray) -> np.ndarray:
  """The part of a block, of the inputs and outputs within its `spans`."""
  n, pair = len(block.inputs), len(block.names) > 1
  dims, rest = [*block.inputs, *block.outputs], list(inner)
  for i in {0, n + pair}:
    dims[i], rest[i] = len(range(dims[i])[inner[i]]), slice(None)
  return matrix.reshape(dims)[tuple(rest)]


def turned(matrix: np.ndarray) -> np.ndarray:
  """The transpose of a matrix, in its own memory."""
  if matrix.ndim < 2:
    return matrix
  # Several times as fast as NumPy, which does not transpose in tiles.
  first = jax.local_devices(backend="cpu")[0]
  return np.asarray(jax.device_put(matrix.T, first))


def tiles_of(block: Block, outs: slice, size: int) -> np.ndarray:
  """Which tile each output is in, of the tensors of a block one by one."""
  own = np.arange(block.shape[0])[outs] // size
  n_tiles = -(-block.shape[0] // size)
  return np.concatenate([own + i * n_tiles for i in range(len(block.names))])


@functools.lru_cache(maxsize=4)
def _numbers(dtype: np.dtype) -> np.ndarray:
  """All 256 numbers of a type of one byte."""
  return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def dequantized(
  values: np.ndarray,
  scales: np.ndarray,
  row_tiles: np.ndarray,
  column_tiles: np.ndarray,
) -> np.ndarray:
  """values * scales in float32.

  Args:
    values: [R, C] of a type of one byte.
    scales: [row tiles, column tiles].
    row_tiles: [R], which tile a row is in.
    column_tiles: [C].
  """
  out = _numbers(values.dtype)[values.view(np.uint8)]
  across = scales.astype(np.float32)[:, column_tiles]
  for tile in np.unique(row_tiles):
    out[row_tiles == tile] *= across[tile]
  return out

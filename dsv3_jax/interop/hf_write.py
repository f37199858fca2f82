"""Writes parameters as a released checkpoint that other software reads.

Shards are written under temporary names, read again, compared by SHA-256 and
renamed. The index is written last: a folder without it holds no checkpoint.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, io
from dsv3_jax.errors import InputError
from dsv3_jax.interop import (
  hf_config,
  hf_mapping,
  hf_read,
  resumable,
  safetensors,
)
from dsv3_jax.interop.hf_mapping import Block
from dsv3_jax.interop.hf_read import ReleasedCheckpoint
from dsv3_jax.interop.resumable import Advance
from dsv3_jax.linear import quantize

JOURNAL = ".export.jsonl"
SHARD_BYTES = 4_300_000_000  # most bytes of a file, unless a block has more
TILE = 128, 128  # FP8 tile of outputs and inputs

# Types to write: that of matrices, and what config.json calls the others;
# "stored" has the types of the source.
DTYPES = {
  "float32": (hf_read.F32, "float32"),
  "bfloat16": (hf_read.BF16, "bfloat16"),
  "fp8": (hf_read.E4M3, "bfloat16"),
}

BlockShapes = tuple[Block, safetensors.Shapes]


@dataclasses.dataclass(frozen=True)
class ParamArrays:
  """Parameters in memory, float32."""

  model: config.Model
  params: Mapping[str, np.ndarray]  # by path; BIAS too
  tile: None = None

  def dtypes(self, block: Block) -> tuple[np.dtype, None]:
    """Returns the type of a block, and None: it has no scales."""
    return self.params[block.path].dtype, None

  def read_block(self, block: Block) -> tuple[np.ndarray, None]:
    """Returns a block as [inputs, outputs], and None: it has no scales."""
    array = self.params[block.path][block.index]
    return array.reshape(block.matrix_shape), None

  def fingerprint(self) -> str:
    """Returns a digest of the model and every number."""
    digest = hashlib.sha256(repr(self.model).encode())
    for path in sorted(self.params):
      digest.update(safetensors.as_bytes(self.params[path]))
    return digest.hexdigest()


ParamSource = ReleasedCheckpoint | ParamArrays


@dataclasses.dataclass(frozen=True)
class ExportFormat:
  """Converts the blocks of a source to tensors of the types to write."""

  source: ParamSource
  dtype: str  # "stored", or one of DTYPES

  def __post_init__(self) -> None:
    if self.dtype not in ("stored", *DTYPES):
      raise InputError(
        f"dtype={self.dtype}: must be stored or one of {', '.join(DTYPES)}"
      )

  @property
  def tile(self) -> tuple[int, int] | None:
    """FP8 tile of what is written; None: no FP8."""
    return {"stored": self.source.tile, "fp8": TILE}.get(self.dtype)

  def dtypes(self, block: Block) -> tuple[np.dtype, np.dtype | None]:
    """Returns the types of a block's tensors and of their scales."""
    if self.dtype == "stored":
      return self.source.dtypes(block)
    if block.path == hf_mapping.BIAS:
      return hf_read.F32, None
    dtype, _ = DTYPES[self.dtype]
    if dtype != hf_read.E4M3:
      return dtype, None
    return (dtype, hf_read.F32) if block.quantized else (hf_read.BF16, None)

  def tensors(self, block: Block) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and arrays of a block's tensors, in the order of `shapes`.

    Raises:
      InputError: a weight is not finite and is to be quantized.
    """
    values, scales = self.source.read_block(block)
    dtype, scales_dtype = self.dtypes(block)
    if scales is not None and self.dtype != "stored":
      tall, wide = self.source.tile
      row_tiles = np.arange(block.tensor_shape[1]) // wide
      column_tiles = hf_mapping.output_tiles(block, slice(None), tall)
      tiles = row_tiles, column_tiles
      values, scales = hf_mapping.dequantize(values, scales, *tiles), None
    if scales_dtype is None:
      values = values.astype(dtype, copy=False)
    matrix = hf_mapping.convert_layout(block, values)
    matrices = np.split(matrix, len(block.names))
    if scales_dtype is None:
      yield from zip(block.names, matrices, strict=True)
      return
    pairs = map(_quantize, matrices)
    if scales is not None:
      tiles = np.split(np.ascontiguousarray(scales.T), len(block.names))
      pairs = zip(matrices, tiles, strict=True)
    for name, (matrix, tile_scales) in zip(block.names, pairs, strict=True):
      yield name, matrix
      yield name + hf_mapping.SCALES, tile_scales

  def shapes(self, block: Block) -> safetensors.Shapes:
    """Returns types and shapes of a block's tensors, by name."""
    dtype, scales_dtype = self.dtypes(block)
    shapes = {}
    for name in block.names:
      shapes[name] = dtype, block.tensor_shape
      if scales_dtype is not None:
        scales_shape = block.scales_shape(self.tile)
        shapes[name + hf_mapping.SCALES] = scales_dtype, scales_shape
    return shapes

  def total_bytes(self) -> int:
    """Returns the size of all tensors in bytes."""
    return sum(_n_bytes(shapes) for _, shapes in _blocks_and_shapes(self))


def _quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns a matrix in FP8, and the scales of its tiles."""
  result = quantize.quantize(jnp.asarray(matrix, jnp.float32), TILE)
  if not np.isfinite(result.scales).all():
    raise InputError("a weight is not finite: FP8 cannot hold it")
  return np.asarray(result.codes).view(hf_read.E4M3), np.asarray(result.scales)


def _blocks_and_shapes(export_format: ExportFormat) -> list[BlockShapes]:
  """Returns blocks and the shapes of their tensors; MTP copies come last."""
  model = export_format.source.model
  blocks = hf_mapping.model_blocks(model)
  by_name = {block.names[0]: block for block in blocks}
  result = [(block, export_format.shapes(block)) for block in blocks]
  for name, original in hf_mapping.mtp_copies(model).items():
    block = by_name[original]
    dtype, _ = export_format.dtypes(block)
    result.append((block, {name: (dtype, block.tensor_shape)}))
  return result


def _n_bytes(shapes: safetensors.Shapes) -> int:
  return sum(
    math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values()
  )


def _split_into_shards(items: list[BlockShapes]) -> list[list[BlockShapes]]:
  """Splits blocks into files of at most SHARD_BYTES, or of a single block."""
  shards, size = [[]], 0
  for item in items:
    n_bytes = _n_bytes(item[1])
    if shards[-1] and size + n_bytes > SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(item)
    size += n_bytes
  return shards


def exported_config_json(
  config_json: dict[str, Any], export_format: ExportFormat
) -> dict[str, Any]:
  """Returns the config.json of an export: types and MTP depth are set."""
  depth = export_format.source.model.mtp.depth
  config_json = config_json | {"num_nextn_predict_layers": depth}
  config_json.pop("auto_map", None)
  if export_format.dtype == "stored":
    return config_json
  for key in ("quantization_config", "dtype", "torch_dtype"):
    config_json.pop(key, None)
  if export_format.dtype == "fp8":
    tile = {"weight_block_size": list(TILE)}
    config_json["quantization_config"] = hf_config.FP8 | tile
  return config_json | {"torch_dtype": DTYPES[export_format.dtype][1]}


def export(
  export_format: ExportFormat,
  folder: pathlib.Path,
  config_json: dict[str, Any],
  advance: Advance,
  write_other_files: Callable[[], Any],
) -> None:
  """Writes a checkpoint; an interrupted call is resumed by the same call.

  The folder is empty, or left by an interrupted call. `write_other_files` is
  called once all shards are written.

  Raises:
    InputError: the folder holds something else, the disk is full, or a file
      does not read as it was written.
  """
  if (folder / hf_read.INDEX).exists() or (folder / hf_read.SINGLE).exists():
    raise InputError(
      f"{folder}: holds a checkpoint already; take another folder"
    )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    journal, weight_map = _write_shards(
      export_format, folder, config_json, advance
    )
    names = dict.fromkeys(weight_map.values())
    sums = "".join(f"{journal.done[name]}  {name}\n" for name in names)
    io.write_text(folder / hf_read.SUMS, sums)
    write_other_files()
    metadata = {"total_size": export_format.total_bytes()}
    index = {"metadata": metadata, "weight_map": weight_map}
    io.write_json(folder / hf_read.CONFIG, config_json)
    io.write_json(folder / hf_read.INDEX, index)
    journal.path.unlink()
  except OSError as error:
    raise resumable.disk_error(folder, error) from error


def _write_shards(
  export_format: ExportFormat,
  folder: pathlib.Path,
  config_json: dict[str, Any],
  advance: Advance,
) -> tuple[resumable.Journal, dict[str, str]]:
  """Writes the shards that the journal lacks.

  Returns the journal with the SHA-256 of all shards, and each tensor's shard.
  """
  settings = [export_format.dtype, config_json, SHARD_BYTES]
  text = json.dumps(settings, sort_keys=True)
  work = export_format.source.fingerprint() + text
  journal = resumable.Journal(folder / JOURNAL, work)
  if not journal.begun:
    journal.begin(export_format.total_bytes())
  shards = _split_into_shards(_blocks_and_shapes(export_format))
  weight_map = {}
  for i, items in enumerate(shards, 1):
    name = f"model-{i:05}-of-{len(shards):05}.safetensors"
    shapes = {k: v for _, tensors in items for k, v in tensors.items()}
    weight_map |= dict.fromkeys(shapes, name)
    if name in journal.done:
      advance(_n_bytes(shapes))
      continue
    partial = folder / f".{name}.partial"
    digest = _write_shard(export_format, partial, items, shapes, advance)
    if _sha256_on_disk(partial) != digest:
      raise InputError(
        f"{partial}: does not read as it was written; check the disk"
      )
    os.replace(partial, folder / name)
    journal.add({name: digest}, [folder / name])
  return journal, weight_map


def _write_shard(
  export_format: ExportFormat,
  path: pathlib.Path,
  items: list[BlockShapes],
  shapes: safetensors.Shapes,
  advance: Advance,
) -> str:
  """Writes a file from its beginning to its end; returns its SHA-256."""
  header = safetensors.make_header(shapes)
  digest = hashlib.sha256(header)

  def make_tensors(item: BlockShapes) -> dict[str, np.ndarray]:
    block, wanted = item  # an MTP copy has another name than its block
    arrays = (array for _, array in export_format.tensors(block))
    return dict(zip(wanted, arrays, strict=True))

  with path.open("wb") as file:
    # A function, so that no name keeps an array while the next is made.
    def write(array: np.ndarray) -> None:
      data = safetensors.as_bytes(array)
      digest.update(data)
      file.write(data)
      advance(len(data))

    file.write(header)
    for (_, wanted), tensors in resumable.map_in_order(
      make_tensors, items, lambda item: _n_bytes(item[1])
    ):
      for name in wanted:
        write(tensors.pop(name))
    file.flush()
    os.fsync(file.fileno())
  return digest.hexdigest()


def _sha256_on_disk(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file, read from the disk and not from a cache."""
  with path.open("rb") as file:
    safetensors.drop_from_cache(file.fileno())
    return hashlib.file_digest(file, "sha256").hexdigest()


def corrupt_shards(
  released: ReleasedCheckpoint, advance: Advance
) -> Iterator[str]:
  """Yields a problem for each shard whose SHA-256 is not that in SHA256SUMS."""
  sums = (released.folder / hf_read.SUMS).read_text(encoding="utf-8")
  lines = (line.partition("  ") for line in sums.splitlines())
  recorded = {name: digest for digest, _, name in lines}
  for path in released.shards():
    if path.name not in recorded:
      yield f"{path}: not in {hf_read.SUMS}"
      continue
    digest = hashlib.sha256()
    with path.open("rb") as file:
      while data := file.read(1 << 24):
        digest.update(data)
        advance(len(data))
    if digest.hexdigest() != recorded[path.name]:
      yield (
        f"{path}: corrupt: its SHA-256 is {digest.hexdigest()}, must be"
        f" {recorded[path.name]}; download or export it again"
      )

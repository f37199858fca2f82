"""Parameters as a released checkpoint that other software reads.

Shards are written under temporary names, read again and compared with what was
meant, then renamed; the index comes last: without it there is no checkpoint.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.interop import hf_mapping, hf_read, resumable, safetensors
from dsv3_jax.linear import quantize

JOURNAL = ".export.jsonl"
SHARD_BYTES = 4_300_000_000  # most in a file, unless a tensor has more
TILE = 128, 128  # of weights in FP8


class Source(Protocol):
  """Where parameters are."""

  model: config.Model
  tile: tuple[int, int] | None

  def dtype(self, block: hf_mapping.Block) -> np.dtype: ...
  def scales_dtype(self, block: hf_mapping.Block) -> np.dtype | None: ...
  def stored(
    self, block: hf_mapping.Block
  ) -> tuple[np.ndarray, np.ndarray | None]: ...
  def fingerprint(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Parameters in memory, float32."""

  model: config.Model
  params: Mapping[str, np.ndarray]  # by path; BIAS too
  tile: None = None

  def dtype(self, block: hf_mapping.Block) -> np.dtype:
    return self.params[block.path].dtype

  def scales_dtype(self, block: hf_mapping.Block) -> None:
    del block

  def stored(self, block: hf_mapping.Block) -> tuple[np.ndarray, None]:
    """As of `hf.Released.stored`."""
    return self.params[block.path][block.index].reshape(block.matrix), None

  def fingerprint(self) -> str:
    """Of every number."""
    digest = hashlib.sha256(repr(self.model).encode())
    for path in sorted(self.params):
      digest.update(safetensors.as_bytes(self.params[path]))
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Form:
  """What numbers are written in."""

  source: Source
  kind: str  # stored, float32, bfloat16 or fp8

  @property
  def tile(self) -> tuple[int, int] | None:
    """Of weights in FP8, if there are."""
    return {"stored": self.source.tile, "fp8": TILE}.get(self.kind)

  def dtypes(self, block: hf_mapping.Block) -> tuple[np.dtype, np.dtype | None]:
    """Of a block's tensors, and of their scales."""
    if self.kind == "stored":
      return self.source.dtype(block), self.source.scales_dtype(block)
    if self.kind == "float32" or block.path == hf_mapping.BIAS:
      return hf_read.F32, None
    if self.kind == "fp8" and block.quantized:
      return hf_read.E4M3, hf_read.F32
    return hf_read.BF16, None

  def tensors(
    self, block: hf_mapping.Block
  ) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a block, in the order of `shapes`."""
    values, scales = self.source.stored(block)
    if self.kind != "stored" and scales is not None:
      tall, wide = self.source.tile
      rows = np.arange(block.shape[1]) // wide
      columns = hf_mapping.tiles_of(block, slice(None), tall)
      values, scales = (
        hf_mapping.dequantized(values, scales, rows, columns),
        None,
      )
    dtype, scales_dtype = self.dtypes(block)
    if scales_dtype is None:
      values = values.astype(dtype, copy=False)
    values = values if block.table else hf_mapping.turned(values)
    parts = np.split(values, len(block.names))
    if scales_dtype is None:
      yield from zip(block.names, parts, strict=True)
      return
    if scales is None:
      made = [_quantized(part) for part in parts]
    else:
      apart = np.split(np.ascontiguousarray(scales.T), len(block.names))
      made = zip(parts, apart, strict=True)
    for name, (part, own) in zip(block.names, made, strict=True):
      yield name, part
      yield name + hf_mapping.SCALES, own

  def shapes(self, block: hf_mapping.Block) -> safetensors.Shapes:
    """What a block is written as."""
    dtype, scales_dtype = self.dtypes(block)
    found = {}
    for name in block.names:
      found[name] = dtype, block.shape
      if scales_dtype is not None:
        own = scales_dtype, block.scales_shape(self.tile)
        found[name + hf_mapping.SCALES] = own
    return found


def _quantized(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  made = quantize.quantize(jnp.asarray(matrix, jnp.float32), TILE)
  if not np.isfinite(made.scales).all():
    raise InputError("a weight is not finite: FP8 cannot hold it")
  return np.asarray(made.bits).view(hf_read.E4M3), np.asarray(made.scales)


def _items(form: Form) -> list[tuple[hf_mapping.Block, safetensors.Shapes]]:
  """Blocks and the tensors written of each; copies come last."""
  model = form.source.model
  whole = {b.names[0]: b for b in hf_mapping.of_model(model)}
  found = [(b, form.shapes(b)) for b in hf_mapping.of_model(model)]
  for name, of in hf_mapping.copies(model).items():
    dtype, _ = form.dtypes(whole[of])
    found.append((whole[of], {name: (dtype, whole[of].shape)}))
  return found


def _n_bytes(shapes: safetensors.Shapes) -> int:
  return sum(
    math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values()
  )


def _shards(items: list) -> list[list]:
  """Blocks by file."""
  found, size = [[]], 0
  for item in items:
    n = _n_bytes(item[1])
    if found[-1] and size + n > SHARD_BYTES:
      found.append([])
      size = 0
    found[-1].append(item)
    size += n
  return found


def described(facts: dict[str, Any], form: Form) -> dict[str, Any]:
  """A config.json for what is written, of one for the model."""
  depth = form.source.model.mtp.depth
  facts = facts | {"num_nextn_predict_layers": depth}
  facts.pop("auto_map", None)
  if form.kind == "stored":
    return facts
  for key in ("quantization_config", "dtype", "torch_dtype"):
    facts.pop(key, None)
  if form.kind == "fp8":
    facts["quantization_config"] = {
      "quant_method": "fp8",
      "fmt": "e4m3",
      "activation_scheme": "dynamic",
      "weight_block_size": list(TILE),
    }
  dtype = "float32" if form.kind == "float32" else "bfloat16"
  return facts | {"torch_dtype": dtype}


def export(
  form: Form,
  folder: pathlib.Path,
  facts: dict[str, Any],
  advance: Callable[[int], None],
  beside: Callable[[], Any],
) -> None:
  """Writes a checkpoint; an interrupted call's finished shards are kept.

  Args:
    form: of what, and in what types.
    folder: where to; empty, or left by an interrupted call.
    facts: config.json.
    advance: is told the bytes of every tensor that is written.
    beside: writes what else belongs into the folder.

  Raises:
    InputError: there is something else already, no room, or a file does not
      read as it was written.
  """
  if (folder / hf_read.INDEX).exists() or (folder / hf_read.SINGLE).exists():
    raise InputError(
      f"{folder}: holds a checkpoint already; take another folder"
    )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _write(form, folder, facts, advance, beside)
  except OSError as error:
    raise resumable.disk_error(folder, error) from error


def total_bytes(form: Form) -> int:
  """Of all tensors that are written."""
  return sum(_n_bytes(shapes) for _, shapes in _items(form))


def _write(form, folder, facts, advance, beside):
  how = json.dumps([form.kind, facts, SHARD_BYTES], sort_keys=True)
  journal = resumable.Journal(folder / JOURNAL, form.source.fingerprint() + how)
  items = _items(form)
  shards = _shards(items)
  names = [
    f"model-{i:05}-of-{len(shards):05}.safetensors"
    for i in range(1, len(shards) + 1)
  ]
  if not journal.begun:
    if left := sorted(p.name for p in folder.iterdir()):
      raise InputError(f"{folder}: must be empty, holds {', '.join(left)}")
    resumable.check_room(folder, sum(_n_bytes(shapes) for _, shapes in items))
    journal.begin()
  weight_map, total = {}, 0
  for name, own in zip(names, shards, strict=True):
    shapes = {k: v for _, tensors in own for k, v in tensors.items()}
    weight_map |= dict.fromkeys(shapes, name)
    total += _n_bytes(shapes)
    if name in journal.done:
      advance(_n_bytes(shapes))
      continue
    partial = folder / f".{name}.partial"
    digest = _write_shard(form, partial, own, shapes, advance)
    if _sum(partial) != digest:
      raise InputError(f"{partial}: does not read as it was written")
    os.replace(partial, folder / name)
    journal.add({name: digest}, [folder / name])
  sums = "".join(f"{journal.done[name]}  {name}\n" for name in names)
  resumable.write_text(folder / hf_read.SUMS, sums)
  beside()
  resumable.write_text(
    folder / hf_read.CONFIG, json.dumps(facts, indent=2) + "\n"
  )
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  resumable.write_text(
    folder / hf_read.INDEX, json.dumps(index, indent=2) + "\n"
  )
  journal.path.unlink()


def _write_shard(form, path, items, shapes, advance) -> str:
  """Writes a file from its beginning to its end; returns its sha256."""
  head, _ = safetensors.plan(path, shapes)
  digest = hashlib.sha256(head)

  def made(item):
    block, wanted = item
    found = dict(form.tensors(block))
    # A copy has another name, and no scales.
    return (
      found
      if wanted.keys() <= found.keys()
      else dict(zip(wanted, found.values(), strict=True))
    )

  with path.open("wb") as file:
    # A function's names do not keep an array while the next is made.
    def write(array):
      data = safetensors.as_bytes(array)
      digest.update(data)
      file.write(data)
      advance(len(data))

    file.write(head)
    size = lambda item: _n_bytes(item[1])
    for (_, wanted), found in resumable.in_order(made, items, size):
      for name in wanted:
        write(found.pop(name))
    file.flush()
    os.fsync(file.fileno())
  return digest.hexdigest()


def _sum(path: pathlib.Path) -> str:
  """Of what is on the disk."""
  with path.open("rb") as file:
    safetensors.forget(file.fileno())
    return hashlib.file_digest(file, "sha256").hexdigest()

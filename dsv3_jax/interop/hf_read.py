"""A folder with a released checkpoint, of which everything is accounted for.

`config.json`, shards of tensors, and `model.safetensors.index.json` that says
which tensor is in which. Nothing in it is ever executed.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.interop import hf_config, hf_mapping, resumable, safetensors

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUMS = "SHA256SUMS"
E4M3 = safetensors.DTYPES["F8_E4M3"]
F32, BF16 = safetensors.DTYPES["F32"], safetensors.DTYPES["BF16"]
_SCALES = F32, safetensors.DTYPES["F8_E8M0"]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Released:
  """A folder that was found complete."""

  folder: pathlib.Path
  facts: dict[str, Any]  # config.json
  model: config.Model
  tensors: dict[str, safetensors.Tensor]  # by name
  tile: tuple[int, int] | None  # of weights in FP8, if there are such
  notes: tuple[str, ...]  # what a user should know

  def main_only(self) -> "Released":
    """The same without its MTP layers."""
    model = config.override(self.model, "mtp.depth=0")
    return dataclasses.replace(self, model=model)

  def dtype(self, block: hf_mapping.Block) -> np.dtype:
    """What a block is written in, as all of its parameter."""
    return self.tensors[block.names[0]].dtype

  def scales_dtype(self, block: hf_mapping.Block) -> np.dtype | None:
    """What its scales are written in; None: it is not in FP8."""
    scales = self.tensors.get(block.names[0] + hf_mapping.SCALES)
    return scales and scales.dtype

  def n_bytes(self, block: hf_mapping.Block) -> int:
    """Of a block, without its scales."""
    return sum(self.tensors[name].n_bytes for name in block.names)

  def place(self, block: hf_mapping.Block) -> tuple[str, int]:
    """Where a block begins: in which file, at which byte."""
    first = self.tensors[block.names[0]]
    return first.file.name, first.offset

  def fingerprint(self) -> str:
    """Of what is there, as far as can be told without reading all of it."""
    seen = [json.dumps(self.facts, sort_keys=True)]
    for name, tensor in sorted(self.tensors.items()):
      stat = tensor.file.stat()
      seen.append(f"{name} {tensor} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()

  def stored(
    self, block: hf_mapping.Block
  ) -> tuple[np.ndarray, np.ndarray | None]:
    """A block as the parameter has it, and its scales if it is in FP8.

    Nothing is rounded: [inputs, outputs] of the type that the files have, and
    [tiles of inputs, tiles of outputs].
    """
    values = self._joined(block, slice(None), slice(None))
    values = values if block.table else hf_mapping.turned(values)
    return values, self._scales(block)

  def part(
    self, block: hf_mapping.Block, inner: hf_mapping.Slices
  ) -> np.ndarray:
    """Some of a block's numbers; of FP8, what they stand for in float32.

    Args:
      block: which one.
      inner: of its dims, inputs then outputs; no more is read of the files
        than what they are within along the first of each.
    """
    ins, outs = hf_mapping.spans(block, inner)
    across = block.table and block.inputs
    rows, columns = (ins, outs) if across else (outs, ins)
    values = self._joined(block, rows, columns)
    scales = self._scales(block)
    if scales is not None:
      tall, wide = self.tile
      rows = hf_mapping.tiles_of(block, rows, tall)
      columns = np.arange(block.shape[1])[columns] // wide
      values = hf_mapping.dequantized(values, scales.T, rows, columns)
    values = values if block.table else hf_mapping.turned(values)
    return hf_mapping.part(block, inner, values)

  def cheap_dim(self, block: hf_mapping.Block) -> int:
    """The dim along which the rows of files are cut."""
    if block.table:
      return 0
    return len(block.inputs) + (len(block.names) > 1)

  def _joined(
    self, block: hf_mapping.Block, rows: slice, columns: slice
  ) -> np.ndarray:
    """Rows of each of a block's tensors, one below the other."""
    tensors = [self.tensors[name] for name in block.names]
    if len(tensors) == 1:
      return safetensors.read(tensors[0], rows, columns)
    n, width = (
      len(range(size)[s])
      for size, s in zip(block.shape, (rows, columns), strict=True)
    )
    out = np.empty((len(tensors), n, width), tensors[0].dtype)
    for one, tensor in zip(out, tensors, strict=True):
      safetensors.read(tensor, rows, columns, one)
    return out.reshape(-1, width)

  def _scales(self, block: hf_mapping.Block) -> np.ndarray | None:
    if self.dtype(block) != E4M3:
      return None
    names = [name + hf_mapping.SCALES for name in block.names]
    scales = [safetensors.read(self.tensors[name]) for name in names]
    return np.ascontiguousarray(np.concatenate(scales).T)


def open_folder(
  folder: pathlib.Path,
  *,
  ignore_auto_map: bool = False,
  follow_links: bool = False,
) -> Released:
  """Looks at names, shapes and types of everything in a folder.

  Args:
    folder: which one.
    ignore_auto_map: whether a config.json may name code, which is not run.
    follow_links: whether shards may be symbolic links.

  Raises:
    InputError: anything is missing, left over or not as it must be; all of it.
  """
  facts = _facts(folder, ignore_auto_map)
  model, tile = hf_config.read(facts), hf_config.tile(facts)
  tensors, problems = _tensors(folder, follow_links)
  if problems:
    raise InputError("\n".join(problems))
  notes = [
    f"{CONFIG}: {key}={facts[key]!r} is not known here and not used"
    for key in sorted(facts.keys() - hf_config.KNOWN)
  ]
  if model.mtp.depth and _last_layer(tensors) < model.n_layers:
    notes.append(
      f"{CONFIG}: num_nextn_predict_layers={model.mtp.depth}, but no tensor"
      f" begins with model.layers.{model.n_layers}.: read as a model without"
      " MTP layers"
    )
    model = config.override(model, "mtp.depth=0")
  # Before they are all listed.
  if (n := hf_mapping.count(model)) > 2 * len(tensors) + 1000:
    raise InputError(
      f"{folder}: {CONFIG} describes a model of {n:,} tensors or more, there"
      f" are {len(tensors):,}"
    )
  if problems := list(_account(tensors, model, tile)):
    raise InputError("\n".join(f"{folder}: {line}" for line in problems))
  biases = [
    b.names[0] for b in hf_mapping.of_model(model) if b.path == hf_mapping.BIAS
  ]
  if biases and tensors[biases[0]].dtype != F32:
    notes.append(
      f"{biases[0]} and the others are {tensors[biases[0]].dtype}: whoever"
      " wrote them has rounded them; DeepSeek's are float32"
    )
  return Released(folder, facts, model, tensors, tile, tuple(notes))


def _facts(folder: pathlib.Path, ignore_auto_map: bool) -> dict[str, Any]:
  if not folder.is_dir():
    raise InputError(f"{folder}: no such folder")
  facts = resumable.read_object(folder / CONFIG)
  if "auto_map" in facts and not ignore_auto_map:
    raise InputError(
      f"{folder / CONFIG}: auto_map names code that comes with the"
      " checkpoint; it is never run here. If the model is DeepSeek-V3's"
      " architecture without it, say --ignore_auto_map"
    )
  return facts


def _shards(folder: pathlib.Path) -> dict[str, str]:
  """The file of each tensor, as the index says; "": of a single file."""
  if (folder / INDEX).exists():
    names = resumable.read_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
      raise InputError(f"{folder / INDEX}: has no weight_map")
    bad = [
      f"{folder / INDEX}: {name}: {file!r} must be a file of this folder,"
      " *.safetensors"
      for name, file in names.items()
      if not _is_shard(file)
    ]
    if bad:
      raise InputError("\n".join(bad))
    return names
  if (folder / SINGLE).exists():
    return {"": SINGLE}
  pickles = [p.name for p in folder.iterdir() if p.suffix in _PICKLES]
  if pickles:
    raise InputError(
      f"{folder}: offers {', '.join(sorted(pickles))} only: pickles can run"
      " code and are never read here. Convert them with the software that"
      " wrote them: model.save_pretrained(FOLDER, safe_serialization=True)"
    )
  raise InputError(f"{folder}: has neither {INDEX} nor {SINGLE}")


def _is_shard(file: Any) -> bool:
  return (
    isinstance(file, str)
    and file.endswith(".safetensors")
    and not set(file) & set("/\\\0")
  )


def _tensors(
  folder: pathlib.Path, follow_links: bool
) -> tuple[dict[str, safetensors.Tensor], list[str]]:
  """All tensors of all shards by name, and what is wrong with the shards."""
  weight_map = _shards(folder)
  files, tensors, problems = sorted(set(weight_map.values())), {}, []
  headers = {}
  for path in sorted(folder.glob("*.safetensors")):
    if path.name not in files:
      problems.append(f"{path}: no tensor of the index is in it")
  for file in files:
    path = folder / file
    if path.is_symlink() and not follow_links:
      problems.append(
        f"{path}: is a link to {path.readlink()}; if you trust what it leads"
        " to, as in a download cache, say --follow_links"
      )
      continue
    try:
      headers[file] = safetensors.header(path)
    except InputError as error:
      problems.append(str(error))
      continue
    for name, tensor in headers[file].items():
      home = weight_map.get(name, weight_map.get(""))
      if home != file:
        where = f"the index has it in {home}" if home else "not in the index"
        problems.append(f"{path}: {name}: {where}")
      else:
        tensors[name] = tensor
  for name, home in weight_map.items():
    if name and home in headers and name not in headers[home]:
      problems.append(
        f"{folder / home}: {name}: missing, the index has it there"
      )
  return tensors, problems


def _last_layer(names: Iterable[str]) -> int:
  """The largest number of a layer; -1: there is none."""
  layers = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in names)
  return max((int(found[1]) for found in layers if found), default=-1)


def _account(
  tensors: dict[str, safetensors.Tensor],
  model: config.Model,
  tile: tuple[int, int] | None,
) -> Iterator[str]:
  """What is missing, left over, or of another shape or type."""
  left, dtypes = dict(tensors), {}
  for block in hf_mapping.of_model(model):
    for name in block.names:
      tensor = left.pop(name, None)
      if tensor is None:
        yield f"{name}: missing"
        continue
      if tensor.shape != block.shape:
        yield f"{name}: shape {tensor.shape}, must be {block.shape}"
      fp8 = block.quantized and tile is not None
      allowed = (F32, BF16, E4M3) if fp8 else (F32, BF16)
      if tensor.dtype not in allowed:
        yield (
          f"{name}: dtype {tensor.dtype}, must be"
          f" {' or '.join(map(str, allowed))}"
        )
      first = dtypes.setdefault(block.path, (name, tensor.dtype))
      if tensor.dtype != first[1]:
        yield f"{name}: dtype {tensor.dtype}, but {first[0]} is {first[1]}"
      if fp8 and tensor.dtype == E4M3:
        yield from _account_scales(name, block.scales_shape(tile), left)
  for name, of in hf_mapping.copies(model).items():
    copy = left.pop(name, None)
    if copy is None:
      yield f"{name}: missing"
    elif of in tensors and copy.shape != tensors[of].shape:
      yield f"{name}: shape {copy.shape}, must be {tensors[of].shape} as {of}"
    elif of in tensors and copy.dtype != tensors[of].dtype:
      yield f"{name}: dtype {copy.dtype}, must be {tensors[of].dtype} as {of}"
  for name in left:
    yield f"{name}: not part of this model"


def _account_scales(
  name: str,
  shape: tuple[int, int],
  left: dict[str, safetensors.Tensor],
) -> Iterator[str]:
  scales = left.pop(name + hf_mapping.SCALES, None)
  if scales is None:
    yield f"{name + hf_mapping.SCALES}: missing, {name} is in FP8"
    return
  if scales.shape != shape:
    yield f"{name + hf_mapping.SCALES}: shape {scales.shape}, must be {shape}"
  if scales.dtype not in _SCALES:
    yield (
      f"{name + hf_mapping.SCALES}: dtype {scales.dtype}, must be"
      f" {' or '.join(map(str, _SCALES))}"
    )


def bad_values(released: Released) -> Iterator[str]:
  """Scales that cannot be, and copies that differ from what they repeat."""
  powers = _powers_of_two(released.facts)
  for name, tensor in released.tensors.items():
    if not name.endswith(hf_mapping.SCALES):
      continue
    scales = safetensors.read(tensor).astype(np.float32)
    if not np.isfinite(scales).all():
      yield f"{name}: not all finite"
    elif not (scales > 0).all():
      yield f"{name}: not all above 0"
    elif powers and (np.frexp(scales)[0] != 0.5).any():
      yield f"{name}: not all powers of two, as scale_fmt=ue8m0 says"
  for name, of in hf_mapping.copies(released.model).items():
    if not _equal(released.tensors[name], released.tensors[of]):
      yield f"{name}: differs from {of}, which it must repeat"


def _powers_of_two(facts: dict[str, Any]) -> bool:
  return (facts.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"


def _equal(a: safetensors.Tensor, b: safetensors.Tensor) -> bool:
  """Byte by byte, some rows at a time."""
  step = max((1 << 26) // max(a.n_bytes // a.shape[0], 1), 1)
  for row in range(0, a.shape[0], step):
    rows = slice(row, row + step)
    one, other = (safetensors.read(t, rows) for t in (a, b))
    if safetensors.as_bytes(one) != safetensors.as_bytes(other):
      return False
  return True

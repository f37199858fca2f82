"""Reads a folder with a released checkpoint; every tensor is accounted for.

The folder has `config.json`, shards of tensors in the safetensors format, and
`model.safetensors.index.json`, which names the shard of each tensor. Nothing in
it is ever executed.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dsv3_jax import config, io
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.interop import hf_config, hf_mapping, safetensors
from dsv3_jax.interop.hf_mapping import Block, Slices

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUMS = "SHA256SUMS"
E4M3 = safetensors.DTYPES["F8_E4M3"]
F32, BF16, F16 = map(safetensors.DTYPES.get, ("F32", "BF16", "F16"))
_SCALES = F32, safetensors.DTYPES["F8_E8M0"]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

Tensors = dict[str, safetensors.StoredTensor]  # by name


@dataclasses.dataclass(frozen=True)
class ReleasedCheckpoint:
  """A released checkpoint whose names, shapes and types have been checked."""

  folder: pathlib.Path
  config_json: dict[str, Any]
  model: config.Model
  tensors: Tensors
  tile: tuple[int, int] | None  # FP8 tile of outputs and inputs; None: no FP8
  notes: tuple[str, ...]  # messages for the user
  # CRC-32 of tensors by name, compared whenever all of a tensor is read.
  checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def without_mtp(self) -> "ReleasedCheckpoint":
    """Returns the checkpoint of the main model alone."""
    model = config.override(self.model, "mtp.depth=0")
    return dataclasses.replace(self, model=model)

  def make_run(self) -> config.Run:
    """Returns a run of the model, see `hf_config.make_run`."""
    return hf_config.make_run(self.config_json, self.model)

  def shards(self) -> list[pathlib.Path]:
    """Returns the files that hold the tensors."""
    return sorted({tensor.file for tensor in self.tensors.values()})

  def total_bytes(self) -> int:
    """Returns the size of all tensors in bytes."""
    return sum(tensor.n_bytes for tensor in self.tensors.values())

  def dtypes(self, block: Block) -> tuple[np.dtype, np.dtype | None]:
    """Returns the types of a block's values and scales; None: not in FP8."""
    name = block.names[0]
    scales = self.tensors.get(name + hf_mapping.SCALES)
    return self.tensors[name].dtype, scales and scales.dtype

  def fingerprint(self) -> str:
    """Returns a digest of config.json, all headers, and sizes and times."""
    seen = [json.dumps(self.config_json, sort_keys=True)]
    for name, tensor in sorted(self.tensors.items()):
      stat = tensor.file.stat()
      seen.append(f"{name} {tensor} {stat.st_size} {stat.st_mtime_ns}")
    return io.sha256("\n".join(seen))

  def read_block(self, block: Block) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads a block [inputs, outputs] as stored, and the scales of FP8.

    Scales are [tiles of inputs, tiles of outputs], or None.
    """
    matrix = self._read_rows(block, slice(None), slice(None))
    return hf_mapping.convert_layout(block, matrix), self._read_scales(block)

  def read_slice(self, block: Block, inner: Slices) -> np.ndarray:
    """Reads a slice of a block; FP8 is dequantized to float32.

    `inner` slices its dims, inputs then outputs. The files are read only within
    the slices of the first input and the first output dim.
    """
    ins, outs = hf_mapping.bounding_slices(block, inner)
    swapped = block.transposed or not block.inputs
    rows, columns = (outs, ins) if swapped else (ins, outs)
    matrix = self._read_rows(block, rows, columns)
    scales = self._read_scales(block)
    if scales is not None:
      tall, wide = self.tile
      row_tiles = hf_mapping.output_tiles(block, rows, tall)
      column_tiles = np.arange(block.tensor_shape[1])[columns] // wide
      matrix = hf_mapping.dequantize(matrix, scales.T, row_tiles, column_tiles)
    matrix = hf_mapping.convert_layout(block, matrix)
    return hf_mapping.take_slice(block, inner, matrix)

  def chunk_dim(self, block: Block) -> int | None:
    """Returns the dim of a block along which files can be read in chunks.

    None where there are checksums, which need the whole tensor.
    """
    if self.checksums:
      return None
    if not block.transposed:
      return 0
    return len(block.inputs) + (len(block.names) > 1)

  def _read_rows(self, block: Block, rows: slice, columns: slice) -> np.ndarray:
    """Reads rows of each tensor of a block, and concatenates them."""
    if len(block.names) == 1:
      return self.read_tensor(block.names[0], rows, columns)
    n_rows, n_columns = block.tensor_shape
    n, width = len(range(n_rows)[rows]), len(range(n_columns)[columns])
    out = np.empty((len(block.names), n, width), self.dtypes(block)[0])
    for name, array in zip(block.names, out, strict=True):
      self.read_tensor(name, rows, columns, array)
    return out.reshape(-1, width)

  def _read_scales(self, block: Block) -> np.ndarray | None:
    if self.dtypes(block)[0] != E4M3:
      return None
    names = [name + hf_mapping.SCALES for name in block.names]
    scales = [self.read_tensor(name) for name in names]
    return np.ascontiguousarray(np.concatenate(scales).T)

  def read_tensor(
    self,
    name: str,
    rows: slice = slice(None),
    columns: slice = slice(None),
    out: np.ndarray | None = None,
  ) -> np.ndarray:
    """Reads rows and columns of a tensor, see `safetensors.read`.

    Raises:
      InputError: all of the tensor is read, and its checksum is wrong.
    """
    tensor, recorded = self.tensors[name], self.checksums.get(name)
    array = safetensors.read(tensor, rows, columns, out)
    if recorded is not None and array.nbytes == tensor.n_bytes:
      if (checksum := safetensors.crc32(array)) != recorded:
        raise InputError(
          f"{tensor.file}: {name}: corrupt: its CRC-32 is {checksum:08x}, must"
          f" be {recorded:08x} as imported; import the checkpoint again"
        )
    return array


def open_folder(
  folder: pathlib.Path,
  *,
  ignore_auto_map: bool = False,
  follow_links: bool = False,
) -> ReleasedCheckpoint:
  """Opens a checkpoint: checks the names, shapes and types of all tensors.

  Args:
    ignore_auto_map: accept a config.json that names code; it is not run.
    follow_links: accept shards that are symbolic links.

  Raises:
    InputError: a tensor is missing, unused, or of another shape or type; lists
      all problems.
  """
  config_json = _read_config_json(folder, ignore_auto_map)
  model = hf_config.read_model(config_json)
  tile = hf_config.read_fp8_tile(config_json)
  tensors, problems = _read_headers(folder, follow_links)
  raise_problems(group_by_kind(problems))
  notes = list(hf_config.ignored_settings(config_json))
  if model.mtp.depth and _largest_layer(tensors) < model.n_layers:
    notes.append(
      f"{CONFIG}: num_nextn_predict_layers={model.mtp.depth}, but no tensor"
      f" begins with model.layers.{model.n_layers}.: read as a model without"
      " MTP layers"
    )
    model = config.override(model, "mtp.depth=0")
  # Compared before blocks are listed: a wrong size could make billions.
  if (n := hf_mapping.count_blocks(model)) > 2 * len(tensors) + 1000:
    raise InputError(
      f"{folder}: {CONFIG} describes a model of {n:,} tensors or more, there"
      f" are {len(tensors):,}"
    )
  problems = list(_check_tensors(tensors, model, tile))
  problems += _check_copies(tensors, model)
  raise_problems(group_by_kind(problems), f"{folder}: ")
  notes += _passed_over(tensors, model)
  notes += _rounded_biases(tensors, model)
  return ReleasedCheckpoint(
    folder, config_json, model, tensors, tile, tuple(notes)
  )


def _read_config_json(
  folder: pathlib.Path, ignore_auto_map: bool
) -> dict[str, Any]:
  if not folder.is_dir():
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder))
    hint = (
      f"; to get it: hf download {folder} --local-dir DIR" if is_name else ""
    )
    raise InputError(f"{folder}: no such folder{hint}")
  if not (folder / CONFIG).exists():
    raise InputError(
      f"{folder}: holds no released checkpoint, {CONFIG} is missing"
    )
  config_json = io.read_json_object(folder / CONFIG)
  if "settings" in config_json:
    raise InputError(
      f"{folder}: is the workdir of a run, not a released checkpoint: use"
      f" --workdir={folder}"
    )
  if "auto_map" in config_json and not ignore_auto_map:
    raise InputError(
      f"{folder / CONFIG}: auto_map names code that comes with the"
      " checkpoint, which is never run here; if the model has DeepSeek-V3's"
      " architecture without it, use --ignore_auto_map"
    )
  return config_json


def _read_weight_map(folder: pathlib.Path) -> dict[str, str]:
  """Maps each tensor to its file, by the index; {"": FILE} if there is none."""
  if (folder / INDEX).exists():
    names = io.read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
      raise InputError(f"{folder / INDEX}: has no weight_map")
    wanted = "must be a file of this folder, *.safetensors"
    bad = {name: file for name, file in names.items() if not _is_shard(file)}
    problems = (f"{name}: {file!r} {wanted}" for name, file in bad.items())
    raise_problems(problems, f"{folder / INDEX}: ")
    return names
  if (folder / SINGLE).exists():
    return {"": SINGLE}
  if pickles := [p.name for p in folder.iterdir() if p.suffix in _PICKLES]:
    raise InputError(
      f"{folder}: holds only {', '.join(sorted(pickles))}: pickles can run"
      " code and are never read here. Convert them with the software that"
      " wrote them: model.save_pretrained(FOLDER, safe_serialization=True)"
    )
  raise InputError(f"{folder}: has neither {INDEX} nor {SINGLE}")


def _is_shard(file: Any) -> bool:
  is_name = isinstance(file, str) and not set(file) & set("/\\\0")
  return is_name and file.endswith(".safetensors")


def _read_headers(
  folder: pathlib.Path, follow_links: bool
) -> tuple[Tensors, list[str]]:
  """Returns all tensors by name, and the problems of the shards."""
  weight_map = _read_weight_map(folder)
  files, headers, tensors = set(weight_map.values()), {}, {}
  problems = [
    f"{path}: no tensor of the index is in it"
    for path in sorted(folder.glob("*.safetensors"))
    if path.name not in files
  ]
  for file in sorted(files):
    path = folder / file
    if path.is_symlink() and not follow_links:
      problems.append(
        f"{path}: is a link to {path.readlink()}; if you trust that file, as"
        " in a download cache, use --follow_links"
      )
      continue
    try:
      headers[file] = safetensors.read_header(path)
    except InputError as error:
      problems.append(str(error))
      continue
    for name, tensor in headers[file].items():
      indexed = weight_map.get(name, weight_map.get(""))
      if indexed == file:
        tensors[name] = tensor
      elif indexed:
        problems.append(f"{path}: {name}: the index has it in {indexed}")
      else:
        problems.append(f"{path}: {name}: not in the index")
  problems += [
    f"{folder / file}: {name}: missing, the index has it there"
    for name, file in weight_map.items()
    if name and file in headers and name not in headers[file]
  ]
  return tensors, problems


def group_by_kind(problems: Iterable[str]) -> Iterator[str]:
  """Yields one line for those that differ in numbers alone: the first, a count.

  A model has a thousand tensors a layer.
  """
  kinds: dict[str, list[str]] = {}
  for problem in problems:
    kinds.setdefault(re.sub(r"\d+", "0", problem), []).append(problem)
  for first, *others in kinds.values():
    yield first + f" (and {len(others):,} more of this kind)" * bool(others)


def _largest_layer(names: Iterable[str]) -> int:
  """Returns the largest layer number in names of tensors; -1: none."""
  matches = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in names)
  return max((int(match[1]) for match in matches if match), default=-1)


def _check_tensors(
  tensors: Tensors, model: config.Model, tile: tuple[int, int] | None
) -> Iterator[str]:
  """Yields tensors that are missing, unused, or of another shape or type."""
  unused, dtypes = dict(tensors), {}
  embedding = tensors.get(hf_mapping.UNSTACKED["embed"])
  half = F16 if embedding and embedding.dtype == F16 else BF16
  for block in hf_mapping.model_blocks(model):
    for name in block.names:
      tensor = unused.pop(name, None)
      if tensor is None:
        yield f"{name}: missing"
        continue
      if tensor.shape != block.tensor_shape:
        yield f"{name}: shape {tensor.shape}, must be {block.tensor_shape}"
      fp8 = block.quantized and tile is not None
      allowed = (F32, half, E4M3) if fp8 else (F32, half)
      if tensor.dtype not in allowed:
        types = " or ".join(map(str, allowed))
        yield f"{name}: dtype {tensor.dtype}, must be {types}"
      first = dtypes.setdefault(block.path, (name, tensor.dtype))
      if tensor.dtype != first[1]:
        yield f"{name}: dtype {tensor.dtype}, but {first[0]} is {first[1]}"
      if fp8 and tensor.dtype == E4M3:
        yield from _check_scales(name, block.scales_shape(tile), unused)
  for name in _passed_over_names(tensors, model):
    del unused[name]
  depth, first = model.mtp.depth, model.n_layers + model.mtp.depth
  if f"model.layers.{first}.eh_proj.weight" in unused:
    extra = [n for n in unused if _largest_layer([n]) >= first]
    yield (
      f"{CONFIG}: num_nextn_predict_layers={depth}, but {len(extra):,} tensors"
      f" are of MTP layers, model.layers.{first}. on; set it to"
      f" {_largest_layer(extra) - model.n_layers + 1} in {CONFIG} to read them"
    )
    unused = {name: t for name, t in unused.items() if name not in extra}
  for name in sorted(unused.keys() - hf_mapping.mtp_copies(model).keys()):
    yield f"{name}: not part of this model"


def _passed_over_names(tensors: Tensors, model: config.Model) -> list[str]:
  """Returns tensors that hold nothing of a model.

  `transformers` writes matrices of no experts, with a dim of 0, and older
  versions the frequencies of the rotation, which follow from config.json.
  """
  blocks = hf_mapping.model_blocks(model)
  needed = {name for block in blocks for name in block.names}
  return sorted(
    name
    for name, tensor in tensors.items()
    if name not in needed
    and (name.endswith("rotary_emb.inv_freq") or 0 in tensor.shape)
  )


def _passed_over(tensors: Tensors, model: config.Model) -> Iterator[str]:
  """Yields a note for each kind of tensor that holds nothing of a model."""
  yield from group_by_kind(
    f"{name}: holds nothing of the model, passed over"
    for name in _passed_over_names(tensors, model)
  )


def _check_copies(tensors: Tensors, model: config.Model) -> Iterator[str]:
  """Yields MTP copies that are missing, or of another shape or type."""
  for name, original in hf_mapping.mtp_copies(model).items():
    copy, wanted = tensors.get(name), tensors.get(original)
    if copy is None:
      yield f"{name}: missing"
    elif wanted and copy.shape != wanted.shape:
      yield f"{name}: shape {copy.shape}, must be {wanted.shape} as {original}"
    elif wanted and copy.dtype != wanted.dtype:
      yield f"{name}: dtype {copy.dtype}, must be {wanted.dtype} as {original}"


def _rounded_biases(tensors: Tensors, model: config.Model) -> list[str]:
  """Returns a note if router biases are not float32."""
  return [
    f"{name}: router biases are {tensors[name].dtype}: they were rounded when"
    " the file was written; DeepSeek's are float32"
    for block in hf_mapping.model_blocks(model)
    for name in block.names
    if block.path == hf_mapping.BIAS and tensors[name].dtype != F32
  ][:1]


def _check_scales(
  name: str, shape: tuple[int, int], unused: Tensors
) -> Iterator[str]:
  scales_name = name + hf_mapping.SCALES
  scales = unused.pop(scales_name, None)
  if scales is None:
    yield f"{scales_name}: missing, {name} is in FP8"
    return
  if scales.shape != shape:
    yield f"{scales_name}: shape {scales.shape}, must be {shape}"
  if scales.dtype not in _SCALES:
    allowed = " or ".join(map(str, _SCALES))
    yield f"{scales_name}: dtype {scales.dtype}, must be {allowed}"


def validate_values(released: ReleasedCheckpoint) -> Iterator[str]:
  """Yields scales that are not valid, and MTP copies that differ.

  Whoever imports, verifies or loads a checkpoint asks this, so that all have
  one opinion of it.
  """
  for name, tensor in released.tensors.items():
    if not name.endswith(hf_mapping.SCALES):
      continue
    scales = safetensors.read(tensor).astype(np.float32)
    if not np.isfinite(scales).all():
      yield f"{name}: not all finite"
    elif not (scales > 0).all():
      yield f"{name}: not all above 0"
  for name, original in hf_mapping.mtp_copies(released.model).items():
    if not _equal_bytes(released.tensors[name], released.tensors[original]):
      yield f"{name}: differs from {original}, which it must repeat"


def _equal_bytes(
  a: safetensors.StoredTensor, b: safetensors.StoredTensor
) -> bool:
  """Compares two tensors byte by byte, some rows at a time."""
  step = max((1 << 26) // max(a.n_bytes // a.shape[0], 1), 1)
  for row in range(0, a.shape[0], step):
    rows = slice(row, row + step)
    bytes_a, bytes_b = (
      safetensors.as_bytes(safetensors.read(t, rows)) for t in (a, b)
    )
    if bytes_a != bytes_b:
      return False
  return True

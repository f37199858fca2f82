"""Parameters of a released checkpoint in a workdir: as the model reads them.

`weights/` holds a file for each parameter, with `values` in the type that they
came in and, of FP8, their `scales`; and `index.json`, written last, with where
they came from and a digest of each block. Nothing else of a run is here: no
optimizer, and no masters in float32.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.interop import (
  hf_config,
  hf_mapping,
  hf_read,
  resumable,
  safetensors,
)

FOLDER, INDEX, JOURNAL = "weights", "index.json", "journal.jsonl"
_VALUES, _SCALES = "values", "scales"


def _file(folder: pathlib.Path, path: str) -> pathlib.Path:
  return folder / f"{path.replace('/', '.')}.safetensors"


def _shapes(source: Any) -> dict[str, safetensors.Shapes]:
  """What the file of each parameter holds."""
  found = {}
  for block in hf_mapping.of_model(source.model):
    # The last of a parameter's blocks has the largest index.
    stack = tuple(i + 1 for i in block.index)
    shape = *stack, *block.inputs, *block.outputs
    shapes = {_VALUES: (source.dtype(block), shape)}
    if (dtype := source.scales_dtype(block)) is not None:
      n_out, n_in = block.scales_shape(source.tile)
      shapes[_SCALES] = dtype, (*stack, n_in, n_out * len(block.names))
    found[block.path] = shapes
  return found


@dataclasses.dataclass(frozen=True)
class Weights:
  """The parameters in a workdir; a source as `hf.Released` is one."""

  folder: pathlib.Path
  facts: dict[str, Any]  # config.json of what was imported
  model: config.Model
  tile: tuple[int, int] | None
  tensors: dict[str, dict[str, safetensors.Tensor]]  # by path
  digests: dict[str, int]  # by the name of a block's first tensor

  def dtype(self, block: hf_mapping.Block) -> np.dtype:
    return self.tensors[block.path][_VALUES].dtype

  def scales_dtype(self, block: hf_mapping.Block) -> np.dtype | None:
    scales = self.tensors[block.path].get(_SCALES)
    return scales and scales.dtype

  def n_bytes(self, block: hf_mapping.Block) -> int:
    return math.prod(block.matrix) * self.dtype(block).itemsize

  def fingerprint(self) -> str:
    """Of every number."""
    text = json.dumps([self.facts, self.digests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def stored(
    self, block: hf_mapping.Block
  ) -> tuple[np.ndarray, np.ndarray | None]:
    """As of `hf.Released.stored`; InputError where it has changed since."""
    values, scales = self._read(block, slice(None))
    if not self.intact(block, values, scales):
      raise InputError(self.damage(block))
    return values, scales

  def _read(
    self, block: hf_mapping.Block, ins: slice
  ) -> tuple[np.ndarray, np.ndarray | None]:
    """Inputs of a block with all their outputs, and all scales."""
    files = self.tensors[block.path]
    values = safetensors.read(_own(files[_VALUES], block, block.matrix), ins)
    if _SCALES not in files:
      return values, None
    shape = files[_SCALES].shape[-2:]
    return values, safetensors.read(_own(files[_SCALES], block, shape))

  def intact(
    self, block: hf_mapping.Block, values: np.ndarray, scales: np.ndarray | None
  ) -> bool:
    """Whether the numbers of a whole block are those that were imported."""
    return _digest(values, scales) == self.digests[block.names[0]]

  def damage(self, block: hf_mapping.Block) -> str:
    """What to say of a block that is not intact."""
    at = "".join(f"[{i}]" for i in block.index)
    return f"{_file(self.folder, block.path)}: {block.path}{at}: damaged"

  def part(
    self, block: hf_mapping.Block, inner: hf_mapping.Slices
  ) -> np.ndarray:
    """As of `hf.Released.part`, but inputs are read with all their outputs.

    Raises:
      InputError: it is all of a block, and has changed since the import.
    """
    n = len(block.inputs)
    whole = *inner[:n], *(slice(None),) * len(block.outputs)
    ins, _ = hf_mapping.spans(block, whole)
    values, scales = self._read(block, ins)
    if values.shape == block.matrix and not self.intact(block, values, scales):
      raise InputError(self.damage(block))
    if scales is not None:
      tall, wide = self.tile
      rows = np.arange(block.shape[1])[ins] // wide
      columns = hf_mapping.tiles_of(block, slice(None), tall)
      values = hf_mapping.dequantized(values, scales, rows, columns)
    values = hf_mapping.part(block, whole, values)
    return values[(*(slice(None),) * n, *inner[n:])]

  def cheap_dim(self, block: hf_mapping.Block) -> None:
    """Blocks are read whole: their checksum is compared then."""
    del block


def _own(
  tensor: safetensors.Tensor, block: hf_mapping.Block, shape: tuple[int, ...]
) -> safetensors.Tensor:
  """A block's share of a parameter's file."""
  stack = tensor.shape[: len(block.index)]
  i = int(np.ravel_multi_index(block.index, stack)) if stack else 0
  own = dataclasses.replace(tensor, shape=shape)
  return dataclasses.replace(own, offset=tensor.offset + i * own.n_bytes)


def _digest(values: np.ndarray, scales: np.ndarray | None) -> int:
  """A checksum against accidents, which takes less time than reading."""
  found = zlib.crc32(safetensors.as_bytes(values))
  if scales is not None:
    found = zlib.crc32(safetensors.as_bytes(scales), found)
  return found


# --- import ---

_COMMIT = 1 << 30  # bytes between entries of the journal


def import_released(
  source: hf_read.Released,
  folder: pathlib.Path,
  advance: Callable[[int], None],
) -> None:
  """Copies a released checkpoint, block by block, in the order of its files.

  What an earlier call has copied of the same source stays.

  Args:
    source: what to copy.
    folder: where to, see `FOLDER`.
    advance: is told the bytes of every block that is done.

  Raises:
    InputError: there is something else already, or no room.
  """
  if (folder / INDEX).exists():
    if _facts(folder).get("source") == source.fingerprint():
      return
    raise InputError(f"{folder}: holds another checkpoint already")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _copy(source, folder, advance)
  except OSError as error:
    raise resumable.disk_error(folder, error) from error


def _copy(source, folder, advance):
  journal = resumable.Journal(folder / JOURNAL, source.fingerprint())
  todo = hf_mapping.of_model(source.model)
  if not journal.begun:
    resumable.check_room(folder, sum(map(source.n_bytes, todo)))
    for path, kinds in _shapes(source).items():
      safetensors.create(_file(folder, path), kinds)
    journal.begin()
  tensors = {
    path: safetensors.header(_file(folder, path)) for path in _shapes(source)
  }

  def copy(block):
    values, scales = source.stored(block)
    files = tensors[block.path]
    safetensors.write(_own(files[_VALUES], block, block.matrix), values)
    if scales is not None:
      safetensors.write(_own(files[_SCALES], block, scales.shape), scales)
    return _digest(values, scales)

  left = [b for b in todo if b.names[0] not in journal.done]
  advance(sum(source.n_bytes(b) for b in todo) - sum(map(source.n_bytes, left)))
  left.sort(key=source.place)
  digests, files, since = {}, set(), 0
  for block, digest in resumable.in_order(copy, left, source.n_bytes):
    digests[block.names[0]] = digest
    files.add(_file(folder, block.path))
    since += source.n_bytes(block)
    if since >= _COMMIT:
      journal.add(digests, files)
      digests, files, since = {}, set(), 0
    advance(source.n_bytes(block))
  journal.add(digests, files)
  facts = {
    "source": source.fingerprint(),
    "config": source.facts,
    "mtp_depth": source.model.mtp.depth,
    "digests": journal.done,
  }
  resumable.write_text(folder / INDEX, json.dumps(facts))
  journal.path.unlink()


def _facts(folder: pathlib.Path) -> dict[str, Any]:
  """What the index says."""
  if not (folder / INDEX).exists():
    raise InputError(
      f"{folder}: holds no complete checkpoint; run the import again"
    )
  return resumable.read_object(folder / INDEX)


def open_weights(folder: pathlib.Path) -> Weights:
  """The parameters of a workdir.

  Raises:
    InputError: they are not all there, or not what the index says.
  """
  facts = _facts(folder)
  try:
    source, digests = facts["config"], facts["digests"]
    model, tile = hf_config.read(source), hf_config.tile(source)
    model = config.override(model, f"mtp.depth={facts['mtp_depth']}")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{folder / INDEX}: cannot be read: {error}") from error
  found = {
    path: safetensors.header(_file(folder, path))
    for path in sorted({b.path for b in hf_mapping.of_model(model)})
  }
  weights = Weights(folder, source, model, tile, found, digests)
  problems = []
  for path, kinds in _shapes(weights).items():
    there = {name: (t.dtype, t.shape) for name, t in found[path].items()}
    if there != dict(kinds):
      problems.append(f"{_file(folder, path)}: holds {there}, must be {kinds}")
  missing = {b.names[0] for b in hf_mapping.of_model(model)} ^ digests.keys()
  problems += [
    f"{folder / INDEX}: {name}: a digest without block, or the reverse"
    for name in sorted(missing)
  ]
  if problems:
    raise InputError("\n".join(problems))
  return weights


def damaged(weights: Weights, advance: Callable[[int], None]) -> Iterator[str]:
  """Blocks whose bytes are not those that were imported."""

  def look(block):
    try:
      weights.stored(block)
    except InputError as error:
      return str(error)

  todo = hf_mapping.of_model(weights.model)
  for block, problem in resumable.in_order(look, todo, weights.n_bytes):
    if problem:
      yield problem
    advance(weights.n_bytes(block))

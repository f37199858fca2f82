"""Files of tensors in the safetensors format: a JSON header, then bytes.

The package of that name gives NumPy neither BF16 nor FP8, maps files whole,
which counts as memory, and takes the last of two tensors of one name. Here a
header is believed only if all of it is right, and reads are of what is asked.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.errors import InputError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, as of the format

Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # by name


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor is."""

  file: pathlib.Path
  offset: int  # bytes from the start of the file
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def n_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def header(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a file, in the order of their bytes.

  Raises:
    InputError: the file cannot be read, or its header does not describe
      exactly the bytes that follow it.
  """
  text, size = _head(path)
  try:
    facts = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(facts, dict):
      raise InputError("not an object")
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path}: bad header: {error}") from error
  facts.pop("__metadata__", None)
  start = 8 + len(text)
  found = {name: _tensor(path, start, name, f) for name, f in facts.items()}
  found = dict(sorted(found.items(), key=lambda item: item[1].offset))
  end = start
  for name, tensor in found.items():
    if tensor.offset != end:
      raise InputError(
        f"{path}: bad header: {name} begins at byte {tensor.offset - start},"
        f" what is before it ends at {end - start}"
      )
    end += tensor.n_bytes
  if end != size:
    what = "truncated" if end > size else "trailing bytes"
    raise InputError(f"{path}: {what}: {size} bytes, its header says {end}")
  return found


def _head(path: pathlib.Path) -> tuple[bytes, int]:
  """The text of a file's header, and the size of the file."""
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if size >= 8 and length <= min(size - 8, MAX_HEADER):
        return file.read(length), size
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error}") from error
  raise InputError(
    f"{path}: truncated, or no safetensors file: {size} bytes, the first of"
    f" which announce a header of {length}"
  )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    raise InputError(f"twice in it: {', '.join(sorted(twice))}")
  return found


def _tensor(path: pathlib.Path, start: int, name: str, facts: Any) -> Tensor:
  """A tensor as its entry in a header describes it."""
  problem = InputError(f"{path}: bad header: {name}: {facts!r}"[:500])
  if not isinstance(facts, dict):
    raise problem
  dtype, shape = DTYPES.get(str(facts.get("dtype"))), facts.get("shape")
  offsets = facts.get("data_offsets")
  for numbers in (shape, offsets):
    if not isinstance(numbers, list):
      raise problem
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
      raise problem
  if dtype is None or len(offsets) != 2:
    raise problem
  tensor = Tensor(path, start + offsets[0], dtype, tuple(shape))
  if offsets[1] - offsets[0] != tensor.n_bytes:
    raise problem
  return tensor


def read(
  tensor: Tensor,
  rows: slice = slice(None),
  columns: slice = slice(None),
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Rows and columns of a matrix, or rows of an array of any rank.

  Args:
    tensor: which one.
    rows: of its first dim.
    columns: of all other dims together.
    out: [rows, columns], contiguous, to read into.

  Raises:
    InputError: the file has changed since its header was read.
  """
  n_rows, width = tensor.shape[0], math.prod(tensor.shape[1:])
  rows, columns = range(n_rows)[rows], range(width)[columns]
  if out is None:
    out = np.empty((len(rows), len(columns)), tensor.dtype)
  size = tensor.dtype.itemsize
  start = tensor.offset + (rows.start * width + columns.start) * size
  # A row at a time unless rows are read whole.
  parts = [out] if len(columns) == width else out
  try:
    with tensor.file.open("rb", buffering=0) as file:
      for i, part in enumerate(parts):
        _fill(file.fileno(), part, start + i * width * size)
      if parts is not out:
        forget(file.fileno(), start, out.nbytes)
  except (OSError, EOFError) as error:
    raise InputError(f"{tensor.file}: cannot be read: {error}") from error
  if len(columns) == width:
    out = out.reshape(len(rows), *tensor.shape[1:])
  return out


def forget(file: int, offset: int = 0, n_bytes: int = 0) -> None:
  """Takes a part of a file, or all of it, out of the system's cache.

  What is read or written once would push out what others use, and a machine
  whose memory is lent to it page by page waits for each new one.
  """
  if hasattr(os, "posix_fadvise"):
    os.posix_fadvise(file, offset, n_bytes, os.POSIX_FADV_DONTNEED)


def as_bytes(array: np.ndarray) -> memoryview:
  """The memory of an array of any type.

  Raises:
    InputError: it is not contiguous.
  """
  if not array.flags.c_contiguous:
    raise ValueError("array must be contiguous")
  return memoryview(array.reshape(-1).view(np.uint8))


def _fill(file: int, array: np.ndarray, offset: int) -> None:
  left = as_bytes(array)
  while left:
    n = os.preadv(file, [left], offset)
    if not n:
      raise EOFError("it ends early; was it changed meanwhile?")
    left, offset = left[n:], offset + n


def plan(
  path: pathlib.Path, tensors: Shapes
) -> tuple[bytes, dict[str, Tensor]]:
  """The header of a file of tensors in this order, and where each will be."""
  facts, end = {"__metadata__": {"format": "pt"}}, 0
  for name, (dtype, shape) in tensors.items():
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    facts[name] = {
      "dtype": CODES[dtype],
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(facts, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the bytes of tensors are aligned
  start = 8 + len(text)
  places = {
    name: Tensor(path, start + facts[name]["data_offsets"][0], *kind)
    for name, kind in tensors.items()
  }
  return len(text).to_bytes(8, "little") + text, places


def create(path: pathlib.Path, tensors: Shapes) -> dict[str, Tensor]:
  """A file for tensors that are still to be written, zeros until then."""
  head, places = plan(path, tensors)
  with path.open("wb") as file:
    file.write(head)
    file.truncate(len(head) + sum(t.n_bytes for t in places.values()))
  return places


def write(tensor: Tensor, array: np.ndarray) -> None:
  """Writes a tensor into a file that `create` made."""
  left, offset = as_bytes(array), tensor.offset
  with tensor.file.open("r+b", buffering=0) as file:
    while left:
      n = os.pwrite(file.fileno(), left, offset)
      left, offset = left[n:], offset + n

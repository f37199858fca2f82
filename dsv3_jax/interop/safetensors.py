"""Reads and writes tensors in safetensors files: a JSON header, then bytes.

The package of that name gives NumPy neither BF16 nor FP8, maps whole files,
which counts as memory, takes the last of two tensors of one name, and writes
only files whose tensors are all in memory. This module checks all of a header,
reads only the rows that are asked for, and writes tensors one by one.
"""

import dataclasses
import json
import math
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.errors import InputError

DTYPES = {
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "BOOL": np.dtype(np.bool_),
}
# NumPy's names count bytes instead of bits: F64 is its f8.
for _code in "F64 F32 F16 I64 I32 I16 I8 U64 U32 U16 U8".split():
  DTYPES[_code] = np.dtype(f"{_code[0].lower()}{int(_code[1:]) // 8}")
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the format

Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # by name


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """Position, type and shape of a tensor in a file."""

  file: pathlib.Path
  offset: int  # bytes from the start of the file
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def n_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
  """Reads the header of a file; returns its tensors in the order of bytes.

  Raises:
    InputError: the file cannot be read, or its header does not describe
      exactly the bytes that follow it.
  """
  head, size = read_header_bytes(path)
  try:
    entries = json.loads(head[8:], object_pairs_hook=_reject_duplicates)
    if not isinstance(entries, dict):
      raise InputError("not an object")
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path}: bad header: {error}") from error
  entries.pop("__metadata__", None)
  start = end = len(head)
  tensors = [
    (name, _parse_tensor(path, start, name, entry))
    for name, entry in entries.items()
  ]
  tensors = dict(sorted(tensors, key=lambda item: item[1].offset))
  for name, tensor in tensors.items():
    if tensor.offset != end:
      raise InputError(
        f"{path}: bad header: {name} begins at byte {tensor.offset - start},"
        f" but the tensor before it ends at {end - start}"
      )
    end += tensor.n_bytes
  if end != size:
    problem = "truncated" if end > size else "trailing bytes"
    raise InputError(f"{path}: {problem}: {size} bytes, its header says {end}")
  return tensors


def read_header_bytes(path: pathlib.Path) -> tuple[bytes, int]:
  """Reads the bytes before the first tensor; returns them and the file's size.

  Raises:
    InputError: the file cannot be read, or is shorter than its header.
  """
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      first = file.read(8)
      length = int.from_bytes(first, "little")
      if size >= 8 and length <= min(size - 8, MAX_HEADER):
        return first + file.read(length), size
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error}") from error
  raise InputError(
    f"{path}: truncated, or not a safetensors file: {size} bytes, with a"
    f" header of {length}"
  )


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object as a dict; raises InputError for a name twice."""
  result = dict(pairs)
  if len(result) != len(pairs):
    names = [name for name, _ in pairs]
    duplicates = {name for name in names if names.count(name) > 1}
    raise InputError(f"duplicate names: {', '.join(sorted(duplicates))}")
  return result


def _parse_tensor(
  path: pathlib.Path, start: int, name: str, entry: Any
) -> StoredTensor:
  """Returns the tensor that an entry of a header describes."""
  problem = InputError(f"{path}: bad header: {name}: {entry!r}"[:500])
  if not isinstance(entry, dict):
    raise problem
  dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
  offsets = entry.get("data_offsets")
  if not isinstance(shape, list) or not isinstance(offsets, list):
    raise problem
  if any(type(n) is not int or not 0 <= n < 2**63 for n in shape + offsets):
    raise problem
  if dtype is None or len(offsets) != 2:
    raise problem
  tensor = StoredTensor(path, start + offsets[0], dtype, tuple(shape))
  if offsets[1] - offsets[0] != tensor.n_bytes:
    raise problem
  return tensor


def read(
  tensor: StoredTensor,
  rows: slice = slice(None),
  columns: slice = slice(None),
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Reads rows and columns of a matrix, or rows of an array of any rank.

  Args:
    tensor: the tensor.
    rows: slice of its first dim.
    columns: slice of all other dims flattened.
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
  # All at once if rows are complete, else row by row.
  arrays = [out] if len(columns) == width else out
  try:
    with tensor.file.open("rb", buffering=0) as file:
      for i, array in enumerate(arrays):
        _fill(file.fileno(), array, start + i * width * size)
      if arrays is not out:
        drop_from_cache(file.fileno(), start, out.nbytes)
  except (OSError, EOFError) as error:
    raise InputError(f"{tensor.file}: cannot be read: {error}") from error
  if len(columns) == width:
    out = out.reshape(len(rows), *tensor.shape[1:])
  return out


def drop_from_cache(file: int, offset: int = 0, n_bytes: int = 0) -> None:
  """Removes a range of a file, by default all of it, from the page cache.

  Data that is read or written once would evict pages that are used again, and
  virtual machines wait for each page of memory that the host gives them.
  """
  if hasattr(os, "posix_fadvise"):
    os.posix_fadvise(file, offset, n_bytes, os.POSIX_FADV_DONTNEED)


def as_bytes(array: np.ndarray) -> memoryview:
  """Returns the memory of a contiguous array of any type."""
  if not array.flags.c_contiguous:
    raise ValueError("array must be contiguous")
  return memoryview(array.reshape(-1).view(np.uint8))


def crc32(array: np.ndarray) -> int:
  """Returns the CRC-32 of an array; computing it is faster than reading."""
  return zlib.crc32(as_bytes(array))


def _fill(file: int, array: np.ndarray, offset: int) -> None:
  """Reads bytes of a file into an array; raises EOFError if it ends early."""
  remaining = as_bytes(array)
  while remaining:
    n = os.preadv(file, [remaining], offset)
    if not n:
      raise EOFError("it ends early; was it changed meanwhile?")
    remaining, offset = remaining[n:], offset + n


def make_header(tensors: Shapes) -> bytes:
  """Returns the bytes of a file before its tensors, stored in this order."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, (dtype, shape) in tensors.items():
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {
      "dtype": CODES[dtype],
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # aligns the tensors
  return len(text).to_bytes(8, "little") + text


def write(tensor: StoredTensor, array: np.ndarray) -> None:
  """Writes a tensor into a file that has a header already."""
  remaining, offset = as_bytes(array), tensor.offset
  with tensor.file.open("r+b", buffering=0) as file:
    while remaining:
      n = os.pwrite(file.fileno(), remaining, offset)
      remaining, offset = remaining[n:], offset + n

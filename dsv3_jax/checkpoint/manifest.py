"""Manifest of a checkpoint: arrays with checksums, files with sizes.

It is the last file written before the folder gets its name: a folder without a
complete `manifest.json` was never finished, or only half copied.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from dsv3_jax import io
from dsv3_jax.errors import InputError

NAME = "manifest.json"
VERSION = 1
_TYPE = re.compile(r"[a-z]\w*\[(\d{1,18}(,\d{1,18})*)?\]", re.ASCII)
# Orbax writes these later, and nothing reads them here.
_IGNORED = NAME, "_CHECKPOINT_METADATA", "commit_success.txt"


class DamagedError(InputError):
  """A checkpoint differs from what was saved."""


class MissingError(InputError):
  """There is no usable checkpoint."""


class SaveError(RuntimeError):
  """A checkpoint could not be written."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Content of a checkpoint."""

  step: int
  # By name: `type`, such as float32[2,3], and `digest`.
  arrays: dict[str, dict[str, Any]]
  metadata: dict[str, Any]  # the caller's; `facts` in the file
  files: dict[str, int]  # size in bytes by path in the folder

  def __post_init__(self):
    """Raises TypeError if a field has another type."""
    _expect(self.step, int)
    for field in (self.arrays, self.metadata, self.files):
      _expect(field, dict)
    for size in self.files.values():
      _expect(size, int)
    for array in self.arrays.values():
      _expect(array, dict)
      _expect(array["digest"], str)
      if not _TYPE.fullmatch(array["type"]):
        raise TypeError(f"{array['type']!r} is no type of an array")


def _expect(value: Any, expected: type) -> None:
  if type(value) is not expected:  # true is no number
    raise TypeError(f"{value!r} where {expected.__name__} is expected")


def write(
  folder: pathlib.Path,
  step: int,
  arrays: dict[str, dict[str, Any]],
  metadata: dict[str, Any],
) -> None:
  """Writes the manifest of a folder whose other files are complete."""
  body = {"version": VERSION} | dataclasses.asdict(
    Manifest(step, arrays, metadata, _files(folder))
  )
  body["facts"] = body.pop("metadata")
  body["sha256"] = _seal(body)
  with open(folder / NAME, "x", encoding="utf-8") as file:
    json.dump(body, file, indent=1)
    file.flush()
    os.fsync(file.fileno())


def read(folder: pathlib.Path) -> Manifest:
  """Reads a manifest and checks that its files exist with their sizes.

  Raises:
    DamagedError: something is missing, of another size, too much, a link, or
      the manifest is not as it was written.
  """
  path = folder / NAME
  try:
    if path.is_symlink():
      raise DamagedError(f"{path}: is a link")
    body = json.loads(path.read_bytes())
    seal, version = body.pop("sha256"), body.pop("version")
    if seal != _seal({"version": version} | body):
      raise DamagedError(f"{path}: is not as it was written")
    if version != VERSION:
      raise DamagedError(
        f"{path}: of version {version}; this program reads {VERSION}"
      )
    listed = Manifest(metadata=body.pop("facts"), **body)
    there = _files(folder)
  except FileNotFoundError as error:
    raise DamagedError(
      f"{folder}: has no {NAME}: half written or half copied, or made by"
      " another program"
    ) from error
  except (
    OSError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise DamagedError(f"{path}: cannot be read: {error!r}") from error
  except DamagedError:
    raise
  except ValueError as error:
    raise DamagedError(f"{path}: is not as it was written: {error}") from error
  if folder.name != str(listed.step):
    raise DamagedError(f"{folder}: holds step {listed.step}")
  lines = [
    f"{folder / name}: {there.get(name, 'no')} bytes,"
    f" {listed.files.get(name, 'none')} were written"
    for name in sorted(there.keys() | listed.files.keys())
    if there.get(name) != listed.files.get(name)
  ]
  if lines:
    raise DamagedError("\n".join(lines))
  return listed


def _seal(body: dict[str, Any]) -> str:
  return io.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")))


def _files(folder: pathlib.Path) -> dict[str, int]:
  """Measures all files in a folder that a manifest lists.

  Raises:
    DamagedError: something is neither a file nor a folder, as a link is not.
  """
  sizes = {}
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.is_dir(follow_symlinks=False):
        inner = _files(pathlib.Path(entry.path))
        sizes |= {f"{entry.name}/{name}": size for name, size in inner.items()}
      elif not entry.is_file(follow_symlinks=False):
        raise DamagedError(f"{entry.path}: is neither a file nor a folder")
      elif entry.name not in _IGNORED:
        sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
  return sizes

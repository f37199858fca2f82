"""Imports a released checkpoint into a workdir: a copy or links, and checksums.

`hf/` in the workdir holds the released files as they are, FP8 with its scales,
and `import.json`, written last, with the CRC-32 of every tensor. The workdir
holds nothing else of a run: no optimizer state, no float32 master weights.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator

from dsv3_jax import io
from dsv3_jax.errors import InputError
from dsv3_jax.interop import hf_read, resumable, safetensors, tokenizer_files
from dsv3_jax.interop.hf_read import ReleasedCheckpoint
from dsv3_jax.interop.resumable import Advance

FOLDER, RECORD, JOURNAL = "hf", "import.json", ".import.jsonl"
LINKS = "", "hard", "symbolic"  # "": files are copied
# The folder of an import by versions that had a weight format of their own.
OLD_FOLDER = "weights"
_COMMIT = 1 << 30  # bytes between entries of the journal


def import_checkpoint(
  source: ReleasedCheckpoint, folder: pathlib.Path, link: str, advance: Advance
) -> None:
  """Copies or links a released checkpoint and records its checksums.

  An interrupted call is resumed by the same call: tensors in its journal are
  not read again. `link` is one of `LINKS`.

  Raises:
    InputError: the folder holds something else, or the disk is full.
  """
  if (folder / RECORD).exists():
    record = io.read_json_object(folder / RECORD)
    if record.get("source") == source.fingerprint():
      return
    raise InputError(
      f"{folder}: holds another checkpoint already; take another --workdir"
    )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    checksums = _import_tensors(source, folder, link, advance)
    names = hf_read.INDEX, hf_read.SUMS, *tokenizer_files.FILES
    tokenizer_files.copy_files(source.folder, folder, (*names, hf_read.CONFIG))
    record = {"source": source.fingerprint(), "crc32": checksums}
    io.write_text(folder / RECORD, json.dumps(record))
    (folder / JOURNAL).unlink()
  except OSError as error:
    raise resumable.disk_error(folder, error) from error


def _import_tensors(
  source: ReleasedCheckpoint, folder: pathlib.Path, link: str, advance: Advance
) -> dict[str, int]:
  """Returns the CRC-32 of each tensor, once all of them are on the disk."""
  tensors, files = source.tensors, source.shards()
  work = f"{source.fingerprint()} {link}"
  journal = resumable.Journal(folder / JOURNAL, work)
  if not journal.begun:
    journal.begin(0 if link else sum(path.stat().st_size for path in files))
  for path in files:
    if not (folder / path.name).exists():
      _create_file(path.resolve(), folder / path.name, link)

  def import_tensor(name: str) -> int:
    tensor = tensors[name]
    array = safetensors.read(tensor)
    if not link:
      copy = dataclasses.replace(tensor, file=folder / tensor.file.name)
      safetensors.write(copy, array)
    return safetensors.crc32(array)

  remaining = sorted(
    tensors.keys() - journal.done.keys(),
    key=lambda name: (tensors[name].file, tensors[name].offset),
  )
  advance(sum(tensors[name].n_bytes for name in journal.done))
  checksums, written, n_bytes = {}, set(), 0
  for name, checksum in resumable.map_in_order(
    import_tensor, remaining, lambda name: tensors[name].n_bytes
  ):
    checksums[name] = checksum
    if not link:
      written.add(folder / tensors[name].file.name)
    n_bytes += tensors[name].n_bytes
    if n_bytes >= _COMMIT:
      journal.add(checksums, written)
      checksums, written, n_bytes = {}, set(), 0
    advance(tensors[name].n_bytes)
  journal.add(checksums, written)
  return journal.done


def _create_file(source: pathlib.Path, target: pathlib.Path, link: str) -> None:
  """Links a file; or makes one with its header, and zeros for its tensors."""
  if link == "hard":
    os.link(source, target)
  elif link == "symbolic":
    target.symlink_to(source)
  else:
    header, size = safetensors.read_header_bytes(source)
    with io.atomic_write(target, "wb") as file:
      file.write(header)
      file.truncate(size)


def open_import(workdir: pathlib.Path) -> ReleasedCheckpoint:
  """Opens the checkpoint of a workdir; reading it compares its checksums.

  Raises:
    InputError: the workdir holds no import, or an incomplete or damaged one.
  """
  folder = workdir / FOLDER
  if not folder.is_dir():
    check_format(workdir)
    raise InputError(f"{workdir}: holds no imported checkpoint")
  if not (folder / RECORD).exists():
    raise InputError(f"{folder}: incomplete; run the import again")
  checksums = io.read_json_object(folder / RECORD).get("crc32")
  source = hf_read.open_folder(folder, ignore_auto_map=True, follow_links=True)
  if (
    not isinstance(checksums, dict)
    or checksums.keys() != source.tensors.keys()
    or any(type(checksum) is not int for checksum in checksums.values())
  ):
    raise InputError(
      f"{folder / RECORD}: must have a CRC-32 of each tensor of {folder};"
      " import into an empty folder again"
    )
  return dataclasses.replace(source, checksums=checksums)


def check_format(workdir: pathlib.Path) -> None:
  """Raises InputError for an import of a version that wrote `weights/`."""
  if (workdir / OLD_FOLDER).is_dir():
    raise InputError(
      f"{workdir}: was imported by an older version, whose"
      f" {OLD_FOLDER}/ is not read any more; remove {workdir} and import again:"
      f" python -m scripts.convert --mode=import --hf=DIR --workdir={workdir}"
    )


def corrupt_tensors(
  source: ReleasedCheckpoint, advance: Advance
) -> Iterator[str]:
  """Yields a problem for each tensor whose bytes are not those imported."""

  def check(name: str) -> str:
    try:
      source.read_tensor(name)
    except InputError as error:
      return str(error)
    return ""

  def n_bytes(name: str) -> int:
    return source.tensors[name].n_bytes

  for name, problem in resumable.map_in_order(check, source.tensors, n_bytes):
    if problem:
      yield problem
    advance(n_bytes(name))

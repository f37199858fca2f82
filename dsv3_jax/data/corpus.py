"""The text of a run: documents read from files, their split and their digest.

Documents come in the order of their names, so neither the order in which a
file system lists a directory nor the place of that directory matters.
"""

import bz2
import collections
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence

from absl import logging

from dsv3_jax.config import fields
from dsv3_jax.errors import InputError

NOVELS = pathlib.Path(__file__).parent / "novels"
WHOLE_DOCUMENTS = 20  # from so many on, documents are held out whole
_LINE_BREAK_BYTES = 4096  # how far a cut may move to end on a line break
_ALLOWED = (
  "allowed: a UTF-8 text file, .gz, .jsonl or .jsonl.gz, a directory of"
  " them, or nothing for the two novels"
)


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and where it is in the corpus."""

  name: str  # file, or file:line of a .jsonl
  text: str


def documents(path: str, on_decode_error: str) -> list[Document]:
  """Reads the corpus at `path`, in the order of the names.

  A byte order mark is dropped and CRLF becomes LF. Documents of white space
  only are left out. Bad text is invalid UTF-8, a NUL or (in JSON) a lone
  surrogate; what was replaced or left out is counted in the log.

  Args:
    path: text file, .gz, .jsonl ({"text": ...} a line), a directory of them
      (recursive, without hidden files and symbolic links), or "": the novels.
    on_decode_error: `error` raises, `replace` puts U+FFFD, `skip` leaves out
      the document.

  Raises:
    InputError: the path is missing, has no text, cannot be read, is not the
      JSON expected, or has bad text; names the file and the line or byte.
  """
  if on_decode_error not in ("error", "replace", "skip"):
    raise InputError(
      f"data.on_decode_error={on_decode_error!r}: must be error, replace or"
      " skip"
    )
  counts = collections.Counter()
  found = []
  for name, file in _files(path):
    for document in _read(name, file, on_decode_error, counts):
      if document.text.strip():
        found.append(document)
      else:
        counts["empty documents left out"] += 1
  for what, count in sorted(counts.items()):
    logging.warning("data.path=%r: %d %s", path, count, what)
  if not found:
    raise InputError(f"data.path={path!r}: there is no text in it; {_ALLOWED}")
  return found


def _files(path: str) -> list[tuple[str, pathlib.Path]]:
  """(name in the corpus, file) for each file of it, sorted by name."""
  if not path:
    return [(file.name, file) for file in sorted(NOVELS.glob("*.gz"))]
  root = pathlib.Path(os.path.expanduser(path))
  if os.path.isfile(root):
    return [(root.name, root)]
  if not os.path.isdir(root):
    beside = root.parent.iterdir() if os.path.isdir(root.parent) else ()
    hint = fields.nearest(root.name, (file.name for file in beside))
    raise InputError(
      f"data.path={path!r}: no such file or directory{hint}; {_ALLOWED}"
    )
  return sorted((f.relative_to(root).as_posix(), f) for f in _walk(root))


def _walk(root: pathlib.Path) -> Iterator[pathlib.Path]:
  """The regular files below a directory, but hidden ones and links."""
  for parent, directories, names in os.walk(root, onerror=_unreadable):
    directories[:] = [name for name in directories if name[0] != "."]
    for name in names:
      file = pathlib.Path(parent, name)
      # A link may lead out of the corpus, or to a text that it has already.
      if name[0] != "." and file.is_file() and not file.is_symlink():
        yield file


def _unreadable(error: OSError) -> None:
  raise InputError(f"data.path: cannot read {error.filename}: {error.strerror}")


def _read(
  name: str, file: pathlib.Path, policy: str, counts: collections.Counter
) -> Iterator[Document]:
  """The documents of one file."""
  try:
    raw = file.read_bytes()
    if file.suffix.lower() == ".gz":
      if not raw:  # which gzip takes for the end of a good file
        raise EOFError("the file is empty, no gzip header")
      raw = gzip.decompress(raw)
  except (OSError, EOFError, zlib.error) as error:
    raise InputError(f"data.path: cannot read {file}: {error}") from error
  if file.name.lower().removesuffix(".gz").endswith(".jsonl"):
    yield from _read_lines(name, file, raw, policy, counts)
  elif (text := _text(raw, str(file), 0, policy, counts)) is not None:
    yield Document(name, text)


def _read_lines(
  name: str,
  file: pathlib.Path,
  raw: bytes,
  policy: str,
  counts: collections.Counter,
) -> Iterator[Document]:
  """The documents of a .jsonl file; blank lines are none."""
  start = 0
  for number, line in enumerate(raw.split(b"\n"), 1):
    where = f"{file}, line {number}"
    text = _text(line, where, start, policy, counts)
    start += len(line) + 1
    if text is None or not text.strip():
      continue
    try:
      record = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
      raise InputError(
        f'{where}: expected an object {{"text": "..."}}, got {text[:60]!r}'
      )
    # JSON may spell what UTF-8 cannot hold; as bytes it meets the same rule.
    inner = record["text"].encode("utf-8", "surrogatepass")
    text = _text(inner, f"{where}, in its text", 0, policy, counts)
    if text is not None:
      yield Document(f"{name}:{number}", text)


def _text(
  raw: bytes, where: str, start: int, policy: str, counts: collections.Counter
) -> str | None:
  """Decodes bytes that begin at offset `start`; None: to be left out."""
  bad = _first_bad(raw)
  if bad is not None:
    if policy == "error":
      raise InputError(
        f"{where}: byte {raw[bad]:#04x} at offset {start + bad} is not UTF-8"
        " text; data.on_decode_error=replace or =skip goes on without it"
      )
    if policy == "skip":
      counts["documents of bad text left out"] += 1
      return None
    counts["texts with bytes replaced by U+FFFD"] += 1
  text = raw.decode("utf-8", "replace").replace("\0", "\ufffd")
  return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _first_bad(raw: bytes) -> int | None:
  """Offset of the first NUL or byte that is not UTF-8."""
  end = len(raw)
  try:
    raw.decode("utf-8")
  except UnicodeDecodeError as error:
    end = error.start
  nul = raw.find(b"\0", 0, end)
  if nul >= 0:
    return nul
  return end if end < len(raw) else None


def split(
  documents: Sequence[Document], heldout: float
) -> tuple[list[Document], list[Document]]:
  """Splits documents into those to train on and those held out.

  A corpus of at least `WHOLE_DOCUMENTS` documents holds out whole ones: in the
  order of a hash of name and text, each that still fits into the share. A
  smaller one holds out the last bytes of all its text, cut as `_cut` says.

  Args:
    documents: in corpus order.
    heldout: share of the UTF-8 bytes, in (0, 1).

  Raises:
    InputError: a part would have no text.
  """
  whole = len(documents) >= WHOLE_DOCUMENTS
  train, held = (_split_whole if whole else _split_end)(documents, heldout)
  if not train or not held:
    n_bytes = len(text_bytes(documents))
    raise InputError(
      f"data.heldout_fraction={heldout}: of {n_bytes} bytes of text in"
      f" {len(documents)} documents this leaves nothing to"
      f" {'evaluate' if train else 'train'} on; choose another share or add"
      " text"
    )
  return train, held


def _split_whole(
  documents: Sequence[Document], heldout: float
) -> tuple[list[Document], list[Document]]:
  sizes = [len(document.text.encode()) for document in documents]
  left = heldout * sum(sizes)
  keys = [digest([document]) for document in documents]
  order = sorted(range(len(documents)), key=lambda i: keys[i])
  chosen = set()
  for i in order:
    if sizes[i] <= left:
      chosen.add(i)
      left -= sizes[i]
  if not chosen:  # no document is that small: the one nearest to it
    chosen.add(min(order, key=lambda i: sizes[i]))
  train = [d for i, d in enumerate(documents) if i not in chosen]
  return train, [documents[i] for i in sorted(chosen)]


def _split_end(
  documents: Sequence[Document], heldout: float
) -> tuple[list[Document], list[Document]]:
  total = len(text_bytes(documents))
  left = total - round(heldout * total)  # bytes to train on
  train, held = [], []
  for document in documents:
    raw = document.text.encode()
    at = _cut(raw, left) if 0 < left < len(raw) else max(0, left)
    for part, piece in ((train, raw[:at]), (held, raw[at:])):
      if piece.strip():
        part.append(Document(document.name, piece.decode()))
    left -= len(raw)
  return train, held


def _cut(raw: bytes, at: int) -> int:
  """Where to cut a text near byte `at`.

  After the first line break at or after it, if that is at most
  `_LINE_BREAK_BYTES` and half of what follows away; else at the next character.
  """
  near = min(_LINE_BREAK_BYTES, (len(raw) - at) // 2)
  line_break = raw.find(b"\n", at, at + near)
  if line_break >= 0:
    return line_break + 1
  while at < len(raw) and raw[at] & 0xC0 == 0x80:  # inside a UTF-8 character
    at += 1
  return at


def text_bytes(documents: Sequence[Document]) -> bytes:
  """The text of all documents, one after the other, in UTF-8."""
  return b"".join(document.text.encode() for document in documents)


def digest(documents: Sequence[Document]) -> str:
  """The sha256 of all names and texts, in order."""
  result = hashlib.sha256()
  for document in documents:
    for part in (os.fsencode(document.name), document.text.encode()):
      result.update(len(part).to_bytes(8, "big") + part)
  return result.hexdigest()


def compression_bits_per_byte(train: bytes, heldout: bytes) -> dict[str, float]:
  """What general compressors need for `heldout` once they have seen `train`.

  That is the growth of the compressed size, in bits a byte held out: the bar
  that a model's bits per byte stand against.
  """
  compressors = {
    "bzip2 -9": lambda raw: bz2.compress(raw, 9),
    "xz -9e": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
  }
  return {
    name: 8 * (len(run(train + heldout)) - len(run(train))) / len(heldout)
    for name, run in compressors.items()
  }

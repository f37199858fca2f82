"""The table of data sources, and the documents of a run by domain."""

from collections.abc import Callable, Iterable

from dsv3_jax import config
from dsv3_jax.config import fields
from dsv3_jax.data import corpus, text_files
from dsv3_jax.errors import InputError

# `data.source` -> a function that yields the documents of a run in a fixed
# order. It reads `data.path` and `data.domains` in its own way.
SOURCES: dict[str, Callable[[config.Data], Iterable[corpus.Document]]] = {
  "files": text_files.read_corpus
}

Split = tuple[list[corpus.Document], list[corpus.Document]]


def load_documents(data: config.Data) -> dict[str, Split]:
  """Reads the documents of a run: {domain: (training, held-out)}.

  With `data.domains`, documents of other domains are dropped; without, all are
  of the domain "". Raises InputError if a source or text is missing.
  """
  if data.source not in SOURCES:
    names = *SOURCES, *config.SUPERVISED
    hint = fields.nearest(data.source, names)
    raise InputError(
      f"data.source={data.source!r}: must be one of {', '.join(names)}{hint}"
    )
  domains = {name: [] for name in data.domain_weights or [""]}
  for document in SOURCES[data.source](data):
    name = document.domain if data.domain_weights else ""
    if name in domains:
      domains[name].append(document)
  trained_bytes: dict[str, int] = {}
  return {
    name: corpus.split(documents, data.heldout_fraction, trained_bytes)
    for name, documents in domains.items()
  }

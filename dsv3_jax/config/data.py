"""Settings of a run's data: its source, and how rows are made of it."""

from collections.abc import Iterator

from dsv3_jax.config import fields
from dsv3_jax.config.fields import choice, number, plain


def _is_weight(entry: str) -> bool:
  try:
    return 1e-9 <= float(entry.partition("=")[2]) <= 1e9
  except ValueError:
    return False


# Sources of conversations, of which only answers are trained on.
CONVERSATIONS, TASKS, PREFERENCES = "conversations", "tasks", "preferences"
SUPERVISED = CONVERSATIONS, TASKS, PREFERENCES


@fields.checked
class Data:
  """Text, and its conversion to rows of tokens."""

  # A key of data.sources.SOURCES, or one of SUPERVISED.
  source: str = plain(
    "files",
    "reader of `path`; to fine-tune conversations, tasks or preferences",
  )
  path: str = plain(
    "", "text file, .gz, .jsonl, or a folder of them; empty: two novels"
  )
  tokenizer: str = choice(
    "bpe", "deepseek", doc="BPE trained on the text, or V3's own"
  )
  seq_len: int = number(low=1, doc="tokens of a row, the context of training")
  heldout_fraction: float = number(
    0.05, above=0, high=0.5, doc="share of the text, at its end, to evaluate on"
  )
  on_decode_error: str = choice(
    "error", "replace", "skip", doc="what to do with text that is not UTF-8"
  )
  domains: str = plain(
    "",
    "folders or files of `path` with sampling weights, such as prose=2,code=1",
  )
  segment_mask: bool = plain(False, "attention stays within a document")
  fim_rate: float = number(
    0.0, low=0, high=1, doc="share of fill-in-the-middle documents"
  )
  split_rate: float = number(
    0.0, low=0, high=1, doc="share of tokens with a line break that are split"
  )
  # A key of data.chat.TEMPLATES.
  template: str = plain("plain", "chat template of conversations")
  problems: int = number(
    20_000, low=1, doc="problems of each task, besides those held out"
  )

  @property
  def supervised(self) -> bool:
    """Returns whether only the answers of conversations are trained on."""
    return self.source in SUPERVISED

  @property
  def group(self) -> int:
    """Samples that share a row: a pair, of preferences."""
    return 2 if self.source == PREFERENCES else 1

  @property
  def room(self) -> int:
    """Tokens of a row that samples may take.

    Those of preferences leave one free: the score is read at their last token,
    which must not be a label alone.
    """
    return self.seq_len + 2 - self.group

  def validate(self) -> Iterator[str]:
    if self.supervised and (self.domains or self.fim_rate or self.split_rate):
      yield (
        f"Data.source={self.source}: conversations have no domains, fim_rate or"
        " split_rate"
      )
    entries, setting = self._domain_entries, f"Data.domains={self.domains!r}"
    names = [entry.partition("=")[0].strip() for entry in entries]
    if entries and not self.path:
      yield f"{setting}: needs Data.path, their folder"
    for entry, name in zip(entries, names, strict=True):
      valid = name and name[0] != "." and "/" not in name and _is_weight(entry)
      if names.count(name) > 1 or not valid:
        yield (
          f"{setting}: {entry!r} must be name=weight, such as prose=2; each"
          " name once and in Data.path, the weight from 1e-9 to 1e9"
        )

  @property
  def _domain_entries(self) -> list[str]:
    return self.domains.split(",") if self.domains else []

  @property
  def domain_weights(self) -> dict[str, float]:
    """The weight of each domain, in order; empty if there is one domain."""
    pairs = (entry.partition("=") for entry in self._domain_entries)
    return {name.strip(): float(weight) for name, _, weight in pairs}

"""What an engine counts."""

import dataclasses


@dataclasses.dataclass
class EngineStats:
  """Counts since an engine was made."""

  prompt_tokens: int = 0
  tokens: int = 0  # written by cycles, those behind the end of a text too
  cycles: int = 0  # passes of the main model over the slots
  rows: int = 0  # texts that they read tokens of, summed
  wasted_rows: int = 0  # the same of texts that had ended; counted nowhere else
  drafts: int = 0
  accepted: int = 0  # of the drafts
  # Of a unit's devices before each time that experts were placed anew, mean
  # over routers.
  imbalance: list[float] = dataclasses.field(default_factory=list)

  @property
  def acceptance(self) -> float:
    """The share of drafts that were kept."""
    return self.accepted / self.drafts if self.drafts else 0.0

  @property
  def calls_per_token(self) -> float:
    """Passes of the main model for a token of one text."""
    return self.rows / self.tokens if self.tokens else 0.0

"""The request for a generated text: its prompt, sampling settings and stops."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

MAX_TEMPERATURE = 1e30  # dividing float32 logits by more gives zeros

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def _setting(default: Any, description: str) -> Any:
  return dataclasses.field(default=default, metadata={"help": description})


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
  """A prompt, and how to generate the text that follows it.

  The fields with a "help" are the settings that flags and JSON rows have too.
  """

  prompt: Prompt  # a text, token ids, or messages with "role" and "content"
  max_tokens: int = _setting(256, "maximum number of generated tokens")
  temperature: float = _setting(1.0, "softmax temperature; 0 is greedy")
  top_p: float = _setting(1.0, "sample from the smallest set of this mass")
  top_k: int = _setting(0, "sample from this many most likely tokens; 0: all")
  seed: int = _setting(0, "random seed of the text")
  stop: tuple[str, ...] = _setting((), "a string that ends the text before it")
  stop_token_ids: tuple[int, ...] = ()  # ids that end the text

  def validate(self) -> list[str]:
    """Lists the settings that are out of range, a line each."""
    problems = []
    if not 0 <= self.temperature <= MAX_TEMPERATURE:
      problems.append(
        f"temperature={self.temperature}: must be at least 0, and at most"
        f" {MAX_TEMPERATURE:.0e}"
      )
    if not 0 < self.top_p <= 1:
      problems.append(f"top_p={self.top_p}: must be above 0 and at most 1")
    if not 0 <= self.top_k < 2**31:
      problems.append(
        f"top_k={self.top_k}: must be in [0, 2^31), where 0 is no limit"
      )
    if not 0 <= self.seed < 2**32:
      problems.append(f"seed={self.seed}: must be in [0, 2^32)")
    if self.max_tokens < 1:
      problems.append(f"max_tokens={self.max_tokens}: must be at least 1")
    if "" in self.stop:
      problems.append("stop=: a stop string must not be empty")
    return problems


IDLE = GenerationRequest((), temperature=0)  # settings of an empty slot
SETTINGS = {
  field.name: field
  for field in dataclasses.fields(GenerationRequest)
  if "help" in field.metadata
}

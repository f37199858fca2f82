"""A fault of another code base as one changed line of ours."""

import dataclasses
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A fault, the line that brings it here, and the test that sees it."""

  fault: str  # project#number of the threads that report it
  what: str  # it does
  file: str
  before: str  # in the file once
  after: str
  test: str  # file::class::method, and the case of a parameterized one

  @property
  def name(self) -> str:
    """The first thread, and the file: a name for a test."""
    text = f"{self.fault.split(',')[0]}_{self.what}"
    return "_".join("".join(c if c.isalnum() else " " for c in text).split())

  def source(self) -> str:
    """Returns the file with the changed line."""
    text = (ROOT / self.file).read_text("utf-8")
    assert text.count(self.before) == 1, (self.fault, text.count(self.before))
    return text.replace(self.before, self.after)

"""Tables that programs make and put into README.md, between marks."""

import pathlib
from collections.abc import Sequence

from dsv3_jax.errors import InputError

README = pathlib.Path(__file__).parents[1] / "README.md"
LEAD, END = "<!-- made by: ", "<!-- end of what it made -->"


def row(*cells: str) -> str:
  """A row of a table, in Markdown."""
  return "| " + " | ".join(cells) + " |"


def head(names: Sequence[str]) -> list[str]:
  """The rows above those of a table."""
  return [row(*names), row(*["---"] * len(names))]


def folded(title: str, names: Sequence[str], rows: Sequence[str]) -> str:
  """A table that is shown when its title is clicked."""
  lines = [*head(names), *rows]
  opening = f"<details><summary>{title}</summary>\n"
  return "\n".join([opening, *lines, "\n</details>"])


def replaced(text: str, mark: str, block: str) -> str:
  """A page with what stands after a mark replaced.

  Args:
    text: the page.
    mark: begins with LEAD; what follows ends with END.
    block: what is to stand there.

  Raises:
    InputError: the marks are not there, the first of them once.
  """
  before, begin, rest = text.partition(mark)
  old, end, after = rest.partition(END)
  if not (begin and end) or mark in rest or LEAD in old:
    raise InputError(f"expected {mark!r} once, and then {END!r}")
  return f"{before}{mark}\n{block}\n{END}{after}"


def put(mark: str, block: str) -> None:
  """Replaces what stands after a mark in the README."""
  text = README.read_text(encoding="utf-8")
  README.write_text(replaced(text, mark, block), encoding="utf-8")

"""Tables in which objects show themselves, on terminals and in notebooks."""

import html
from collections.abc import Mapping


class Table:
  """Base of classes that are shown as a table of names and values."""

  def _rows(self) -> Mapping[str, object]:
    """Returns what to show, by name; starts nothing and waits for nothing."""
    raise NotImplementedError

  def __repr__(self) -> str:
    rows = self._rows()
    width = max(map(len, rows), default=0)
    lines = (f"  {name:<{width}}  {value}" for name, value in rows.items())
    return "\n".join((type(self).__name__, *lines))

  def _repr_html_(self) -> str:
    """Returns the table as IPython shows it."""
    cells = (
      f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
      for name, value in self._rows().items()
    )
    return f"<table>{''.join(cells)}</table>"

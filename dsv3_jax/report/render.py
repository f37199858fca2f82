"""Renders drawings as PNG files in one style."""

import io
from collections.abc import Callable

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH_IN = 7.2
DPI = 150
PAPER, INK, GRID = "#ffffff", "#2b3036", "#e3e6ea"
# Safe for the colour-blind, after Okabe and Ito.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#7a5195")
# Expert load, from idle over even, which is the paper's colour, to overloaded.
LOAD = LinearSegmentedColormap.from_list(
  "expert-load",
  ("#08305b", "#1f77b4", "#8fc1e3", PAPER, "#f6b98a", "#d8601a", "#6b2400"),
).with_extremes(bad=GRID)
STYLE = {
  "axes.edgecolor": INK,
  "axes.labelcolor": INK,
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
  "grid.color": GRID,
  "axes.prop_cycle": matplotlib.cycler(color=SERIES),
  "font.size": 10,
  "axes.titlesize": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.linewidth": 0.8,
  "axes.axisbelow": True,
  "legend.frameon": False,
  "lines.linewidth": 1.8,
}


def png(
  draw: Callable[[Figure], None], height_in: float, width_in: float = WIDTH_IN
) -> bytes:
  """Renders what `draw` puts into a figure as PNG bytes."""
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
  return file.getvalue()

"""The looks of a picture: colours of light and dark pages, sizes, PNG."""

import dataclasses
import io
from collections.abc import Callable

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

WIDTH_IN = 7.2
DPI = 150


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours of a page; series and heat map are safe for the colour-blind."""

  paper: str
  ink: str
  grid: str
  series: tuple[str, ...]  # after Okabe and Ito
  low: tuple[str, ...]  # towards an idle expert, from the middle outwards
  high: tuple[str, ...]  # towards an overloaded one
  shares: str  # name of the colour map made of these


LIGHT = Theme(
  paper="#ffffff",
  ink="#2b3036",
  grid="#e3e6ea",
  series=("#0072b2", "#d55e00", "#009e73", "#7a5195"),
  low=("#8fc1e3", "#1f77b4", "#08305b"),
  high=("#f6b98a", "#d8601a", "#6b2400"),
  shares="expert-share-light",
)
DARK = Theme(
  paper="#1b1f24",
  ink="#d5dae0",
  grid="#333a43",
  series=("#56b4e9", "#f0913a", "#35c79a", "#c79ae0"),
  low=("#1f4f7a", "#3f97d8", "#c4e4ff"),
  high=("#7a3f12", "#ec8a3c", "#ffe0bf"),
  shares="expert-share-dark",
)


def _register_shares(theme: Theme) -> None:
  """Makes the theme's colour map known: an even load is the paper itself."""
  colours = (*theme.low[::-1], theme.paper, *theme.high)
  ramp = LinearSegmentedColormap.from_list(theme.shares, colours)
  matplotlib.colormaps.register(ramp.with_extremes(bad=theme.grid))


_register_shares(LIGHT)
_register_shares(DARK)


def render(
  draw: Callable[[Figure], None],
  theme: Theme,
  height_in: float,
  width_in: float = WIDTH_IN,
) -> bytes:
  """A drawing as PNG bytes."""
  settings = {
    "figure.facecolor": theme.paper,
    "axes.facecolor": theme.paper,
    "axes.edgecolor": theme.ink,
    "axes.labelcolor": theme.ink,
    "text.color": theme.ink,
    "xtick.color": theme.ink,
    "ytick.color": theme.ink,
    "grid.color": theme.grid,
    "axes.prop_cycle": matplotlib.cycler(color=theme.series),
    "image.cmap": theme.shares,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
  }
  with matplotlib.rc_context(settings):
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    draw(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
  # Few colours: a third of the size.
  png = io.BytesIO()
  with Image.open(drawn) as image:
    image.convert("RGB").quantize(256).save(png, format="png", optimize=True)
  return png.getvalue()

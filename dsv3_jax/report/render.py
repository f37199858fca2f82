"""Renders drawings as SVG for a page, light or dark, and as PNG files."""

import io
import re
from collections.abc import Callable

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH_IN, NARROW_IN = 7.2, 3.75  # of a page, and of a phone
DPI = 150

# Colours by name, for a light and for a dark page. Those of series and ramp
# have a contrast of 3 to the paper, and the colour-blind can tell all series
# apart; tests/report/render_test.py computes both.
LIGHT = {
  "paper": "#ffffff",
  "ink": "#24292f",
  "soft": "#626b75",
  "grid": "#e4e7eb",
  "card": "#f6f7f9",
  "series-0": "#2563c9",
  "series-1": "#df6a17",
  "series-2": "#0d523d",
  "series-3": "#a64a85",
  # From the first layer to the last.
  "ramp-0": "#301c64",
  "ramp-1": "#243378",
  "ramp-2": "#054a80",
  "ramp-3": "#005e7e",
  "ramp-4": "#09717f",
  "ramp-5": "#03847f",
  "ramp-6": "#169777",
  "ramp-7": "#55a568",
}
DARK = {
  "paper": "#16191d",
  "ink": "#dde2e8",
  "soft": "#98a2ad",
  "grid": "#2d333b",
  "card": "#1f242a",
  "series-0": "#6aa5ff",
  "series-1": "#f0883e",
  "series-2": "#a5ecc9",
  "series-3": "#b0609f",
  "ramp-0": "#7468b0",
  "ramp-1": "#6a80c6",
  "ramp-2": "#5d98d5",
  "ramp-3": "#4fb1dc",
  "ramp-4": "#4ec8db",
  "ramp-5": "#62dcd5",
  "ramp-6": "#86eecb",
  "ramp-7": "#b2fdc1",
}
PAPER, INK, SOFT, GRID = (LIGHT[k] for k in ("paper", "ink", "soft", "grid"))
SERIES = tuple(v for k, v in LIGHT.items() if k.startswith("series"))
RAMP = tuple(v for k, v in LIGHT.items() if k.startswith("ramp"))

# Expert load, from idle to overloaded. Even load is transparent, so that it has
# the colour of any paper.
LOAD = LinearSegmentedColormap.from_list(
  "expert-load",
  [
    (0.0, SERIES[0] + "ff"),
    (0.5, SERIES[0] + "00"),
    (0.5, SERIES[1] + "00"),
    (1.0, SERIES[1] + "ff"),
  ],
).with_extremes(bad=SOFT)
STYLE = {
  "axes.edgecolor": SOFT,
  "axes.labelcolor": SOFT,
  "text.color": INK,
  "xtick.color": SOFT,
  "ytick.color": SOFT,
  "grid.color": GRID,
  "grid.linewidth": 0.8,
  "axes.prop_cycle": (
    matplotlib.cycler(linestyle=["-", "--", ":"])
    * matplotlib.cycler(color=SERIES)
  ),
  "font.size": 9.5,
  "axes.titlesize": 9.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "ytick.major.size": 0,
  "axes.linewidth": 0.8,
  "axes.axisbelow": True,
  "legend.frameon": False,
  "lines.linewidth": 1.6,
  "svg.fonttype": "none",  # text is text
}

Draw = Callable[[Figure], None]


def _render(
  draw: Draw, height_in: float, width_in: float, **options: object
) -> bytes:
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, **options)
  return file.getvalue()


def png(draw: Draw, height_in: float, width_in: float = WIDTH_IN) -> bytes:
  """Renders what `draw` puts into a figure as PNG bytes, on white."""
  return _render(draw, height_in, width_in, format="png")


def svg(draw: Draw, height_in: float, width_in: float, name: str) -> str:
  """Renders a drawing as an <svg> element for a page with `colours_css`.

  `name` becomes a part of the element's ids, which a page needs to be unique.
  """
  metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  with matplotlib.rc_context({"svg.hashsalt": name}):
    options = {"format": "svg", "transparent": True, "metadata": metadata}
    text = _render(draw, height_in, width_in, **options).decode()
  text = text[text.index("<svg") :]
  text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text)
  text = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", text)
  # The page has the style of lines and the font.
  text = re.sub(r"<defs>\s*<style[^<]*</style>\s*</defs>", "", text)
  text = re.sub(r"font-family: [^;]*; ", "", text)
  for key, colour in LIGHT.items():
    text = text.replace(colour, f"var(--{key})")
  return text.strip()


def colours_css(colours: dict[str, str]) -> str:
  """Returns colours as custom properties of CSS."""
  return " ".join(f"--{name}: {colour};" for name, colour in colours.items())

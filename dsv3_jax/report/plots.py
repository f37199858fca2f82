"""Drawings: functions that draw arrays into a matplotlib figure.

Colours and fonts are those of `render`. Files and runs are for others.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure

from dsv3_jax.report import render

PANELS = 12  # most layers that are shown with a panel of their own


def count(n: float) -> str:
  """Formats 1234567 as 1.23 M."""
  for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
    if abs(n) >= size:
      return f"{n / (1e3 if unit == 'k' else size):.3g} {unit}"
  return f"{n:,.0f}"


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Returns the centred running mean over the finite values."""
  if window < 2:
    return values
  finite, kernel = np.isfinite(values), np.ones(window)
  total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
  count = np.convolve(finite, kernel, "same")
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.where(count > 0.5, total / count, np.nan)


def _window(n: int) -> int:
  """Window of a running mean over 2 % of the run."""
  return max(1, n // 50)


def _scales(axes: Axes, *, label: bool = True, ticks: int = 6) -> None:
  """Formats the axes: tokens to the right, about `ticks` ticks upwards."""
  # The default number of ticks depends on the room that the layout leaves,
  # and this on the width of their labels: a label could be cut off.
  axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(ticks))
  axes.grid(True, linewidth=0.8)
  axes.xaxis.set_major_formatter(lambda n, _: count(n))
  axes.set_xlim(left=0)
  if label:
    axes.set_xlabel("training tokens")


def _trend(axes: Axes, x: np.ndarray, y: np.ndarray, label: str) -> None:
  """Draws the running mean of y over the faint values themselves."""
  window = _window(len(y))
  marker = "o" if len(y) == 1 else None
  (line,) = axes.plot(x, smooth(y, window), marker=marker, label=label)
  if window > 1:
    axes.plot(x, y, color=line.get_color(), alpha=0.25, linewidth=0.8, zorder=1)


def losses(
  figure: Figure,
  x: np.ndarray,
  curves: Mapping[str, np.ndarray],
  points: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
  """Draws losses of every step as trends, those of evaluations as points.

  Args:
    figure: drawn into.
    x: [steps] tokens.
    curves: [steps] losses by label.
    points: tokens and losses of evaluations by label.
  """
  axes = figure.subplots()
  for label, y in curves.items():
    _trend(axes, x, y, label)
  for label, (at, y) in points.items():
    axes.plot(at, y, marker="o", markersize=4, label=label, zorder=3)
  axes.set_ylabel("cross-entropy (nats per token)")
  _scales(axes)
  figure.legend(loc="outside upper left", ncols=4)


def gaps(
  figure: Figure,
  x: np.ndarray,
  curves: Mapping[str, np.ndarray],
  gaps: Mapping[str, np.ndarray],
  bar: float,
  warmup: int,
) -> None:
  """Draws losses of several runs, and below their gaps to the first.

  Args:
    figure: drawn into.
    x: [steps] tokens.
    curves: [seeds, steps] losses by label; the first is the baseline.
    gaps: [seeds, steps] relative differences by label of all others.
    bar: the largest difference that is accepted.
    warmup: steps in which differences do not matter.
  """
  above, below = figure.subplots(2, sharex=True)
  for i, (label, losses) in enumerate(curves.items()):
    above.plot(x, losses.mean(0), label=label)
    for gap in gaps.get(label, ()):
      below.plot(x, gap, color=f"C{i}", alpha=0.3, linewidth=0.8)
    if label in gaps:
      below.plot(x, gaps[label].mean(0), color=f"C{i}")
  # Early losses are far above all others.
  late = np.concatenate([losses[:, warmup:] for losses in curves.values()])
  if np.isfinite(late).all():
    above.set_ylim(late.min() - 0.1, late.max() + 0.1)
  below.axvspan(0, x[min(warmup, len(x) - 1)], alpha=0.1, linewidth=0)
  for at in (-bar, bar):
    below.axhline(at, linestyle="--", linewidth=0.8)
  below.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
  above.set_ylabel("loss (nats per token)")
  below.set_ylabel(f"gap to {next(iter(curves))}")
  _scales(above, label=False)
  _scales(below)
  figure.legend(loc="outside upper left", ncols=len(curves))


def bits_per_byte(
  figure: Figure, x: np.ndarray, y: np.ndarray, baselines: Mapping[str, float]
) -> None:
  """Draws held-out bits per byte, with those of compressors as lines."""
  axes = figure.subplots()
  axes.plot(x, y, marker="o", markersize=4)
  left = {"textcoords": "offset points", "ha": "right"}
  if np.isfinite(y[-1]):
    at = x[-1], y[-1]
    axes.annotate(f"{y[-1]:.2f}", at, (0, -6), va="top", **left)
  edge = axes.get_yaxis_transform()  # x = 1 is the right edge
  for name, value in baselines.items():
    axes.axhline(value, color=render.INK, ls="--", lw=1)
    text = f"{name} {value:.2f}"
    axes.annotate(text, (1, value), (0, 3), edge, va="bottom", **left)
  axes.set_ylabel("bits per byte of held-out text")
  _scales(axes)
  axes.margins(y=0.12)


def max_violation(
  figure: Figure, x: np.ndarray, vio: np.ndarray, names: Sequence[str]
) -> None:
  """Draws the running mean of MaxVio [steps, routers], one line per router."""
  axes = figure.subplots()
  n = len(names)
  ramp = matplotlib.colormaps["viridis"]
  colours = ramp(np.linspace(0.1, 0.88, n))  # its end is too faint on white
  window, marker = _window(len(x)), "o" if len(x) == 1 else None
  for column, colour in zip(vio.T, colours, strict=True):
    axes.plot(x, smooth(column, window), color=colour, marker=marker, lw=1.5)
  norm = BoundaryNorm(np.arange(n + 1) - 0.5, n)
  scale = matplotlib.cm.ScalarMappable(
    norm, matplotlib.colors.ListedColormap(colours)
  )
  bar = figure.colorbar(scale, ax=axes, aspect=25, pad=0.02)
  shown = np.arange(0, n, -(-n // 16))
  bar.set_ticks(shown, labels=[names[i] for i in shown], minor=False)
  bar.ax.tick_params(which="both", length=0)
  bar.ax.invert_yaxis()  # first layer on top, as in the heat maps
  bar.outline.set_visible(False)
  axes.set_ylabel("MaxVio (0: even load)")
  axes.set_ylim(bottom=0)
  _scales(axes)


def load_maps(
  figure: Figure,
  shares: np.ndarray,
  titles: Sequence[str],
  names: Sequence[str],
) -> None:
  """Draws heat maps of expert load [times, routers, experts]; 1 is even."""
  times, routers, _ = shares.shape
  columns = min(times, 2)
  grid = figure.subplots(-(-times // columns), columns, squeeze=False)
  for axes, share, title in zip(grid.flat, shares, titles, strict=False):
    image = axes.imshow(
      share,
      vmin=0,
      vmax=2,
      aspect="auto",
      interpolation="nearest",
      cmap=render.LOAD,
    )
    axes.set_title(title, loc="left")
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    shown = np.arange(0, routers, -(-routers // 16))
    axes.set_yticks(shown, [names[i] for i in shown])
    axes.spines[:].set_visible(True)
  for axes in grid.flat[times:]:
    axes.set_axis_off()
  for axes in grid[-1]:
    axes.set_xlabel("expert")
  for axes in grid[:, 1:].flat:
    axes.tick_params(labelleft=False)
  _share_bar(figure, image, grid)


def load_over_time(
  figure: Figure, x: np.ndarray, shares: np.ndarray, names: Sequence[str]
) -> None:
  """Draws one heat map per router: experts upwards, tokens to the right.

  Args:
    figure: drawn into.
    x: [times] tokens, rising.
    shares: [times, routers, experts], 1 where the load is even.
    names: of the routers.
  """
  shown = evenly_spaced(len(names), PANELS)
  columns = min(len(shown), 2)
  rows = -(-len(shown) // columns)
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  experts = np.arange(shares.shape[-1])
  for axes, i in zip(grid.flat, shown, strict=False):
    image = axes.pcolormesh(
      *(x, experts, shares[:, i].T),
      vmin=0,
      vmax=2,
      shading="nearest",
      cmap=render.LOAD,
    )
    axes.set_title(names[i], loc="left")
    axes.tick_params(length=0)
    axes.xaxis.set_major_formatter(lambda n, _: count(n))
    few = matplotlib.ticker.MaxNLocator(5, integer=True)
    axes.yaxis.set_major_locator(few)
  for axes in grid.flat[len(shown) :]:
    axes.set_axis_off()
  for axes in grid[:, 0]:
    axes.set_ylabel("expert")
  for axes in grid.flat[: len(shown)][-columns:]:  # lowest of each column
    axes.tick_params(labelbottom=True)
    axes.set_xlabel("training tokens")
  _share_bar(figure, image, grid)


def _share_bar(figure: Figure, image: object, grid: np.ndarray) -> None:
  bar = figure.colorbar(
    image, ax=grid, location="top", extend="max", aspect=45, shrink=0.7
  )
  bar.set_ticks([0, 0.5, 1, 1.5, 2])
  bar.set_label("load of an expert (1: its even share)")


def expert_placement(
  figure: Figure, in_order: np.ndarray, placed: np.ndarray, names: Sequence[str]
) -> None:
  """Draws the load of the busiest device per router, before and after EPLB.

  Args:
    figure: drawn into.
    in_order: [routers], at least 1.
    placed: [routers], the same with experts placed by their load.
    names: of the routers.
  """
  axes = figure.subplots()
  rows = np.arange(len(names))
  axes.hlines(rows, placed, in_order, color="C0", alpha=0.35, linewidth=1.2)
  size = 6 if len(rows) <= 16 else 3
  marks = {"linestyle": "none", "markersize": size}
  axes.plot(in_order, rows, "o", label="experts in order", **marks)
  axes.plot(placed, rows, "D", label="placed by load, with replicas", **marks)
  shown = np.arange(0, len(rows), -(-len(rows) // 16))
  axes.set_yticks(shown, [names[i] for i in shown])
  axes.tick_params(axis="y", length=0)
  axes.set_ylim(len(rows) - 0.5, -0.5)  # first layer on top
  axes.grid(True, axis="x", linewidth=0.8)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
  axes.axvline(1, color=render.INK, ls="--", lw=1)
  axes.margins(x=0.04)
  axes.set_xlabel("load of the busiest device (1: the mean of all)")
  figure.legend(loc="outside upper left", ncols=2)


def needles_height_in(n: int) -> float:
  """Height of the picture of n models' needles."""
  return 0.7 + 1.7 * -(-n // 2)


def needles(
  figure: Figure,
  lengths: Sequence[int],
  depths: Sequence[float],
  right: Mapping[str, Sequence[Sequence[float]]],
) -> None:
  """Draws a heat map per model: context length by depth of the needle.

  Args:
    figure: drawn into.
    lengths: of contexts, in tokens.
    depths: of needles, 0 to 1.
    right: shares of right answers [lengths, depths] by model.
  """
  ramp = LinearSegmentedColormap.from_list(
    "share-right", [render.PAPER, render.SERIES[0]]
  )
  columns = min(len(right), 2)
  rows = -(-len(right) // columns)
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  for axes, (label, shares) in zip(grid.flat, right.items(), strict=False):
    image = axes.imshow(
      np.transpose(shares), cmap=ramp, vmin=0, vmax=1, aspect="auto"
    )
    axes.set_title(label, loc="left")
    axes.tick_params(length=0)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    shown = evenly_spaced(len(depths), 3)
    axes.set_yticks(shown, [f"{depths[i]:.0%}" for i in shown])
    axes.spines[:].set_visible(True)
  for axes in grid.flat[len(right) :]:
    axes.set_axis_off()
  for axes in grid.flat[: len(right)][-columns:]:  # lowest of each column
    axes.tick_params(labelbottom=True)
    axes.set_xlabel("tokens of context")
  for axes in grid[:, 0]:
    axes.set_ylabel("depth")
  bar = figure.colorbar(image, ax=grid, aspect=30, shrink=0.8)
  bar.ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
  bar.set_label("right answers")


def evenly_spaced(n: int, most: int) -> list[int]:
  """At most `most` evenly spaced indices below n, first and last included."""
  return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})


def panels(
  figure: Figure,
  x: np.ndarray,
  curves: Mapping[str, np.ndarray],
  *,
  noisy: bool,
) -> None:
  """Draws curves of different units, one above the other.

  Args:
    figure: drawn into.
    x: tokens.
    curves: values by label.
    noisy: draw a running mean; otherwise exact steps.
  """
  grid = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
  for axes, (label, y) in zip(grid, curves.items(), strict=True):
    if noisy:
      _trend(axes, x, y, label)
    else:
      marker = "o" if len(y) == 1 else None
      axes.plot(x, y, drawstyle="steps-post", marker=marker)
    axes.set_title(label, loc="left")
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,g}")
    _scales(axes, label=axes is grid[-1], ticks=4)

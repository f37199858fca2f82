"""Drawings: functions that draw arrays into a matplotlib figure.

Colours and fonts are those of `render`. Files and runs are for others.
"""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure

from dsv3_jax.report import axes as axes_lib
from dsv3_jax.report import render

PANELS = 12  # most layers that are shown with a panel of their own


def losses(
  figure: Figure,
  x: np.ndarray,
  curves: Mapping[str, np.ndarray],
  points: Mapping[str, tuple[np.ndarray, np.ndarray]],
  steps: np.ndarray,
) -> None:
  """Draws losses of every step as trends, those of evaluations as points.

  Args:
    figure: drawn into.
    x: [steps] tokens.
    curves: [steps] losses by label.
    points: tokens and losses of evaluations by label.
    steps: [steps] their numbers.
  """
  axes = figure.subplots()
  axes_lib.trends(axes, x, curves, steps)
  for label, (at, y) in points.items():
    axes.plot(at, y, marker="o", markersize=4, label=label, zorder=3)
  axes.set_ylabel("cross-entropy (nats per token)")
  axes_lib.scales(axes)
  axes_lib.legend(figure)


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
    look = {"color": f"C{i}", "linestyle": "-"}
    above.plot(x, losses.mean(0), label=label, **look)
    for gap in gaps.get(label, ()):
      below.plot(x, gap, alpha=0.3, linewidth=0.8, **look)
    if label in gaps:
      below.plot(x, gaps[label].mean(0), **look)
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
  axes_lib.scales(above, label=False)
  axes_lib.scales(below)
  axes_lib.legend(figure)


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
    axes.axhline(value, color=render.SOFT, ls="--", lw=1)
    text = f"{name} {value:.2f}"
    axes.annotate(text, (1, value), (0, 3), edge, va="bottom", **left)
  axes.set_ylabel("bits per byte of held-out text")
  axes_lib.scales(axes)
  axes.margins(y=0.12)


def by_name(
  figure: Figure, x: np.ndarray, curves: Mapping[str, np.ndarray], label: str
) -> None:
  """Draws a metric of each domain or task, by name."""
  axes = figure.subplots()
  for (name, y), marker in zip(
    curves.items(), itertools.cycle("osD^v"), strict=False
  ):
    size = 4 if len(x) <= 50 else 0
    axes.plot(x, y, marker=marker, markersize=size, label=name)
  axes.set_ylabel(label)
  axes_lib.scales(axes)
  axes_lib.legend(figure)


def max_violation(
  figure: Figure,
  x: np.ndarray,
  vio: np.ndarray,
  names: Sequence[str],
  steps: np.ndarray,
) -> None:
  """Draws the running mean of MaxVio [steps, routers], one line per router.

  Args:
    figure: drawn into.
    x: [steps] tokens.
    vio: [steps, routers] values; the biggest outlier is marked.
    names: of the routers.
    steps: [steps] their numbers.
  """
  axes = figure.subplots()
  n = len(names)
  stops = np.linspace(0, len(render.RAMP) - 1, n).round().astype(int)
  colours = [render.RAMP[i] for i in stops]
  window, marker = axes_lib.window(len(x)), "o" if len(x) == 1 else None
  found = []
  for column, colour, name in zip(vio.T, colours, names, strict=True):
    mean = axes_lib.smooth(column, window)
    at = axes_lib.thin(mean)
    axes.plot(x[at], mean[at], color=colour, marker=marker, linestyle="-")
    for i, distance in zip(*axes_lib.outliers(column), strict=True):
      found.append((distance, x[i], column[i], steps[i], name, colour))
      break
  norm = BoundaryNorm(np.arange(n + 1) - 0.5, n)
  scale = matplotlib.cm.ScalarMappable(
    norm, matplotlib.colors.ListedColormap(colours)
  )
  bar = figure.colorbar(scale, ax=axes, aspect=25, pad=0.02)
  _name_ticks(bar.ax.yaxis, names)
  bar.ax.tick_params(which="both", length=0)
  bar.ax.invert_yaxis()  # first layer on top, as in the heat maps
  bar.outline.set_visible(False)
  axes.set_ylabel("MaxVio (0: even load)")
  if found:
    _, at, value, step, name, colour = max(found)
    text = f"{name}: {value:.2f} at step {step:,}"
    axes_lib.mark(axes, (at, value), text, colour)
  axes.set_ylim(bottom=0)
  axes_lib.scales(axes)


def load_maps(
  figure: Figure,
  shares: np.ndarray,
  titles: Sequence[str],
  names: Sequence[str],
) -> None:
  """Draws heat maps of expert load [times, routers, experts]; 1 is even."""
  times = len(shares)
  columns = min(times, _columns(figure))
  grid = figure.subplots(-(-times // columns), columns, squeeze=False)
  for axes, share, title in zip(grid.flat, shares, titles, strict=False):
    image = axes.imshow(
      share,
      vmin=0,
      vmax=2,
      aspect="auto",
      interpolation="none",
      cmap=render.LOAD,
    )
    axes.set_title(title, loc="left")
    axes.tick_params(length=0)
    axes_lib.set_ticks(axes.xaxis, 5 if columns == 2 else 8, integer=True)
    _name_ticks(axes.yaxis, names)
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
  columns = min(len(shown), _columns(figure))
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
      rasterized=True,
    )
    axes.set_title(names[i], loc="left")
    axes.tick_params(length=0)
    axes_lib.token_axis(axes, label=False)
    axes_lib.set_ticks(axes.yaxis, 4, integer=True)
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
  bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0", "0.5", "1", "1.5", "2"])
  bar.solids.set_rasterized(True)
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
  _name_ticks(axes.yaxis, names)
  axes.tick_params(axis="y", length=0)
  axes.set_ylim(len(rows) - 0.5, -0.5)  # first layer on top
  axes.grid(True, axis="x")
  axes_lib.set_ticks(axes.xaxis, 5)
  axes.axvline(1, color=render.SOFT, ls="--", lw=1)
  axes.margins(x=0.04)
  axes.set_xlabel("load of the busiest device (1: the mean of all)")
  axes_lib.legend(figure)


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
  columns = min(len(right), _columns(figure))
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


def _columns(figure: Figure) -> int:
  """Panels side by side."""
  return 1 if axes_lib.is_narrow(figure) else 2


def _name_ticks(axis: Axis, names: Sequence[str]) -> None:
  """Puts ticks with the names of routers at their indices."""
  shown = axes_lib.layer_ticks(names)
  axis.set_ticks(shown, labels=[names[i] for i in shown], minor=False)


def evenly_spaced(n: int, most: int) -> list[int]:
  """At most `most` evenly spaced indices below n, first and last included."""
  return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})


def panels(
  figure: Figure,
  x: np.ndarray,
  curves: Mapping[str, np.ndarray],
  steps: np.ndarray | None = None,
) -> None:
  """Draws curves of different units, one above the other.

  Args:
    figure: drawn into.
    x: tokens.
    curves: values by label.
    steps: numbers of the steps, for noisy curves: a running mean is drawn and
      its biggest outlier marked.
  """
  grid = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
  for axes, (label, y) in zip(grid, curves.items(), strict=True):
    axes.margins(y=0.12)
    if steps is None:
      marker, at = "o" if len(y) == 1 else None, axes_lib.thin(y)
      axes.plot(x[at], y[at], drawstyle="steps-post", marker=marker)
    else:
      axes_lib.trends(axes, x, {label: y}, steps)
    axes.set_title(label, loc="left")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(axes_lib.number)
    axes_lib.scales(axes, label=axes is grid[-1], ticks=4)

"""Axes of drawings: round ticks, legends, trends and their outliers."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsv3_jax.report import render

BINS = 400  # drawn are the least and the greatest value of so many parts
NEIGHBOURS = 10  # to each side, whose median a value is compared with
# An outlier is this many standard deviations away. Of a million normal values
# none is; the deviation is estimated by the median, which outliers leave alone.
OUTLIER, MEDIAN_TO_STD = 8.0, 1.4826
VISIBLE = 0.02  # and at least this part of the range of all medians


def count(n: float, _: object = None) -> str:
  """Formats 1234567 as 1.23 M."""
  for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
    if abs(n) >= size:
      return f"{n / (1e3 if unit == 'k' else size):.3g} {unit}"
  return f"{n:,.0f}"


def number(value: float, _: object = None) -> str:
  """Formats a value of any size: 5e-5, 0.25, 1,800, 250 k."""
  if abs(value) >= 1e4:
    return count(value)
  if value and abs(value) < 1e-4:
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
  return f"{value:,.4g}"


def is_narrow(figure: Figure) -> bool:
  """Returns whether a figure is for a phone."""
  return figure.get_figwidth() < (render.WIDTH_IN + render.NARROW_IN) / 2


def set_ticks(axis: Axis, most: int, *, integer: bool = False) -> None:
  """Puts about `most` ticks at multiples of 1, 2 or 5 times a power of 10."""
  # The default number of ticks depends on the room that the layout leaves,
  # and this on the width of their labels: a label could be cut off.
  axis.set_major_locator(
    MaxNLocator(most, steps=[1, 2, 5, 10], integer=integer)
  )


def token_axis(axes: Axes, *, label: bool = True) -> None:
  """Formats the axis to the right, of training tokens."""
  set_ticks(axes.xaxis, 4 if is_narrow(axes.figure) else 6)
  axes.xaxis.set_major_formatter(count)
  if label:
    axes.set_xlabel("training tokens")


def scales(axes: Axes, *, label: bool = True, ticks: int = 8) -> None:
  """Formats both axes: tokens to the right, about `ticks` ticks upwards."""
  set_ticks(axes.yaxis, ticks)
  axes.grid(True, axis="y")
  axes.set_xlim(left=0)
  token_axis(axes, label=label)


def legend(figure: Figure) -> None:
  """Puts a legend on top, in as many columns as the width has room for."""
  pairs = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
  labels = [label for labels in pairs for label in labels]
  if labels:
    widths_in = [0.6 + 0.07 * len(label) for label in labels]
    ncols, width_in = len(labels), figure.get_figwidth()
    if sum(widths_in) > width_in:
      ncols = max(1, int(width_in / max(widths_in)))
    figure.legend(loc="outside upper left", ncols=ncols)


def layer_ticks(names: Sequence[str], most: int = 16) -> list[int]:
  """Indices of at most about `most` routers, of layers with round numbers."""
  step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if len(names) <= s * most)
  shown = [
    i
    for i, name in enumerate(names)
    if name.startswith("MTP") or int(name.split()[-1]) % step == 0
  ]
  after = [*shown[1:], len(names) + step]
  pairs = zip(shown, after, strict=True)
  return [i for i, following in pairs if following - i > step / 2]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Returns the centred running mean over the finite values."""
  if window < 2:
    return values
  finite, kernel = np.isfinite(values), np.ones(window)
  total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
  n = np.convolve(finite, kernel, "same")
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.where(n > 0.5, total / n, np.nan)


def window(n: int) -> int:
  """Window of a running mean over 2 % of the run."""
  return max(1, n // 50)


def thin(values: np.ndarray) -> np.ndarray:
  """Indices of values that look like all: extremes of `BINS` parts."""
  n = len(values)
  if n <= 4 * BINS:
    return np.arange(n)
  shown = {0, n - 1}
  for part in np.array_split(np.arange(n), BINS):
    finite = part[np.isfinite(values[part])]
    if len(finite):
      shown.add(finite[values[finite].argmin()])
      shown.add(finite[values[finite].argmax()])
    if len(finite) < len(part):  # a gap stays one
      shown.add(part[~np.isfinite(values[part])][0])
  return np.array(sorted(shown))


def outliers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Indices of outliers among the values of steps, the biggest first.

  An outlier is further from the median of its neighbours than `OUTLIER`
  standard deviations of such distances, of all and of those around it. At both
  ends there are as many neighbours on one side as on the other, so that no
  steady curve has one, and neither has one too short to be smoothed.
  Returned with the indices are the distances.
  """
  (at,) = np.nonzero(np.isfinite(values))
  y, n = values[at], len(at)
  if window(n) == 1:
    return at[:0], y[:0]
  windows = np.lib.stride_tricks.sliding_window_view(y, 2 * NEIGHBOURS + 1)
  middle = y.copy()
  middle[NEIGHBOURS:-NEIGHBOURS] = np.median(windows, axis=-1)
  for i in range(NEIGHBOURS):
    middle[i] = np.median(y[: 2 * i + 1])
    middle[n - 1 - i] = np.median(y[n - 1 - 2 * i :])
  distance = np.abs(y - middle)
  # Noise may be larger in a part of the run, such as its beginning.
  parts = np.array_split(distance, max(n // (4 * NEIGHBOURS), 1))
  medians = np.pad([np.median(part) for part in parts], 1, mode="edge")
  local = np.repeat(
    np.lib.stride_tricks.sliding_window_view(medians, 3).max(-1),
    [len(part) for part in parts],
  )
  deviation = MEDIAN_TO_STD * np.maximum(local, np.median(distance))
  bound = np.maximum(OUTLIER * deviation, VISIBLE * np.ptp(middle))
  order = np.argsort(-distance, kind="stable")
  order = order[distance[order] > bound[order]]
  return at[order], distance[order]


def trends(
  axes: Axes, x: np.ndarray, curves: Mapping[str, np.ndarray], steps: np.ndarray
) -> None:
  """Draws running means over faint values, and marks the biggest outlier.

  If outliers are so far away that nothing else could be seen, the axis ends
  before them; the mark is then a triangle at its edge, and the mean is without
  them.

  Args:
    axes: drawn into.
    x: [steps] tokens.
    curves: [steps] values by label.
    steps: [steps] numbers of the steps.
  """
  marker = "o" if len(x) == 1 else None
  n, found = window(len(x)), []
  top = _top(list(curves.values()))
  for label, y in curves.items():
    near = y if top is None else np.where(y > top, np.nan, y)
    mean, shown = smooth(near, n), thin(y)
    at = thin(mean)
    (line,) = axes.plot(x[at], mean[at], marker=marker, label=label)
    colour = line.get_color()
    if n > 1:
      faint = {"color": colour, "alpha": 0.25, "linewidth": 0.8, "zorder": 1}
      axes.plot(x[shown], y[shown], linestyle="-", **faint)
    for i, distance in zip(*outliers(y), strict=True):
      found.append((distance, x[i], y[i], steps[i], colour))
      break
  if not found:
    return
  if top is not None:
    axes.set_ylim(top=top)
  _, at, value, step, colour = max(found)
  mark(axes, (at, value), f"{number(value)} at step {step:,}", colour)


def _top(curves: Sequence[np.ndarray]) -> float | None:
  """The end of an axis that leaves out outliers far above all else, if any."""
  rest = np.concatenate([np.delete(y, outliers(y)[0]) for y in curves])
  if not np.isfinite(rest).any():
    return None
  low, high = np.nanmin(rest), np.nanmax(rest)
  highest = np.nanmax(np.concatenate(curves))
  far = highest > high + 3 * (high - low) and high > low
  return high + 0.15 * (high - low) if far else None


def mark(
  axes: Axes, at: tuple[float, float], text: str, colour: object
) -> None:
  """Marks a point by a ring and a text; at the edge if it is above it."""
  x, y = at
  left, right = axes.get_xlim()
  bottom, top = axes.get_ylim()
  beyond = y > top
  size = {"markersize": 6, "clip_on": False, "zorder": 4, "linestyle": "none"}
  axes.plot(
    x,
    min(y, top),
    marker="^" if beyond else "o",
    color=colour,
    markerfacecolor=colour if beyond else "none",
    **size,
  )
  # The text is beside the mark; in the middle above or below it, towards the
  # nearer edge, where no curve is.
  third = min(int(3 * (x - left) / (right - left)), 2)
  ha, dx, dy = (("left", 8, 0), ("center", 0, 7), ("right", -8, 0))[third]
  if beyond or y < (bottom + top) / 2:
    dy = -dy
  va = {0: "top" if beyond else "center", 7: "bottom", -7: "top"}[dy]
  ink = matplotlib.rcParams["axes.labelcolor"]
  place = {"textcoords": "offset points", "ha": ha, "va": va, "color": ink}
  axes.annotate(text, (x, min(y, top)), (dx, dy), **place)
  if beyond:
    axes.set_ylim(top=top)

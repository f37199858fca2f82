"""Ticks are round, outliers are marked, and thinned curves look the same."""

import numpy as np
from absl.testing import absltest, parameterized
from matplotlib.figure import Figure

from dsv3_jax.report import axes, plots, render


def drawn(draw, width_in=render.WIDTH_IN) -> Figure:
  """The figure after it has been laid out."""
  figures = []

  def draw_and_keep(figure):
    draw(figure)
    figures.append(figure)

  render.png(draw_and_keep, 3.4, width_in)
  return figures[0]


def texts(figure: Figure) -> list[str]:
  return [t.get_text() for ax in figure.axes for t in ax.texts]


class TicksTest(parameterized.TestCase):
  @parameterized.parameters(
    (4.05, 7.7), (0, 573_440), (1.79, 2.21), (0, 3e-4), (0, 14.8e12), (0, 255)
  )
  def test_are_multiples_of_1_2_or_5(self, low, high):
    ax = Figure().subplots()
    axes.set_ticks(ax.yaxis, 6)
    ticks = ax.yaxis.get_major_locator().tick_values(low, high)
    step = np.diff(ticks)[0]
    digits = step / 10.0 ** np.floor(np.log10(step) + 1e-9)
    self.assertIn(round(digits, 6), (1, 2, 5))
    multiples = ticks / step
    np.testing.assert_allclose(multiples, multiples.round(), atol=1e-6)

  @parameterized.parameters(
    (0, "0"),
    (5e-5, "5e-5"),
    (1.5e-4, "0.00015"),
    (0.25, "0.25"),
    (0.30000000000000004, "0.3"),
    (1800, "1,800"),
    (25e4, "250 k"),
  )
  def test_number(self, value, expected):
    self.assertEqual(axes.number(value), expected)

  def test_layers_have_round_numbers(self):
    names = [f"layer {i}" for i in range(3, 61)] + ["MTP 1"]
    shown = [names[i] for i in axes.layer_ticks(names)]
    rounded = [f"layer {i}" for i in range(5, 60, 5)]
    self.assertEqual(shown, [*rounded, "MTP 1"])
    few = ["layer 1", "layer 2", "MTP 1"]
    self.assertEqual(axes.layer_ticks(few), [0, 1, 2])


class OutliersTest(parameterized.TestCase):
  def curve(self, n=600):
    rng = np.random.default_rng(0)
    t = np.arange(n) / n
    return 4 + 4 * np.exp(-9 * t) + rng.normal(0, 0.02 + 0.2 * (t < 0.1), n)

  def test_the_biggest_comes_first(self):
    y = self.curve()
    self.assertEmpty(axes.outliers(y)[0])
    y[300], y[500], y[400] = 5.5, 7, np.nan
    self.assertEqual(axes.outliers(y)[0].tolist(), [500, 300])
    y[200] = 1e9  # hides no other
    self.assertEqual(axes.outliers(y)[0].tolist(), [200, 500, 300])

  def test_steep_noisy_flat_or_short_curves_have_none(self):
    falling = 8 * np.exp(-np.arange(400) / 20)
    uneven = np.random.default_rng(0).normal(size=100_000)
    for y in (falling, uneven, np.ones(300), np.full(300, np.nan), falling[:9]):
      self.assertEmpty(axes.outliers(y)[0])

  def draw(self, y, width_in=render.WIDTH_IN):
    def draw(figure):
      steps = np.arange(1, len(y) + 1)
      plots.panels(figure, 4096 * steps, {"norm": y}, steps)

    return drawn(draw, width_in)

  def test_is_marked_with_value_and_step(self):
    y = self.curve()
    y[299] = 5.5
    self.assertEqual(texts(self.draw(y)), ["5.5 at step 300"])
    self.assertEmpty(texts(self.draw(self.curve())))

  def test_does_not_flatten_the_curve(self):
    y = self.curve()
    y[299] = 12_000
    figure = self.draw(y)
    self.assertEqual(texts(figure), ["12 k at step 300"])
    self.assertLess(figure.axes[0].get_ylim()[1], 2 * y[0])

  @parameterized.parameters(0, 20, 300, 579, 599)
  def test_text_stays_inside_the_picture(self, i):
    y = self.curve()
    y[i] += 300
    for width_in in (render.WIDTH_IN, render.NARROW_IN):
      figure = self.draw(y, width_in)
      for text in figure.axes[0].texts:
        box = text.get_window_extent()
        self.assertGreaterEqual(box.x0, 0)
        self.assertLessEqual(box.x1, figure.bbox.x1)
        self.assertLessEqual(box.y1, figure.bbox.y1)


class ThinTest(absltest.TestCase):
  def test_keeps_ends_extremes_and_gaps(self):
    y = np.random.default_rng(0).normal(size=50_000)
    y[777], y[30_000:31_000] = 99, np.nan
    at = axes.thin(y)
    self.assertLess(len(at), 3 * axes.BINS + 3)
    self.assertEqual((at[0], at[-1]), (0, len(y) - 1))
    self.assertIn(777, at)
    self.assertIn(np.nanargmin(y), at)
    self.assertTrue(np.isnan(y[at]).any())
    np.testing.assert_array_equal(at, np.unique(at))

  def test_leaves_short_curves_alone(self):
    np.testing.assert_array_equal(axes.thin(np.ones(90)), np.arange(90))


if __name__ == "__main__":
  absltest.main()

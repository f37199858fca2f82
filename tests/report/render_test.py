"""Colours can be told apart on every page; drawings take those of the page."""

import itertools
import re

import numpy as np
from absl.testing import absltest, parameterized

from dsv3_jax.report import render

# Colour blindness of full severity, in linear RGB: Machado, Oliveira and
# Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", 2009.
VISIONS = {
  "normal": np.eye(3),
  "protanopia": np.array(
    [
      [0.152286, 1.052583, -0.204868],
      [0.114503, 0.786281, 0.099216],
      [-0.003882, -0.048116, 1.051998],
    ]
  ),
  "deuteranopia": np.array(
    [
      [0.367322, 0.860646, -0.227968],
      [0.280085, 0.672501, 0.047413],
      [-0.011820, 0.042940, 0.968881],
    ]
  ),
  "tritanopia": np.array(
    [
      [1.255528, -0.076749, -0.178779],
      [-0.078411, 0.930809, 0.147602],
      [0.004733, 0.691367, 0.303900],
    ]
  ),
}
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
# Björn Ottosson's Oklab: linear RGB to cones, and those to lightness and hues.
CONES = np.array(
  [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
  ]
)
OKLAB = np.array(
  [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
  ]
)
APART = 0.1  # in Oklab, whose just noticeable difference is 0.02


def linear_rgb(colour: str) -> np.ndarray:
  c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(*colours: str) -> float:
  """Contrast of WCAG 2."""
  dark, light = sorted(linear_rgb(c) @ LUMINANCE for c in colours)
  return (light + 0.05) / (dark + 0.05)


def oklab(colour: str, vision: np.ndarray) -> np.ndarray:
  seen = np.clip(vision @ linear_rgb(colour), 0, 1)
  return OKLAB @ np.cbrt(CONES @ seen)


def some(colours: dict[str, str], kind: str) -> list[str]:
  return [c for name, c in colours.items() if name.startswith(kind)]


@parameterized.named_parameters(("light", render.LIGHT), ("dark", render.DARK))
class ColoursTest(parameterized.TestCase):
  def test_lines_have_a_contrast_of_3_and_text_of_4_5(self, colours):
    for kind, least in (("series", 3), ("ramp", 3), ("soft", 4.5), ("ink", 7)):
      self.assertNotEmpty(some(colours, kind))
      for colour in some(colours, kind):
        for ground in ("paper", "card") if least > 3 else ("paper",):
          self.assertGreaterEqual(contrast(colour, colours[ground]), least)

  def test_the_colour_blind_tell_all_series_apart(self, colours):
    for name, vision in VISIONS.items():
      labs = [oklab(c, vision) for c in some(colours, "series")]
      for a, b in itertools.combinations(labs, 2):
        self.assertGreaterEqual(np.linalg.norm(a - b), APART, name)

  def test_the_ramp_becomes_lighter(self, colours):
    lightness = [linear_rgb(c) @ LUMINANCE for c in some(colours, "ramp")]
    self.assertSequenceEqual(lightness, sorted(lightness))


class SvgTest(absltest.TestCase):
  def test_both_pages_have_the_same_colours_by_name(self):
    self.assertSequenceEqual(list(render.LIGHT), list(render.DARK))
    self.assertLen(set(render.LIGHT.values()), len(render.LIGHT))

  def test_every_colour_is_the_page_s(self):
    def draw(figure):
      axes = figure.subplots()
      for i in range(len(render.SERIES) + 1):
        axes.plot([0, 1], [0, i], label=f"curve {i}")
      axes.grid(True)
      figure.legend(loc="outside upper left")

    text = render.svg(draw, 2.0, 3.0, "name")
    self.assertNotRegex(text, "#[0-9a-f]{6}[^0-9a-f]")
    for name in ("series-0", "series-3", "ink", "soft", "grid"):
      self.assertIn(f"var(--{name})", text)
    # Curves of one colour differ in their dashes.
    first, again = (
      re.search(rf'<path d="M[^"]*"[^>]*stroke: var\(--series-0\){dash}', text)
      for dash in ("; stroke-width: 1.6; stroke-linecap: square", "")
    )
    self.assertIsNotNone(first)
    self.assertIsNotNone(again)
    self.assertIn("stroke-dasharray", text)
    self.assertIn(">curve 4<", text)


if __name__ == "__main__":
  absltest.main()

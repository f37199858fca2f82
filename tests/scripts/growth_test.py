"""Tests of the growth of cost: its points, its exponents and its picture."""

import json
from unittest import mock

import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError
from dsv3_jax.report import render
from scripts.bench import growth


def point(what, dim, value, power=1.0):
  """A point whose rounds differ by a factor, whose memory is constant."""
  return {
    "what": what,
    "dim": dim,
    "value": value,
    "tokens": 100,
    "flops": 7 * value**2,
    "seconds": [0.1 * value**power * noise for noise in (1, 3, 2)],
    "memory_mib": 50.0,
  }


def points(what, dim, power=1.0):
  return [point(what, dim, n, power) for n in growth.GROWTH[what][dim]]


class PointsTest(parameterized.TestCase):
  @parameterized.parameters(
    *[(what, dim) for what, dims in growth.GROWTH.items() for dim in dims]
  )
  def test_every_point_is_a_model_of_which_one_size_grows(self, what, dim):
    flops = []
    for value, sizes in growth.grow(what, dim):
      self.assertEqual(sizes[dim], value)
      run = config.override(presets.S, *growth.settings(sizes))
      load = growth.make_load(what, sizes)
      if what == "train":
        self.assertEqual(load.batch * load.prompt, run.tokens_per_step)
      else:
        self.assertEqual(load.seq, sizes["cache"])
      if n := sizes["devices"]:
        self.assertEqual(run.train.batch_size % n, 0)
      flops.append(load.flops(run.model))
    self.assertLen(flops, 4)
    self.assertEqual(flops, sorted(flops))


class ExponentTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 1.0, 1.5, -0.5)
  def test_of_a_power_is_the_power(self, power):
    x = [2, 4, 8, 16]
    self.assertAlmostEqual(growth.exponent(x, [5 * n**power for n in x]), power)

  def test_is_of_the_upper_half(self):
    y = [1, 1, 1, 1, 1, 2, 4, 8, 16, 32]
    self.assertAlmostEqual(growth.exponent([2**i for i in range(10)], y), 1)
    self.assertAlmostEqual(growth.exponent([1, 2, 4, 8], [9, 1, 2, 4]), 1)

  def test_noise_of_rounds_is_told(self):
    rows = points("train", "layers")
    self.assertAlmostEqual(growth.summarize(rows)["seconds"], 1)
    self.assertAlmostEqual(growth.summarize(rows)["flops"], 2)
    self.assertAlmostEqual(growth.summarize(rows)["memory"], 0)
    rows[-1]["seconds"] = [
      s * f for s, f in zip(rows[-1]["seconds"], (1, 2, 4), strict=True)
    ]
    found = growth.summarize(rows)
    self.assertAlmostEqual(found["low"], 1)
    self.assertAlmostEqual(found["seconds"], 1.5)
    self.assertAlmostEqual(found["high"], 2)


class FileTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.path = testing.folder(self) / "growth.jsonl"

  def write(self, rows):
    self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

  def test_only_sizes_with_all_points_are_shown(self):
    layers, width = points("train", "layers"), points("train", "width")
    self.assertEqual(
      list(growth.by_dim([*layers, *width[:-1]])), [("train", "layers")]
    )
    (line,) = growth.table(layers).splitlines()[2:]
    self.assertIn("| train, layers | 2 to 16 | 250 to 31 | 1.00 (1.00", line)

  def test_measures_what_is_missing(self):
    self.write(points("train", "layers"))
    args = ["--dims=layers,width", f"--rows={self.path}"]
    args.append(f"--png={self.path}.png")
    measured = mock.Mock(return_value=points("train", "width"))
    with mock.patch.object(growth, "measure", measured):
      for _ in range(2):
        code, out, err = testing.command_line(growth.main, *args)
        self.assertEqual((code, err), (0, ""))
        self.assertIn("train, width", out)
    measured.assert_called_once_with("train", "width", 3, mock.ANY)
    self.assertLen(growth.read(self.path), 8)
    picture = self.path.with_name("growth.jsonl.png").read_bytes()
    self.assertTrue(picture.startswith(b"\x89PNG"))

  def test_other_files_are_refused(self):
    for text in ("{", "[1]", '{"what": "train"}'):
      self.path.write_text(text)
      with self.assertRaisesRegex(InputError, "other lines than points"):
        growth.read(self.path)

  def test_panels_are_of_the_first_point(self):
    rows = [*points("train", "layers"), *points("decode", "cache", 0.5)]
    found = []

    def draw(figure):
      growth.draw(figure, rows)
      found.extend((axes.get_title(), *axes.lines) for axes in figure.axes)

    render.png(draw, growth.ROW_IN)
    titles = [title for title, *_ in found]
    self.assertEqual(titles, ["train: layers", "decode: cache"])
    seconds, memory, flops = found[1][1:]
    self.assertEqual(
      [round(y, 3) for y in seconds.get_ydata()], [1, 1.414, 2, 2.828]
    )
    self.assertEqual(list(memory.get_ydata()), [1, 1, 1, 1])
    self.assertEqual(list(flops.get_ydata()), [1, 4, 16, 64])


if __name__ == "__main__":
  absltest.main()

"""The report shows what a run has, says what it lacks, and stands alone."""

import html.parser
import json
import pathlib
import tempfile

import numpy as np
import pytest
import testing
import written_run
from absl.testing import absltest, parameterized

from dsv3_jax.infer import eplb
from dsv3_jax.report import axes, page, pictures, plots, render, run_data
from scripts import report


class Elements(html.parser.HTMLParser):
  """Collects elements and text, and checks that tags close in order."""

  VOID = ("meta", "img", "source", "wbr")

  def __init__(self, text: str):
    super().__init__()
    self.found, self.open, self.text = [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if self.open.pop() != tag:
      raise ValueError(f"</{tag}> closes another element")

  def handle_data(self, data):
    self.text += data if "style" not in self.open else ""


class ReportTest(parameterized.TestCase):
  def workdir(self, rows=(), **files) -> pathlib.Path:
    """A workdir with rows of metrics and files of JSON."""
    path = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    if rows:
      lines = "".join(json.dumps(row) + "\n" for row in rows)
      (path / "metrics.jsonl").write_text(lines)
    for name, tree in files.items():
      (path / f"{name}.json").write_text(json.dumps(tree))
    return path

  def page_of(self, workdir: pathlib.Path) -> Elements:
    elements = Elements(page.write(workdir).read_text(encoding="utf-8"))
    self.assertEmpty(elements.open)
    return elements

  def test_complete_run_shows_everything_and_stands_alone(self):
    workdir = self.workdir()
    written_run.write(workdir, steps=60)
    elements = self.page_of(workdir)
    tags = [tag for tag, _ in elements.found]
    self.assertEqual(tags.count("svg"), 2 * 8)  # also for a phone
    images = [a for _, a in elements.found if a.get("role") == "img"]
    self.assertLen(images, 2 * 8)
    for image in images:
      self.assertNotEmpty(image["aria-label"])
    ids = [a["id"] for _, a in elements.found if "id" in a]
    self.assertCountEqual(ids, set(ids))
    for _, attributes in elements.found:
      for name in ("href", "src", "srcset"):
        self.assertNotIn(name, attributes)
      data = attributes.get("xlink:href", "#")
      if not data.startswith("data:image/png;base64,"):
        self.assertIn(data.removeprefix("#"), ["", *ids])
    text = (workdir / "report.html").read_text(encoding="utf-8")
    text = text.replace("url(#", "")
    for outside in ("http:", "https:", "<script", "<link", "url(", "@import"):
      self.assertNotIn(outside, text)
    for said in (
      "5,012,352",
      "2,345,472",
      "bzip2 -9 needs 1.99",
      "xz -9e needs 2.21",
      "60 of 488",
      "16 sequences of 256 tokens",
      "4 min 11 s",
      "0123abc",
    ):
      self.assertIn(said, elements.text)
    self.assertNotIn("Not in this report", elements.text)
    names = sorted(p.name for p in (workdir / "report").iterdir())
    self.assertLen(names, 8)
    for picture in (workdir / "report").iterdir():
      self.assertStartsWith(picture.read_bytes(), b"\x89PNG")

  def test_text_of_the_model_is_escaped(self):
    rows = [
      {"step": 1, "tokens": 8, "loss": 1.0},
      {
        "step": 1,
        "heldout_loss": 1.0,
        "heldout_bpb": 2.0,
        "sample": "<img src=x onerror=alert(1)>&amp;\x1b[31m\ud800\ttab",
      },
    ]
    settings = {"variant": "<b>", "settings": {"data.path": "<i>/x"}}
    elements = self.page_of(self.workdir(rows, config=settings))
    self.assertIn("<img src=x onerror=alert(1)>&amp;", elements.text)
    self.assertIn("Training run: <b>", elements.text)
    self.assertIn("<i>/x", elements.text)
    self.assertNotIn("\x1b", elements.text)
    tags = [tag for tag, _ in elements.found]
    self.assertNotIn("i", tags)
    self.assertFalse([a for _, a in elements.found if "onerror" in a])

  def test_one_step_says_what_is_missing(self):
    rows = [{"step": 1, "tokens": 4096, "loss": 7.6, "lr": 1e-4}]
    elements = self.page_of(self.workdir(rows))
    for said in (
      "config.json: not written",
      "Bits per byte: no held-out evaluation",
      "MaxVio: no row has it",
      "Expert load: no row has it",
      "Expert placement: no row has loads",
      "Throughput: no row",
      "Samples: no evaluation",
      "has not been evaluated",
    ):
      self.assertIn(said, elements.text)

  @parameterized.named_parameters(
    ("every_loss_nan", {"loss": None, "main_loss": None}),
    ("no_mtp", {"loss": 1.0, "main_loss": 1.0, "mtp_loss": None}),
    ("idle_layer", {"loss": 1, "load": [[0, 0], [1, 3]]}),
    ("nan_violation", {"loss": 1, "max_vio_per_layer": [None, 0.5]}),
  )
  def test_odd_rows_are_drawn(self, row):
    rows = [{"step": 1, "tokens": 4} | row, {"step": 2, "tokens": 8, "loss": 1}]
    rows.append({"step": 2, "heldout_loss": None, "heldout_bpb": None})
    self.page_of(self.workdir(rows[: 1 if row["loss"] is None else None]))

  @pytest.mark.slow
  def test_many_layers_and_experts(self):
    load = np.random.default_rng(0).integers(50, 150, (4, 59, 256))
    vio = load.max(-1) / load.mean(-1) - 1
    rows = [
      {
        "step": i + 1,
        "tokens": 1000 * (i + 1),
        "loss": 1.0,
        "load": load[i].tolist(),
        "max_vio_per_layer": vio[i].tolist(),
      }
      for i in range(4)
    ]
    settings = {"model": {"n_dense_layers": 3, "mtp": {"depth": 1}}}
    workdir = self.workdir(rows, config=settings)
    self.assertIn("12 of 59 layers", self.page_of(workdir).text)
    names = run_data.router_names(run_data.read(workdir), 59)
    self.assertEqual(names[:1] + names[-2:], ["layer 3", "layer 60", "MTP 1"])

  def test_final_violation_is_of_the_last_tenth(self):
    rows = [
      {"step": i, "tokens": i, "loss": 1.0, "max_vio_per_layer": [9.0, 9.0]}
      for i in range(1, 19)
    ]
    rows.append(rows[0] | {"step": 19, "max_vio_per_layer": [0.2, 0.5]})
    rows.append(rows[0] | {"step": 20, "max_vio_per_layer": [0.4, 0.1]})
    run = run_data.read(self.workdir(rows))
    means = run_data.final_violation(run)
    np.testing.assert_allclose(means["router 0"], (0.3, 0.4), rtol=1e-15)
    np.testing.assert_allclose(means["router 1"], (0.3, 0.5), rtol=1e-15)

  def skewed(self, n_experts, n_routers=3):
    """A run whose loads differ much, and in another way at the end."""
    rng, n_rows = np.random.default_rng(0), 12
    rows = [{"step": 1, "tokens": 1, "loss": 1.0}]
    for i in range(n_rows):
      if i in (0, n_rows - n_rows // 4):
        falling = 1000 / np.arange(1, n_experts + 1)
        skew = rng.permuted(np.tile(falling, (n_routers, 1)), axis=1)
      load = rng.poisson(skew).tolist()
      step = i + 2
      rows.append({"step": step, "tokens": step, "loss": 1.0, "load": load})
    return rows

  @parameterized.parameters(
    # Experts; devices, the largest power of two that divides them with two
    # experts or more on each.
    (16, 8),
    (12, 4),
    (10, 2),
    (4, 2),
    (256, 128),
  )
  def test_experts_are_placed_for_the_loads_at_the_end(self, n_experts, n):
    rows = self.skewed(n_experts)
    run = run_data.read(self.workdir(rows))
    found = run_data.expert_balance(run)
    self.assertEqual((found.n_devices, found.n_experts), (n, n_experts))
    load = np.mean([row["load"] for row in rows[-3:]], axis=0)
    before = load.reshape(3, n, -1).sum(-1)
    where = eplb.balance_experts(load, n_replicas=n_experts + n, n_devices=n)
    after = where.loads(load, n)
    in_order, placed = (y.max(-1) / y.mean(-1) for y in (before, after))
    np.testing.assert_allclose(found.in_order, in_order, rtol=1e-12)
    np.testing.assert_allclose(found.placed, placed, rtol=1e-12)
    self.assertLess(placed.mean(), in_order.mean())
    (picture,) = (
      p
      for p in pictures.pictures(run)
      if isinstance(p, pictures.Picture) and p.name == "expert_placement"
    )
    for said in (
      f"busiest of {n} devices that share a layer's {n_experts} experts",
      f"In order there are {n_experts // n} experts on each device.",
      f"Placed by load there are {n_experts // n + 1}:",
      f"replicas, {n} in all.",
      f"goes from {in_order.mean():.3f} to {placed.mean():.3f},",
      f"from {in_order.max():.3f} (router {in_order.argmax()})"
      f" to {placed.max():.3f} (router {placed.argmax()}).",
    ):
      self.assertIn(said, picture.caption)

  @parameterized.parameters(1, 2, 7)
  def test_experts_that_devices_cannot_share_are_not_placed(self, n_experts):
    run = run_data.read(self.workdir(self.skewed(n_experts)))
    self.assertIsNone(run_data.expert_balance(run))
    said = "Expert placement: no row has loads of experts that devices share."
    self.assertIn(said, pictures.pictures(run))

  def test_a_layer_without_load_is_balanced(self):
    load = [[0, 0, 0, 0], [9, 1, 1, 1]]
    rows = [{"step": 1, "tokens": 1, "loss": 1.0, "load": load}]
    found = run_data.expert_balance(run_data.read(self.workdir(rows)))
    # Of two devices one has 9 + 1 of 12; then two of three replicas of the
    # first expert, and another one: 3 + 3 + 1.
    np.testing.assert_allclose(found.in_order, [1, 10 / 6], rtol=1e-12)
    np.testing.assert_allclose(found.placed, [1, 7 / 6], rtol=1e-12)

  def test_a_run_that_is_writing_can_be_read(self):
    workdir = self.workdir([{"step": 1, "tokens": 8, "loss": 1.0}])
    with open(workdir / "metrics.jsonl", "a") as file:
      file.write('{"step": 2, "tok')
    (workdir / "summary.json").write_text('{"parame')
    self.assertLen(run_data.read(workdir).steps, 1)
    self.assertIn("summary.json: not valid JSON", self.page_of(workdir).text)

  @parameterized.named_parameters(
    ("unknown_flag", ["--wrkdir={}"], "unknown flag '--wrkdir"),
    ("stray", ["--workdir={}", "more"], "stray argument 'more'"),
    ("no_workdir", [], "--workdir is missing"),
    ("no_metrics", ["--workdir={}"], "has no metrics.jsonl"),
    ("too_long", ["--workdir=" + "9" * 300], "too long"),
  )
  def test_bad_call_exits_2(self, arguments, message):
    empty = self.enter_context(tempfile.TemporaryDirectory())
    code, _, err = self.call(*(a.format(empty) for a in arguments))
    self.assertEqual(code, 2)
    self.assertIn(message, err)

  def call(self, *arguments):
    return testing.command_line(report.main, *arguments)

  def test_call_prints_the_path(self):
    workdir = self.workdir([{"step": 1, "tokens": 8, "loss": 1.0}])
    code, out, _ = self.call(f"--workdir={workdir}")
    self.assertEqual((code, out), (0, f"{workdir}/report.html\n"))


class PlotsTest(parameterized.TestCase):
  def test_smooth_keeps_a_line_and_skips_nan(self):
    y = np.full(9, 2.0)
    y[4] = np.nan
    np.testing.assert_allclose(axes.smooth(y, 3), 2.0, rtol=1e-15)

  def test_labels_stay_inside_the_picture(self):
    # In these limits, ticks every 0.25 just fit and need more room than 0.5.
    x, y = np.linspace(4e3, 123e3, 30), np.linspace(7.66077, 5.83633, 30)
    drawn = []

    def draw(figure):
      plots.losses(figure, x, {"training": y}, {}, np.arange(1, 31))
      drawn.extend(figure.axes)

    render.png(draw, 3.4)
    self.assertGreaterEqual(drawn[0].yaxis.label.get_window_extent().x0, 0)

  @parameterized.parameters((1, [0]), (3, [0, 1, 2]), (10, [0, 3, 6, 9]))
  def test_evenly_spaced_keeps_both_ends(self, n, expected):
    self.assertEqual(plots.evenly_spaced(n, 4), expected)

  @parameterized.parameters(
    (9_990, "9,990"),
    (25e4, "250 k"),
    (5_012_352, "5.01 M"),
    (671_026_404_352, "671 B"),
  )
  def test_count(self, n, expected):
    self.assertEqual(axes.count(n), expected)


if __name__ == "__main__":
  absltest.main()

"""The page in a browser: nothing is cut, on a phone and on a screen."""

import html
import json
import re
import shutil
import subprocess
import threading
from unittest import mock

import pytest
import testing
import written_run
from absl.testing import absltest, parameterized
from PIL import Image

from dsv3_jax.report import page, watch

CHROMIUM = shutil.which("chromium")
# The least width of a window is about 500 pixels; that of a frame is not.
FRAME = """<!DOCTYPE html><meta charset=utf-8>
<html style="color-scheme: {scheme}"><body style="margin: 0">
<iframe id=frame width={width} height=900 srcdoc="{page}"
 style="border: 0; color-scheme: inherit"></iframe><pre id=found></pre>
<script>
onload = () => {{
  const view = frame.contentWindow, page = view.document;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const name = (e) => e.tagName + ": " + e.textContent.trim().slice(0, 60);
  const shown = (e) => e.getClientRects().length;
  const outside = (inner, outer, slack) =>
    inner.left < outer.left - slack || inner.right > outer.right + slack ||
    inner.top < outer.top - slack || inner.bottom > outer.bottom + slack;
  const cut = [], all = [...page.body.querySelectorAll("*")].filter(shown);
  const screen = page.documentElement.getBoundingClientRect();
  for (const e of all) {{
    const box = e.getBoundingClientRect(), svg = e.closest("svg");
    if (!svg && e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
      cut.push("scrolls: " + name(e));
    if (svg && e.tagName === "text" &&
        outside(box, svg.getBoundingClientRect(), 1))
      cut.push("text of a figure: " + name(e));
    if (!svg || svg === e)
      if (outside(box, e.parentElement.getBoundingClientRect(), 2))
        cut.push("not in its parent: " + name(e));
    if (box.left < 0 || box.right > view.innerWidth + 1)
      cut.push("off the screen: " + name(e));
  }}
  found.textContent = JSON.stringify({{
    cut: [...new Set(cut)], width: view.innerWidth,
    scroll: page.documentElement.scrollWidth,
    figures: all.filter((e) => e.tagName === "svg").length,
    paper: view.getComputedStyle(page.body).backgroundColor,
  }});
}};
</script>"""
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 25, 29)"}


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
class BrowserTest(parameterized.TestCase):
  def chromium(self, *arguments: str) -> str:
    """Runs the browser without a window; what it prints."""
    profile = testing.folder(self)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    done = subprocess.run(
      [*command, f"--user-data-dir={profile}", *arguments],
      capture_output=True,
      text=True,
      timeout=240,
      check=True,
    )
    return done.stdout

  def in_browser(self, text: str, width: int, scheme: str) -> dict:
    path = testing.folder(self) / "frame.html"
    frame = FRAME.format(page=html.escape(text), width=width, scheme=scheme)
    path.write_text(frame, encoding="utf-8", errors="replace")
    dark = ["--blink-settings=preferredColorScheme=0"] * (scheme == "dark")
    out = self.chromium(*dark, "--dump-dom", f"file://{path}")
    found = re.search('<pre id="found">(.*?)</pre>', out, re.DOTALL)
    return json.loads(html.unescape(found[1]))

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pages = {}

  def page(self, kind: str) -> str:
    if kind not in self.pages:
      folder = testing.folder(self)
      options = {}
      if kind == "long":
        options["domains"] = [f"{i}-domain-with-a-name" for i in range(8)]
        options["spikes"] = {30: 4000.0, 470: 90.0}
      written_run.write(folder, 10 if kind == "short" else 488, **options)
      self.pages[kind] = page.write(folder).read_text(errors="replace")
    return self.pages[kind]

  @parameterized.product(
    width=(1280, 768, 390), scheme=("light", "dark"), kind=("long", "short")
  )
  def test_nothing_is_cut(self, width, scheme, kind):
    found = self.in_browser(self.page(kind), width, scheme)
    self.assertEqual(found["width"], width)
    self.assertLessEqual(found["scroll"], width)
    self.assertEqual(found["figures"], 9 if kind == "long" else 8)
    self.assertEqual(found["paper"], PAPER[scheme])
    self.assertEmpty(found["cut"])

  def test_what_is_cut_would_be_found(self):
    text = self.page("short").replace(
      "<h1>", '<div style="width: 700px; height: 9px">wide</div><h1>'
    )
    found = self.in_browser(text, 390, "light")
    self.assertGreater(found["scroll"], 390)
    self.assertIn("off the screen: DIV: wide", found["cut"])
    text = self.page("short").replace("text-anchor: middle", "font-size: 90px")
    self.assertNotEmpty(self.in_browser(text, 390, "light")["cut"])

  def test_a_page_that_is_watched_refreshes_itself(self):
    folder = testing.folder(self)
    version, asked = watch.LivePage.version, []

    def train_and_version(live_page):
      asked.append(live_page)
      if len(asked) == 2:  # after the first page
        written_run.write(folder, 2)
      return version(live_page)

    self.enter_context(mock.patch.object(watch, "LEAST_S", 0.0))
    self.enter_context(mock.patch.object(watch, "BUSY", 1e9))
    self.enter_context(
      mock.patch.object(watch.LivePage, "version", train_and_version)
    )
    server = self.enter_context(watch.make_server(folder, 0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    self.addCleanup(server.shutdown)
    address = f"http://localhost:{server.server_port}/"
    out = self.chromium("--virtual-time-budget=9000", "--dump-dom", address)
    self.assertIn("<h1>Training run: tiny</h1>", out)
    self.assertNotIn('class="ended"', out)

  def test_pictures_of_pages_for_people(self):
    # Looked at by eye where they are written; here, that they are not empty.
    path = testing.folder(self) / "page.html"
    path.write_text(self.page("long"), encoding="utf-8")
    shot = path.with_suffix(".png")
    size = "--window-size=1280,2000"
    self.chromium(size, f"--screenshot={shot}", f"file://{path}")
    with Image.open(shot) as image:
      self.assertEqual(image.size, (1280, 2000))
      self.assertGreater(len(image.convert("RGB").getcolors(1 << 24)), 50)


if __name__ == "__main__":
  absltest.main()

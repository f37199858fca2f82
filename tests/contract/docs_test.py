"""Tests of README.md and docs/: paths, links, lines of code, commands."""

import ast
import functools
import pathlib
import re

from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets

ROOT = pathlib.Path(__file__).parents[2]
README, INDEX = ROOT / "README.md", ROOT / "docs" / "README.md"
HISTORY = "LOG.md", "CHANGELOG.md"  # they name what was there once
# Folders that paths in prose may start at.
BASES = ROOT, ROOT / "dsv3_jax", ROOT / "tests"
LONGEST_README = 150  # lines


def pages(*skip: str) -> list[pathlib.Path]:
  """Pages of the root and of docs/, without those of these names."""
  paths = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
  return [path for path in paths if path.name not in skip]


PRESENT = [
  (page.relative_to(ROOT).as_posix(), page) for page in pages(*HISTORY)
]


@functools.cache
def lines_of(path: pathlib.Path) -> dict[str, int]:
  """Line of each function, class and constant, by qualified name."""
  lines = {}
  if not path.exists():
    return lines

  def add(body: list[ast.stmt], prefix: str) -> None:
    for node in body:
      if isinstance(node, ast.ClassDef | ast.FunctionDef):
        lines[prefix + node.name] = node.lineno
        add(node.body, f"{prefix}{node.name}.")
      elif isinstance(node, ast.Assign | ast.AnnAssign):
        for name in ast.walk(node):
          if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
            lines[prefix + name.id] = node.lineno

  add(ast.parse(path.read_text()).body, "")
  return lines


class PageTest(parameterized.TestCase):
  @parameterized.named_parameters(PRESENT)
  def test_paths_and_links_exist(self, page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    for path in re.findall(r"(?<![\w/.=-])[\w/-]+\.(?:py|sh|md)\b", text):
      bases = page.parent, *BASES
      if not any((base / path).exists() for base in bases):
        missing.append(path)
    self.assertEmpty(missing)

  @parameterized.named_parameters(PRESENT)
  def test_modules_of_commands_exist(self, page):
    names = re.findall(
      r"python -m ((?:experiments|scripts)[\w.]*\w)", page.read_text()
    )
    for name in names:
      path = ROOT / name.replace(".", "/")
      self.assertTrue(path.is_dir() or path.with_suffix(".py").exists(), name)

  @parameterized.named_parameters(PRESENT)
  def test_settings_exist(self, page):
    if page.name == "extend.md":
      self.skipTest("its examples add settings of their own")
    known = {
      name.removeprefix("model.") for name in config.flatten(presets.TINY)
    }
    names = re.findall(r"--set=([\w.]+)=", page.read_text())
    unknown = {name.removeprefix("model.") for name in names} - known
    self.assertEmpty(unknown - {"a.b"})


class TourTest(absltest.TestCase):
  def test_names_stand_at_their_lines(self):
    text = (ROOT / "docs" / "tour.md").read_text()
    steps = re.findall(r"`([\w/]+\.py):(\d+) ([\w.]+)`", text)
    self.assertGreater(len(steps), 20)
    missing, moved = [], []
    for path, line, name in steps:
      lines = lines_of(ROOT / path)
      if name not in lines:
        missing.append(f"{path} {name}")
      elif str(lines[name]) != line:
        change = f"{path}:{line} {name}`|{path}:{lines[name]} {name}`"
        moved.append(f"sed -i 's|{change}|' docs/tour.md")
    self.assertEmpty(missing, "docs/tour.md")
    self.assertEmpty(moved, "to correct the lines, run\n" + "\n".join(moved))


class ReadmeTest(absltest.TestCase):
  def test_is_short(self):
    self.assertLessEqual(len(README.read_text().splitlines()), LONGEST_README)

  def test_index_lists_every_page(self):
    linked = re.findall(r"\]\(([\w.]+\.md)\)", INDEX.read_text())
    names = {page.name for page in (ROOT / "docs").glob("*.md")}
    self.assertCountEqual(linked, names - {INDEX.name})


if __name__ == "__main__":
  absltest.main()

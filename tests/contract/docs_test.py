"""Tests of README.md and docs/: paths, links, lines of code, commands."""

import ast
import contextlib
import functools
import importlib
import pathlib
import re
import runpy
import shlex
import subprocess
import tempfile
from unittest import mock

import jax
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from experiments import allocator, cli

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


# Commands of a page, with lines that a backslash continues.
COMMAND = re.compile(
  r"python -m ((?:experiments|scripts)[\w.]*\w)((?:\\\n|[^\n`#|;'])*)"
)


def commands() -> list[tuple[str, str, list[str]]]:
  """Page, module and flags of each command that could be copied."""
  found = []
  for name, page in PRESENT:
    for module, text in COMMAND.findall(page.read_text()):
      if "..." not in text and "--" in text:
        found.append((name, module, shlex.split(text.replace("\\\n", " "))))
  return found


PROGRAMS = sorted(
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for folder in ("experiments", "scripts")
  for path in (ROOT / folder).rglob("*.py")
  if '\nif __name__ == "__main__":' in path.read_text()
)


class CommandTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # What pages before this one in a reading have made.
    folder = self.enter_context(tempfile.TemporaryDirectory())
    for name in ("demo", "nano", "sft"):
      path = pathlib.Path(folder, "runs", name, "checkpoints")
      path.mkdir(parents=True)
    (pathlib.Path(folder) / "DIR").mkdir()
    for name in ("prompts.jsonl", "DIR/model.safetensors"):
      (pathlib.Path(folder) / name).touch()
    self.enter_context(contextlib.chdir(folder))

  def run_until_work(self, module, arguments):
    """Exit code and errors of a program whose work is nothing."""
    program = importlib.import_module(module)
    if module == "scripts.bench":
      program = importlib.import_module("scripts.bench.main")
    if hasattr(program, "Args"):
      main = functools.partial(cli.run_script, lambda args: None, program.Args)
    else:
      self.enter_context(mock.patch.object(program, "execute"))
      program.execute.__module__ = module
      program.execute.return_value = None
      if hasattr(program, "configure"):  # reads the model and the data
        fake = mock.patch.object(program, "configure", cli.configure)
        self.enter_context(fake)
      main = program.main
    code, _, err = testing.command_line(main, *arguments)
    return code, err

  @parameterized.parameters(commands())
  def test_is_accepted(self, page, module, arguments):
    if module == "scripts.layout_matrix":
      self.assertEqual(arguments, ["--write"])
      return
    self.assertEqual(self.run_until_work(module, arguments), (cli.OK, ""))

  def test_there_are_some(self):
    self.assertGreater(len(commands()), 20)

  @parameterized.parameters(PROGRAMS)
  def test_help_is_shown_and_nothing_done(self, module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    program = functools.partial(runpy.run_path, str(path), run_name="__main__")
    if "flags.DEFINE" in path.read_text():  # they cannot be defined again
      program = importlib.import_module(module).main
    # Devices are counted already, in this process.
    self.enter_context(mock.patch.object(jax.config, "update"))
    # The allocator's settings would replace this process.
    self.enter_context(mock.patch.object(allocator, "keep_large_blocks"))
    code, out, _ = testing.command_line(program, "--help")
    self.assertIn(code, (0, None))
    (first, *_) = ast.get_docstring(ast.parse(path.read_text())).splitlines()
    self.assertIn(first, out)
    self.assertLessEqual(max(map(len, out.splitlines())), 80)

  @parameterized.parameters("demo", "test", "supervise", "slurm")
  def test_help_of_shell_scripts(self, name):
    script = ROOT / "scripts" / f"{name}.sh"
    done = subprocess.run(
      ["bash", script, "--help"], capture_output=True, text=True, timeout=60
    )
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    self.assertIn("usage: ", done.stdout)


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

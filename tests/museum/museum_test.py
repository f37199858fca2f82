"""Faults of other code bases, planted in ours, are seen by their tests."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import mutants
import pytest
from absl.testing import absltest, parameterized

FOLDERS = "dsv3_jax", "experiments", "tests", "docs"


class TableTest(absltest.TestCase):
  def test_each_line_is_there_once_and_each_test_exists(self):
    self.assertGreaterEqual(len(mutants.MUTANTS), 40)
    names = [mutant.name for mutant in mutants.MUTANTS]
    self.assertLen(set(names), len(names))
    problems = []
    for mutant in mutants.MUTANTS:
      try:
        ast.parse(mutant.source())
      except (AssertionError, SyntaxError) as error:
        problems.append(f"{mutant.file}: {mutant.before}: {error}")
      if not mutants.has_test(mutant.test):
        problems.append(f"{mutant.test}: is not there")
    self.assertEmpty(problems, "\n".join(problems))

  def test_a_test_that_is_not_there_is_told(self):
    file = "tests/museum/museum_test.py"
    for test in ("TableTest::test_x", "X::test_each_line"):
      self.assertFalse(mutants.has_test(f"{file}::{test}"))
    self.assertFalse(mutants.has_test("tests/no_test.py::A::test_b"))

  def test_page_is_that_of_the_table(self):
    self.assertEqual(
      mutants.PAGE.read_text("utf-8"),
      mutants.page(),
      "run python tests/museum/mutants.py",
    )


class MuseumTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    for name in FOLDERS:
      shutil.copytree(
        mutants.ROOT / name,
        cls.root / name,
        ignore=shutil.ignore_patterns("__pycache__"),
      )
    for file in ("pyproject.toml", "README.md"):
      shutil.copy(mutants.ROOT / file, cls.root)

  def run_tests(self, *tests):
    """Runs tests of the copy; returns exit code and output."""
    # Files that change within a second have the same stamp in a cache.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    files, names = set(), []
    for test in tests:
      file, group, name = test.split("::")
      files.add(file)
      names.append(f"({group} and {name})")  # all cases of one with cases
    command = [sys.executable, *"-m pytest -n 0 -x --tb=short -rf".split()]
    done = subprocess.run(
      [*command, "-k", " or ".join(names), *sorted(files)],
      cwd=self.root,
      env=environment,
      capture_output=True,
      text=True,
      timeout=500,
    )
    return done.returncode, done.stdout + done.stderr

  @pytest.mark.slow
  def test_without_a_mutant_all_pass(self):
    tests = sorted({mutant.test for mutant in mutants.MUTANTS})
    code, output = self.run_tests(*tests)
    self.assertEqual(code, 0, output)

  @parameterized.named_parameters(
    (mutant.name, mutant) for mutant in mutants.MUTANTS
  )
  @pytest.mark.slow
  def test_fails_with(self, mutant):
    path = self.root / mutant.file
    source = path.read_text("utf-8")
    path.write_text(mutant.source(), "utf-8")
    try:
      code, output = self.run_tests(mutant.test)
    finally:
      path.write_text(source, "utf-8")
    self.assertEqual(code, 1, output)
    # An assertion of the test, and no other error.
    self.assertRegex(output, r"(?m)^E +AssertionError")


if __name__ == "__main__":
  absltest.main()

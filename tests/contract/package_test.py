"""Tests of the package as it is installed: wheel, data, extras, programs."""

import json
import pathlib
import re
import subprocess
import sys
import tomllib

import testing
from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Prints from an installed package, in a folder without the repository.
PROGRAM = """
import pathlib
import dsv3_jax
from dsv3_jax.data import text_files
from dsv3_jax.report import page
from dsv3_jax.trainer import Trainer

novels = sorted(text_files.NOVELS.glob("*.txt.gz"))
print(dsv3_jax.__file__, len(novels), page.TEMPLATE.is_file(), Trainer.__name__)
kernel = pathlib.Path(dsv3_jax.__file__).parent / "infer" / "native"
print(*sorted(path.name for path in kernel.glob("*")))
"""
# Prints exit code and output of `--help` of each console script, as JSON.
HELP = """
import contextlib, importlib, io, json, sys
found = {}
for target in sys.argv[1:]:
  module, function = target.split(":")
  sys.argv, out = [module, "--help"], io.StringIO()
  with contextlib.redirect_stdout(out):
    try:
      code = getattr(importlib.import_module(module), function)()
    except SystemExit as ended:
      code = ended.code
  found[target] = code, out.getvalue()
print(json.dumps(found))
"""


def requirements(name):
  """The requirements of a file, without their reasons."""
  lines = (ROOT / name).read_text().splitlines()
  return [
    line for text in lines if (line := re.split(r"\s*#", text)[0].strip())
  ]


def python(folder, *arguments):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    env={
      "PATH": "",
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(folder / "site"),
    },
    capture_output=True,
    text=True,
    timeout=300,
  )


class WheelTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = testing.folder(cls)
    pip = [
      sys.executable,
      "-m",
      "pip",
      "--disable-pip-version-check",
      "--quiet",
    ]
    build = "--no-deps", "--no-build-isolation", "--no-index"
    # Not from the source tree itself, in which setuptools leaves files.
    source = cls.folder / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    subprocess.run(
      [*pip, "wheel", *build, f"--wheel-dir={cls.folder}", source], check=True
    )
    (wheel,) = cls.folder.glob("*.whl")
    site = cls.folder / "site"
    subprocess.run(
      [*pip, "install", *build, f"--target={site}", wheel], check=True
    )

  def test_is_used_from_another_folder(self):
    done = python(self.folder, "-c", PROGRAM)
    self.assertEqual(done.returncode, 0, done.stderr)
    first, sources = done.stdout.splitlines()
    file, n_novels, has_page, name = first.split()
    self.assertStartsWith(file, str(self.folder / "site"))
    self.assertEqual((n_novels, has_page, name), ("2", "True", "Trainer"))
    kernel = ROOT / "dsv3_jax" / "infer" / "native"
    self.assertContainsSubset(
      [path.name for path in kernel.glob("*.*")], sources.split()
    )

  def test_console_scripts_print_help(self):
    scripts = PROJECT["scripts"]
    done = python(self.folder, "-c", HELP, *scripts.values())
    self.assertEqual(done.returncode, 0, done.stderr)
    found = json.loads(done.stdout)
    for script, target in scripts.items():
      with self.subTest(script):
        code, text = found[target]
        self.assertEqual(code, 0)
        self.assertIn(
          "--workdir" if "schedule" not in script else "--ranks", text
        )


class ExtrasTest(absltest.TestCase):
  def test_dev_is_what_the_tests_install(self):
    extras = PROJECT["optional-dependencies"]
    self.assertEqual(extras["dev"], requirements("requirements-dev.txt"))
    self.assertContainsSubset(
      {"eval", "posttrain", "interop", "cuda12", "tpu", "dev"}, extras
    )

  def test_pre_commit_runs_the_tools_of_the_tests(self):
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for command in re.findall(
      r"\.venv/bin/(?:ruff \w+|pyrefly \w+)",
      (ROOT / "scripts" / "test.sh").read_text(),
    ):
      self.assertIn(command, hooks)


if __name__ == "__main__":
  absltest.main()

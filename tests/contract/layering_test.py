"""Tests of what may import and call what; the source is read, not run."""

import ast
import pathlib

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[2]
# A part imports only what stands left of it, and itself.
ORDER = (
  "errors display io config param_spec checksum varying data linear model"
  " losses parallel plan optim ema train checkpoint interop infer evals trainer"
  " posttrain report"
).split()
# Where communication may be written by hand.
MANUAL = ("parallel", "train", "evals", "infer")
# Flags and the environment are read at the edge only; other frameworks stay
# outside.
FORBIDDEN_IMPORTS = (
  "absl.flags argparse experiments flax.linen flax.nnx scripts torch"
  " transformers"
).split()
WORKERS = "against_transformers.py", "transformers_logits.py"
# No docstring begins with a pronoun, a preposition or a question.
FIRST_WORDS = (
  "As Each For Here How If In Of That Their Those They This Under What When"
  " Where Which Who Whose With"
).split()
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef
FORBIDDEN_NAMES = "os.environ os.getenv".split()
# $CXX and the user's cache, as any build reads them.
ENVIRONMENT = ("dsv3_jax/infer/native/build.py",)


def sources(folder):
  return sorted((ROOT / folder).rglob("*.py"))


def part_of(path):
  return path.relative_to(ROOT / "dsv3_jax").parts[0].removesuffix(".py")


def imports(tree):
  """Every module and name imported, dotted."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(tree):
  """Every name and dotted name used."""
  for node in ast.walk(tree):
    if isinstance(node, (ast.Name, ast.Attribute)):
      yield ast.unparse(node)


def within(name, packages):
  return any(name == p or name.startswith(p + ".") for p in packages)


def package_trees():
  """Part, path from the root and syntax tree of each file of the package."""
  for path in sources("dsv3_jax"):
    yield part_of(path), path.relative_to(ROOT), ast.parse(path.read_text())


class PackageTest(absltest.TestCase):
  def test_imports_only_leftwards(self):
    for part, path, tree in package_trees():
      if part == "__init__":
        continue
      self.assertIn(part, ORDER)
      for imported in imports(tree):
        if within(imported, ["dsv3_jax"]):
          other = imported.split(".")[1]
          self.assertLessEqual(
            ORDER.index(other), ORDER.index(part), f"{path}: {imported}"
          )

  def test_leaves_the_edge_to_others(self):
    for part, path, tree in package_trees():
      used = set(names(tree))
      wrong = [n for n in imports(tree) if within(n, FORBIDDEN_IMPORTS)]
      if part != "trainer" and str(path) not in ENVIRONMENT:
        wrong += used & set(FORBIDDEN_NAMES)
      if part not in MANUAL:
        wrong += [n for n in used if n.endswith("shard_map")]
      self.assertEmpty(wrong, path)

  def test_holds_no_file_past_its_size(self):
    sizes = {
      path: len(path.read_text().splitlines()) for path in sources("dsv3_jax")
    }
    self.assertEmpty({k: n for k, n in sizes.items() if n > 450})


class EverywhereTest(absltest.TestCase):
  def test_nothing_foreign_outside_the_package(self):
    for path in sources("experiments") + sources("scripts"):
      for imported in imports(ast.parse(path.read_text())):
        self.assertFalse(within(imported, ["tests"]), path)
        # Workers are processes of their own.
        if path.name not in WORKERS:
          self.assertFalse(within(imported, ["torch", "transformers"]), path)

  def test_docstrings_begin_with_a_verb_or_the_name_of_the_result(self):
    wrong = []
    for folder in ("dsv3_jax", "experiments", "scripts", "tests"):
      for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text())):
          if not isinstance(node, DOCUMENTED):
            continue
          first = (ast.get_docstring(node) or "-").split(None, 1)[0]
          if first.rstrip(",.:;") in FIRST_WORDS:
            line = getattr(node, "lineno", 1)
            wrong.append(f"{path.relative_to(ROOT)}:{line} {first}")
    self.assertEmpty(wrong, "\n".join(wrong))

  def test_linters_are_obeyed_and_not_silenced(self):
    marks = ["# no" + "qa", "# type: " + "ignore", "# pylint: " + "disable"]
    for folder in ("dsv3_jax", "experiments", "scripts", "tests"):
      for path in sources(folder):
        for mark in marks:
          self.assertNotIn(mark, path.read_text(), path)


if __name__ == "__main__":
  absltest.main()

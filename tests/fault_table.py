"""Pytest plugin that writes docs/faults.md from the marks of tests.

A test, class or module is marked `@pytest.mark.fault("F07")`, and one of those
of a fault says in two more arguments what is injected and what is expected.
`python -m pytest -n 0 --collect-only --write_faults` writes the table.
"""

import collections
import pathlib

import pytest

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "faults.md"
HEAD = """# Faults

Each fault is injected into the program or its files by the tests beside it:
`python -m pytest -m fault` runs all of them, `-m "fault and not slow"` the
quick ones. `python -m pytest -n 0 --collect-only --write_faults` writes this
page from the marks of the tests.

| | fault injected | expected outcome | tests |
| --- | --- | --- | --- |
"""
ROWS = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
  parser.addoption(
    "--write_faults", action="store_true", help="write docs/faults.md"
  )


def rows(items) -> list[str]:
  """Rows of the table: name, fault injected, expected outcome, tests."""
  texts, tests = {}, collections.defaultdict(dict)  # dicts keep their order
  for item in items:
    for node, mark in item.iter_markers_with_node("fault"):
      name, *text = mark.args
      file, *path = node.nodeid.removeprefix("tests/").split("::")
      if node is item:  # without the case of a parameterized test
        path[-1] = getattr(item.function, "__wrapped__", item.function).__name__
      tests[name].setdefault(f"`{file}`", {})[".".join(path)] = None
      texts[name] = text or texts.get(name, ("", ""))
  cells = lambda name: [
    name,
    *texts[name],
    "; ".join(" ".join([f, ", ".join(t)]) for f, t in tests[name].items()),
  ]
  return [f"| {' | '.join(cells(name))} |" for name in sorted(tests)]


def page(rows) -> str:
  """Text of docs/faults.md."""
  return HEAD + "\n".join(rows) + "\n"


@pytest.hookimpl(tryfirst=True)  # before tests are deselected
def pytest_collection_modifyitems(config, items):
  config.stash[ROWS] = rows(items)
  if config.option.write_faults:
    PAGE.write_text(page(config.stash[ROWS]), "utf-8")

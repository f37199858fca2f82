"""Does the system survive it? Every fault, injected and looked at.

  python -m scripts.faults [--only=F01,F12] [--fast] [--readme]

Runs the tests of each fault and prints a table: what is done, what must come of
it, how many tests say that it does. `--fast` leaves out those that take
minutes, `--readme` puts the table, or with `--only` these rows of it, into
README.md. Needs requirements-dev.txt.
"""

import collections
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterable, Sequence

from absl import flags

from dsv3_jax.errors import InputError
from scripts import fault_list, readme

ROOT = pathlib.Path(__file__).parents[1]
MARK = "<!-- made by: python -m scripts.faults --readme -->"
HEAD = "", "what is done", "what comes of it", "tests"


def collected(selection: str) -> list[str]:
  """Names of all tests there are."""
  command = [sys.executable, "-m", "pytest", "--collect-only", "-n", "0"]
  done = subprocess.run(
    [*command, "-m", selection], cwd=ROOT, capture_output=True, text=True
  )
  names = [line for line in done.stdout.splitlines() if "::" in line]
  if done.returncode:
    raise InputError(f"pytest cannot collect:\n{done.stdout[-2000:]}")
  return names


def tests_of(fault: fault_list.Fault, names: Iterable[str]) -> list[str]:
  """Those of the names that are tests of a fault."""
  found = []
  for test in fault.tests if isinstance(fault.tests, tuple) else ():
    module, *rest = test.split(".")
    pattern = "::".join([f"tests/{module}_test.py", *rest])
    found += [name for name in names if name.startswith(pattern)]
  return list(dict.fromkeys(found))


def _run(names: Sequence[str]) -> dict[str, str]:
  """What became of tests: passed, failed, skipped."""
  with tempfile.TemporaryDirectory() as folder:
    report = pathlib.Path(folder) / "report.xml"
    arguments = ["--timeout=3600", f"--junitxml={report}", *names]
    subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT)
    cases = xml.etree.ElementTree.parse(report).iter("testcase")
    outcomes = {}
    for case in cases:
      parts = case.get("classname").split(".")
      name = f"tests/{parts[1]}.py::{'::'.join(parts[2:])}::{case.get('name')}"
      kinds = {child.tag for child in case}
      outcomes[name] = (
        "failed"
        if kinds & {"failure", "error"}
        else "skipped"
        if "skipped" in kinds
        else "passed"
      )
  return outcomes


def row(
  fault: fault_list.Fault, names: Sequence[str], outcomes: dict[str, str]
) -> str:
  """A row of the table, in Markdown."""
  if isinstance(fault.tests, str):
    said = fault.tests
  else:
    counts = collections.Counter(outcomes.get(n, "did not run") for n in names)
    said = ", ".join(f"{n} {what}" for what, n in counts.items()) or "NONE"
  return readme.row(fault.name, fault.done, fault.expected, said)


def _put(rows: Sequence[str]) -> None:
  """Puts rows into the README's table, whose others stay."""
  text = readme.README.read_text(encoding="utf-8")
  block = text.partition(MARK)[2].partition(readme.END)[0]
  old = [line for line in block.splitlines() if line.startswith("| F")]
  of = {line.split()[1]: line for line in [*old, *rows]}
  table = [of[fault.name] for fault in fault_list.FAULTS if fault.name in of]
  title = f"All {len(table)} faults: what is done, and what comes of it"
  readme.put(MARK, readme.folded(title, HEAD, table))


def _parse(argv: Sequence[str]) -> flags.FlagValues:
  known = flags.FlagValues()
  flags.DEFINE_boolean("help", False, "show this help", flag_values=known)
  flags.DEFINE_list("only", [], "faults such as F01", flag_values=known)
  flags.DEFINE_boolean("fast", False, "without slow tests", flag_values=known)
  flags.DEFINE_boolean(
    "readme", False, "put the table into README.md", flag_values=known
  )
  try:
    _, *stray = known(argv)
  except flags.Error as error:
    raise InputError(str(error)) from error
  there = {fault.name for fault in fault_list.FAULTS}
  if wrong := set(known.only) - there:
    stray += [f"--only={name}" for name in sorted(wrong)]
  if stray:
    raise InputError(
      f"{' '.join(stray)!r}: flags are --a=b, faults {min(there)} to"
      f" {max(there)}"
    )
  if known.readme and known.fast:
    raise InputError("--readme is of all tests, --fast leaves some out")
  return known


def main(argv: Sequence[str]) -> int:
  """Runs what is asked for; returns the exit code."""
  try:
    known = _parse(argv)
    if known.readme:  # refused now rather than after half an hour
      readme.replaced(readme.README.read_text(encoding="utf-8"), MARK, "")
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if known.help:
    print(__doc__, known.get_help(), sep="\n")
    return 0
  faults = fault_list.FAULTS
  if known.only:
    faults = [fault for fault in faults if fault.name in known.only]
  names = collected("not slow" if known.fast else "slow or not slow")
  tests = {fault.name: tests_of(fault, names) for fault in faults}
  every = dict.fromkeys(name for each in tests.values() for name in each)
  outcomes = _run(list(every)) if every else {}
  rows = [row(fault, tests[fault.name], outcomes) for fault in faults]
  print(*readme.head(HEAD), *rows, sep="\n")
  if known.readme:
    _put(rows)
  return int(set(outcomes.values()) != {"passed"} and bool(every))


if __name__ == "__main__":
  sys.exit(main(sys.argv))

"""Tests that every fault has a test, and that docs/faults.md says which."""

import fault_table
import pytest


def test_faults_are_those_of_the_table(pytestconfig):
  if pytestconfig.args_source is not pytest.Config.ArgsSource.TESTPATHS:
    pytest.skip("some tests were not collected")
  rows = pytestconfig.stash[fault_table.ROWS]
  names = [row.split()[1] for row in rows]
  assert names == [f"F{i:02}" for i in range(1, 49)]
  assert fault_table.PAGE.read_text("utf-8") == fault_table.page(rows), (
    "write it: python -m pytest -n 0 --collect-only --write_faults"
  )

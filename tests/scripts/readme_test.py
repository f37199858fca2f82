"""Tests of the tables in the README, and of the faults that one lists."""

import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from scripts import fault_list, faults, layout_matrix, readme

ROOT = pathlib.Path(__file__).parents[2]
MARK = readme.LEAD + "python -m scripts.tables -->"


class ReplacedTest(parameterized.TestCase):
  def test_a_new_table_takes_the_place_of_the_old_one(self):
    other = f"{readme.LEAD}another -->\nkept\n{readme.END}"
    page = f"above\n{other}\n{MARK}\nold\n{readme.END}\nbelow\n{other}\n"
    block = readme.folded("rows", ["a"], ["| 1 |"])
    once = readme.replaced(page, MARK, block)
    self.assertEqual(
      once,
      f"above\n{other}\n{MARK}\n<details><summary>rows</summary>\n\n| a |\n"
      f"| --- |\n| 1 |\n\n</details>\n{readme.END}\nbelow\n{other}\n",
    )
    self.assertEqual(readme.replaced(once, MARK, block), once)

  @parameterized.parameters(
    "{0}", "{1}", "{1} {0}", "{0} {0} {1}", "{0} {2} {1}", "{0} {1} {0}"
  )
  def test_marks_that_are_not_there_once_are_refused(self, page):
    page = page.format(MARK, readme.END, readme.LEAD + "another -->")
    with self.assertRaisesRegex(ValueError, "once"):
      readme.replaced(page, MARK, "")

  @parameterized.parameters(layout_matrix.BEGIN, faults.MARK)
  def test_the_readme_has_the_marks(self, mark):
    text = readme.README.read_text(encoding="utf-8")
    readme.replaced(text, mark, "")


class FaultsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.names = faults.collected("slow or not slow")

  def test_every_fault_has_the_tests_that_it_names(self):
    for fault in fault_list.FAULTS:
      if isinstance(fault.tests, str):
        continue
      for test in fault.tests:
        one = fault_list.Fault(fault.name, "", "", (test,))
        self.assertNotEmpty(faults.tests_of(one, self.names), test)

  def test_the_readme_has_a_row_of_each_that_passed(self):
    text = readme.README.read_text(encoding="utf-8")
    block = text.partition(faults.MARK)[2].partition(readme.END)[0]
    rows = [line for line in block.splitlines() if line.startswith("| F")]
    self.assertLen(rows, len(fault_list.FAULTS))
    for fault, row in zip(fault_list.FAULTS, rows, strict=True):
      lead = readme.row(fault.name, fault.done, fault.expected, "")
      self.assertStartsWith(row, lead.removesuffix(" |"))
      if isinstance(fault.tests, tuple):
        self.assertRegex(row, r"\| [1-9]\d* passed \|$")

  def test_all_are_there_in_order(self):
    names = [fault.name for fault in fault_list.FAULTS]
    self.assertEqual(names, [f"F{i:02}" for i in range(1, 49)])

  @parameterized.parameters("--only=F99", "--onli=F01", "F01", "--readme=x")
  def test_refuses_what_it_does_not_know(self, argument):
    self.assertEqual(faults.main(["program", argument]), 2)

  def test_the_table_is_of_all_tests(self):
    self.assertEqual(faults.main(["program", "--readme", "--fast"]), 2)

  def test_some_rows_of_the_table_are_made_anew(self):
    page = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()), "a")
    before = readme.README.read_text(encoding="utf-8")
    page.write_text(before.replace("| F48 | code", "| F48 | old"), "utf-8")
    self.assertNotEqual(page.read_text("utf-8"), before)
    self.enter_context(mock.patch.object(readme, "README", page))
    # One without tests, as those take their time.
    self.assertEqual(faults.main(["program", "--only=F48", "--readme"]), 0)
    self.assertEqual(page.read_text("utf-8"), before)


if __name__ == "__main__":
  absltest.main()

"""Tests of flags as fields of a dataclass."""

import contextlib
import dataclasses
import io

from absl.testing import absltest, parameterized

from dsv3_jax.errors import InputError
from experiments import flag_parser
from experiments.flag_parser import flag


@dataclasses.dataclass(frozen=True)
class Args:
  workdir: str = flag("", "folder of the run")
  step: int | None = flag(None, "step", low=1, old_name="at")
  what: tuple[str, ...] = flag(("a",), "parts", choices=("a", "b"))
  stop: tuple[str, ...] = flag((), "a string", repeated=True)
  json: bool = flag(False, "print JSON", old_name="js")
  share: float = flag(2.0, "share")

  def validate(self):
    if not self.workdir:
      yield "--workdir is missing"


def parse(*arguments):
  return flag_parser.parse(Args, ["program", *arguments])


class ParseTest(parameterized.TestCase):
  def test_values_have_the_type_of_the_field(self):
    args = parse(
      "--workdir=x=y", "--step", "3", "--what=b,a", "--stop=,", "--stop=b"
    )
    expected = Args(
      workdir="x=y", step=3, what=("b", "a"), stop=(",", "b"), json=False
    )
    self.assertEqual(args, expected)
    self.assertIs(type(parse("--workdir=x", "--share=3").share), float)
    self.assertEqual(parse("--workdir=x"), Args(workdir="x"))

  def test_lists_all_problems_at_once(self):
    with self.assertRaises(InputError) as raised:
      parse("--step=0", "--what=c", "--share=y", "--workdr=3", "left")
    self.assertEqual(
      str(raised.exception).splitlines(),
      [
        "unknown flag '--workdr=3'; did you mean --workdir?",
        "stray argument 'left': settings are --flag=value",
        "--step=0: must be at least 1",
        "--what=c: must be one of a, b",
        "--share=y: expected a number",
        "--workdir is missing",
      ],
    )

  @parameterized.parameters("--json=maybe", "--workdir")
  def test_what_cannot_be_read_is_an_input_error(self, argument):
    with self.assertRaisesRegex(InputError, argument[2:].partition("=")[0]):
      parse(argument)

  @parameterized.parameters(
    (["--at=7"], "step"), (["--at", "7"], "step"), (["--js"], "json")
  )
  def test_old_names_are_read_with_a_warning(self, arguments, new):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
      args = parse("--workdir=x", *arguments)
    self.assertEqual(err.getvalue().count("\n"), 1)
    self.assertIn(f"is now --{new};", err.getvalue())
    self.assertTrue(getattr(args, new))

  def test_help_has_docstring_and_flags(self):
    text = flag_parser.help_text(Args)
    self.assertIn("Tests of flags", text)
    self.assertIn("  --share: share (default: 2.0)", text)


if __name__ == "__main__":
  absltest.main()

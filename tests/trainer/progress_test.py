"""Progress and messages suit terminals of any width, pipes and log files."""

import io
import pathlib
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from dsv3_jax.trainer import progress, terminal


class Screen(io.StringIO):
  """A terminal; `lines` is what a person sees."""

  def isatty(self):
    return True

  def lines(self) -> list[str]:
    rows, column = [[]], 0
    for character in self.getvalue().replace("\x1b[K", "\v"):
      if character == "\n":
        rows.append([])
        column = 0
      elif character == "\r":
        column = 0
      elif character == "\v":
        del rows[-1][column:]
      else:
        rows[-1][column : column + 1] = [character]
        column += 1
    return ["".join(row) for row in rows]


def row(step: int, **more) -> dict:
  """The row of a step."""
  return {
    "loss": 9.0,
    "main_loss": 5.0 - step,
    "mtp_loss": 4.5,
    "grad_norm": 0.714,
    "tokens_per_s": 12_345.6,
    "max_vio": 0.21,
    "skipped_steps": 0,
    "peak_bytes": 3 << 29,
  } | more


class ProgressTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    clock = mock.patch("time.monotonic", side_effect=lambda: self.now)
    self.enter_context(clock)
    self.environ = {"TERM": "xterm", "COLUMNS": "120"}
    self.now = 100.0

  def open(self, stream, total=10, **environ):
    """Opens a terminal, and the progress on it."""
    environ = self.environ | environ
    self.enter_context(mock.patch.dict("os.environ", environ))
    lines = terminal.Terminal(self.workdir, stream)
    self.addCleanup(lines.close)
    return progress.Progress(lines, total)

  def logged(self):
    text = (self.workdir / terminal.LOG).read_text()
    return [line.split("  ", 1)[1] for line in text.splitlines()]

  def test_pipe_gets_a_line_every_five_seconds(self):
    stream = io.StringIO()
    shown = self.open(stream)
    for step in range(1, 9):
      shown.write(step, row(step))
      self.now += 2
    shown.close()
    lines = stream.getvalue().splitlines()
    steps = [line.split()[1] for line in lines]
    self.assertEqual(steps, ["1/10", "4/10", "7/10", "8/10"])
    self.assertNoCommonElements(stream.getvalue(), "\r\x1b")
    self.assertEqual(self.logged(), lines)

  def test_line_says_what_a_person_wants_to_know(self):
    stream = io.StringIO()
    shown = self.open(stream)
    shown.write(1, row(1))
    shown.write(1, {"heldout_loss": 4.0, "heldout_bpb": 1.987})
    for step in (2, 3, 4):
      self.now += 20
      shown.write(step, row(step, skipped_steps=step // 4))
    self.assertEqual(
      stream.getvalue().splitlines()[-1],
      "step 4/10  loss 1.000  mtp 4.500  norm 0.71  12,346 tok/s  2:00 left"
      "  MaxVio 0.21  1.5 GiB  skipped 1  bpb 1.987 at 1",
    )
    self.assertNotIn("skipped 0", stream.getvalue())

  def test_time_left_does_not_jump_at_evaluations(self):
    stream = Screen()
    shown = self.open(stream, total=1000)
    left = []
    for step in range(1, 401):
      self.now += 30 if step == 1 else 1
      shown.write(step, row(step))
      seen = [c for c in stream.lines()[-1].split("  ") if c.endswith("left")]
      left += [(step, *seen)] if seen else []
      if step % 100 == 0:
        self.now += 40 if step == 100 else 10  # the first compiles
        shown.write(step, {"heldout_loss": 4.0})
    seconds = {
      step: 60 * int(text[:-8]) + int(text[-7:-5]) for step, text in left
    }
    for step in range(3, 401):
      # What an evaluation takes is known after the second: 10 s, 8 to come.
      most = 80 if step == 201 else 1
      change = seconds[step] - seconds[step - 1]
      self.assertBetween(change, -3, most, step)
    self.assertBetween(seconds[400], 600, 600 + 6 * 10)

  @parameterized.parameters(40, 80, 120, 1)
  def test_a_narrow_terminal_shows_what_matters_most(self, width):
    stream = Screen()
    shown = self.open(stream, COLUMNS=str(width))
    for step in range(1, 5):
      shown.write(step, row(step, skipped_steps=7))
      self.now += 1
    (line,) = stream.lines()
    self.assertLess(len(line), width)
    parts = ("4/10", "loss 1.000", "0:06 left", "skipped 7")
    for part in parts if width >= 40 else ():
      self.assertIn(part, line)
    self.assertEqual("1.5 GiB" in line, width == 120)
    self.assertEqual("tok/s" in line, width >= 80)

  @parameterized.parameters({"TERM": "dumb"}, {"COLUMNS": "0"}, {"COLUMNS": ""})
  def test_a_terminal_without_width_or_abilities(self, **environ):
    stream = Screen()
    shown = self.open(stream, **environ)
    shown.write(1, row(1))
    shown.close()
    if environ.get("TERM") == "dumb":
      self.assertNoCommonElements(stream.getvalue(), "\r\x1b")
    self.assertIn("1/10  loss 4.000", stream.lines()[0])

  def test_messages_stand_on_lines_of_their_own(self):
    stream = Screen()
    self.enter_context(mock.patch.object(sys, "stderr", stream))
    shown = self.open(stream)
    for step in range(1, 4):
      shown.write(step, row(step))
      print(f"message {step}", file=sys.stderr)
      self.now += 1
    shown.close()
    lines = stream.lines()
    self.assertEqual(lines[:3], ["message 1", "message 2", "message 3"])
    self.assertStartsWith(lines[3], "step 3/10")

  def test_evaluation_always_gets_a_line_and_its_sample_one(self):
    stream = Screen()
    shown = self.open(stream)
    shown.write(1, row(1))
    sample = "one\ntwo\x1b[2J\r" + "x" * 200
    shown.write(1, {"heldout_loss": 4.0, "heldout_bpb": None, "sample": sample})
    *_, evaluation, text, _ = stream.lines()
    self.assertEndsWith(evaluation, "held-out loss 4.0000  nan bits per byte")
    self.assertStartsWith(text, "  > one two\ufffd[2J xxx")
    self.assertLess(len(text), 101)

  def test_letters_that_the_stream_cannot_show_are_escaped(self):
    raw = io.BytesIO()
    lines = terminal.Terminal(self.workdir, io.TextIOWrapper(raw, "ascii"))
    lines.print("“quoted”")
    lines.close()
    self.assertEqual(raw.getvalue(), b"\\u201cquoted\\u201d\n")


class WaitingTest(absltest.TestCase):
  def test_says_what_is_waited_for_and_leaves_nothing(self):
    stream = Screen()
    workdir = self.enter_context(tempfile.TemporaryDirectory())
    self.enter_context(mock.patch.dict("os.environ", {"TERM": "xterm"}))
    lines = terminal.Terminal(pathlib.Path(workdir), stream)
    with lines.waiting("compiling"):
      while "compiling  0:0" not in stream.getvalue():
        pass
    lines.close()
    self.assertEqual(stream.lines(), [""])


if __name__ == "__main__":
  absltest.main()

"""Tests of conversations on a terminal and from a pipe."""

import contextlib
import io
import os
import signal
import sys
from unittest import mock

import testing
from absl.testing import absltest, parameterized

from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError
from dsv3_jax.infer import engine, generate
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from experiments import chat, cli, sample


class Terminal(io.StringIO):
  """A standard input that a person types at."""

  def isatty(self):
    return True


class Answering(generate.Generator):
  """Answers "one", "two" and so on; remembers what was asked."""

  def __init__(self, *, max_len=1000, stops=()):
    served = mock.Mock(options=EngineOptions(max_len=max_len))
    super().__init__(served, tokenizer.train(["x"], 264))
    self.asked, self._stops = [], stops

  def generate(self, request):
    self.asked.append(request.prompt)
    number = len(self.asked)

    def chunks():
      text = ("one", "two", "three")[number - 1]
      for i, letter in enumerate(text):
        reason = engine.STOP if letter == text[-1] and i else ""
        if number in self._stops:
          os.kill(os.getpid(), signal.SIGINT)
        yield generate.Chunk(0, letter, 9, -1.0, reason)

    return generate.GeneratedText(chunks())


def user(text):
  return {"role": "user", "content": text}


def assistant(text):
  return {"role": "assistant", "content": text}


class ChatTest(parameterized.TestCase):
  def converse(self, generator, stdin, max_tokens=9):
    out, err = io.StringIO(), io.StringIO()
    self.enter_context(mock.patch.object(sys, "stdin", stdin))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      request = GenerationRequest("", max_tokens)
      try:
        chat.converse(generator, request, sample._show)
      finally:
        self.out, self.err = out.getvalue(), err.getvalue()

  @parameterized.parameters(io.StringIO, Terminal)
  def test_each_answer_knows_all_before_it(self, kind):
    generator = Answering()
    self.converse(generator, kind("a\n\nb\n/reset\nc"))
    first = [user("a")]
    second = [*first, assistant("one"), user("b")]
    self.assertEqual(generator.asked, [first, second, [user("c")]])
    self.assertEqual(self.out, "one\ntwo\nthree\n" + "\n" * (kind is Terminal))

  def test_exit_ends_it(self):
    generator = Answering()
    self.converse(generator, io.StringIO("a\n/exit\nb\n"))
    self.assertLen(generator.asked, 1)

  def test_a_terminal_is_told_of_a_command_that_is_none(self):
    generator = Answering()
    self.converse(generator, Terminal("/quit\n/etc/passwd\n"))
    self.assertEqual(generator.asked, [[user("/etc/passwd")]])
    self.assertIn("/quit: is no command; /reset begins anew", self.err)

  def test_an_interrupt_stops_an_answer_and_keeps_it(self):
    generator, before = Answering(stops=(1,)), signal.getsignal(signal.SIGINT)
    self.converse(generator, Terminal("a\nb\n"))
    self.assertEqual(generator.asked[1], [user("a"), assistant("o"), user("b")])
    self.assertStartsWith(self.out, "o\ntwo\n")
    self.assertIn("(stopped)", self.err)
    self.assertEqual(signal.getsignal(signal.SIGINT), before)

  def test_an_interrupt_ends_a_pipe(self):
    with self.assertRaises(KeyboardInterrupt):
      self.converse(Answering(stops=(1,)), io.StringIO("a\nb\n"))

  def test_an_interrupt_at_the_prompt_ends_it(self):
    generator = Answering()
    with mock.patch("builtins.input", side_effect=KeyboardInterrupt):
      self.converse(generator, Terminal())
    self.assertEmpty(generator.asked)

  def test_says_that_it_is_full(self):
    # With BOS and the tokens of user and assistant, the first question has 23.
    lines = "a" * 20 + "\nb\n"
    generator = Answering(max_len=32)
    message = (
      r"full: 30 tokens, and --max_tokens=9 .* more than --max_len=32. /reset"
    )
    with self.assertRaisesRegex(InputError, message):
      self.converse(generator, io.StringIO(lines))
    self.assertEqual(self.out, "one\n")
    with self.subTest("on a terminal, where it goes on"):
      generator = Answering(max_len=32)
      self.converse(generator, Terminal(lines + "/reset\nc\n"))
      self.assertRegex(self.err, "error: the conversation is " + message)
      self.assertEqual(generator.asked[1], [user("c")])

  def test_half_of_a_character_is_refused(self):
    with self.assertRaisesRegex(InputError, "is not Unicode text"):
      self.converse(Answering(), io.StringIO("cold \udcff\n"))

  def test_standard_input_that_is_closed_or_no_text(self):
    with self.assertRaisesRegex(InputError, "standard input is closed"):
      self.converse(Answering(), None)
    stdin = io.TextIOWrapper(io.BytesIO(b"a \xff\n"), "utf-8")
    with self.assertRaisesRegex(InputError, "standard input: is not text"):
      self.converse(Answering(), stdin)

  @parameterized.parameters(
    ("--chat", "--prompt=a"), ("--chat", "--json"), ("--chat", "--prompts=a")
  )
  def test_flags_that_do_not_fit_together(self, *flags):
    code, _, err = testing.command_line(sample.main, *flags)
    self.assertEqual(code, cli.BAD_INPUT)
    self.assertIn("give one of them", err)


class ShowTest(absltest.TestCase):
  def test_a_terminal_gets_no_control_codes(self):
    for stream, expected in (
      (io.StringIO(), "a\x1b[2J\n\té"),
      (Terminal(), "a\ufffd[2J\n\té"),
    ):
      with contextlib.redirect_stdout(stream):
        sample._show("a\x1b[2J\n\té")
      self.assertEqual(stream.getvalue(), expected)


if __name__ == "__main__":
  absltest.main()

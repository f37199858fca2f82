"""Conversations: lines of standard input, each answered with all before it.

On a terminal, Ctrl-C stops an answer, which stays in the conversation; at the
prompt it ends the conversation, as Ctrl-D does.
"""

import contextlib
import dataclasses
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dsv3_jax.errors import InputError
from dsv3_jax.infer import engine, generate
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.interop import tokenizer_files

EXIT, RESET = "/exit", "/reset"
_HELP = f"{RESET} begins anew, {EXIT} or Ctrl-D ends, Ctrl-C stops an answer"
_PROMPT = "> "

Messages = list[dict[str, str]]
Print = Callable[[str], None]  # of a piece of an answer


def converse(
  generator: generate.Generator, request: GenerationRequest, show: Print
) -> None:
  """Answers line after line, up to the end of standard input or EXIT.

  `request` has the settings of the answers. Not on a terminal, nothing but the
  answers is printed, a line each.

  Raises:
    InputError: a line cannot be answered; a terminal is asked for another.
  """
  if sys.stdin is None:
    raise InputError("--chat: standard input is closed; there is no line")
  terminal, messages = sys.stdin.isatty(), []
  if terminal:
    with contextlib.suppress(ImportError):
      import readline

      readline.set_auto_history(True)  # lines can be edited and come back
    if generator.defaults == tokenizer_files.DEFAULTS:
      _log("note: a run that saw no conversations in training continues text")
    _log(_HELP)
  while (line := _read_line(terminal)) not in (None, EXIT):
    if line == RESET:
      messages = []
      _log("a new conversation")
    elif re.fullmatch("/[a-z]*", line) and terminal:
      _log(f"{line}: is no command; {_HELP}")
    elif line.strip():
      asked = [*messages, {"role": "user", "content": line}]
      try:
        messages = _answer(generator, request, asked, show, terminal)
      except InputError as error:
        if not terminal:
          raise
        _log(f"error: {error}")


def _log(line: str) -> None:
  print(line, file=sys.stderr)


def _read_line(terminal: bool) -> str | None:
  """Returns the next line of standard input; None at its end.

  Raises:
    InputError: it is no text in the encoding of the terminal.
  """
  try:
    return input(_PROMPT if terminal and sys.stdout.isatty() else "")
  except UnicodeDecodeError as error:
    raise InputError(f"standard input: is not text: {error}") from error
  except (EOFError, KeyboardInterrupt) as end:
    if not terminal and isinstance(end, KeyboardInterrupt):
      raise
    if terminal:
      print()
    return None


def _answer(
  generator: generate.Generator,
  settings: GenerationRequest,
  asked: Messages,
  show: Print,
  terminal: bool,
) -> Messages:
  """Prints the answer to the last message; returns the longer conversation.

  Raises:
    InputError: the conversation is too long, or the template refuses it.
  """
  request = dataclasses.replace(settings, prompt=asked)
  _check_length(generator, request)
  text = generator.generate(request)
  interrupt = _first_interrupt() if terminal else contextlib.nullcontext()
  with contextlib.closing(text), interrupt as interrupted:
    for piece in text:
      show(piece)
      if interrupted and interrupted.is_set():
        break
  print(flush=True)
  if text.finish_reason == engine.LENGTH:
    _log(f"(the answer ends at --max_tokens={request.max_tokens})")
  elif not text.finish_reason:
    _log("(stopped)")
  if sys.stderr.isatty():
    _log(f"({text.describe_speed()})")
  return [*asked, {"role": "assistant", "content": text.text}]


def _check_length(
  generator: generate.Generator, request: GenerationRequest
) -> None:
  """Raises InputError if there is no room for another answer."""
  ids = generate.encode(generator.tok, request.prompt, generator.defaults)
  longest = generator.engine.options.max_len
  if len(ids) + request.max_tokens > longest:
    raise InputError(
      f"the conversation is full: {len(ids)} tokens, and"
      f" --max_tokens={request.max_tokens} for the answer, are more than"
      f" --max_len={longest}. {RESET} begins anew; a larger --max_len has room"
      " for more"
    )


@contextlib.contextmanager
def _first_interrupt() -> Iterator[Any]:
  """Sets an event at the first SIGINT; a second one interrupts as usual.

  The engine is left alone between two tokens, where it can go on.
  """
  interrupted = threading.Event()
  before = signal.getsignal(signal.SIGINT)

  def interrupt(*_: object) -> None:
    interrupted.set()
    signal.signal(signal.SIGINT, before)

  signal.signal(signal.SIGINT, interrupt)
  try:
    yield interrupted
  finally:
    signal.signal(signal.SIGINT, before)

"""Text generation: requests and tokens of an engine as streams of text."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import tokenizers

from dsv3_jax.data import chat, tokenizer
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.infer import engine as engine_lib
from dsv3_jax.infer.request import GenerationRequest, Prompt
from dsv3_jax.interop import tokenizer_files
from dsv3_jax.interop.tokenizer_files import DEFAULTS, GenerationDefaults

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The text that one token adds."""

  index: int  # of the request in its stream, counted from 0
  text: str  # "": characters are not complete, or might begin a stop string
  token: int
  logprob: float
  finish_reason: str  # "stop" or "length" with the last chunk, "" before


class Generator:
  """Generates texts with an engine."""

  def __init__(
    self,
    engine: engine_lib.Engine,
    tok: tokenizers.Tokenizer,
    defaults: GenerationDefaults = DEFAULTS,
  ):
    self.engine, self.tok, self.defaults = engine, tok, defaults

  def generate(self, request: GenerationRequest | str) -> Iterator[str]:
    """Yields one text piece by piece; a string is a prompt.

    A prompt alone has the settings that the model's folder states.

    Raises:
      InputError: the request cannot be served.
    """
    if isinstance(request, str):
      request = GenerationRequest(request, **self.defaults.settings)
    for chunk in self.stream([request]):
      if chunk.text:
        yield chunk.text

  def stream(self, requests: Iterable[GenerationRequest]) -> Iterator[Chunk]:
    """Yields chunks of all texts, several at the same time.

    Raises:
      InputError: a request cannot be served.
      RuntimeError: the engine has other requests, whose events would be lost.
    """
    if self.engine.busy:
      raise RuntimeError("the engine has other requests; end them first")
    first, texts = self.engine.submitted, {}

    def tokenized():
      for request in requests:
        in_tokens = self.tokenize(request)
        texts[self.engine.submitted] = _StreamedText(self.tok, request.stop)
        yield in_tokens

    try:
      for event in self.engine.run(tokenized()):
        if (text := texts.get(event.index)) is None:
          continue  # a stop string ended it before
        new, reason = text.add(event)
        if reason:
          del texts[event.index]
          self.engine.cancel(event.index)
        index = event.index - first
        yield Chunk(index, new, event.token, event.logprob, reason)
    finally:
      for index in texts:
        self.engine.cancel(index)

  def tokenize(self, request: GenerationRequest) -> GenerationRequest:
    """Returns the request with its prompt in token ids; the model's EOS stops.

    Raises:
      InputError: it cannot be served; lists the problems, a line each.
    """
    request = tokenize(self.tok, request, self.defaults)
    raise_problems(self.engine.validate_request(request))
    return request


def tokenize(
  tok: tokenizers.Tokenizer,
  request: GenerationRequest,
  defaults: GenerationDefaults,
) -> GenerationRequest:
  """Returns the request with its prompt in token ids; the model's EOS stops.

  Raises:
    InputError: the prompt is no Unicode text, or no conversation that the
      model's chat template accepts.
  """
  return dataclasses.replace(
    request,
    prompt=encode(tok, request.prompt, defaults.template),
    stop_token_ids=(*request.stop_token_ids, *defaults.stop_token_ids),
  )


def encode(
  tok: tokenizers.Tokenizer,
  prompt: Prompt,
  template: chat.ChatTemplate | None = chat.V3,
) -> list[int]:
  """Returns the token ids of a prompt; a text begins with BOS.

  Raises:
    InputError: it is no Unicode text, or no conversation that the chat template
      accepts.
  """
  if isinstance(prompt, str):
    try:
      prompt.encode()
    except UnicodeEncodeError as error:
      raise InputError(f"prompt: is not Unicode text: {error}") from error
    return [tokenizer.BOS_ID, *tok.encode(prompt, add_special_tokens=False).ids]
  items = list(prompt)
  if not items or not isinstance(items[0], Mapping):
    return items
  if template is None:
    raise InputError(
      "messages: the model's folder has no chat template; add"
      f" {tokenizer_files.TEMPLATE}, or give a prompt"
    )
  return chat.encode(tok, items, template=template)


class _StreamedText:
  """Incremental detokenizer of one text, which looks for its stop strings."""

  def __init__(self, tok: tokenizers.Tokenizer, stops: Sequence[str]):
    self._tok, self._stops = tok, stops
    # Tokens since characters were complete, and how many of their characters
    # have been read.
    self._ids: list[int] = []
    self._n = 0
    self._held = ""  # characters that may begin a stop string

  def add(self, event: engine_lib.Event) -> tuple[str, str]:
    """Returns the characters to show next, and the finish reason or ""."""
    text = self._held + self._read(event)
    ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if ends:
      return text[: min(ends)], engine_lib.STOP
    if event.finish_reason:
      return text, event.finish_reason
    shown = len(text) - max((_overlap(text, s) for s in self._stops), default=0)
    self._held = text[shown:]
    return text[:shown], ""

  def _read(self, event: engine_lib.Event) -> str:
    """Returns the characters that a token completes; EOS has none."""
    self._ids.append(event.token)
    new = self._tok.decode(self._ids)[self._n :]
    # Only the last can be unfinished: those before it stand for bytes that are
    # no character whatever follows.
    if new.endswith(_UNFINISHED) and not event.finish_reason:
      new = new[:-1]
      self._n += len(new)
    else:
      self._ids, self._n = [], 0
    return new


def _overlap(text: str, stop: str) -> int:
  """Returns the longest n for which text ends with stop[:n], stop excluded."""
  most = min(len(text), len(stop) - 1)
  return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)

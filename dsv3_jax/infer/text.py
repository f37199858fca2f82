"""Text from the folder of a run, or of a released checkpoint.

  writer = text.load("runs/demo")
  for piece in writer.write("It is a truth", max_tokens=50):
    print(piece, end="", flush=True)
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tokenizers

from dsv3_jax import config
from dsv3_jax import schema
from dsv3_jax.data import chat
from dsv3_jax.data import tokenizer
from dsv3_jax.infer import engine as engine_lib
from dsv3_jax.infer import served
from dsv3_jax.interop import hf
from dsv3_jax.interop import hf_config
from dsv3_jax.interop import placing
from dsv3_jax.interop import runs
from dsv3_jax.interop import tokens
from dsv3_jax.model import precision
from dsv3_jax.model import transformer
from dsv3_jax.parallel import layouts
from dsv3_jax.parallel import topology

MAX_LEN = 4096
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # and recipes
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Ask:
  """A text to write."""

  prompt: Prompt  # a text, token ids, or a conversation as `chat` has them
  max_tokens: int = 256
  temperature: float = 1.0  # 0: the most likely token
  top_p: float = 1.0
  top_k: int = 0  # 0: no limit
  seed: int = 0
  stop: tuple[str, ...] = ()  # texts that end it, and do not belong to it


@dataclasses.dataclass(frozen=True)
class Piece:
  """What a token adds to a text."""

  ask: int  # which one, counted from 0
  text: str  # "": characters are not complete, or might begin a stop string
  token: int
  logprob: float
  ended: str  # "stop" or "length" with the last piece


class Writer:
  """Writes texts with an engine."""

  def __init__(self, engine: engine_lib.Engine, tok: tokenizers.Tokenizer):
    self.engine, self.tok = engine, tok

  def write(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
    """Yields a text as it is made; settings are those of `Ask`.

    Raises:
      ValueError: it cannot be served.
    """
    for piece in self.stream([Ask(prompt, **settings)]):
      if piece.text:
        yield piece.text

  def stream(self, asks: Iterable[Ask]) -> Iterator[Piece]:
    """Yields pieces of all texts, several at the same time.

    Raises:
      ValueError: one cannot be served.
    """
    first, texts = self.engine.submitted, {}

    def requests():
      for ask in asks:
        request = self.request(ask)
        texts[self.engine.submitted] = _Text(self.tok, ask.stop)
        yield request

    try:
      for event in self.engine.run(requests()):
        if (text := texts.get(event.request)) is None:
          continue  # a stop string ended it before
        new, ended = text.add(event)
        if ended:
          del texts[event.request]
          self.engine.cancel(event.request)
        number = event.request - first
        yield Piece(number, new, event.token, event.logprob, ended)
    finally:
      for number in texts:
        self.engine.cancel(number)

  def request(self, ask: Ask) -> engine_lib.Request:
    """The ask in token ids.

    Raises:
      ValueError: it cannot be served; says why, a line a problem.
    """
    if "" in ask.stop:
      raise ValueError("stop: a stop string must not be empty")
    made = engine_lib.Request(
        prompt=encode(self.tok, ask.prompt),
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        top_k=ask.top_k,
        seed=ask.seed,
        stop=(tokenizer.EOS_ID,),
    )
    if problems := self.engine.problems(made):
      raise ValueError("\n".join(problems))
    return made


def encode(tok: tokenizers.Tokenizer, prompt: Prompt) -> list[int]:
  """Token ids of a prompt; a text begins with BOS."""
  if isinstance(prompt, str):
    ids = tok.encode(prompt, add_special_tokens=False).ids
    return [tokenizer.BOS_ID, *ids]
  if prompt and isinstance(prompt[0], Mapping):
    return chat.encode(tok, prompt)
  return list(prompt)


class _Text:
  """A text that grows: what of it can be shown, and whether it has ended."""

  def __init__(self, tok: tokenizers.Tokenizer, stops: Sequence[str]):
    self._tok, self._stops = tok, stops
    self._ids: list[int] = []  # of characters that are not complete
    self._held = ""  # may begin a stop string

  def add(self, event: engine_lib.Event) -> tuple[str, str]:
    """What can be shown more, and why the text ends here, if it does."""
    if event.ended != engine_lib.STOP:
      self._ids.append(event.token)
    new = self._tok.decode(self._ids)
    if new.endswith(_UNFINISHED) and not event.ended:
      return "", ""
    self._ids, text = [], self._held + new
    found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      return text[: min(found)], engine_lib.STOP
    if event.ended:
      return text, event.ended
    shown = len(text) - max((_overlap(text, s) for s in self._stops), default=0)
    self._held = text[shown:]
    return text[:shown], ""


def _overlap(text: str, stop: str) -> int:
  """Characters at the end of a text that a stop string begins with."""
  most = min(len(text), len(stop) - 1)
  return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


# --- from a folder ---


def load(
    folder: str | pathlib.Path,
    *,
    dtype: str = "float32",
    average: bool = False,
    max_len: int | None = None,
    n_drafts: int = 0,
    **options: Any,
) -> Writer:
  """A writer with the model of a folder.

  Args:
    folder: of a run with a checkpoint or imported parameters, or of a released
      checkpoint in safetensors.
    dtype: of parameters and cache, one of DTYPES.
    average: the average of a run's parameters instead.
    max_len: of prompt and text in tokens; None: MAX_LEN, or what YaRN extends
      to if that is less.
    n_drafts: tokens that the MTP module drafts at a time.
    **options: the others of `engine.Engine`.

  Raises:
    ValueError: the folder does not hold such a model and its tokenizer, or an
      option is out of range.
    checkpoint.MissingError: the run has no checkpoint.
  """
  if dtype not in DTYPES:
    raise ValueError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")
  params, bias, cfg, tok = read(pathlib.Path(folder), average)
  if not n_drafts:
    params.pop("mtp", None)
    bias, cfg = bias[: cfg.n_moe_layers], config.override(cfg, "mtp.depth=0")
  made = _served(params, bias, cfg=cfg, recipe=DTYPES[dtype])
  del params
  if max_len is None:
    max_len = int(min(MAX_LEN, cfg.mla.yarn.max_len))
  engine = engine_lib.Engine(
      made, cfg, max_len=max_len, n_drafts=n_drafts, **options
  )
  return Writer(engine, tok)


def read(
    folder: pathlib.Path, average: bool
) -> tuple[schema.Params, jax.Array, config.Model, tokenizers.Tokenizer]:
  """Parameters and router bias in float32, the model, its tokenizer."""
  mesh = topology.mesh({})
  if is_released(folder):
    if average:
      raise ValueError(f"{folder}: a released checkpoint has no average")
    source = hf.open_folder(folder)
    tok = tokenizer.load(folder / tokens.TOKENIZER)
    run = hf_config.run(source.facts, source.model)
    layout = layouts.layout(run, mesh.shape)
    parts = placing.load(source, layout, mesh, np.float32)
  else:
    run = runs.run_of(runs.read_config(folder))
    tok = tokenizer.load(folder / "data" / tokens.TOKENIZER)
    parts = runs.newest(folder, run, mesh, average=average)
  tokenizer.check_fits(tok, run.model.vocab_size)
  return *topology.on_first_device(parts, mesh), run.model, tok


def is_released(folder: pathlib.Path) -> bool:
  """Whether a folder holds a released checkpoint, not a run."""
  return (folder / hf.INDEX).exists() or (folder / hf.SINGLE).exists()


@jax.jit(static_argnames=("cfg", "recipe"))
def _served(params, bias, *, cfg, recipe):
  how = config.Precision(recipe=recipe)
  params = precision.compute_params(params, transformer.specs(cfg), how)
  return served.params(params, bias, cfg)

"""Text from the folder of a run, or of a released checkpoint.

writer = text.load("runs/demo")
for piece in writer.write("It is a truth", max_tokens=50):
  print(piece, end="", flush=True)
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers

from dsv3_jax import config, param_spec
from dsv3_jax.data import chat, tokenizer
from dsv3_jax.errors import InputError
from dsv3_jax.infer import engine as engine_lib
from dsv3_jax.infer import inference_params, serving_mesh
from dsv3_jax.interop import (
  hf_read,
  load_sharded,
  open_run,
  tokenizer_files,
)
from dsv3_jax.linear import recipe as recipe_lib
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, layouts

MAX_LEN = 4096
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # and recipes
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"

Parameters = tuple[param_spec.Params, jax.Array]  # and router bias, in float32
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
  """A text to write."""

  prompt: Prompt  # a text, token ids, or a conversation as `chat` has them
  max_tokens: int = 256
  temperature: float = 1.0  # 0: the most likely token
  top_p: float = 1.0
  top_k: int = 0  # 0: no limit
  seed: int = 0
  stop: tuple[str, ...] = ()  # texts that end it, and do not belong to it


@dataclasses.dataclass(frozen=True)
class Chunk:
  """What a token adds to a text."""

  index: int  # which one, counted from 0
  text: str  # "": characters are not complete, or might begin a stop string
  token: int
  logprob: float
  finish_reason: str  # "stop" or "length" with the last piece


class Generator:
  """Writes texts with an engine."""

  def __init__(self, engine: engine_lib.Engine, tok: tokenizers.Tokenizer):
    self.engine, self.tok = engine, tok

  def write(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
    """Yields a text as it is made; settings are those of `GenerationRequest`.

    Raises:
      InputError: it cannot be served.
    """
    for piece in self.stream([GenerationRequest(prompt, **settings)]):
      if piece.text:
        yield piece.text

  def stream(self, asks: Iterable[GenerationRequest]) -> Iterator[Chunk]:
    """Yields pieces of all texts, several at the same time.

    Raises:
      InputError: one cannot be served.
      RuntimeError: the engine has other requests, whose events would be lost.
    """
    if self.engine.busy:
      raise RuntimeError("the engine has other requests; end them first")
    first, texts = self.engine.submitted, {}

    def requests():
      for ask in asks:
        request = self.request(ask)
        texts[self.engine.submitted] = _Text(self.tok, ask.stop)
        yield request

    try:
      for event in self.engine.run(requests()):
        if (text := texts.get(event.index)) is None:
          continue  # a stop string ended it before
        new, ended = text.add(event)
        if ended:
          del texts[event.index]
          self.engine.cancel(event.index)
        number = event.index - first
        yield Chunk(number, new, event.token, event.logprob, ended)
    finally:
      for number in texts:
        self.engine.cancel(number)

  def request(self, ask: GenerationRequest) -> engine_lib.Request:
    """The ask in token ids.

    Raises:
      InputError: it cannot be served; says why, a line a problem.
    """
    if "" in ask.stop:
      raise InputError("stop: a stop string must not be empty")
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
      raise InputError("\n".join(problems))
    return made


def encode(tok: tokenizers.Tokenizer, prompt: Prompt) -> list[int]:
  """Token ids of a prompt; a text begins with BOS.

  Raises:
    InputError: it holds what is no character, or a role that there is not.
  """
  if isinstance(prompt, str):
    try:
      prompt.encode()
    except UnicodeEncodeError as error:
      raise InputError(f"prompt: is not Unicode text: {error}") from error
    ids = tok.encode(prompt, add_special_tokens=False).ids
    return [tokenizer.BOS_ID, *ids]
  parts = list(prompt)
  if parts and isinstance(parts[0], Mapping):
    return chat.encode(tok, parts)
  return parts


class _Text:
  """A text that grows: what of it can be shown, and whether it has ended."""

  def __init__(self, tok: tokenizers.Tokenizer, stops: Sequence[str]):
    self._tok, self._stops = tok, stops
    # Tokens since characters were complete, and how many characters of them
    # have been read.
    self._ids: list[int] = []
    self._n = 0
    self._held = ""  # read, but may begin a stop string

  def add(self, event: engine_lib.Event) -> tuple[str, str]:
    """What can be shown more, and why the text ends here, if it does."""
    text = self._held + self._read(event)
    found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      return text[: min(found)], engine_lib.STOP
    if event.finish_reason:
      return text, event.finish_reason
    shown = len(text) - max((_overlap(text, s) for s in self._stops), default=0)
    self._held = text[shown:]
    return text[:shown], ""

  def _read(self, event: engine_lib.Event) -> str:
    """The characters that a token completes; EOS has none of its own."""
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
  """Characters at the end of a text that a stop string begins with."""
  most = min(len(text), len(stop) - 1)
  return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


# --- from a folder ---


@dataclasses.dataclass(frozen=True)
class EngineOptions:
  """How texts are to be written."""

  dtype: str = "float32"  # of parameters and cache, one of DTYPES
  n_slots: int = 8  # texts at the same time
  max_len: int | None = None  # None: MAX_LEN, or what YaRN extends to if less
  chunk: int = 512  # tokens of a prompt that are read together
  n_drafts: int = 0  # tokens that the MTP module drafts at a time
  deployment: serving_mesh.ServingConfig | None = None  # None: one device
  rebalance_every: int = 0  # cycles after which experts are placed anew


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """The model of a folder and its tokenizer; no parameter has been read."""

  model: config.Model
  tok: tokenizers.Tokenizer
  read: Callable[[jax.sharding.Mesh, bool], Parameters]  # with those of MTP?

  def problems(
    self, options: EngineOptions, *asks: GenerationRequest
  ) -> list[str]:
    """What is wrong with options, or with asks of their writer, a line each."""
    found = []
    if options.dtype not in DTYPES:
      known = ", ".join(DTYPES)
      found.append(f"dtype={options.dtype}: must be one of {known}")
    try:
      # Only what writes needs parameters.
      writer = Generator(self._engine({}, options), self.tok)
      for ask in asks:
        writer.request(ask)
    except InputError as error:
      found += str(error).splitlines()
    return found

  def writer(self, options: EngineOptions) -> Generator:
    """Reads the parameters.

    Raises:
      InputError: an option is out of range, or parameters cannot be read.
      manifest.MissingError: the run has no checkpoint.
    """
    if problems := self.problems(options):
      raise InputError("\n".join(problems))
    cfg, mesh = self._cfg(options), device_mesh.make_mesh({})
    params, bias = self.read(mesh, cfg.mtp.depth > 0)
    if not cfg.mtp.depth:
      params.pop("mtp", None)
    parts = params, bias[: cfg.n_routers]
    params, bias = device_mesh.on_first_device(parts, mesh)
    made = _served(params, bias, cfg=cfg, recipe=DTYPES[options.dtype])
    if options.deployment:
      unit = serving_mesh.make_serving_mesh(options.deployment, cfg)
      made = serving_mesh.shard_params(
        made, serving_mesh.uniform_placement(unit, cfg), unit, cfg
      )
    return Generator(self._engine(made, options), self.tok)

  def _cfg(self, options: EngineOptions) -> config.Model:
    """The model as it is served: with MTP modules only if they draft."""
    if options.n_drafts:
      return self.model
    return config.override(self.model, "mtp.depth=0")

  def _engine(
    self, params: inference_params.InferenceParams, options: EngineOptions
  ) -> engine_lib.Engine:
    cfg, max_len, unit = self._cfg(options), options.max_len, None
    if max_len is None:
      max_len = int(min(MAX_LEN, cfg.mla.yarn.max_len))
    if options.deployment:
      unit = serving_mesh.make_serving_mesh(options.deployment, cfg)
    return engine_lib.Engine(
      params,
      cfg,
      n_slots=options.n_slots,
      max_len=max_len,
      chunk=options.chunk,
      n_drafts=options.n_drafts,
      unit=unit,
      placed=unit and serving_mesh.uniform_placement(unit, cfg),
      rebalance_every=options.rebalance_every,
    )


def open_model(
  folder: str | pathlib.Path,
  *,
  average: bool = False,
  ignore_auto_map: bool = False,
  follow_links: bool = False,
) -> LoadedModel:
  """Looks at a folder.

  Args:
    folder: of a run with a checkpoint or imported parameters, or of a released
      checkpoint in safetensors.
    average: the average of a run's parameters instead.
    ignore_auto_map, follow_links: of a released checkpoint, as in
      `hf.open_folder`.

  Raises:
    InputError: it does not hold a model and its tokenizer.
  """
  folder = pathlib.Path(folder)
  if is_released(folder):
    if average:
      raise InputError(f"{folder}: a released checkpoint has no average")
    source = hf_read.open_folder(
      folder, ignore_auto_map=ignore_auto_map, follow_links=follow_links
    )
    path, model = folder / tokenizer_files.TOKENIZER, source.model
    read = functools.partial(_read_released, source)
  else:
    run = open_run.run_from_config(open_run.read_config(folder))
    path, model = folder / "data" / tokenizer_files.TOKENIZER, run.model
    read = lambda mesh, _: open_run.load_newest_params(
      folder, run, mesh, average=average
    )
  tok = tokenizer.load(path)
  tokenizer.check_fits(tok, model.vocab_size)
  return LoadedModel(model, tok, read)


def load(
  folder: str | pathlib.Path, *, average: bool = False, **options: Any
) -> Generator:
  """A writer with the model of a folder; options are those of `EngineOptions`.

  Raises:
    InputError: the folder does not hold such a model and its tokenizer, or an
      option is out of range.
    manifest.MissingError: the run has no checkpoint.
  """
  return open_model(folder, average=average).writer(EngineOptions(**options))


def is_released(folder: pathlib.Path) -> bool:
  """Whether a folder holds a released checkpoint, not a run."""
  return (folder / hf_read.INDEX).exists() or (folder / hf_read.SINGLE).exists()


def _read_released(
  source: hf_read.ReleasedCheckpoint, mesh: jax.sharding.Mesh, drafting: bool
) -> Parameters:
  source = source if drafting else source.without_mtp()
  run = source.make_run()
  layout = layouts.make_layout(run, mesh.shape)
  return load_sharded.load(source, layout, mesh, np.float32)


@jax.jit(static_argnames=("cfg", "recipe"))
def _served(params, bias, *, cfg, recipe):
  how = config.Precision(recipe=recipe)
  params = recipe_lib.compute_params(params, transformer.specs(cfg), how)
  return inference_params.from_params(params, bias, cfg)

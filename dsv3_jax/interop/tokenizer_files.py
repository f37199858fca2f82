"""Reads, copies and writes the files beside the weights: tokenizer, generation.

A folder says how its model is talked to and drawn from: the chat template, the
tokens that end a text, and settings. What it says is obeyed, or named.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import processors

from dsv3_jax import io
from dsv3_jax.data import chat, tokenizer
from dsv3_jax.errors import InputError

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
TOKEN_IDS = {
  "bos_token_id": tokenizer.BOS_ID,
  "eos_token_id": tokenizer.EOS_ID,
  "pad_token_id": tokenizer.PAD_ID,
}
# Files of a checkpoint that are copied unchanged.
FILES = (
  TOKENIZER,
  TOKENIZER_CONFIG,
  GENERATION,
  "special_tokens_map.json",
  TEMPLATE,
)
# Settings of a request by the keys of generation_config.json that they obey.
_SETTINGS = {
  "max_new_tokens": ("max_tokens", int),
  "temperature": ("temperature", float),
  "top_p": ("top_p", float),
  "top_k": ("top_k", int),
}
# Keys of generation_config.json that change nothing with this value, or with
# any: None.
_NEUTRAL = {
  "_from_model_config": None,
  "transformers_version": None,
  "pad_token_id": None,
  "use_cache": None,
  "output_attentions": None,
  "output_hidden_states": None,
  "output_scores": None,
  "return_dict_in_generate": None,
  "bos_token_id": tokenizer.BOS_ID,
  "repetition_penalty": 1,
  "num_beams": 1,
  "num_return_sequences": 1,
  "min_p": 0,
  "typical_p": 1,
}


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
  """Template, end and settings of texts, as a folder states them."""

  template: chat.ChatTemplate | None = chat.V3  # None: has none
  stop_token_ids: tuple[int, ...] = (tokenizer.EOS_ID,)
  # Settings of requests that do not state them.
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()  # what is not obeyed
  add_bos: bool = True  # to texts; a template says so itself


DEFAULTS = GenerationDefaults()  # of a run


def read_defaults(
  folder: pathlib.Path, config_json: Mapping[str, Any]
) -> GenerationDefaults:
  """Reads what a released folder says about generation.

  Raises:
    InputError: a file is not what its name says.
  """
  path = folder / GENERATION
  given = io.read_json_object(path) if path.exists() else {}
  given = {key: value for key, value in given.items() if value is not None}
  stops = given.pop("eos_token_id", config_json.get("eos_token_id"))
  stops = tokenizer.EOS_ID if stops is None else stops
  stops = stops if isinstance(stops, list) else [stops]
  if any(type(i) is not int for i in stops):
    raise InputError(f"{path}: eos_token_id={stops}: must be token ids")
  settings = {}
  for key in given.keys() & _SETTINGS.keys():
    (name, kind), value = _SETTINGS[key], given.pop(key)
    if type(value) not in (int, kind):
      raise InputError(f"{path}: {key}={value!r}: must be a number")
    settings[name] = kind(value)
  if not given.pop("do_sample", True):
    settings["temperature"] = 0.0
  notes = tuple(
    f"{path}: {key}={value!r} is not done here"
    for key, value in given.items()
    if key not in _NEUTRAL or _NEUTRAL[key] not in (None, value)
  )
  return GenerationDefaults(
    read_template(folder), tuple(stops), settings, notes, _read_add_bos(folder)
  )


def _read_add_bos(folder: pathlib.Path) -> bool:
  """Reads whether texts begin with BOS; they do where nothing is said."""
  path, key = folder / TOKENIZER_CONFIG, "add_bos_token"
  given = io.read_json_object(path).get(key) if path.exists() else None
  if given is not None and type(given) is not bool:
    raise InputError(f"{path}: {key}={given!r}: must be true or false")
  return given is not False


def read_template(folder: pathlib.Path) -> chat.ChatTemplate | None:
  """Reads the chat template of a released folder, and its special tokens.

  Raises:
    InputError: a file is not what its name says.
  """
  about = {}
  for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
    if (folder / name).exists():
      about |= io.read_json_object(folder / name)
  tokens = dict(chat.V3.tokens)
  for key, token in about.items():
    if isinstance(token, dict):  # with how it is matched
      token = token.get("content")
    if key.endswith("_token") and isinstance(token, str):
      tokens[key] = token
  source = about.get("chat_template")
  if (path := folder / TEMPLATE).exists():
    try:
      source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f"{path}: cannot be read: {error}") from error
  elif isinstance(source, list):  # several, by name
    named = {t.get("name"): t for t in source if isinstance(t, dict)}
    source = named.get("default", {}).get("template")
  if source is None:
    return None
  if not isinstance(source, str):
    raise InputError(
      f"{folder / TOKENIZER_CONFIG}: chat_template: must be text"
    )
  return chat.ChatTemplate(source, tuple(tokens.items()))


def copy_files(
  source: pathlib.Path, target: pathlib.Path, names: Iterable[str] = FILES
) -> None:
  """Copies the files that exist, each atomically."""
  for name in names:
    if (source / name).is_file():
      with io.atomic_write(target / name, "wb") as file:
        file.write((source / name).read_bytes())


def write_files(
  tok: tokenizers.Tokenizer, folder: pathlib.Path, max_len: int
) -> None:
  """Writes the tokenizer, its chat template and generation settings.

  `max_len` is the longest context of the model in tokens.
  """
  with_bos = tokenizers.Tokenizer.from_str(tok.to_str())
  # The model was trained on texts that begin with BOS.
  with_bos.post_processor = processors.TemplateProcessing(
    single=f"{tokenizer.BOS} $A",
    pair=f"{tokenizer.BOS} $A {tokenizer.BOS} $B",
    special_tokens=[(tokenizer.BOS, tokenizer.BOS_ID)],
  )
  io.write_text(folder / TOKENIZER, with_bos.to_str(pretty=True))
  tokenizer_config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": tokenizer.BOS,
    "eos_token": tokenizer.EOS,
    "pad_token": tokenizer.PAD,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": max_len,
    "chat_template": chat.TEMPLATE,
  }
  text = json.dumps(tokenizer_config, indent=2, ensure_ascii=False)
  io.write_text(folder / "tokenizer_config.json", text + "\n")
  io.write_json(folder / "generation_config.json", TOKEN_IDS)

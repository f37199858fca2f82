"""Copies and writes the tokenizer files that serving software reads."""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import processors

from dsv3_jax import io
from dsv3_jax.data import chat, tokenizer

TOKENIZER = "tokenizer.json"
TOKEN_IDS = {
  "bos_token_id": tokenizer.BOS_ID,
  "eos_token_id": tokenizer.EOS_ID,
  "pad_token_id": tokenizer.PAD_ID,
}
# Files of a checkpoint that are copied unchanged.
FILES = (
  TOKENIZER,
  "tokenizer_config.json",
  "generation_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
)


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

"""Tokenizer files beside a checkpoint, for software that serves it."""

import json
import pathlib
import shutil

import tokenizers
from tokenizers import processors

from dsv3_jax.data import chat, tokenizer
from dsv3_jax.interop import resumable

TOKENIZER = "tokenizer.json"
# What a checkpoint may have beside its tensors; taken over as it is.
FILES = (
  TOKENIZER,
  "tokenizer_config.json",
  "generation_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
)


def copy(source: pathlib.Path, target: pathlib.Path) -> list[str]:
  """Copies those of FILES that there are; returns their names."""
  found = [name for name in FILES if (source / name).is_file()]
  for name in found:
    partial = target / f".{name}.partial"
    shutil.copyfile(source / name, partial)
    partial.replace(target / name)
  return found


def write(
  tok: tokenizers.Tokenizer, folder: pathlib.Path, max_len: int
) -> None:
  """Writes tokenizer, chat template and how text is to be generated.

  Args:
    tok: of the model.
    folder: where to.
    max_len: tokens that the model reads.
  """
  own = tokenizers.Tokenizer.from_str(tok.to_str())
  # Who encodes for this model begins with BOS, as it was trained.
  own.post_processor = processors.TemplateProcessing(
    single=f"{tokenizer.BOS} $A",
    pair=f"{tokenizer.BOS} $A {tokenizer.BOS} $B",
    special_tokens=[(tokenizer.BOS, tokenizer.BOS_ID)],
  )
  resumable.write_text(folder / TOKENIZER, own.to_str(pretty=True))
  about = {
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
  generation = {
    "bos_token_id": tokenizer.BOS_ID,
    "eos_token_id": tokenizer.EOS_ID,
    "pad_token_id": tokenizer.PAD_ID,
  }
  for name, facts in (
    ("tokenizer_config.json", about),
    ("generation_config.json", generation),
  ):
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    resumable.write_text(folder / name, text + "\n")

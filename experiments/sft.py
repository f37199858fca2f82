r"""Supervised fine-tuning on conversations (arXiv:2412.19437, section 5.1).

  python -m experiments.sft --init_from=runs/demo --workdir=runs/sft \
      --data=conversations.jsonl
  python -m experiments.sft --init_from=runs/demo --workdir=runs/sft \
      --data=chain_sum:max_terms=2:max_digits=2,number_sorting

The model is that of --init_from. --data is a file of conversations, a line each

  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}
  {"prompt": ..., "response": ...}

or a folder with train.jsonl and heldout.jsonl, or names of tasks of the package
reasoning-gym. Only answers and their end tokens are trained on. A row holds
several samples, which do not see each other.

With --reward_model, the model gets a scalar head and learns which of two
answers is better (section 5.2.1), from lines of

  {"prompt": ..., "chosen": ..., "rejected": ...}

The variant sets optimizer and schedule, not the model: sft is the report's, 2
epochs with the learning rate on a cosine from 5e-6 to 1e-6.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.data import chat, conversation_corpus, tokenized_corpus
from dsv3_jax.errors import InputError
from dsv3_jax.interop import open_run
from dsv3_jax.trainer import run_args, trainer
from experiments import cli

_DATA = flags.DEFINE_string(
  "data", "", "file or folder of conversations, or tasks with settings"
)
_TEMPLATE = flags.DEFINE_string(
  "template", "plain", f"chat template, of {', '.join(chat.TEMPLATES)}"
)
_EPOCHS = flags.DEFINE_float(
  "epochs", None, "passes over the conversations; default: the variant's"
)


_REWARD_MODEL = flags.DEFINE_bool(
  "reward_model", False, "learn to score answers, from pairs of them"
)


def configure(
  variant: str, run: config.Run, settings: Sequence[str]
) -> config.Run:
  """Returns the run of the flags: the model of --init_from, its token budget.

  Raises:
    InputError: a flag is missing or wrong, the source is no run, or the
      conversations cannot be read or encoded.
  """
  source = flags.FLAGS.init_from
  problems = [
    *["--init_from is missing: the run to fine-tune"] * (not source),
    *["--data is missing: conversations, or tasks"] * (not _DATA.value),
  ]
  if _EPOCHS.value is not None and not _EPOCHS.value > 0:
    problems.append(f"--epochs={_EPOCHS.value:g}: must be above 0")
  if _TEMPLATE.value not in chat.TEMPLATES:
    names = ", ".join(chat.TEMPLATES)
    problems.append(f"--template={_TEMPLATE.value}: must be one of {names}")
  if problems:
    raise InputError("\n".join(problems))
  base = open_run.run_from_config(open_run.read_config(pathlib.Path(source)))
  source_name = config.TASKS
  if _REWARD_MODEL.value:
    source_name = config.PREFERENCES
  elif os.path.exists(_DATA.value):  # False for a text too long for a name
    source_name = config.CONVERSATIONS
  run = config.override(
    base,
    *presets.SFT[variant],
    f"model.reward_head={_REWARD_MODEL.value}",
    f"data.source={source_name}",
    f"data.path={_DATA.value}",
    f"data.template={_TEMPLATE.value}",
  )
  run = cli.override(run, settings)
  if any(one.startswith("train.tokens=") for one in settings):
    return run
  epochs = _EPOCHS.value or presets.SFT_EPOCHS[variant]
  tokenizer_file = pathlib.Path(source, "data", tokenized_corpus.TOKENIZER)
  n_rows = conversation_corpus.n_rows(run.data, tokenizer_file)
  steps = max(round(epochs * n_rows / run.train.batch_size), 1)
  tokens = steps * run.train.batch_size * run.data.seq_len
  return config.override(run, f"train.tokens={tokens}")


def execute(command: run_args.RunArgs) -> None:
  """Fine-tunes the model."""
  if command.workdir is None:
    raise InputError("--workdir is missing: the folder that the run writes to")
  cli.start_jax(command)
  trainer.fit(command)


def main() -> None:
  """Runs the program from the command line."""
  variants = {
    name: config.override(presets.TINY, *settings)
    for name, settings in presets.SFT.items()
  }
  cli.main(variants, execute, configure)


if __name__ == "__main__":
  main()

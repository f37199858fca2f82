"""Text from a run's newest checkpoint, or from a released one.

  python -m experiments.sample --workdir=runs/demo --prompt="It is a truth"
  python -m experiments.sample --workdir=runs/demo \
      --prompts=prompts.jsonl --out=texts.jsonl

With --prompts, many texts at the same time: see `experiments/batch.py`.
"""

import pathlib
import sys
import time
from typing import Any

from absl import flags

from dsv3_jax.infer import text
from experiments import batch
from experiments import common

_PROMPT = flags.DEFINE_string("prompt", "", "what the text starts with")
_PROMPTS = flags.DEFINE_string("prompts", None, "a JSON Lines file of prompts")
_OUT = flags.DEFINE_string(
    "out",
    None,
    "where their texts go, in JSON Lines",
    allow_override=True,  # `scripts.convert` has it too
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "tokens to write")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "nucleus of the distribution")
_TOP_K = flags.DEFINE_integer("top_k", 0, "most likely tokens; 0: all")
_STOP = flags.DEFINE_multi_string("stop", [], "a string that ends the text")
_SPECULATIVE = flags.DEFINE_bool(
    "speculative", False, "draft tokens with the MTP module"
)
_DRAFTS = flags.DEFINE_integer("drafts", 1, "how many at a time")
_SLOTS = flags.DEFINE_integer("slots", 8, "texts at the same time")
_MAX_LEN = flags.DEFINE_integer(
    "max_len", None, f"tokens of prompt and text; default: {text.MAX_LEN}"
)
_CHUNK = flags.DEFINE_integer("chunk", 512, "tokens of a prompt read at once")
_COMPUTE = flags.DEFINE_string("compute", "float32", "or bfloat16")
_EMA = flags.DEFINE_bool("ema", False, "the averaged parameters")

# Options of the engine, and their flags.
_FLAGS = {
    "n_slots": "slots",
    "n_drafts": "drafts",
    "max_len": "max_len",
    "chunk": "chunk",
    "dtype": "compute",
}


def _settings() -> dict[str, Any]:
  """Of a text, where its prompt does not say otherwise."""
  return {
      "max_tokens": _MAX_TOKENS.value,
      "temperature": _TEMPERATURE.value,
      "top_p": _TOP_P.value,
      "top_k": _TOP_K.value,
      "seed": flags.FLAGS.seed,
      "stop": tuple(_STOP.value),
  }


def _problems() -> list[str]:
  args, problems = flags.FLAGS, []
  if not args.workdir:
    problems.append("--workdir is missing: the folder of a training run")
  if bool(_PROMPTS.value) != bool(_OUT.value):
    problems.append("--prompts and --out: one needs the other")
  if _PROMPTS.value and _PROMPT.value:
    problems.append("--prompt and --prompts: give one of them")
  if _SPECULATIVE.value and _DRAFTS.value < 1:
    problems.append(f"--drafts={_DRAFTS.value}: must be at least 1")
  found = batch.problems(_settings())
  return problems + [f"--{line}" for line in found]


def _load() -> text.Writer:
  try:
    return text.load(
        pathlib.Path(flags.FLAGS.workdir),
        dtype=_COMPUTE.value,
        average=_EMA.value,
        n_drafts=_DRAFTS.value if _SPECULATIVE.value else 0,
        n_slots=_SLOTS.value if _PROMPTS.value else 1,
        max_len=_MAX_LEN.value,
        chunk=_CHUNK.value,
    )
  except ValueError as error:
    raise type(error)(_as_flags(str(error))) from error


def _as_flags(message: str) -> str:
  """What the engine calls its options, as the flags are called."""
  for name, flag in _FLAGS.items():
    message = message.replace(f"{name}=", f"--{flag}=")
  return message


def _show(writer: text.Writer) -> None:
  """Prints the prompt and what follows it, piece by piece."""
  start = time.perf_counter()
  print(_PROMPT.value, end="", flush=True)
  for piece in writer.write(_PROMPT.value, **_settings()):
    print(piece, end="", flush=True)
  print()
  if _SPECULATIVE.value:
    _tell(writer, time.perf_counter() - start)


def _tell(writer: text.Writer, seconds: float) -> None:
  stats = writer.engine.stats
  print(
      f"{stats.tokens} tokens in {seconds:.1f} s, compiling included; of"
      f" {stats.drafts} drafts {stats.acceptance:.0%} accepted:"
      f" {stats.calls_per_token:.2f} passes of the main model a token",
      file=sys.stderr,
  )


def sample() -> None:
  """Writes the texts that the flags ask for."""
  if problems := common.parse_flags(sys.argv) or _problems():
    raise ValueError("\n".join(problems))
  writer = _load()
  if not _PROMPTS.value:
    _show(writer)
    return
  batch.write(
      writer,
      pathlib.Path(_PROMPTS.value),
      pathlib.Path(_OUT.value),
      _settings(),
  )


if __name__ == "__main__":
  common.run_main(sample)

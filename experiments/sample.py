"""Text from a run's newest checkpoint.

  python -m experiments.sample --workdir=runs/demo --prompt="It is a truth"
"""

import pathlib
import sys

import jax
from absl import flags

from dsv3_jax import presets
from dsv3_jax.data import tokenizer
from dsv3_jax.infer import decoding
from dsv3_jax.parallel import topology
from experiments import common
from experiments import parameters
from experiments import workdir

_PROMPT = flags.DEFINE_string("prompt", "", "what the text starts with")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "tokens to write")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy")
_EMA = flags.DEFINE_bool("ema", False, "the averaged parameters")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "nucleus of the distribution")


def _problems() -> list[str]:
  args, problems = flags.FLAGS, []
  if not args.workdir:
    problems.append("--workdir is missing: the folder of a training run")
  if _MAX_TOKENS.value < 1:
    problems.append(f"--max_tokens={_MAX_TOKENS.value}: must be at least 1")
  if not 0 <= _TEMPERATURE.value < float("inf"):
    problems.append(f"--temperature={_TEMPERATURE.value}: must be at least 0")
  if not 0 < _TOP_P.value <= 1:
    problems.append(
        f"--top_p={_TOP_P.value}: must be above 0 and at most 1"
    )
  return problems


def sample() -> None:
  """Prints the prompt and what follows it, piece by piece."""
  if problems := common.parse_flags(sys.argv) or _problems():
    raise ValueError("\n".join(problems))
  folder = pathlib.Path(flags.FLAGS.workdir)
  facts = workdir.read_config(folder)
  run = workdir.run_of(facts, presets.PRESETS)
  tok = tokenizer.load(folder / "data" / "tokenizer.json")
  mesh = topology.mesh({})
  parts = parameters.newest(folder, run, mesh, average=_EMA.value)
  params, bias = topology.on_first_device(parts, mesh)
  prompt = tok.encode(_PROMPT.value, add_special_tokens=False).ids
  made = decoding.generate(
      params,
      bias,
      [tokenizer.BOS_ID, *prompt],
      _MAX_TOKENS.value,
      jax.random.key(flags.FLAGS.seed),
      run.model,
      temperature=_TEMPERATURE.value,
      top_p=_TOP_P.value,
      stop=tokenizer.EOS_ID,
  )
  ids, shown = [], ""
  print(_PROMPT.value, end="", flush=True)
  for token in made:
    ids.append(token)
    text = tok.decode(ids)
    # A character whose bytes are not all there yet decodes to a placeholder.
    if not text.endswith("\N{REPLACEMENT CHARACTER}"):
      print(text[len(shown) :], end="", flush=True)
      shown = text
  print()


if __name__ == "__main__":
  common.run_main(sample)

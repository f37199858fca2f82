"""Text from a run's newest checkpoint, or from a released one.

  python -m experiments.sample --workdir=runs/demo --prompt="It is a truth"
  python -m experiments.sample --workdir=runs/demo \
      --prompts=prompts.jsonl --out=texts.jsonl

With --prompts, many texts at a time: see `experiments/batch_generate.py`.
"""

import math
import pathlib
import sys
import time
from typing import Any

from absl import flags

from dsv3_jax.errors import InputError
from dsv3_jax.infer import engine, generate, serving_mesh
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import distributed
from experiments import batch_generate, cli

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
  "max_len", None, f"tokens of prompt and text; default: {generate.MAX_LEN}"
)
_CHUNK = flags.DEFINE_integer("chunk", 512, "tokens of a prompt read at once")
_COMPUTE = flags.DEFINE_string("compute", "float32", "or bfloat16")
_EMA = flags.DEFINE_bool("ema", False, "the averaged parameters")
_UNIT = flags.DEFINE_string(
  "unit", "decode", "with --mesh, how it divides the model, or prefill"
)
_REDUNDANT = flags.DEFINE_integer(
  "redundant", None, "more slots than experts; default: as many as must be"
)
_REBALANCE = flags.DEFINE_integer(
  "rebalance", 0, "cycles after which experts are placed anew; 0: never"
)
# Of a released checkpoint, as for `scripts.convert`.
_AUTO_MAP = flags.DEFINE_bool(
  "ignore_auto_map",
  False,
  "accept a config.json that names code, which is not run",
  allow_override=True,
)
_LINKS = flags.DEFINE_bool(
  "follow_links", False, "shards may be links", allow_override=True
)

# Those of all experiments that mean something here.
_SHARED = ("workdir", "seed", "mesh")
# Options of `text.Options` that are flags by another name.
_FLAGS = {
  "n_slots": "slots",
  "n_drafts": "drafts",
  "dtype": "compute",
  "role": "unit",
  "redundant_experts": "redundant",
  "rebalance_every": "rebalance",
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


def _ask() -> generate.GenerationRequest:
  return generate.GenerationRequest(_PROMPT.value, **_settings())


def _mesh() -> dict[str, int]:
  return cli.parse_mesh(flags.FLAGS.mesh)[0]


def _options() -> generate.EngineOptions:
  deployment, n_slots = None, _SLOTS.value
  if mesh := _mesh():
    deployment = serving_mesh.ServingConfig(mesh, _UNIT.value, _REDUNDANT.value)
  if not _PROMPTS.value and n_slots > 0:
    n_slots = device_mesh.axis_size(mesh, device_mesh.BATCH)
  return generate.EngineOptions(
    dtype=_COMPUTE.value,
    n_slots=n_slots,
    max_len=_MAX_LEN.value,
    chunk=_CHUNK.value,
    n_drafts=max(_DRAFTS.value, 0) if _SPECULATIVE.value else 0,
    deployment=deployment,
    rebalance_every=_REBALANCE.value,
  )


def _problems() -> list[str]:
  """What is wrong with the flags, whatever the model."""
  problems = [
    f"--{flag.name}: means nothing here"
    for flag in flags.FLAGS.get_flags_for_module(cli.__name__)
    if flag.present and flag.name not in _SHARED
  ]
  problems += cli.parse_mesh(flags.FLAGS.mesh)[1]
  problems += [
    f"--{flag.name}: means nothing without --mesh"
    for flag in (flags.FLAGS[h.name] for h in (_UNIT, _REDUNDANT, _REBALANCE))
    if flag.present and not flags.FLAGS.mesh
  ]
  if not flags.FLAGS.workdir:
    problems.append("--workdir is missing: the folder of a training run")
  if bool(_PROMPTS.value) != bool(_OUT.value):
    problems.append("--prompts and --out: one needs the other")
  elif _OUT.value:
    problems += batch_generate.file_problems(*_files())
  if _PROMPTS.value and _PROMPT.value:
    problems.append("--prompt and --prompts: give one of them")
  if _DRAFTS.value < 1:
    problems.append(f"--drafts={_DRAFTS.value}: must be at least 1")
  return problems + list(map(_of_flag, batch_generate.problems(_settings())))


def _of_flag(problem: str) -> str:
  """A problem of `name=value`, with the name that the flag has."""
  name, equals, rest = problem.partition("=")
  return f"--{_FLAGS.get(name, name)}{equals}{rest}"


def _found(problems: list[str]) -> generate.LoadedModel:
  """The model that the flags ask for.

  Args:
    problems: that there are already; all are told together.
  """
  found, problems = None, [*problems]
  if folder := flags.FLAGS.workdir:
    try:
      found = generate.open_model(
        folder,
        average=_EMA.value,
        ignore_auto_map=_AUTO_MAP.value,
        follow_links=_LINKS.value,
      )
      # Bad settings have been told already.
      asks = [] if problems or _PROMPTS.value else [_ask()]
      problems += map(_of_flag, found.problems(_options(), *asks))
    except InputError as error:
      problems += str(error).splitlines()
  if problems:
    raise InputError("\n".join(problems))
  return found


def _files() -> tuple[pathlib.Path, pathlib.Path]:
  return pathlib.Path(_PROMPTS.value), pathlib.Path(_OUT.value)


def _show(writer: generate.Generator) -> None:
  """Prints the prompt and what follows it, piece by piece."""
  start, n = time.perf_counter(), 0
  print(_PROMPT.value, end="", flush=True)
  for piece in writer.stream([_ask()]):
    print(piece.text, end="", flush=True)
    n += 1
  print()
  if _SPECULATIVE.value:
    print(
      f"{n} tokens in {time.perf_counter() - start:.1f} s, compiling"
      f" included; {batch_generate.drafted(writer.engine.stats)}",
      file=sys.stderr,
    )


def sample() -> None:
  """Writes the texts that the flags ask for."""
  problems = cli.parse_flags(sys.argv)
  if not flags.FLAGS.is_parsed():  # a value of the wrong type
    raise InputError("\n".join(problems))
  problems += _problems()
  if (n := math.prod(_mesh().values())) > 1:
    distributed.use_virtual_devices(n, spare_threads=True)
  writer = _found(problems).writer(_options())
  if _PROMPTS.value:
    batch_generate.write(writer, *_files(), _settings())
  else:
    _show(writer)
  if _mesh():
    _tell_balance(writer.engine)


def _tell_balance(made: engine.Engine) -> None:
  """How even the load of the devices was, each time that experts moved."""
  found = [*made.stats.imbalance, made.imbalance().mean()]
  print(
    "largest over mean load of the devices, mean over layers: "
    + ", ".join(f"{value:.2f}" for value in found),
    file=sys.stderr,
  )


if __name__ == "__main__":
  cli.run_main(sample)

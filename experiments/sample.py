"""Generates text with a run's newest checkpoint, or with a released one.

  python -m experiments.sample --workdir=runs/demo --prompt="It is a truth"
  python -m experiments.sample --workdir=runs/demo \
      --prompts=prompts.jsonl --out=texts.jsonl

With --prompts, many texts at a time: see `experiments/batch_generate.py`.
"""

import dataclasses
import math
import pathlib
import sys
import time

from absl import flags

from dsv3_jax.errors import InputError
from dsv3_jax.infer import engine, engine_options, generate, load, serving_mesh
from dsv3_jax.infer import request as request_lib
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import distributed
from experiments import batch_generate, cli

_PROMPT = flags.DEFINE_string("prompt", "", "the text to continue")
_PROMPTS = flags.DEFINE_string("prompts", None, "a JSON Lines file of prompts")
_OUT = flags.DEFINE_string(
  "out",
  None,
  "JSON Lines file for the generated texts",
)
_DEFAULTS = GenerationRequest("", max_tokens=200, temperature=0.8, top_p=0.95)
_SPECULATIVE = flags.DEFINE_bool(
  "speculative", False, "draft tokens with the MTP module"
)
_DRAFTS = flags.DEFINE_integer("drafts", 1, "drafted tokens in a step")
_MAX_BATCH = flags.DEFINE_integer("max_batch", 8, "texts at the same time")
_MAX_LEN = flags.DEFINE_integer(
  "max_len",
  None,
  f"tokens of prompt and text; default: {engine_options.DEFAULT_MAX_LEN}",
)
_CHUNK = flags.DEFINE_integer("chunk", 512, "tokens of a prompt read at once")
_DTYPE = flags.DEFINE_string(
  "dtype", "float32", "of parameters and cache: float32 or bfloat16"
)
_EMA = flags.DEFINE_bool("ema", False, "use the averaged parameters")
_ROLE = flags.DEFINE_string(
  "role", "decode", "with --mesh: decode or prefill, how to divide the model"
)
_REDUNDANT = flags.DEFINE_integer(
  "redundant_experts",
  None,
  "redundant expert replicas; default: fewest that divide evenly",
)
_REBALANCE = flags.DEFINE_integer(
  "rebalance_every", 0, "decode steps between moves of experts; 0: never"
)
# Of a released checkpoint.
_AUTO_MAP = flags.DEFINE_bool(
  "ignore_auto_map",
  False,
  "accept a config.json that names code, which is not run",
)
_LINKS = flags.DEFINE_bool("follow_links", False, "shards may be links")

# Flags of all experiments that this one reads.
_SHARED = ("workdir", "seed", "mesh")
# Flags of engine options whose field has another name.
_FLAGS = {"n_drafts": "drafts"}
# Old name -> new name of flags; old names are read for one release.
_RENAMED = {
  "compute": "dtype",
  "slots": "max_batch",
  "unit": "role",
  "redundant": "redundant_experts",
  "rebalance": "rebalance_every",
}


def _define_settings() -> None:
  """Defines a flag for each setting of a request; `seed` is a shared one."""
  define = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    tuple[str, ...]: flags.DEFINE_multi_string,
  }
  for name, field in request_lib.SETTINGS.items():
    if name not in _SHARED:
      default = getattr(_DEFAULTS, name)
      define[field.type](name, default, field.metadata["help"])


_define_settings()


def _request() -> GenerationRequest:
  """Returns the request that the flags describe."""
  settings = {name: flags.FLAGS[name].value for name in request_lib.SETTINGS}
  settings["stop"] = tuple(settings["stop"])
  return dataclasses.replace(_DEFAULTS, prompt=_PROMPT.value, **settings)


def _mesh() -> dict[str, int]:
  return cli.parse_mesh(flags.FLAGS.mesh)[0]


def _options() -> engine_options.EngineOptions:
  serving, max_batch = None, _MAX_BATCH.value
  if mesh := _mesh():
    serving = serving_mesh.ServingConfig(mesh, _ROLE.value, _REDUNDANT.value)
  if not _PROMPTS.value and max_batch > 0:
    max_batch = device_mesh.axis_size(mesh, device_mesh.BATCH)
  return engine_options.EngineOptions(
    dtype=_DTYPE.value,
    max_batch=max_batch,
    max_len=_MAX_LEN.value,
    chunk=_CHUNK.value,
    n_drafts=max(_DRAFTS.value, 0) if _SPECULATIVE.value else 0,
    serving=serving,
    rebalance_every=_REBALANCE.value,
  )


def _validate() -> list[str]:
  """Lists what is wrong with the flags, whatever the model."""
  problems = [
    f"--{flag.name}: is not used by experiments.sample"
    for flag in flags.FLAGS.get_flags_for_module(cli.__name__)
    if flag.present and flag.name not in _SHARED
  ]
  problems += cli.parse_mesh(flags.FLAGS.mesh)[1]
  problems += [
    f"--{flag.name}: is not used without --mesh"
    for flag in (flags.FLAGS[h.name] for h in (_ROLE, _REDUNDANT, _REBALANCE))
    if flag.present and not flags.FLAGS.mesh
  ]
  if not flags.FLAGS.workdir:
    problems.append("--workdir is missing: the folder of a training run")
  if bool(_PROMPTS.value) != bool(_OUT.value):
    problems.append("--prompts and --out: one needs the other")
  elif _OUT.value:
    problems += batch_generate.validate_files(*_files())
  if _PROMPTS.value and _PROMPT.value:
    problems.append("--prompt and --prompts: give one of them")
  if _DRAFTS.value < 1:
    problems.append(f"--drafts={_DRAFTS.value}: must be at least 1")
  return problems + list(map(_of_flag, _request().validate()))


def _of_flag(problem: str) -> str:
  """Renames a problem of a field, `name=value`, to that of its flag."""
  name, equals, rest = problem.partition("=")
  return f"--{_FLAGS.get(name, name)}{equals}{rest}"


def _open_model(problems: list[str]) -> load.LoadedModel:
  """Opens the model that the flags name.

  Args:
    problems: of the flags; they are reported together with those of the model.
  """
  model, problems = None, [*problems]
  if folder := flags.FLAGS.workdir:
    try:
      model = load.open_model(
        folder,
        average=_EMA.value,
        ignore_auto_map=_AUTO_MAP.value,
        follow_links=_LINKS.value,
      )
      # Settings that are out of range are among the problems already.
      requests = [] if problems or _PROMPTS.value else [_request()]
      problems += map(_of_flag, model.validate(_options(), *requests))
    except InputError as error:
      problems += str(error).splitlines()
  if problems:
    raise InputError("\n".join(problems))
  return model


def _files() -> tuple[pathlib.Path, pathlib.Path]:
  return pathlib.Path(_PROMPTS.value), pathlib.Path(_OUT.value)


def _print_text(generator: generate.Generator) -> None:
  """Prints the prompt, and the text as it is generated."""
  start, n = time.perf_counter(), 0
  print(_PROMPT.value, end="", flush=True)
  for chunk in generator.stream([_request()]):
    print(chunk.text, end="", flush=True)
    n += 1
  print()
  if _SPECULATIVE.value:
    acceptance = batch_generate.describe_drafts(generator.engine.stats)
    print(
      f"{n} tokens in {time.perf_counter() - start:.1f} s, compiling"
      f" included; {acceptance}",
      file=sys.stderr,
    )


def _print_balance(made: engine.Engine) -> None:
  """Prints the load imbalance of the devices, before each rebalancing."""
  values = [*made.stats.imbalance, made.balancer.imbalance().mean()]
  print(
    "largest over mean load of the devices, mean over layers: "
    + ", ".join(f"{value:.2f}" for value in values),
    file=sys.stderr,
  )


def sample() -> None:
  """Generates the texts that the flags ask for."""
  problems = cli.parse_flags(sys.argv, _RENAMED)
  if not flags.FLAGS.is_parsed():  # a value of the wrong type
    raise InputError("\n".join(problems))
  problems += _validate()
  if (n := math.prod(_mesh().values())) > 1:
    distributed.use_virtual_devices(n, spare_threads=True)
  generator = _open_model(problems).generator(_options())
  if _PROMPTS.value:
    batch_generate.generate_all(generator, *_files(), _request())
  else:
    _print_text(generator)
  if _mesh():
    _print_balance(generator.engine)


if __name__ == "__main__":
  cli.run_main(sample)

r"""Generates text with a run's newest checkpoint, or with a released one.

  python -m experiments.sample --workdir=runs/demo --prompt="It is a truth"
  python -m experiments.sample --workdir=runs/demo \
      --prompts=prompts.jsonl --out=texts.jsonl
  python -m experiments.sample --workdir=runs/demo --chat

With --prompts, many texts at a time: see `experiments/batch_generate.py`; with
--json, one JSON object a text on standard output and nothing else. With --chat,
a conversation: see `experiments/chat.py`. With --reject, answers that pass
rewards, as a set to fine-tune on: see `experiments/reject.py`.
"""

import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich import console, status

from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.infer import (
  engine,
  engine_options,
  forward_form,
  generate,
  load,
  serving_mesh,
)
from dsv3_jax.infer.request import SETTINGS, GenerationRequest
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import compilation, distributed, exit_codes
from experiments import batch_generate, chat, cli, flag_parser, reject
from experiments.flag_parser import flag

# Settings of a request that neither a flag nor the folder states.
_DEFAULTS = {"max_tokens": 200, "temperature": 0.8, "top_p": 0.95}
# All but tab and line break.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _setting(name: str, default: object = None) -> object:
  """Makes the flag of a setting of a request."""
  help_text = SETTINGS[name].metadata["help"]
  if default is None:
    last = _DEFAULTS.get(name, SETTINGS[name].default)
    help_text += f"; default: generation_config.json's, or {last}"
  return flag(default, help_text, repeated=isinstance(default, tuple))


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags of the program."""

  workdir: str = flag("", "folder of a run, or of a released checkpoint")
  prompt: str = flag("", "beginning of the text")
  prompts: str = flag("", "JSON Lines file of prompts")
  out: str = flag("", "JSON Lines file for the texts of --prompts")
  json: bool = flag(False, "print a JSON object for each text")
  chat: bool = flag(False, "answer the lines of standard input, in turns")
  max_tokens: int | None = _setting("max_tokens")
  temperature: float | None = _setting("temperature")
  top_p: float | None = _setting("top_p")
  top_k: int | None = _setting("top_k")
  seed: int = _setting("seed", 0)
  stop: tuple[str, ...] = _setting("stop", ())
  reject: str = flag(
    "", "questions with right answers, of which --out gets answers that pass"
  )
  exclude: str = flag(
    "", "conversations whose questions are not asked, with --reject"
  )
  system_prompt: str = flag(
    "", "system prompt of the second type of samples, with --reject"
  )
  answers: int = flag(8, "answers to a question, with --reject")
  rewards: str = flag(
    "correctness=1", "rewards with what an answer must reach, with --reject"
  )
  language: str = flag("en", "language of answers, for rewards=language")
  reward_model: str = flag("", "workdir of a reward model, for rewards=model")
  keep: int = flag(1, "most answers to a question in --out, with --reject")
  allow_code: bool = flag(False, "run programs of the model, for rewards=code")
  speculative: bool = flag(False, "draft tokens with the MTP module")
  drafts: int = flag(1, "tokens to draft at a time, with --speculative")
  max_batch: int = flag(8, "texts generated at a time", old_name="slots")
  max_len: int | None = flag(
    None,
    f"tokens of prompt and text; default: {engine_options.DEFAULT_MAX_LEN}",
  )
  chunk: int = flag(512, "tokens of a prompt that are read at a time")
  dtype: str = flag(
    "float32", "parameters and cache: float32 or bfloat16", old_name="compute"
  )
  form: str = flag(
    forward_form.AUTO,
    "forward pass: xla, native (a C++ kernel for CPUs), or auto, the fastest",
  )
  ema: bool = flag(False, "use the averaged parameters of a run")
  mesh: str = flag("", "devices by axis, such as expert=4,model=2")
  role: str | None = flag(
    None,
    "with --mesh, what the model is divided for: decode (the default) or"
    " prefill",
    old_name="unit",
  )
  redundant_experts: int | None = flag(
    None,
    "redundant expert replicas; default: fewest that divide evenly",
    old_name="redundant",
  )
  rebalance_every: int = flag(
    0,
    "decode steps between rebalancings of the experts; 0: never",
    old_name="rebalance",
  )
  ignore_auto_map: bool = flag(
    False, "accept a config.json that names code, which is not run"
  )
  follow_links: bool = flag(False, "accept shards that are links")
  compile_cache: str = flag(compilation.default_cache(), compilation.HELP)

  def validate(self) -> Iterator[str]:
    """Yields the problems of the flags, whatever the model."""
    yield from cli.parse_mesh(self.mesh)[1]
    for name in ("role", "redundant_experts", "rebalance_every"):
      if not self.mesh and getattr(self, name) != getattr(Args, name):
        yield f"--{name}: needs --mesh"
    if not self.workdir:
      yield "--workdir is missing: the folder of a training run"
    for name in reject.FLAGS:
      if not self.reject and getattr(self, name) != getattr(Args, name):
        yield f"--{name}: needs --reject"
    if self.reject:
      yield from reject.validate(self)
    elif bool(self.prompts) != bool(self.out) and not self.json:
      yield "--prompts and --out: one needs the other; --json needs no --out"
    elif self.prompts:
      yield from batch_generate.validate_files(*self.files)
    if self.json and self.out:
      yield "--json and --out: give one of them; --out is JSON too"
    given = [
      f"--{name}"
      for name in ("prompt", "prompts", "chat", "reject")
      if getattr(self, name)
    ]
    if len(given) > 1:
      yield f"{' and '.join(given)}: give one of them"
    if self.chat and self.json:
      yield "--chat and --json: give one of them"
    if self.drafts < 1:
      yield f"--drafts={self.drafts}: must be at least 1"
    yield from map(_of_flag, self.request({}).validate())

  @property
  def files(self) -> tuple[pathlib.Path, pathlib.Path | None]:
    """Files of prompts and of texts."""
    out = pathlib.Path(self.out) if self.out else None
    return pathlib.Path(self.prompts), out

  @property
  def mesh_shape(self) -> dict[str, int]:
    """Sizes of the mesh axes that are given."""
    return cli.parse_mesh(self.mesh)[0]

  def request(self, settings: Mapping[str, Any]) -> GenerationRequest:
    """The request of --prompt, and the defaults of --prompts and --chat.

    `settings` are those of the model's folder, which flags replace.
    """
    given = {name: getattr(self, name) for name in SETTINGS}
    given = {name: v for name, v in given.items() if v is not None}
    return GenerationRequest(self.prompt, **{**_DEFAULTS, **settings, **given})

  @property
  def options(self) -> engine_options.EngineOptions:
    """Options of the engine."""
    serving, max_batch, mesh = None, self.max_batch, self.mesh_shape
    if mesh:
      serving = serving_mesh.ServingConfig(
        mesh, self.role or "decode", self.redundant_experts
      )
    if not (self.prompts or self.reject) and max_batch > 0:
      max_batch = device_mesh.axis_size(mesh, device_mesh.BATCH)
    return engine_options.EngineOptions(
      dtype=self.dtype,
      max_batch=max_batch,
      max_len=self.max_len,
      chunk=self.chunk,
      n_drafts=max(self.drafts, 0) if self.speculative else 0,
      serving=serving,
      rebalance_every=self.rebalance_every,
      form=self.form,
    )


def _of_flag(problem: str) -> str:
  """Renames a problem of a field, `name=value`, to that of its flag."""
  for field, flag_name in (("n_drafts=", "drafts="), ("messages:", "chat:")):
    problem = problem.replace(field, flag_name, 1)
  return "--" + problem


def _open(args: Args, problems: list[str]) -> load.LoadedModel:
  """Opens the model that the flags name.

  Raises:
    InputError: the problems of the flags, and those of the model, one a line.
  """
  problems = list(problems)
  if args.workdir:
    try:
      loaded = load.open_model(
        args.workdir,
        average=args.ema,
        ignore_auto_map=args.ignore_auto_map,
        follow_links=args.follow_links,
      )
      # Problems of the request itself are in the list already.
      request = args.request(loaded.defaults.settings)
      if args.chat:
        question = [{"role": "user", "content": "?"}]
        request = dataclasses.replace(request, prompt=question)
      several = args.prompts or args.reject
      requests = [] if problems or several else [request]
      problems += map(_of_flag, loaded.validate(args.options, *requests))
    except InputError as error:
      problems += str(error).splitlines()
  raise_problems(problems)
  return loaded


def _show(text: str) -> None:
  """Prints a piece of a text; a terminal gets no control codes of a model."""
  if sys.stdout.isatty():
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
  print(text, end="", flush=True)


def _print_text(
  generator: generate.Generator, request: GenerationRequest
) -> None:
  """Prints the prompt and the text that continues it, as it is made."""
  text = generator.generate(request)
  with _status("reading the prompt"):
    first = next(text, "")
  _show(request.prompt)
  _show(first)
  try:
    for piece in text:
      _show(piece)
  finally:
    print(flush=True)
  drafts = generator.engine.stats.drafts
  if sys.stderr.isatty() or drafts:
    lines = [text.describe_speed()]
    if drafts:
      lines.append(batch_generate.describe_drafts(generator.engine.stats))
    print("; ".join(lines), file=sys.stderr)


def _status(text: str) -> status.Status:
  """Shows what is done meanwhile, on a terminal."""
  return console.Console(stderr=True).status(text)


def _print_balance(served: engine.Engine) -> None:
  """Prints the load imbalance of the devices, before each rebalancing."""
  values = [*served.stats.imbalance, served.balancer.imbalance().mean()]
  listed = ", ".join(f"{value:.2f}" for value in values)
  print(
    f"largest over mean load of the devices, mean over layers: {listed}",
    file=sys.stderr,
  )


@exit_codes.out_of_memory_says(
  "what needs less: a lower --max_len, --max_batch or --chunk, or"
  " --dtype=bfloat16; --mesh divides the model over devices"
)
def _sample() -> None:
  args, problems = flag_parser.read(Args, sys.argv)
  mesh = args.mesh_shape
  compilation.use_cache(args.compile_cache)
  if (n := math.prod(mesh.values())) > 1:
    distributed.use_virtual_devices(n, spare_threads=True)
  loaded = _open(args, problems)
  for note in loaded.notes:
    print(f"note: {note}", file=sys.stderr)
  with _status("reading parameters"):
    generator = loaded.generator(args.options)
  request = args.request(loaded.defaults.settings)
  if args.chat:
    chat.converse(generator, request, _show)
  elif args.reject:
    reject.write(generator, args, _settings(request))
  elif args.json:
    prompts = args.files[0] if args.prompts else None
    batch_generate.print_all(generator, prompts, request)
  elif args.prompts:
    batch_generate.generate_all(generator, *args.files, request)
  else:
    _print_text(generator, request)
  if mesh:
    _print_balance(generator.engine)


def _settings(request: GenerationRequest) -> dict[str, Any]:
  return {name: getattr(request, name) for name in SETTINGS}


def main() -> None:
  """Runs the program from the command line."""
  cli.run_main(_sample, lambda: flag_parser.help_text(Args))


if __name__ == "__main__":
  main()

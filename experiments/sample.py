"""Text from a run's newest checkpoint, or from a released one.

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
from collections.abc import Iterator

from dsv3_jax.errors import InputError
from dsv3_jax.infer import engine, generate, serving_mesh
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import distributed
from experiments import batch_generate, cli, flag_parser
from experiments.flag_parser import flag

# Fields of `generate.EngineOptions` that are flags by another name.
_FLAG_OF_FIELD = {"n_slots": "max_batch", "n_drafts": "drafts"}


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  workdir: str = flag("", "folder of a run, or of a released checkpoint")
  prompt: str = flag("", "beginning of the text")
  prompts: str = flag("", "JSON Lines file of prompts")
  out: str = flag("", "JSON Lines file for the texts of --prompts")
  max_tokens: int = flag(200, "tokens to generate")
  temperature: float = flag(0.8, "sampling temperature; 0 is greedy")
  top_p: float = flag(0.95, "probability mass that nucleus sampling keeps")
  top_k: int = flag(0, "sample from the k most likely tokens; 0: from all")
  seed: int = flag(0, "random seed of the sampling")
  stop: tuple[str, ...] = flag((), "string that ends the text", repeated=True)
  speculative: bool = flag(False, "draft tokens with the MTP module")
  drafts: int = flag(1, "tokens to draft at a time, with --speculative")
  max_batch: int = flag(8, "texts generated at a time", old_name="slots")
  max_len: int | None = flag(
    None, f"tokens of prompt and text; default: {generate.MAX_LEN}"
  )
  chunk: int = flag(512, "tokens of a prompt that are read at a time")
  dtype: str = flag(
    "float32",
    f"of parameters and cache: {' or '.join(generate.DTYPES)}",
    old_name="compute",
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

  def validate(self) -> Iterator[str]:
    """Yields what is wrong with the flags, whatever the model."""
    yield from cli.parse_mesh(self.mesh)[1]
    needs_mesh = "role", "redundant_experts", "rebalance_every"
    for name in needs_mesh:
      if not self.mesh and getattr(self, name) not in (None, 0):
        yield f"--{name}: needs --mesh"
    if not self.workdir:
      yield "--workdir is missing: the folder of a training run"
    if bool(self.prompts) != bool(self.out):
      yield "--prompts and --out: one needs the other"
    elif self.out:
      yield from batch_generate.file_problems(*self.files)
    if self.prompts and self.prompt:
      yield "--prompt and --prompts: give one of them"
    if self.drafts < 1:
      yield f"--drafts={self.drafts}: must be at least 1"
    yield from map(_of_flag, batch_generate.problems(self.sampling))

  @property
  def files(self) -> tuple[pathlib.Path, pathlib.Path]:
    """Files of prompts and of texts."""
    return pathlib.Path(self.prompts), pathlib.Path(self.out)

  @property
  def mesh_shape(self) -> dict[str, int]:
    """Sizes of the mesh axes that are given."""
    return cli.parse_mesh(self.mesh)[0]

  @property
  def sampling(self) -> dict[str, object]:
    """Settings of a text whose line of --prompts gives no others."""
    names = batch_generate.SETTINGS
    return {name: getattr(self, name) for name in names}

  @property
  def request(self) -> generate.GenerationRequest:
    """The request of --prompt."""
    return generate.GenerationRequest(self.prompt, **self.sampling)

  @property
  def options(self) -> generate.EngineOptions:
    """Options of the engine."""
    deployment, n_slots, mesh = None, self.max_batch, self.mesh_shape
    if mesh:
      deployment = serving_mesh.ServingConfig(
        mesh, self.role or "decode", self.redundant_experts
      )
    if not self.prompts and n_slots > 0:
      n_slots = device_mesh.axis_size(mesh, device_mesh.BATCH)
    return generate.EngineOptions(
      dtype=self.dtype,
      n_slots=n_slots,
      max_len=self.max_len,
      chunk=self.chunk,
      n_drafts=max(self.drafts, 0) if self.speculative else 0,
      deployment=deployment,
      rebalance_every=self.rebalance_every,
    )


def _of_flag(problem: str) -> str:
  """A problem of `name=value`, with the name that the flag has."""
  name, equals, rest = problem.partition("=")
  return f"--{_FLAG_OF_FIELD.get(name, name)}{equals}{rest}"


def _open(args: Args, problems: list[str]) -> generate.LoadedModel:
  """The model that the flags ask for.

  Args:
    args: the flags.
    problems: of the flags, to be reported with those of the model.

  Raises:
    InputError: all problems, one a line.
  """
  problems = list(problems)
  if args.workdir:
    try:
      loaded = generate.open_model(
        args.workdir,
        average=args.ema,
        ignore_auto_map=args.ignore_auto_map,
        follow_links=args.follow_links,
      )
      # Problems of the request itself are in the list already.
      requests = [] if problems or args.prompts else [args.request]
      problems += map(_of_flag, loaded.problems(args.options, *requests))
    except InputError as error:
      problems += str(error).splitlines()
  if problems:
    raise InputError("\n".join(problems))
  return loaded


def _print_text(generator: generate.Generator, args: Args) -> None:
  """Prints the prompt and the text that continues it, chunk by chunk."""
  start, n = time.perf_counter(), 0
  print(args.prompt, end="", flush=True)
  for chunk in generator.stream([args.request]):
    print(chunk.text, end="", flush=True)
    n += 1
  print()
  if args.speculative:
    print(
      f"{n} tokens in {time.perf_counter() - start:.1f} s, compiling"
      f" included; {batch_generate.drafted(generator.engine.stats)}",
      file=sys.stderr,
    )


def _print_balance(served: engine.Engine) -> None:
  """Prints the imbalance of the devices' load at each rebalancing."""
  values = [*served.stats.imbalance, served.imbalance().mean()]
  print(
    "largest over mean load of the devices, mean over layers: "
    + ", ".join(f"{value:.2f}" for value in values),
    file=sys.stderr,
  )


def _sample() -> None:
  args, problems = flag_parser.read(Args, sys.argv)
  mesh = args.mesh_shape
  if (n := math.prod(mesh.values())) > 1:
    distributed.use_virtual_devices(n, spare_threads=True)
  generator = _open(args, problems).writer(args.options)
  if args.prompts:
    batch_generate.write(generator, *args.files, args.sampling)
  else:
    _print_text(generator, args)
  if mesh:
    _print_balance(generator.engine)


def main() -> None:
  """Runs the program from the command line."""
  cli.run_main(_sample, lambda: flag_parser.help_text(Args))


if __name__ == "__main__":
  main()

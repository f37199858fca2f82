r"""Converts released checkpoints: import, export, verification and logits.

  python -m scripts.convert --mode=import --hf=DIR --workdir=DIR \
      [--link=hard | --link=symbolic]
  python -m scripts.convert --mode=export --workdir=DIR --hf=DIR \
      [--fp8 | --dtype=bfloat16] [--ema]
  python -m scripts.convert --mode=export --workdir=DIR --gguf=FILE
  python -m scripts.convert --mode=verify --hf=DIR | --workdir=DIR
  python -m scripts.convert --mode=logits --hf=DIR --tokens=IN.npy \
      --out=OUT.npy [--mtp_out=FILE.npy] [--mesh=expert=4]

Import, export and verify hold a few tensors in memory at a time, whatever the
size of the checkpoint. The same command resumes an interrupted import or
export.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import tokenizers
from rich import console, progress

from dsv3_jax import config, io
from dsv3_jax.config import fields
from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.evals import logits as logits_lib
from dsv3_jax.interop import (
  gguf,
  hf_config,
  hf_import,
  hf_read,
  hf_write,
  open_run,
  resumable,
  tokenizer_files,
)
from dsv3_jax.interop.hf_read import ReleasedCheckpoint
from dsv3_jax.parallel import device_mesh
from dsv3_jax.plan import flops
from dsv3_jax.trainer import compilation, distributed, exit_codes, workdir
from experiments import allocator, cli, flag_parser
from experiments.flag_parser import flag

PROMPTS = 4, 64  # rows and tokens whose logits `verify` compares
# Largest difference of float32 logits, relative to logits above 1.
TOLERANCE = 2e-5

_REQUIRED = {  # flags that a mode needs
  "import": ("hf", "workdir"),
  "export": ("workdir",),
  "verify": (),
  "logits": ("hf", "tokens", "out"),
}
_ONLY_WITH = {  # the only mode that uses a flag
  "link": "import",
  "gguf": "export",
  "fp8": "export",
  "dtype": "export",
  "ema": "export",
  "tokens": "logits",
  "out": "logits",
  "mtp_out": "logits",
  "mesh": "logits",
}


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  mode: str = flag("", "import, export, verify or logits")
  hf: str = flag("", "folder of a released checkpoint")
  workdir: str = flag("", "folder of a run, or of an import")
  link: str = flag(
    "", "import hard or symbolic links to the shards; default: copies"
  )
  gguf: str = flag("", "GGUF file to export to")
  fp8: bool = flag(False, "export linear layers in FP8")
  dtype: str = flag(
    "stored",
    "type to export; a run stores float32",
    choices=("stored", "float32", "bfloat16"),
  )
  ema: bool = flag(False, "export the moving average of the parameters")
  tokens: str = flag("", "file of integers [B, T], .npy")
  out: str = flag("", "file for logits, .npy")
  mtp_out: str = flag("", "file for the logits of the MTP layer, .npy")
  mesh: str = flag("", "devices by axis, such as expert=4")
  ignore_auto_map: bool = flag(
    False, "accept a config.json that names code, which is not run"
  )
  follow_links: bool = flag(False, "accept shards that are symbolic links")
  compile_cache: str = flag(compilation.default_cache(), compilation.HELP)

  def validate(self) -> Iterator[str]:
    """Yields problems of flags that do not fit together."""
    if self.mode not in _REQUIRED:
      hint = fields.nearest(self.mode, _REQUIRED)
      yield f"--mode={self.mode}: must be one of {', '.join(_REQUIRED)}{hint}"
      return
    for name in _REQUIRED[self.mode]:
      if not getattr(self, name):
        yield f"--{name} is missing: --mode={self.mode} needs it"
    for name, only in _ONLY_WITH.items():
      if only != self.mode and getattr(self, name) != getattr(Args, name):
        yield f"--{name}: is not used by --mode={self.mode}, only by {only}"
    for name in ("out", "mtp_out"):
      path = getattr(self, name)
      if path and not pathlib.Path(path).parent.is_dir():
        yield f"--{name}={path}: the folder does not exist"
    if self.link not in hf_import.LINKS:
      yield f"--link={self.link}: must be hard or symbolic"
    if self.mode == "verify" and bool(self.hf) == bool(self.workdir):
      yield "--mode=verify needs one of --hf=DIR and --workdir=DIR"
    if self.mode == "export" and bool(self.hf) == bool(self.gguf):
      yield "--mode=export needs one of --hf=DIR and --gguf=FILE"
    if self.fp8 and (self.dtype != "stored" or self.gguf):
      yield "--fp8: cannot be combined with --dtype or --gguf"
    yield from cli.parse_mesh(self.mesh)[1]


@contextlib.contextmanager
def _progress_bar(title: str, total: int) -> Iterator[resumable.Advance]:
  """Shows a progress bar; yields a function to call with bytes done."""
  columns = (
    progress.TextColumn(title),
    progress.BarColumn(),
    progress.DownloadColumn(),
    progress.TransferSpeedColumn(),
    progress.TimeRemainingColumn(),
  )
  with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
    task = bar.add_task(title, total=total)
    yield lambda n_bytes: bar.update(task, advance=n_bytes)


def _print(text: str) -> None:
  print(text, flush=True)


def _open_released(args: Args) -> ReleasedCheckpoint:
  released = hf_read.open_folder(
    pathlib.Path(args.hf),
    ignore_auto_map=args.ignore_auto_map,
    follow_links=args.follow_links,
  )
  for note in released.notes:
    _print(f"note: {note}")
  return released


def _check_values(released: ReleasedCheckpoint) -> None:
  problems = hf_read.group_by_kind(hf_read.validate_values(released))
  raise_problems(problems, f"{released.folder}: ")


def _import(args: Args) -> None:
  released, folder = _open_released(args), pathlib.Path(args.workdir)
  _check_values(released)
  hf_import.check_format(folder)
  if (folder / open_run.CONFIG).exists():
    raise InputError(
      f"--workdir={folder}: belongs to a run; take another folder"
    )
  target, total = folder / hf_import.FOLDER, released.total_bytes()
  with _progress_bar("import", total) as advance:
    hf_import.import_checkpoint(released, target, args.link, advance)
  for note in open_run.read_defaults(folder).notes:
    _print(f"note: {note}")
  try:
    _import_tokenizer(target / tokenizer_files.TOKENIZER, folder)
    description = workdir.run_identity("imported", 0, released.make_run())
    workdir.write_config(folder, description)
  except OSError as error:
    raise resumable.disk_error(folder, error) from error
  _print(f"{folder}: {total:,} bytes of tensors")


def _import_tokenizer(path: pathlib.Path, folder: pathlib.Path) -> None:
  if not path.exists():
    _print(f"note: {path.name} is missing: text cannot be sampled")
    return
  try:
    tok = tokenizer.load(path)
  except InputError as error:
    _print(f"note: not a tokenizer that can be used here: {error}")
    return
  (folder / "data").mkdir(exist_ok=True)
  tokenizer.save(tok, folder / "data" / tokenizer_files.TOKENIZER)


def _export(args: Args) -> None:
  folder = pathlib.Path(args.workdir)
  source, config_json = open_run.open_source(folder, average=args.ema)
  # A source in FP8 keeps its own bits and scales.
  quantize = args.fp8 and not source.tile
  dtype = "fp8" if quantize else args.dtype
  export_format = hf_write.ExportFormat(source, dtype)
  max_len = hf_config.max_len(config_json)
  if args.gguf:
    path, tok = pathlib.Path(args.gguf), _load_tokenizer(folder)
    defaults = open_run.read_defaults(folder)
    if defaults.template is None:
      _print(f"note: {folder} has no chat template: {path} will have none")
    if source.model.mtp.depth:
      _print("note: MTP layers are not written: llama.cpp reads none")
    with _progress_bar("export", gguf.total_bytes(export_format)) as advance:
      gguf.write(export_format, tok, path, max_len, advance, defaults)
    _print(f"{path}: {path.stat().st_size:,} bytes")
    return
  target = pathlib.Path(args.hf)
  if isinstance(source, ReleasedCheckpoint):
    copy = tokenizer_files.copy_files
    write_tokenizer = functools.partial(copy, source.folder, target)
  else:
    write, tok = tokenizer_files.write_files, _load_tokenizer(folder)
    write_tokenizer = functools.partial(write, tok, target, max_len)
  config_json = hf_write.exported_config_json(config_json, export_format)
  total = export_format.total_bytes()
  with _progress_bar("export", total) as advance:
    hf_write.export(
      export_format, target, config_json, advance, write_tokenizer
    )
  _print(f"{target}: {total:,} bytes, SHA-256 in {hf_read.SUMS}")


def _load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
  return tokenizer.load(folder / "data" / tokenizer_files.TOKENIZER)


def _load_tokens(path: str) -> np.ndarray:
  try:
    return np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"--tokens={path}: cannot be read: {error}") from error


def _logits(args: Args) -> None:
  tokens, released = _load_tokens(args.tokens), _open_released(args)
  sizes, _ = cli.parse_mesh(args.mesh)
  if sizes:
    n_devices = math.prod(sizes.values())
    distributed.use_virtual_devices(n_devices, spare_threads=n_devices > 1)
  if args.mtp_out and not released.model.mtp.depth:
    raise InputError(
      f"--mtp_out={args.mtp_out}: the checkpoint has no MTP layer"
    )
  if not args.mtp_out:
    released = released.without_mtp()
  run = released.make_run()
  if sizes:
    run = config.override(run, "parallel.layout=fsdp")
  mesh = device_mesh.make_mesh(sizes)
  logits = logits_lib.compute_logits(released, run, tokens, mesh)
  for path, array in zip((args.out, args.mtp_out), logits, strict=False):
    with io.atomic_write(pathlib.Path(path), "wb") as file:
      np.save(file, array)


def _verify(args: Args) -> None:
  if args.workdir:
    _verify_import(pathlib.Path(args.workdir))
    return
  released = _open_released(args)
  n = len(released.tensors)
  _print(f"{released.folder}: {n:,} tensors, all accounted for")
  if (released.folder / hf_read.SUMS).exists():
    total = sum(path.stat().st_size for path in released.shards())
    with _progress_bar("verify", total) as advance:
      raise_problems(hf_write.corrupt_shards(released, advance))
  else:
    _print(
      f"note: no {hf_read.SUMS} in {released.folder}: SHA-256 not compared"
    )
  _check_values(released)
  _compare_with_transformers(released)


def _verify_import(folder: pathlib.Path) -> None:
  imported = hf_import.open_import(folder)
  with _progress_bar("verify", imported.total_bytes()) as advance:
    raise_problems(hf_import.corrupt_tensors(imported, advance))
  _print(f"{folder}: {len(imported.tensors):,} tensors, all as imported")


def _no_comparison(released: ReleasedCheckpoint) -> str:
  """Returns why logits cannot be compared with transformers'; "": they can."""
  command = [sys.executable, "-c", "import torch, transformers"]
  if subprocess.run(command, capture_output=True, check=False).returncode:
    return "transformers is not installed"
  n_parameters = flops.parameter_counts(released.model)["main"]
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if 3 * 4 * n_parameters > memory:  # both models in float32, and activations
    return f"{n_parameters:,} parameters do not fit into memory"
  return "weights are in FP8" if released.tile else ""


def _compare_with_transformers(released: ReleasedCheckpoint) -> None:
  """Compares logits of random tokens, if transformers is installed."""
  if reason := _no_comparison(released):
    _print(f"note: {reason}: logits not compared with transformers")
    return
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, released.model.vocab_size, PROMPTS).astype(np.int32)
  released = released.without_mtp()
  ours, *_ = logits_lib.compute_logits(
    released, released.make_run(), tokens, device_mesh.make_mesh({})
  )
  with tempfile.TemporaryDirectory() as folder:
    paths = [str(pathlib.Path(folder, name)) for name in ("in.npy", "out.npy")]
    np.save(paths[0], tokens)
    worker = [sys.executable, "-m", "scripts.bench.transformers_logits"]
    subprocess.run([*worker, str(released.folder), *paths], check=True)
    theirs = np.load(paths[1])
  difference = np.abs(ours - theirs).max()
  _print(
    f"logits of {tokens.size} random tokens: {difference:.1e} from"
    " transformers'"
  )
  if not difference <= TOLERANCE * max(1, np.abs(theirs).max()):
    raise InputError(
      f"logits differ by {difference:.1e} from transformers', should be below"
      f" {TOLERANCE}"
    )


_COMMANDS = {
  "import": _import,
  "export": _export,
  "verify": _verify,
  "logits": _logits,
}


@exit_codes.out_of_memory_says(
  "--mode=logits with --mesh=expert=N divides the model over devices; shorter"
  " --tokens need less"
)
def execute() -> None:
  """Runs the command that --mode names."""
  args = flag_parser.parse(Args, sys.argv)
  compilation.use_cache(args.compile_cache)
  _COMMANDS[args.mode](args)


def main() -> None:
  """Runs the program from the command line."""
  allocator.keep_large_blocks()
  cli.run_main(execute, functools.partial(flag_parser.help_text, Args))


if __name__ == "__main__":
  main()

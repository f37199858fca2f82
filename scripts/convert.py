r"""Released checkpoints, in and out.

  python -m scripts.convert --mode=import --hf=DIR --workdir=DIR
  python -m scripts.convert --mode=export --workdir=DIR --hf=DIR \
      [--fp8 | --dtype=bfloat16] [--ema]
  python -m scripts.convert --mode=export --workdir=DIR --gguf=FILE
  python -m scripts.convert --mode=verify --hf=DIR | --workdir=DIR
  python -m scripts.convert --mode=logits --hf=DIR --tokens=IN.npy \
      --out=OUT.npy [--mtp_out=FILE.npy] [--mesh=expert=4]

Import, export and verify take a few tensors at a time, however large the whole.
An interrupted import or export goes on with the same command.
"""

import contextlib
import hashlib
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tokenizers
from absl import flags
from rich import console, progress

from dsv3_jax import config, param_spec
from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError
from dsv3_jax.interop import (
  hf_config,
  hf_mapping,
  hf_read,
  hf_write,
  load_sharded,
  open_run,
  resumable,
  tokenizer_files,
  weights,
)
from dsv3_jax.model import transformer
from dsv3_jax.trainer import distributed, workdir
from experiments import allocator, cli

_MODE = flags.DEFINE_string("mode", None, "import, export, verify or logits")
_HF = flags.DEFINE_string("hf", None, "folder of a released checkpoint")
_GGUF = flags.DEFINE_string("gguf", None, "file to export to")
_FP8 = flags.DEFINE_bool("fp8", False, "export linear layers in FP8")
_DTYPE = flags.DEFINE_string(
  "dtype",
  "stored",
  "of an export: stored (of a run: float32), float32 or bfloat16",
)
_EMA = flags.DEFINE_bool(
  "ema",
  False,
  "export the averaged parameters",
  allow_override=True,  # `experiments.sample` has it too
)
_TOKENS = flags.DEFINE_string("tokens", None, "integers [B, T], .npy")
_OUT = flags.DEFINE_string("out", None, "file for logits, .npy")
_MTP_OUT = flags.DEFINE_string("mtp_out", None, "file for the MTP layer's")
_AUTO_MAP = flags.DEFINE_bool(
  "ignore_auto_map",
  False,
  "accept a config.json that names code, which is not run",
)
_LINKS = flags.DEFINE_bool("follow_links", False, "shards may be links")

_NEEDED = {
  "import": ("hf", "workdir"),
  "export": ("workdir",),
  "verify": (),
  "logits": ("hf", "tokens", "out"),
}
# Flags that mean something in one mode only.
_OF_MODE = {
  "gguf": "export",
  "fp8": "export",
  "dtype": "export",
  "ema": "export",
  "tokens": "logits",
  "out": "logits",
  "mtp_out": "logits",
  "mesh": "logits",
}
PROMPTS = 4, 64  # random ones that `verify` compares logits of: rows, tokens
CLOSE = 2e-5  # of float32 logits of the size that networks have at first


def _problems() -> list[str]:
  mode, args = _MODE.value, flags.FLAGS
  if mode not in _NEEDED:
    return [f"--mode={mode}: must be one of {', '.join(_NEEDED)}"]
  problems = [
    f"--{name} is missing: --mode={mode} needs it"
    for name in _NEEDED[mode]
    if not args[name].value
  ]
  problems += [
    f"--{name}: means nothing with --mode={mode}"
    for name, only in _OF_MODE.items()
    if only != mode and args[name].present
  ]
  for name in ("out", "mtp_out"):
    path = args[name].value
    if path and not pathlib.Path(path).parent.is_dir():
      problems.append(f"--{name}={path}: there is no such folder")
  if mode == "verify" and bool(_HF.value) == bool(args.workdir):
    problems.append("--mode=verify needs one of --hf=DIR and --workdir=DIR")
  if mode == "export":
    if bool(_HF.value) == bool(_GGUF.value):
      problems.append("--mode=export needs one of --hf=DIR and --gguf=FILE")
    if _DTYPE.value not in ("stored", "float32", "bfloat16"):
      problems.append(
        f"--dtype={_DTYPE.value}: must be stored, float32 or bfloat16"
      )
    if _FP8.value and (_DTYPE.present or _GGUF.value):
      problems.append("--fp8: goes without --dtype and --gguf")
  return problems + cli.parse_mesh(args.mesh)[1]


# --- how far it is ---


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
  """Yields what is to be called with the bytes of each part that is done."""
  columns = (
    progress.TextColumn(what),
    progress.BarColumn(),
    progress.DownloadColumn(),
    progress.TransferSpeedColumn(),
    progress.TimeRemainingColumn(),
  )
  with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
    task = bar.add_task(what, total=total)
    yield lambda n_bytes: bar.update(task, advance=n_bytes)


def _say(text: str) -> None:
  print(text, flush=True)


# --- import ---


def _opened() -> hf_read.Released:
  released = hf_read.open_folder(
    pathlib.Path(_HF.value),
    ignore_auto_map=_AUTO_MAP.value,
    follow_links=_LINKS.value,
  )
  for note in released.notes:
    _say(f"note: {note}")
  return released


def _checked(released: hf_read.Released) -> hf_read.Released:
  if problems := list(hf_read.bad_values(released)):
    raise InputError("\n".join(f"{released.folder}: {p}" for p in problems))
  return released


def _import() -> None:
  released, folder = _checked(_opened()), pathlib.Path(flags.FLAGS.workdir)
  description = workdir.run_identity(
    "imported", 0, hf_config.run(released.facts, released.model)
  )
  if (folder / open_run.CONFIG).exists():
    raise InputError(f"--workdir={folder}: belongs to a run; take another")
  target = folder / weights.FOLDER
  total = sum(map(released.n_bytes, hf_mapping.of_model(released.model)))
  with _bar("import", total) as advance:
    weights.import_released(released, target, advance)
  try:
    found = tokenizer_files.copy(released.folder, target)
    if tokenizer_files.TOKENIZER in found:
      _take_tokenizer(target / tokenizer_files.TOKENIZER, folder)
    else:
      _say(
        f"note: no {tokenizer_files.TOKENIZER} in {released.folder}: no text"
      )
    workdir.write_config(folder, description)
  except OSError as error:
    raise resumable.disk_error(folder, error) from error
  _say(f"{folder}: {total:,} bytes of parameters")


def _take_tokenizer(path: pathlib.Path, folder: pathlib.Path) -> None:
  try:
    tok = tokenizer.load(path)
  except InputError as error:
    _say(f"note: not a tokenizer that text is made with here: {error}")
    return
  (folder / "data").mkdir(exist_ok=True)
  tokenizer.save(tok, folder / "data" / tokenizer_files.TOKENIZER)


# --- export ---


def _source() -> tuple[hf_write.Source, dict[str, Any]]:
  """Parameters of the workdir, and their config.json."""
  folder = pathlib.Path(flags.FLAGS.workdir)
  run = open_run.run_of(open_run.read_config(folder))
  if (folder / weights.FOLDER).is_dir():
    if _EMA.value:
      raise InputError(f"--ema: {folder} is imported, it has no average")
    source = weights.open_weights(folder / weights.FOLDER)
    return source, source.facts
  # These start JAX.
  from dsv3_jax.parallel import device_mesh

  mesh = device_mesh.make_mesh({})
  params, bias = open_run.newest(folder, run, mesh, average=_EMA.value)
  arrays = {path: np.asarray(a) for path, a in param_spec.paths(params).items()}
  arrays[hf_mapping.BIAS] = np.asarray(bias)
  if run.model.router.score == "softmax" and arrays[hf_mapping.BIAS].any():
    raise InputError(
      "router.score=softmax with a bias that is not 0: the format of V2 has"
      " none; train with router.bias_speed=0"
    )
  source = hf_write.Arrays(run.model, arrays)
  facts = hf_config.write(run) | {
    "torch_dtype": "float32",
    "bos_token_id": tokenizer.BOS_ID,
    "eos_token_id": tokenizer.EOS_ID,
    "pad_token_id": tokenizer.PAD_ID,
  }
  return source, facts


def _export() -> None:
  source, facts = _source()
  folder = pathlib.Path(flags.FLAGS.workdir)
  kind = "fp8" if _FP8.value else _DTYPE.value
  if _FP8.value and source.tile:  # so it is already: not a bit is changed
    kind = "stored"
  form = hf_write.Form(source, kind)
  if _GGUF.value:
    _export_gguf(form, facts, folder)
    return
  target = pathlib.Path(_HF.value)
  if isinstance(source, weights.Weights):
    beside = lambda: tokenizer_files.copy(source.folder, target)
  else:
    tok, max_len = _tokenizer(folder), hf_config.max_len(facts)
    beside = lambda: tokenizer_files.write(tok, target, max_len)
  facts = hf_write.described(facts, form)
  with _bar("export", hf_write.total_bytes(form)) as advance:
    hf_write.export(form, target, facts, advance, beside)
  _say(
    f"{target}: {hf_write.total_bytes(form):,} bytes, sums in {hf_read.SUMS}"
  )


def _export_gguf(form, facts, folder) -> None:
  from dsv3_jax.interop import gguf

  path = pathlib.Path(_GGUF.value)
  tok, max_len = _tokenizer(folder), hf_config.max_len(facts)
  with _bar("export", gguf.total_bytes(form)) as advance:
    gguf.write(form, tok, path, max_len, advance)
  _say(f"{path}: {path.stat().st_size:,} bytes")


def _tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
  return tokenizer.load(folder / "data" / tokenizer_files.TOKENIZER)


# --- logits ---


def _rows(path: str) -> np.ndarray:
  try:
    return np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"--tokens={path}: cannot be read: {error}") from error


def compute_logits(
  source: load_sharded.Source, run: config.Run, tokens: np.ndarray, mesh: Any
) -> list[np.ndarray]:
  """Logits in float32, of the main model and of each MTP depth."""
  from dsv3_jax.evals import hidden, logits
  from dsv3_jax.parallel import layout_check, layouts

  if problems := layout_check.validate(run, mesh.shape):
    raise InputError("\n".join(problems))
  layout = layouts.make_layout(run, mesh.shape, staged=False)
  parts = load_sharded.load(source, layout, mesh, np.float32)
  model = hidden.EvalModel(*parts, run, mesh)
  b, t = tokens.shape if tokens.ndim == 2 else (0, 0)
  found = [
    np.empty((b, max(t - k, 0), run.model.vocab_size), np.float32)
    for k in range(1 + run.model.mtp.depth)
  ]
  for rows, made in logits.of_rows(model, tokens):
    for whole, some in zip(found, made, strict=True):
      whole[rows] = some
  return found


def _logits() -> None:
  from dsv3_jax.parallel import device_mesh

  tokens, released = _rows(_TOKENS.value), _checked(_opened())
  sizes, _ = cli.parse_mesh(flags.FLAGS.mesh)
  if sizes:
    n_devices = math.prod(sizes.values())
    distributed.use_virtual_devices(n_devices, spare_threads=n_devices > 1)
  mtp_out = _MTP_OUT.value
  if mtp_out and not released.model.mtp.depth:
    raise InputError(f"--mtp_out={mtp_out}: the checkpoint has no MTP layer")
  if not mtp_out:
    released = released.main_only()
  run = hf_config.run(released.facts, released.model)
  if sizes:
    run = config.override(run, "parallel.layout=fsdp")
  found = compute_logits(released, run, tokens, device_mesh.make_mesh(sizes))
  for path, made in zip((_OUT.value, mtp_out), found, strict=False):
    partial = pathlib.Path(f"{path}.partial")
    with partial.open("wb") as file:
      np.save(file, made)
    partial.replace(path)


# --- verify ---


def _damaged_shards(released: hf_read.Released) -> Iterator[str]:
  """Files whose sums are not those beside them."""
  sums = released.folder / hf_read.SUMS
  if not sums.exists():
    _say(f"note: no {hf_read.SUMS} in {released.folder}: digests not compared")
    return
  wanted = {}
  for line in sums.read_text(encoding="utf-8").splitlines():
    digest, _, name = line.partition("  ")
    wanted[name] = digest
  files = sorted({t.file for t in released.tensors.values()})
  for path in files:
    if path.name not in wanted:
      yield f"{path}: not in {hf_read.SUMS}"
  with _bar("verify", sum(path.stat().st_size for path in files)) as advance:
    for path in files:
      digest = hashlib.sha256()
      with path.open("rb") as file:
        while data := file.read(1 << 24):
          digest.update(data)
          advance(len(data))
      if digest.hexdigest() != wanted.get(path.name):
        yield f"{path}: damaged, its sha256 is {digest.hexdigest()}"


def _verify_workdir(folder: pathlib.Path) -> None:
  if not (folder / weights.FOLDER).is_dir():
    raise InputError(f"--workdir={folder}: holds nothing imported")
  source = weights.open_weights(folder / weights.FOLDER)
  todo = hf_mapping.of_model(source.model)
  with _bar("verify", sum(map(source.n_bytes, todo))) as advance:
    problems = list(weights.damaged(source, advance))
  if problems:
    raise InputError("\n".join(problems))
  _say(f"{folder}: {len(todo):,} blocks, all as they were imported")


def _verify() -> None:
  if flags.FLAGS.workdir:
    _verify_workdir(pathlib.Path(flags.FLAGS.workdir))
    return
  released = _opened()
  n = len(released.tensors)
  _say(f"{released.folder}: {n:,} tensors, all accounted for")
  if problems := list(_damaged_shards(released)):
    raise InputError("\n".join(problems))
  _checked(released)
  _compare(released)


def _compare(released: hf_read.Released) -> None:
  """Logits with those of `transformers`, where that is installed."""
  from dsv3_jax.parallel import device_mesh

  have = "import torch, transformers"
  command = [sys.executable, "-c", have]
  if subprocess.run(command, capture_output=True, check=False).returncode:
    _say("note: transformers is not installed: logits not compared")
    return
  main = transformer.parameter_counts(released.model)["main"]
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if 3 * 4 * main > memory:  # in float32, by both, and some to work with
    _say(
      f"note: {main:,} parameters are too many for this machine's memory:"
      " logits not compared"
    )
    return
  if released.tile:
    _say("note: weights in FP8: logits not compared with transformers")
    return
  rng = np.random.default_rng(0)
  rows = rng.integers(0, released.model.vocab_size, PROMPTS).astype(np.int32)
  released = released.main_only()
  run = hf_config.run(released.facts, released.model)
  ours, *_ = compute_logits(released, run, rows, device_mesh.make_mesh({}))
  with tempfile.TemporaryDirectory() as scratch:
    tokens, out = (str(pathlib.Path(scratch, f)) for f in ("in.npy", "out.npy"))
    np.save(tokens, rows)
    worker = [sys.executable, "-m", "scripts.bench.transformers_logits"]
    subprocess.run([*worker, str(released.folder), tokens, out], check=True)
    theirs = np.load(out)
  apart = np.abs(ours - theirs).max()
  _say(f"logits of {rows.size} random tokens: {apart:.1e} from transformers'")
  if not apart <= CLOSE * max(1, np.abs(theirs).max()):
    raise InputError(f"logits are {apart:.1e} apart, should be below {CLOSE}")


def main() -> None:
  """Does what the flags ask for."""
  if problems := cli.parse_flags(sys.argv) or _problems():
    raise InputError("\n".join(problems))
  modes = {
    "import": _import,
    "export": _export,
    "verify": _verify,
    "logits": _logits,
  }
  modes[_MODE.value]()


if __name__ == "__main__":
  allocator.keep_large_blocks()
  cli.run_main(main)

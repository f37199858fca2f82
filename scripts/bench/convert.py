r"""Measures the speed of loading a released checkpoint, next to a plain read.

  python -m scripts.bench.convert --hf=DIR [--rounds=3] [--scratch=DIR]

Prints a JSON object for each round, and one of medians: bytes per second of
reading the files from beginning to end, of loading them into arrays on the
devices and, with --scratch, of importing them into a folder that is removed
again; and the peak memory of the latter two. Each is measured in a process of
its own, after the files were removed from the page cache.
"""

import dataclasses
import functools
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np

from dsv3_jax.interop import hf_import, hf_read, load_sharded
from dsv3_jax.parallel import device_mesh, layouts
from experiments import allocator, cli, flag_parser
from experiments.flag_parser import flag

TASKS = "read", "load", "import"


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  hf: str = flag("", "folder of a released checkpoint")
  rounds: int = flag(3, "number of measurements", low=1)
  scratch: str = flag("", "folder to import to; it is removed again")
  task: str = flag("", f"run one task and exit: {', '.join(TASKS)}")

  def validate(self) -> Iterator[str]:
    """Yields problems of the folders and of the task."""
    if not self.hf:
      yield "--hf is missing: the folder of a released checkpoint"
    elif not list(pathlib.Path(self.hf).glob("*.safetensors")):
      yield f"--hf={self.hf}: holds no *.safetensors"
    if self.scratch and pathlib.Path(self.scratch).exists():
      yield f"--scratch={self.scratch}: already exists"
    if self.task not in ("", *TASKS):
      yield f"--task={self.task}: must be one of {', '.join(TASKS)}"


def _drop_from_cache(folder: pathlib.Path) -> None:
  """Removes the shards from the page cache."""
  os.sync()
  for path in folder.glob("*.safetensors"):
    with path.open("rb") as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(folder: pathlib.Path) -> float:
  start = time.perf_counter()
  buffer = bytearray(1 << 24)
  for path in sorted(folder.glob("*.safetensors")):
    with path.open("rb", buffering=0) as file:
      while file.readinto(buffer):
        pass
  return time.perf_counter() - start


def _load(folder: pathlib.Path) -> float:
  released = hf_read.open_folder(folder)
  mesh = device_mesh.make_mesh({})
  layout = layouts.make_layout(released.make_run(), mesh.shape)
  dtype = hf_read.BF16 if released.tile is None else np.dtype(np.float32)
  start = time.perf_counter()
  jax.block_until_ready(load_sharded.load(released, layout.specs, mesh, dtype))
  return time.perf_counter() - start


def _import(folder: pathlib.Path, target: pathlib.Path) -> float:
  start = time.perf_counter()
  released = hf_read.open_folder(folder)
  hf_import.import_checkpoint(released, target, "", lambda n_bytes: None)
  seconds = time.perf_counter() - start
  shutil.rmtree(target)
  return seconds


def _run_task(args: Args) -> None:
  """Runs one task in this process and prints its measurements."""
  allocator.keep_large_blocks()
  folder = pathlib.Path(args.hf)
  if args.task == "import":
    seconds = _import(folder, pathlib.Path(args.scratch))
  else:
    seconds = {"read": _read, "load": _load}[args.task](folder)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
  print(json.dumps({"seconds": seconds, "peak_rss_mib": peak}))


def _measure(task: str, args: Args) -> dict[str, float]:
  """Runs a task in a new process; returns the numbers it prints."""
  _drop_from_cache(pathlib.Path(args.hf))
  command = [sys.executable, "-m", "scripts.bench.convert"]
  command += [f"--hf={args.hf}", f"--task={task}", f"--scratch={args.scratch}"]
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout)


def _measure_all(args: Args) -> dict[str, float]:
  """Returns speeds in GB/s, ratios to a plain read, and peaks of memory."""
  shards = pathlib.Path(args.hf).glob("*.safetensors")
  n_bytes, result = sum(path.stat().st_size for path in shards), {}
  for task in TASKS if args.scratch else TASKS[:-1]:
    numbers = _measure(task, args)
    speed = n_bytes / numbers["seconds"] / 1e9
    result[f"{task}_gb_per_s"] = speed
    if task != "read":
      result[f"{task}_ratio"] = speed / result["read_gb_per_s"]
      result[f"{task}_peak_rss_mib"] = numbers["peak_rss_mib"]
  return result


def execute() -> None:
  """Measures all tasks, or runs the one that --task names."""
  args = flag_parser.parse(Args, sys.argv)
  if args.task:
    _run_task(args)
    return
  rounds = []
  for _ in range(args.rounds):
    rounds.append(_measure_all(args))
    print(json.dumps(rounds[-1]), flush=True)
  medians = {
    name: statistics.median(r[name] for r in rounds) for name in rounds[0]
  }
  print(json.dumps({"median": medians}))


def main() -> None:
  """Runs the program from the command line."""
  cli.run_main(execute, functools.partial(flag_parser.help_text, Args))


if __name__ == "__main__":
  main()

r"""Measures the speed of loading a released checkpoint, next to a plain read.

  python -m scripts.bench.convert --hf=DIR [--rounds=3] [--scratch=DIR]

Prints a JSON object for each round, and one of medians: bytes per second of
reading the files from beginning to end, of loading them into arrays on the
devices and, with --scratch, of importing them into a folder that is removed
again; and the peak memory of the latter two. Each is measured in a process of
its own, after the files were removed from the page cache.
"""

import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from absl import flags

from dsv3_jax.errors import InputError
from dsv3_jax.interop import hf_import, hf_read, load_sharded
from dsv3_jax.parallel import device_mesh, layouts
from experiments import allocator, cli

_HF = flags.DEFINE_string("hf", None, "folder of a released checkpoint")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "number of measurements")
_SCRATCH = flags.DEFINE_string("scratch", None, "folder to import to")
_TASK = flags.DEFINE_string("task", None, "read, load or import, and exit")


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
  jax.block_until_ready(load_sharded.load(released, layout, mesh, dtype))
  return time.perf_counter() - start


def _import(folder: pathlib.Path) -> float:
  target = pathlib.Path(_SCRATCH.value)
  start = time.perf_counter()
  released = hf_read.open_folder(folder)
  hf_import.import_checkpoint(released, target, "", lambda n_bytes: None)
  seconds = time.perf_counter() - start
  shutil.rmtree(target)
  return seconds


TASKS = {"read": _read, "load": _load, "import": _import}


def _measure(task: str, folder: pathlib.Path) -> dict[str, float]:
  """Runs a task in a new process; returns the numbers it prints."""
  _drop_from_cache(folder)
  command = [sys.executable, "-m", "scripts.bench.convert"]
  command += [f"--hf={folder}", f"--task={task}"]
  if _SCRATCH.value:
    command.append(f"--scratch={_SCRATCH.value}")
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout)


def _round(folder: pathlib.Path) -> dict[str, float]:
  n_bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
  result = {}
  for task in ("read", "load", *(["import"] if _SCRATCH.value else [])):
    numbers = _measure(task, folder)
    result[f"{task}_gb_per_s"] = n_bytes / numbers["seconds"] / 1e9
    if task != "read":
      ratio = result[f"{task}_gb_per_s"] / result["read_gb_per_s"]
      result[f"{task}_ratio"] = ratio
      result[f"{task}_peak_rss_mib"] = numbers["peak_rss_mib"]
  return result


def main() -> None:
  """Measures all tasks, or runs the one that --task names."""
  problems = cli.parse_flags(sys.argv)
  if not _HF.value:
    problems.append("--hf is missing: the folder of a released checkpoint")
  elif not list(pathlib.Path(_HF.value).glob("*.safetensors")):
    problems.append(f"--hf={_HF.value}: holds no *.safetensors")
  if _ROUNDS.value < 1:
    problems.append(f"--rounds={_ROUNDS.value}: must be at least 1")
  if _SCRATCH.value and pathlib.Path(_SCRATCH.value).exists():
    problems.append(f"--scratch={_SCRATCH.value}: already exists")
  if _TASK.value not in (None, *TASKS):
    problems.append(f"--task={_TASK.value}: must be one of {', '.join(TASKS)}")
  if problems:
    raise InputError("\n".join(problems))
  folder = pathlib.Path(_HF.value)
  if _TASK.value:
    allocator.keep_large_blocks()
    seconds = TASKS[_TASK.value](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"seconds": seconds, "peak_rss_mib": peak}))
    return
  rounds = []
  for _ in range(_ROUNDS.value):
    rounds.append(_round(folder))
    print(json.dumps(rounds[-1]), flush=True)
  medians = {
    name: statistics.median(r[name] for r in rounds) for name in rounds[0]
  }
  print(json.dumps({"median": medians}))


if __name__ == "__main__":
  cli.run_main(main)

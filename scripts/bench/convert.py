r"""How fast a released checkpoint is read, next to a plain read of its files.

  python -m scripts.bench.convert --hf=DIR [--rounds=3] [--scratch=DIR]

Prints a JSON object a round and one of medians: bytes a second of reading the
files from beginning to end, of loading them into arrays on the devices here
and, with --scratch, of importing them into a folder that is removed again; and
the peak of memory of the latter two. Each is a process, and the system is told
to forget the files before.
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

from absl import flags

from dsv3_jax.errors import InputError
from experiments import allocator, cli

_HF = flags.DEFINE_string("hf", None, "folder of a released checkpoint")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "times that all are measured")
_SCRATCH = flags.DEFINE_string("scratch", None, "folder to import to")
_TASK = flags.DEFINE_string("task", None, "what this process is to do")


def _forget(folder: pathlib.Path) -> None:
  """Takes the files out of the page cache."""
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
  import jax
  import numpy as np

  from dsv3_jax.interop import hf_config, hf_read, load_sharded
  from dsv3_jax.parallel import device_mesh, layouts

  released = hf_read.open_folder(folder)
  run = hf_config.run(released.facts, released.model)
  mesh = device_mesh.make_mesh({})
  layout = layouts.make_layout(run, mesh.shape)
  dtype = hf_read.BF16 if released.tile is None else np.dtype(np.float32)
  start = time.perf_counter()
  jax.block_until_ready(load_sharded.load(released, layout, mesh, dtype))
  return time.perf_counter() - start


def _import(folder: pathlib.Path) -> float:
  from dsv3_jax.interop import hf_read, weights

  target = pathlib.Path(_SCRATCH.value)
  start = time.perf_counter()
  released = hf_read.open_folder(folder)
  weights.import_released(released, target, lambda n_bytes: None)
  seconds = time.perf_counter() - start
  shutil.rmtree(target)
  return seconds


TASKS = {"read": _read, "load": _load, "import": _import}


def _measured(task: str, folder: pathlib.Path) -> dict[str, float]:
  """What a process of its own prints."""
  _forget(folder)
  command = [sys.executable, "-m", "scripts.bench.convert"]
  command += [f"--hf={folder}", f"--task={task}"]
  if _SCRATCH.value:
    command.append(f"--scratch={_SCRATCH.value}")
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout)


def _round(folder: pathlib.Path) -> dict[str, float]:
  n_bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
  found = {}
  for task in ("read", "load", *(["import"] if _SCRATCH.value else [])):
    told = _measured(task, folder)
    found[f"{task}_gb_per_s"] = n_bytes / told["seconds"] / 1e9
    if task != "read":
      ratio = found[f"{task}_gb_per_s"] / found["read_gb_per_s"]
      found[f"{task}_ratio"] = ratio
      found[f"{task}_peak_rss_mib"] = told["peak_rss_mib"]
  return found


def main() -> None:
  """Measures, or does one of the tasks."""
  problems = cli.parse_flags(sys.argv)
  if not _HF.value:
    problems.append("--hf is missing: the folder of a released checkpoint")
  elif not list(pathlib.Path(_HF.value).glob("*.safetensors")):
    problems.append(f"--hf={_HF.value}: holds no *.safetensors")
  if _ROUNDS.value < 1:
    problems.append(f"--rounds={_ROUNDS.value}: must be at least 1")
  if _SCRATCH.value and pathlib.Path(_SCRATCH.value).exists():
    problems.append(f"--scratch={_SCRATCH.value}: is there already")
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

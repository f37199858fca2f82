"""Runs of the real program, as they are really started, and what they left."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import testing
from absl.testing import parameterized

from dsv3_jax.checkpoint import manifest
from dsv3_jax.trainer import metrics_writer, replay
from experiments import cli

ROOT = pathlib.Path(__file__).parents[1]
PROSE = "It was a bright cold day, and {} clocks were striking thirteen.\n"
TIMEOUT_S = 300  # of all that a test starts; nothing here can hang for ever
# A model that compiles in seconds.
SETTINGS = (
  "vocab_size=300",
  "d_model=16",
  "n_layers=1",
  "n_dense_layers=0",
  "mtp.depth=0",
  "attention.n_heads=2",
  "attention.q_rank=8",
  "attention.kv_rank=8",
  "attention.nope_dim=4",
  "attention.rope_dim=4",
  "attention.v_dim=4",
  "moe.ffn_dim=8",
  "router.n_experts=8",
  "router.top_k=2",
  "init_std=0.1",
  "data.seq_len=8",
  "train.batch_size=8",
  "train.micro_batches=2",
  "train.tokens=2560",
  "schedule.warmup_until=0.05",
  "checkpoint.every=2",
  "checkpoint.keep=9",
  "evaluate.sample_tokens=0",
  "parallel.layout=zero1",
  "parallel.replica_check_every=2",
)


def environment():
  """Returns the environment of programs: a quick compiler."""
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false",
    "PYTHONPATH": str(ROOT),
  }
  env.pop("NPROC", None)  # the program's own choice is tested
  return env


@dataclasses.dataclass(frozen=True)
class Ended:
  """Exit code and output of a process."""

  code: int
  out: str
  err: str


class Started:
  """Processes that run Python with lists of arguments; a context manager."""

  def __init__(self, *commands, deadline_s=TIMEOUT_S, cache=True, **popen):
    self._deadline = time.monotonic() + deadline_s
    self._files, self.processes = [], []
    for command in commands:
      self._files.append([tempfile.TemporaryFile("w+") for _ in range(2)])
      out, err = self._files[-1]
      process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment() | {"JAX_ENABLE_COMPILATION_CACHE": str(cache)},
        stdout=out,
        stderr=err,
        **popen,
      )
      self.processes.append(process)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()
    for pair in self._files:
      for file in pair:
        file.close()

  @property
  def left_s(self):
    return max(self._deadline - time.monotonic(), 0)

  def until(self, happened):
    """Waits until something has happened, or a process has ended."""
    while not happened():
      if not self.left_s:
        raise TimeoutError
      if any(p.poll() is not None for p in self.processes):
        return
      time.sleep(0.02)

  def ended(self, *indices):
    """Waits for processes, all of them without indices."""
    found = []
    for i in indices or range(len(self.processes)):
      code = self.processes[i].wait(self.left_s)
      texts = []
      for file in self._files[i]:
        file.seek(0)
        texts.append(file.read())
      found.append(Ended(code, *texts))
    return found


def together(*commands, timeout_s=TIMEOUT_S):
  """Runs Python with each argument list, all at once."""
  with Started(*commands, deadline_s=timeout_s) as started:
    return started.ended()


def members(n):
  """The flags of each of n processes."""
  port = testing.free_port()
  return [
    (f"--coordinator=127.0.0.1:{port}", f"--processes={n}", f"--process={i}")
    for i in range(n)
  ]


def rows(folder):
  """The rows of a run, without what depends on the time."""
  with contextlib.suppress(FileNotFoundError):
    return [
      {k: v for k, v in row.items() if k not in replay.OF_ONE_START}
      for row in metrics_writer.read(folder / metrics_writer.METRICS)
    ]
  return []


def saved(folder, step):
  """Digests of all arrays of a checkpoint, and the facts beside them."""
  found = manifest.read(folder / "checkpoints" / str(step))
  return found.arrays, found.metadata


def names(folder):
  """Names in the folder of checkpoints."""
  try:
    return sorted(os.listdir(folder / "checkpoints"))
  except FileNotFoundError:
    return []


class Programs(parameterized.TestCase):
  """Runs of one configuration in a folder."""

  SETTINGS = SETTINGS
  STEPS = 4

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.root = pathlib.Path(folder)
    text = cls.root / "text.txt"
    text.write_text("".join(PROSE.format(i) for i in range(200)))
    cls.settings = (*cls.SETTINGS, f"data.path={text}")

  def command(self, name, mesh, *more):
    return [
      "-m",
      "experiments.pretrain",
      "--variant=tiny",
      f"--workdir={self.root / name}",
      f"--mesh={mesh}",
      f"--steps={self.STEPS}",
      *(f"--set={setting}" for setting in self.settings),
      *more,
    ]

  def train(self, name, mesh, *more, n=1):
    """Trains in n processes, each of which must end well."""
    who = members(n) if n > 1 else [()]
    ended = together(
      *(self.command(name, mesh, *flags, *more) for flags in who)
    )
    for each in ended:
      self.assertEqual(each.code, cli.OK, each)
    return ended

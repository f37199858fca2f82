"""Worker of `scripts.bench`: the train step of this package.

The sequences of a batch are divided over the devices, as in `--mesh=data=N` of
pre-training; on CPU there is a virtual one for each core.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, train
from dsv3_jax.config import presets
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.parallel import device_mesh
from scripts.bench import worker


def cores() -> int:
  """Returns how many virtual devices a CPU is divided into."""
  return os.cpu_count() or 1


def training(cfg: config.Run) -> tuple[Callable[[], float], Callable[[], str]]:
  """Returns the train step of a run, and a function to read its program.

  The step trains on random tokens and returns the loss when it is done. The
  program is the optimized one, as text.
  """
  rng = np.random.default_rng(0)
  vocab, n_micro = cfg.model.vocab_size, cfg.train.micro_batches
  n_rows = cfg.train.batch_size // n_micro
  most = min(jax.device_count(), n_rows)
  shards = max(n for n in range(1, most + 1) if n_rows % n == 0)
  mesh = device_mesh.make_mesh({"data": shards})
  state = train.make_state(cfg, mesh, seed=0)
  train_step = train.make_step(cfg, mesh)
  shape = (n_micro, n_rows, cfg.data.seq_len + 1)

  def batch() -> Batch:
    rows = make_batch(rng.integers(vocab, size=shape, dtype=np.int32))
    return device_mesh.make_global_batch(rows, n_rows, mesh, dim=1)

  def step() -> float:
    nonlocal state
    state, metrics = train_step(state, batch())
    return float(metrics["loss"])

  def program() -> str:
    return train_step.lower(state, batch()).compile().as_text()

  return step, program


def prepare(job: dict[str, Any]) -> worker.Task:
  """The train step of preset `job["shape"]` with `job["set"]` applied."""
  cfg = config.override(presets.PRESETS[job["shape"]], *job["set"])
  step, _ = training(cfg)
  x = jax.random.normal(jax.random.key(1), [worker.PEAK_SIZE] * 2)
  matmul = jax.jit(jnp.matmul)
  return worker.Task(
    step=step,
    matmul=lambda: matmul(x, x).block_until_ready(),
    version=f"jax {jax.__version__}",
  )


if __name__ == "__main__":
  if jax.config.jax_num_cpu_devices < 1:  # JAX_NUM_CPU_DEVICES is not set
    jax.config.update("jax_num_cpu_devices", cores())
  worker.serve(prepare)

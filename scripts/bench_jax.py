"""Worker of `scripts.bench`: the train step of this package."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax import host
from dsv3_jax import losses
from dsv3_jax import presets
from dsv3_jax import train
from scripts import bench_worker


def prepare(job: dict[str, Any]) -> bench_worker.Task:
  """The train step of preset `job["shape"]` with `job["set"]` applied."""
  cfg = config.override(presets.PRESETS[job["shape"]], *job["set"])
  state = train.init_state(cfg, jax.random.key(0))
  train_step = train.make_step(cfg)
  rng = np.random.default_rng(0)
  vocab, n_micro = cfg.model.vocab_size, cfg.train.micro_batches
  shape = (n_micro, cfg.train.batch_size // n_micro, cfg.data.seq_len + 1)

  def step() -> float:
    nonlocal state
    rows = rng.integers(vocab, size=shape, dtype=np.int32)
    state, metrics = train_step(state, losses.batch(rows, vocab))
    return float(metrics["loss"])

  x = jax.random.normal(jax.random.key(1), [bench_worker.PEAK_SIZE] * 2)
  matmul = jax.jit(jnp.matmul)
  return bench_worker.Task(
      step=step,
      matmul=lambda: matmul(x, x).block_until_ready(),
      version=f"jax {jax.__version__}",
  )


if __name__ == "__main__":
  host.keep_freed_memory()
  bench_worker.serve(prepare)

"""Worker of `scripts.bench`: prefill and decode of this package.

Both go through the engine that serves, with a slot for each prompt; what it
compiles is for this job's lengths. Cores are devices where that is faster, as
with `--mesh` of `experiments.sample`.
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax import presets
from dsv3_jax import schema
from dsv3_jax.infer import engine
from dsv3_jax.infer import kvcache
from dsv3_jax.infer import served
from dsv3_jax.infer import units
from experiments import allocator
from experiments import cluster
from scripts import bench_worker

LONGEST_CHUNK = 2048


def _deployment(job: dict[str, Any], n: int) -> units.Deployment | None:
  """Over n devices, how it is fastest on the cores of one processor.

  A single row leaves too little to divide.
  """
  if n < 2 or (job["new"] and len(job["prompts"]) % n):
    return None
  if job["new"]:
    return units.Deployment(mesh={"expert": n}, kind="decode")
  return units.Deployment(mesh={"model": n}, kind="prefill")


def _engine(job: dict[str, Any], cfg: config.Model) -> engine.Engine:
  """With random parameters and a slot for each prompt."""
  n, longest = len(job["prompts"]), len(job["prompts"][0])
  cores = os.cpu_count() or 1
  wanted = _deployment(job, 1 << cores.bit_length() - 1)
  if wanted:
    n_devices = math.prod(wanted.mesh.values())
    cluster.use_virtual_devices(n_devices, spare_threads=False)
  key, specs = jax.random.key(0), served.specs(cfg)
  params = jax.jit(functools.partial(schema.init, specs))(key)
  unit = placed = None
  if wanted:
    unit = units.unit(wanted, cfg)
    placed = units.first_placement(unit, cfg)
    params = units.place(params, placed, unit, cfg)
  return engine.Engine(
      params,
      cfg,
      n_slots=n,
      max_len=longest + max(1, job["new"]),
      chunk=kvcache.bucket(longest, LONGEST_CHUNK),
      unit=unit,
      placed=placed,
  )


def prepare(job: dict[str, Any]) -> bench_worker.Task:
  """Writes `job["new"]` tokens behind prompts, or one if it is to read only."""
  cfg = config.override(presets.PRESETS[job["shape"]], *job["set"])
  prompts, new = job["prompts"], max(1, job["new"])
  writer = _engine(job, cfg.model)
  requests = [
      engine.Request(prompt=ids, max_tokens=new, temperature=0)
      for ids in prompts
  ]

  def step() -> float:
    tokens = [event.token for event in writer.run(requests)]
    assert len(tokens) == len(prompts) * new
    return float(sum(tokens))

  x = jax.random.normal(jax.random.key(1), [bench_worker.PEAK_SIZE] * 2)
  matmul = jax.jit(jnp.matmul)
  return bench_worker.Task(
      step=step,
      matmul=lambda: matmul(x, x).block_until_ready(),
      version=f"jax {jax.__version__}",
  )


if __name__ == "__main__":
  allocator.use_mimalloc()
  bench_worker.serve(prepare)

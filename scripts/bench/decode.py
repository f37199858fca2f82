"""Worker of `scripts.bench`: prefill and decode of this package.

Both go through the engine that serves, with a slot for each prompt; what it
compiles is for this job's lengths. Cores are devices where that is faster, as
with `--mesh` of `experiments.sample`. Each side has its own allocator settings:
this one holds little beyond what it uses.
"""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.infer import engine, inference_params, kvcache, load, serving_mesh
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.trainer import distributed
from scripts.bench import worker

LONGEST_CHUNK = 2048


def _serving(
  job: dict[str, Any], cfg: config.Model
) -> serving_mesh.ServingConfig | None:
  """Returns the fastest serving settings on a CPU's cores; None: one device.

  To read divides heads. To write does not: the native kernel uses all cores.
  """
  cores = 1 << (os.cpu_count() or 1).bit_length() - 1
  n = math.gcd(cores, cfg.attention.n_heads, cfg.router.n_experts)
  if n == 1 or job["new"] > 0:
    return None
  return serving_mesh.ServingConfig(mesh={"model": n}, role="prefill")


def _params(cfg: config.Model) -> inference_params.InferenceParams:
  """Draws parameters in host memory, where a server has them from files.

  Compiled initializers would count in the peak of memory.
  """
  rng, key = np.random.default_rng(0), jax.random.key(0)

  def draw(spec):
    if len(spec.shape) < 2:
      return spec.init(key, spec.shape, spec.dtype)
    p = rng.standard_normal(spec.shape, spec.dtype)
    return np.multiply(p, cfg.init_std, out=p)

  return jax.tree.map(draw, inference_params.specs(cfg))


def _engine(job: dict[str, Any], cfg: config.Model) -> engine.Engine:
  """Makes an engine with a slot for each prompt.

  Parameters are those of `job["workdir"]`, or random without one.
  """
  n, longest = len(job["prompts"]), len(job["prompts"][0])
  if serving := _serving(job, cfg):
    n_devices = math.prod(serving.mesh.values())
    distributed.use_virtual_devices(n_devices, spare_threads=False)
  options = EngineOptions(
    max_batch=n,
    max_len=longest + max(1, job["new"]),
    chunk=kvcache.bucket(longest, LONGEST_CHUNK),
    serving=serving,
  )
  if workdir := job.get("workdir"):
    return load.open_model(workdir).generator(options).engine
  params = _params(cfg)
  return engine.Engine(
    params if serving else jax.device_put(params), cfg, options
  )


def prepare(job: dict[str, Any]) -> worker.Task:
  """Generates `job["new"]` tokens after prompts; one if it is to read only."""
  cfg = config.override(presets.PRESETS[job["shape"]], *job["set"])
  prompts, new = job["prompts"], max(1, job["new"])
  writer = _engine(job, cfg.model)
  requests = [GenerationRequest(ids, new, temperature=0) for ids in prompts]

  def step() -> float:
    tokens = [event.token for event in writer.run(requests)]
    assert len(tokens) == len(prompts) * new
    return float(sum(tokens))

  x = jax.random.normal(jax.random.key(1), [worker.PEAK_SIZE] * 2)
  matmul = jax.jit(jnp.matmul)
  return worker.Task(
    step=step,
    matmul=lambda: matmul(x, x).block_until_ready(),
    version=f"jax {jax.__version__}",
  )


if __name__ == "__main__":
  worker.serve(prepare)

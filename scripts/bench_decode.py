"""Worker of `scripts.bench`: prefill and decode of this package.

Both go through the engine that serves, with a slot for each prompt; what it
compiles is for this job's lengths.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax import presets
from dsv3_jax import schema
from dsv3_jax.infer import engine
from dsv3_jax.infer import served
from dsv3_jax.model import transformer
from experiments import allocator
from scripts import bench_worker


def _params(key: jax.Array, model: config.Model) -> served.Served:
  drawn = schema.init(transformer.specs(model), key)
  return served.params(drawn, transformer.router_bias(model), model)


def prepare(job: dict[str, Any]) -> bench_worker.Task:
  """Writes `job["new"]` tokens behind prompts, or one if it is to read only."""
  cfg = config.override(presets.PRESETS[job["shape"]], *job["set"])
  prompts, new = job["prompts"], max(1, job["new"])
  params = jax.jit(_params, static_argnums=1)(jax.random.key(0), cfg.model)
  writer = engine.Engine(
      params,
      cfg.model,
      n_slots=len(prompts),
      max_len=len(prompts[0]) + new,
  )
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

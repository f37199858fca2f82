"""Worker of `scripts.bench`: prefill and decode of llama.cpp.

All numbers are float32, those of the cache too, as in ours. Each text has a
slot of the server, which is called in this process; a thread runs on each core.
Runs in any interpreter that has xllamacpp and numpy; JAX is not needed.
"""

import os
from typing import Any

import numpy as np
import xllamacpp

from scripts.bench import worker

_F32 = xllamacpp.ggml_type.GGML_TYPE_F32
_NO_FLASH = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
_CELLS = 256  # llama.cpp rounds the length of a cache up to so many


def _server(path: str, n_texts: int, length: int) -> xllamacpp.Server:
  """Opens a GGUF file with a slot of `length` positions for each text."""
  params = xllamacpp.CommonParams()
  params.model.path = path
  params.n_parallel = n_texts
  params.n_ctx = n_texts * -(-length // _CELLS) * _CELLS
  params.cpuparams.n_threads = os.cpu_count()
  params.cpuparams_batch.n_threads = os.cpu_count()
  params.cache_type_k = params.cache_type_v = _F32
  params.flash_attn_type = _NO_FLASH
  params.verbosity = -1
  return xllamacpp.Server(params)


def prepare(job: dict[str, Any]) -> worker.Task:
  """Generates `job["new"]` tokens after prompts; one if it is to read only."""
  prompts, new = job["prompts"], max(1, job["new"])
  server = _server(job["gguf"], len(prompts), len(prompts[0]) + new)
  request = {
    "prompt": prompts if len(prompts) > 1 else prompts[0],
    "n_predict": new,
    "temperature": 0,
    "samplers": ["temperature"],  # no other looks at the logits
    "ignore_eos": True,
    "cache_prompt": False,  # every step reads the prompts again
  }

  def step() -> float:
    answer = server.handle_completions(request)
    ends = [choice["finish_reason"] for choice in answer["choices"]]
    assert ends == ["length"] * len(prompts), ends
    # Of several texts it counts the tokens of one.
    assert answer["usage"]["completion_tokens"] == new, answer["usage"]
    return float(new * len(ends))

  rng = np.random.default_rng(0)
  x = rng.standard_normal((worker.PEAK_SIZE, worker.PEAK_SIZE), np.float32)
  build = xllamacpp.BUILD_INFO
  version = (
    f"llama.cpp {build['commit']}, xllamacpp {xllamacpp.__version__},"
    f" {xllamacpp.get_system_info()}"
  )
  return worker.Task(step=step, matmul=lambda: x @ x, version=version)


if __name__ == "__main__":
  worker.serve(prepare)

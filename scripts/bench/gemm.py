"""Speed and error of FP8 products on a GPU.

  python -m scripts.bench.gemm [--shapes=model] [--rounds=5]

For products of 4096 tokens with weights of the model: every backend of
`scaled_matmul.py` beside a product in BF16, and what it takes to quantize the
activations. They take turns; the ratio is that of neighbouring turns. Errors
are relative, in the norm, to a float32 product of what was quantized
(`rounding`) and of what there was before (`error`). Prints a JSON object a
line.
"""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from dsv3_jax.linear import fp8_matmul_hopper, scaled_matmul
from dsv3_jax.linear import quantize as quantize_lib
from experiments import cli
from experiments.flag_parser import flag

# Tokens, inputs, outputs.
SHAPES = {
  "model": (
    (4096, 7168, 2048),
    (4096, 2048, 7168),
    (4096, 7168, 1536),
    (4096, 1536, 24_576),
    (4096, 16_384, 7168),
  ),
  "tiny": ((128, 256, 128),),
}
BATCH_S = 0.05  # of a turn: enough work that starting it does not count


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  shapes: str = flag("model", "which products", choices=sorted(SHAPES))
  rounds: int = flag(5, "turns of each", low=1)


def _seconds(call: Callable[[], jax.Array], n: int) -> float:
  start = time.perf_counter()
  for _ in range(n):
    last = call()
  last.block_until_ready()
  return (time.perf_counter() - start) / n


def _relative(a: jax.Array, b: jax.Array) -> float:
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def _calls(
  x: jax.Array, w: jax.Array
) -> tuple[dict[str, Callable[[], jax.Array]], dict[str, str]]:
  """Returns timed calls by name, and the reason for each missing one."""
  a = jax.jit(lambda x: quantize_lib.quantize(x, (1, 128)))(x)
  b = jax.jit(lambda w: quantize_lib.quantize(w, (128, 128)))(w)
  matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  quantize = jax.jit(lambda x: quantize_lib.quantize(x, (1, 128)).codes)
  calls = {
    "bf16": functools.partial(jax.jit(matmul), x, w),
    "quantize": functools.partial(quantize, x),
  }
  missing, kernel = {}, fp8_matmul_hopper.blocked
  unpaired = fp8_matmul_hopper.Tuning(paired=False)
  products = {
    "dequantized": scaled_matmul.dequantized,
    "exact": scaled_matmul.exact,
    "kernel": kernel,
    "kernel_unpaired": functools.partial(kernel, tuning=unpaired),
    "kernel_to_bf16": functools.partial(kernel, dtype=jnp.bfloat16),
  }
  for name, product in products.items():
    try:
      calls[name] = functools.partial(jax.jit(product), a, b)
      calls[name]().block_until_ready()
    except NotImplementedError as error:
      missing[name] = str(error)
      del calls[name]
  return calls, missing


def measure(m: int, k: int, n: int, n_rounds: int) -> Iterator[dict]:
  """A line for each way to make one product."""
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
  w = jax.random.normal(keys[1], (k, n), jnp.bfloat16)
  calls, missing = _calls(x, w)
  exactly = functools.partial(jnp.matmul, precision="highest")
  true = jax.jit(exactly)(x.astype(jnp.float32), w.astype(jnp.float32))
  held = [
    quantize_lib.dequantize(quantize_lib.quantize(v, tile), jnp.float32)
    for v, tile in ((x, (1, 128)), (w, (128, 128)))
  ]
  quantized = jax.jit(exactly)(*held)
  turns = {}
  for name, call in calls.items():
    call().block_until_ready()
    turns[name] = max(1, math.ceil(BATCH_S / _seconds(call, 3)))
  times: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(n_rounds):
    for name, call in calls.items():
      times[name].append(_seconds(call, turns[name]))
  shape = {"m": m, "k": k, "n": n, "device": jax.devices()[0].device_kind}
  for name, seconds in times.items():
    median_s = statistics.median(seconds)
    line = shape | {"what": name, "us": round(median_s * 1e6, 1)}
    if name != "quantize":
      ratios = [b / a for a, b in zip(seconds, times["bf16"], strict=True)]
      made = calls[name]()
      line |= {
        "tflops": round(2 * m * k * n / median_s / 1e12, 3),
        "speed_to_bf16": round(statistics.median(ratios), 3),
        "error": _relative(made, true),
      }
      if name != "bf16":
        line["rounding"] = _relative(made, quantized)
    yield line
  for name, why in missing.items():
    yield shape | {"what": name, "missing": why}


def execute(args: Args) -> None:
  """Measures and prints."""
  for shape in SHAPES[args.shapes]:
    for line in measure(*shape, args.rounds):
      print(json.dumps(line), flush=True)


if __name__ == "__main__":
  cli.run_script(execute, Args)

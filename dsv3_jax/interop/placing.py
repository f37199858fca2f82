"""Parameters from files straight to the devices that hold them."""

import concurrent.futures
import math
from typing import Any
from typing import Protocol

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax import schema
from dsv3_jax.interop import blocks
from dsv3_jax.interop import pieces
from dsv3_jax.model import transformer
from dsv3_jax.parallel import layouts


class Source(Protocol):
  """Where parameters are: a released folder, or a workdir's."""

  model: config.Model

  def part(self, block: blocks.Block, inner: blocks.Slices) -> np.ndarray:
    """Some of a block's numbers, see `hf.Released.part`."""


def load(
    source: Source,
    layout: layouts.Layout,
    mesh: jax.sharding.Mesh,
    dtype: Any,
) -> tuple[schema.Params, jax.Array]:
  """Parameters and router bias; a device's slices are all that is read for it.

  Args:
    source: where they are.
    layout: of the model.
    mesh: where to.
    dtype: of the parameters; FP8 becomes what it stands for. The bias stays
      float32.
  """
  model, found = source.model, {}
  for block in blocks.of_model(model):
    found.setdefault(block.path, {})[block.index] = block
  specs = schema.paths(transformer.specs(model))
  shapes = {path: spec.shape for path, spec in specs.items()}
  with concurrent.futures.ThreadPoolExecutor(pieces.WORKERS) as pool:

    def placed(path, spec, dtype):
      made = {}  # devices that hold the same share what is read

      def of_device(index):
        key = str(index)
        if key not in made:
          made[key] = _assembled(
              source, found[path], shapes[path], index, dtype, pool
          )
        return made[key]

      place = jax.NamedSharding(mesh, spec)
      return jax.make_array_from_callback(shapes[path], place, of_device)

    params = jax.tree.map_with_path(
        lambda path, spec: placed(schema.name(path), spec, dtype),
        layout.specs,
    )
    bias = transformer.router_bias(model)
    if blocks.BIAS in found:
      shapes[blocks.BIAS] = bias.shape
      bias = placed(blocks.BIAS, jax.P(), np.float32)
    else:
      bias = jax.device_put(bias, jax.NamedSharding(mesh, jax.P()))
  return params, bias


def _assembled(source, found, shape, index, dtype, pool):
  """The slice of a parameter that a device holds."""
  n = len(next(iter(found)))
  leading = [range(size)[s] for size, s in zip(shape[:n], index, strict=False)]
  inner = index[n:]
  sizes = [len(range(size)[s]) for size, s in zip(shape, index, strict=True)]
  out = _aligned(sizes, np.dtype(dtype))

  def one(place):
    at = tuple(int(r[i]) for r, i in zip(leading, place, strict=True))
    values, to = source.part(found[at], inner), out[place]
    if values.dtype == to.dtype:
      # NumPy copies one number at a time of types that it does not know.
      bits = f"u{to.dtype.itemsize}"
      values, to = values.view(bits), to.view(bits)
    to[...] = values

  list(pool.map(one, np.ndindex(*sizes[:n])))
  return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
  """Memory that a device on this machine's processor can take as it is."""
  n_bytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(n_bytes + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + n_bytes].view(dtype).reshape(shape)

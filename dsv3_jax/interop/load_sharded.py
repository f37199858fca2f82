"""Parameters from files straight to the devices that hold them."""

import concurrent.futures
import math
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.interop import hf_mapping, resumable
from dsv3_jax.model import transformer
from dsv3_jax.parallel import layouts

PIECE = 1 << 24  # numbers that are read and turned at a time


class Source(Protocol):
  """Where parameters are: a released folder, or a workdir's."""

  model: config.Model

  def part(
    self, block: hf_mapping.Block, inner: hf_mapping.Slices
  ) -> np.ndarray:
    """Some of a block's numbers, see `hf.Released.part`."""

  def cheap_dim(self, block: hf_mapping.Block) -> int | None:
    """The dim of a block that parts are best cut along; None: none is."""


def load(
  source: Source,
  layout: layouts.Layout,
  mesh: jax.sharding.Mesh,
  dtype: Any,
) -> tuple[param_spec.Params, jax.Array]:
  """Parameters and router bias; a device's slices are all that is read for it.

  Args:
    source: where they are.
    layout: of the model.
    mesh: where to.
    dtype: of the parameters; FP8 becomes what it stands for. The bias stays
      float32.
  """
  model, found = source.model, {}
  for block in hf_mapping.of_model(model):
    found.setdefault(block.path, {})[block.index] = block
  specs = param_spec.paths(transformer.specs(model))
  shapes = {path: spec.shape for path, spec in specs.items()}
  with concurrent.futures.ThreadPoolExecutor(resumable.WORKERS) as pool:

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

    # Some of them beside each other, or the disk waits for the last piece.
    with concurrent.futures.ThreadPoolExecutor(2) as some:
      params = jax.tree.map_with_path(
        lambda path, spec: some.submit(
          placed, param_spec.name(path), spec, dtype
        ),
        layout.specs,
      )
    params = jax.tree.map(lambda future: future.result(), params)
    bias = transformer.router_bias(model)
    if hf_mapping.BIAS in found:
      shapes[hf_mapping.BIAS] = bias.shape
      bias = placed(hf_mapping.BIAS, jax.P(), np.float32)
    else:
      bias = jax.device_put(bias, jax.NamedSharding(mesh, jax.P()))
  return params, bias


def _pieces(
  source: Source, block: hf_mapping.Block, inner: hf_mapping.Slices
) -> Iterator[tuple[hf_mapping.Slices, hf_mapping.Slices]]:
  """Pieces of a part of a block: where they are in the block, and in the part.

  Several are worked on at once, each in little memory of its own.
  """
  dim, dims = source.cheap_dim(block), (*block.inputs, *block.outputs)
  whole = (slice(None),) * len(dims)
  if dim is None:
    yield inner, whole
    return
  rows = range(dims[dim])[inner[dim]]
  step = max(PIECE * dims[dim] // math.prod(dims), 1)
  for start in range(0, len(rows), step):
    own = rows[start : start + step]
    yield (
      (*inner[:dim], slice(own.start, own.stop), *inner[dim + 1 :]),
      (*whole[:dim], slice(start, start + step), *whole[dim + 1 :]),
    )


def _assembled(source, found, shape, index, dtype, pool):
  """The slice of a parameter that a device holds."""
  n = len(next(iter(found)))
  leading = [range(size)[s] for size, s in zip(shape[:n], index, strict=False)]
  inner = index[n:]
  sizes = [len(range(size)[s]) for size, s in zip(shape, index, strict=True)]
  out = _aligned(sizes, np.dtype(dtype))

  def todo():
    for place in np.ndindex(*sizes[:n]):
      at = tuple(int(r[i]) for r, i in zip(leading, place, strict=True))
      for piece, here in _pieces(source, found[at], inner):
        yield found[at], piece, (*place, *here)

  def one(task):
    block, piece, place = task
    values, to = source.part(block, piece), out[place]
    if values.dtype == to.dtype:
      # NumPy copies one number at a time of types that it does not know.
      bits = f"u{to.dtype.itemsize}"
      values, to = values.view(bits), to.view(bits)
    to[...] = values

  list(pool.map(one, todo()))
  return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
  """Memory that a device on this machine's processor can take as it is."""
  n_bytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(n_bytes + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + n_bytes].view(dtype).reshape(shape)

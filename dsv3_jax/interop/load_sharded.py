"""Loads parameters from files straight to the devices that hold them."""

import concurrent.futures
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dsv3_jax import param_spec
from dsv3_jax.errors import raise_problems
from dsv3_jax.interop import hf_mapping, hf_read, resumable
from dsv3_jax.interop.hf_mapping import Block, Slices
from dsv3_jax.interop.hf_read import ReleasedCheckpoint
from dsv3_jax.model import transformer
from dsv3_jax.plan import memory

CHUNK = 1 << 24  # numbers that are read and converted at a time

Blocks = dict[tuple[int, ...], Block]  # of a parameter, by index


def load(
  source: ReleasedCheckpoint, specs: Any, mesh: jax.sharding.Mesh, dtype: Any
) -> tuple[param_spec.Params, jax.Array]:
  """Returns parameters and router bias; reads each device's slices only.

  `specs` are partition specs of the parameters, a tree as `transformer.specs`,
  `dtype` is their type; FP8 is dequantized, and the bias is float32.

  Raises:
    InputError: a tensor cannot be read, or holds values that are not valid; or
      devices have not the memory.
  """
  if not source.checksums:  # else the import has asked
    problems = hf_read.group_by_kind(hf_read.validate_values(source))
    raise_problems(problems, f"{source.folder}: ")
  model = source.model
  blocks: dict[str, Blocks] = {}
  for block in hf_mapping.model_blocks(model):
    blocks.setdefault(block.path, {})[block.index] = block
  param_specs = param_spec.flatten_with_paths(transformer.specs(model))
  check_memory(source.folder, sharded(transformer.specs(model), specs, mesh))
  with concurrent.futures.ThreadPoolExecutor(resumable.WORKERS) as pool:

    def load_param(
      path: str, shape: tuple[int, ...], spec: jax.P, dtype: Any
    ) -> jax.Array:
      slices = {}  # devices with the same slice share what is read

      def read_slice(index: Slices) -> np.ndarray:
        args = source, blocks[path], shape, index, dtype, pool
        if str(index) not in slices:
          slices[str(index)] = _assemble_slice(*args)
        return slices[str(index)]

      to = jax.NamedSharding(mesh, spec)
      return jax.make_array_from_callback(shape, to, read_slice)

    def submit(path: Any, spec: jax.P) -> concurrent.futures.Future:
      name = param_spec.name(path)
      shape = param_specs[name].shape
      return pairs.submit(load_param, name, shape, spec, dtype)

    # Two parameters at a time: reading one alone waits for its last chunk.
    with concurrent.futures.ThreadPoolExecutor(2) as pairs:
      futures = jax.tree.map_with_path(submit, specs)
    params = jax.tree.map(lambda future: future.result(), futures)
    bias = transformer.router_bias(model)
    if hf_mapping.BIAS in blocks:
      bias = load_param(hf_mapping.BIAS, bias.shape, jax.P(), np.float32)
    else:
      bias = jax.device_put(bias, jax.NamedSharding(mesh, jax.P()))
  return params, bias


def sharded(tree: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns the shapes of arrays or specs, divided by partition specs."""

  def leaf(a: Any, spec: jax.P) -> jax.ShapeDtypeStruct:
    to = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to)

  return jax.tree.map(leaf, tree, specs)


def check_memory(folder: pathlib.Path, params: Any) -> None:
  """Raises InputError if devices have not the memory that shapes need."""
  (sharding, *_) = (leaf.sharding for leaf in jax.tree.leaves(params))
  memory.check_fits(
    f"{folder}: the parameters in float32",
    memory.bytes_per_device(params),
    sharding.mesh.local_devices,
    "a machine with more memory, or --mesh of more devices, can read them",
  )


def _split_slice(
  source: ReleasedCheckpoint, block: Block, inner: Slices
) -> Iterator[tuple[Slices, Slices]]:
  """Yields chunks of a slice: as slices of the block, and of the slice.

  Several chunks are read at once, each in little memory of its own.
  """
  dim, dims = source.chunk_dim(block), (*block.inputs, *block.outputs)
  everything = (slice(None),) * len(dims)
  if dim is None:
    yield inner, everything
    return
  rows = range(dims[dim])[inner[dim]]
  step = max(CHUNK * dims[dim] // math.prod(dims), 1)
  for start in range(0, len(rows), step):
    chunk = rows[start : start + step]
    yield (
      (*inner[:dim], slice(chunk.start, chunk.stop), *inner[dim + 1 :]),
      (*everything[:dim], slice(start, start + step), *everything[dim + 1 :]),
    )


def _assemble_slice(
  source: ReleasedCheckpoint,
  blocks: Blocks,
  shape: tuple[int, ...],
  index: Slices,
  dtype: Any,
  pool: concurrent.futures.Executor,
) -> np.ndarray:
  """Reads the slice of a parameter that a device holds; `pool` reads chunks."""
  n_stack = len(next(iter(blocks)))
  ranges = [range(size)[s] for size, s in zip(shape, index, strict=True)]
  sizes = [len(indices) for indices in ranges]
  out = _empty_aligned(sizes, np.dtype(dtype))

  def chunks() -> Iterator[tuple[Block, Slices, tuple]]:
    for position in np.ndindex(*sizes[:n_stack]):
      stack = zip(ranges, position, strict=False)
      block = blocks[tuple(indices[i] for indices, i in stack)]
      for in_block, in_slice in _split_slice(source, block, index[n_stack:]):
        yield block, in_block, (*position, *in_slice)

  def read(chunk: tuple[Block, Slices, tuple]) -> None:
    block, in_block, in_out = chunk
    values, target = source.read_slice(block, in_block), out[in_out]
    if values.dtype == target.dtype:
      # NumPy copies types that it does not know one number at a time.
      bits = f"u{target.dtype.itemsize}"
      values, target = values.view(bits), target.view(bits)
    target[...] = values

  list(pool.map(read, chunks()))
  return out


def _empty_aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
  """Returns memory that a CPU device can use without a copy."""
  n_bytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(n_bytes + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + n_bytes].view(dtype).reshape(shape)

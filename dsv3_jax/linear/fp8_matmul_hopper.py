"""The blocked product of FP8 on Hopper GPUs, with its sums promoted.

Tensor cores keep few bits of a sum of FP8 products, so a sum over 128 of them
is taken out, scaled, and added to a float32 total in registers (section 3.3.2,
figure 7b). Three warp groups share a tile of 128 x 128: one moves operands, two
multiply 64 rows each, one of which can scale while the other multiplies. They
stay for many tiles: the next one's operands are on their way while a result
leaves. Pairs of multiprocessors with tiles below each other share what they
read of the right operand.

Mosaic, because Pallas' other way to GPUs, Triton, decides itself when operands
move and what accumulates where. On an H200 it is 1.03 to 1.36 times as fast as
the product in bfloat16 (`scripts/bench/gemm.py`, docs/fp8.md).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from dsv3_jax import varying
from dsv3_jax.linear import quantize

SLICE = 128  # of the contracted dim, between promotions; bytes of a swizzle
TILE = 128  # rows and columns of the result
GROUPS = 2  # that multiply
ROWS = TILE // GROUPS  # of each
PROCESSORS = 132  # of an H100, where there is none to ask


@dataclasses.dataclass(frozen=True)
class Tuning:
  """Tile schedule; it changes the time alone."""

  stages: int = 4  # slices on their way from memory
  paired: bool = True  # multiprocessors, where tiles of rows are even
  panel: int = 8  # tiles of rows that are computed together, for the cache


def supported() -> bool:
  """Returns whether the first device is a GPU of compute capability 9."""
  device = jax.devices()[0]
  capability = getattr(device, "compute_capability", "")
  return device.platform == "gpu" and str(capability).startswith("9.")


def blocked(
  a: quantize.BlockScaled,
  b: quantize.BlockScaled,
  dtype: jax.typing.DTypeLike = jnp.float32,
  *,
  tuning: Tuning = Tuning(),
  interpret: Any = None,
) -> Float[Array, "M N"]:
  """a @ b, [M, K] and [K, N] to [M, N].

  Tiles of a have 128 columns, those of b 128 rows. The result is float32 or
  bfloat16, its sums float32. `interpret` has parameters of Pallas' interpreter
  for GPUs, to run it on CPU.

  Raises:
    NotImplementedError: for other tiles and types, without elements, or on
      other hardware.
  """
  (m, k), n = a.codes.shape, b.codes.shape[1]
  if a.tile[1] != SLICE or b.tile[0] != SLICE:
    raise NotImplementedError(
      f"tiles {a.tile} and {b.tile}: the sum must be cut into {SLICE}"
    )
  if {a.codes.dtype, b.codes.dtype} != {jnp.dtype(jnp.uint8)}:
    raise NotImplementedError(
      f"{a.codes.dtype} and {b.codes.dtype}: both must be bytes of E4M3"
    )
  if not m * n * k:
    raise NotImplementedError(f"nothing to multiply: {m} x {k} x {n}")
  if not (interpret or supported()):
    raise NotImplementedError("the first device is no Hopper GPU")
  slices = -(-k // SLICE)
  of_rows = quantize.expand_scales(a.scales, (a.tile[0], 1), (m, slices)).T
  of_columns = quantize.expand_scales(b.scales, (1, b.tile[1]), (slices, n))
  # Both operands with the contracted dim last, as tensor cores want FP8.
  args = _padded(a.codes), _padded(b.codes.T)
  args = [jax.lax.bitcast_convert_type(bits, quantize.E4M3) for bits in args]
  if interpret:  # which knows no transposed views
    args[1] = args[1].T
  args += _padded(of_rows, 1), _padded(of_columns, 1)
  one_scale = b.tile[1] % TILE == 0  # for all columns of a tile
  out = _call(*args, GemmPlan(tuning, one_scale, interpret), dtype)
  # What a kernel returns is said to be the same on all devices.
  axes = frozenset().union(*map(varying.varying, args))
  return varying.vary(out, sorted(axes))[:m, :n]


def _padded(x: jax.Array, rows: int = TILE) -> jax.Array:
  """Pads with zeros to multiples of `rows` rows and 128 columns."""
  sizes = zip(x.shape, (rows, TILE), strict=True)
  return jnp.pad(x, [(0, -n % size) for n, size in sizes])


@dataclasses.dataclass(frozen=True)
class GemmPlan:
  """Static parameters of a kernel."""

  tuning: Tuning
  one_scale: bool  # of the right operand, in a slice of a tile
  interpret: Any

  def pair(self, rows: int) -> int:
    """Number of multiprocessors that share operands; 1 when interpreted."""
    together = self.tuning.paired and rows % 2 == 0
    return 2 if together and not self.interpret else 1

  def layout(self, x: jax.Array) -> jax.Array:
    return x if self.interpret else plgpu.layout_cast(x, plgpu.Layout.WGMMA)

  def scales(self, ref: Any, where: tuple, dim: int) -> jax.Array:
    """Scales as they lie along a dim of sums; interpreted, anyhow."""
    if self.interpret:
      return ref[where]
    layout = plgpu.Layout.WGMMA.reduce(1 - dim)
    return plgpu.load(ref, where, layout=layout, optimized=False)


def _call(a, b, of_rows, of_columns, plan, dtype):
  m, n = of_rows.shape[1], of_columns.shape[1]
  rows, columns = m // TILE, n // TILE
  pair = plan.pair(rows)
  options = {"interpret": plan.interpret} if plan.interpret else {}
  if pair > 1:
    options |= {"cluster": (pair,), "cluster_names": ("pair",)}
  processors = getattr(jax.devices()[0], "core_count", PROCESSORS)
  workers = max(1, min(processors, rows * columns) // pair)
  return plgpu.kernel(
    functools.partial(_kernel, plan=plan),
    out_type=jax.ShapeDtypeStruct((m, n), dtype),
    grid=(workers,),
    grid_names=("worker",),
    num_threads=GROUPS + 1,
    thread_name="group",
    **options,
  )(a, b, of_rows, of_columns)


def _in_shared_memory(dtype: jax.typing.DTypeLike) -> tuple:
  """Transforms of a matrix in shared memory: rows of 128 bytes, swizzled."""
  across = 128 // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, across)), plgpu.SwizzleTransform(128)


def _pipeline(plan: GemmPlan, slices: int, pair: int):
  """Brings slices of both operands and of their scales."""
  matrix = functools.partial(
    plgpu.BlockSpec, transforms=_in_shared_memory(quantize.E4M3)
  )
  of_a = matrix((TILE, SLICE), lambda k: (0, k))
  of_scales = plgpu.BlockSpec((1, TILE), lambda k: (k, 0))
  if plan.interpret:
    of_b = matrix((SLICE, TILE), lambda k: (k, 0))
  else:
    shared = ("pair",) if pair > 1 else ()
    of_b = matrix((TILE, SLICE), lambda k: (0, k), collective_axes=shared)
  return functools.partial(
    plgpu.emit_pipeline_warp_specialized,
    grid=(slices,),
    in_specs=[of_a, of_b, of_scales, of_scales],
    memory_registers=40,
    max_concurrent_steps=min(plan.tuning.stages, slices),
    wg_axis="group",
    num_compute_wgs=GROUPS,
  )


def _add(plan, own, left, right, row_scales, column_scales, total):
  """Adds the product of a slice; each group has rows of its own."""

  def along(x, dim):
    return jax.lax.broadcast_in_dim(x, (ROWS, TILE), (dim,))

  # Read before the product starts: that it is done is the only sign that all
  # of the group have read, and may be overwritten.
  scale = plan.scales(row_scales, (0, own), 0)
  if plan.one_scale:
    scale = along(scale * column_scales[0, 0], 0)
  else:
    of_columns = plan.scales(column_scales, (0, slice(None)), 1)
    scale = along(scale, 0) * along(of_columns, 1)
  right = right if plan.interpret else plgpu.transpose_ref(right, (1, 0))

  def product(sums):
    plgpu.wgmma(sums, left.at[own], right)
    return sums[...]

  sums = pl.run_scoped(product, plgpu.ACC((ROWS, TILE), jnp.float32))
  return total + sums * scale


def _place(step, rows, columns, panel):
  """Row and column of the tile of a step: down panels of some rows."""
  first = step // (panel * columns) * panel
  high = jnp.minimum(panel, rows - first)
  within = step - first * columns
  return first + within % high, within // high


def _kernel(a, b, of_rows, of_columns, out, *, plan):
  """A worker's tiles, one after the other."""
  rows, columns = out.shape[0] // TILE, out.shape[1] // TILE
  pair = plan.pair(rows)
  pipeline = _pipeline(plan, of_rows.shape[0], pair)
  group = jax.lax.axis_index("group")
  own = pl.ds(group * ROWS, ROWS)

  def tile(i, j, held, leaving):
    here, there = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)

    def compute(over_slices):
      total = jnp.zeros((ROWS, TILE), jnp.float32)
      total = over_slices(plan.layout(total))
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's
      leaving[group] = total.astype(out.dtype)
      plgpu.commit_smem()
      mine = pl.ds(i * TILE + group * ROWS, ROWS)
      plgpu.copy_smem_to_gmem(leaving.at[group], out.at[mine, there])

    def add(_, *refs):
      return _add(plan, own, *refs)

    pipeline(add, compute_context=compute)(
      a.at[here],
      b.at[:, there] if plan.interpret else b.at[there],
      of_rows.at[:, here],
      of_columns.at[:, there],
      allocations=held,
    )

  def work(held, leaving):
    # Pairs take tiles below each other.
    size = rows // pair, columns, max(1, plan.tuning.panel // pair)

    @plgpu.nd_loop((size[0] * size[1],), collective_axes="worker")
    def _(loop):
      i, j = _place(*loop.index, *size)
      if pair > 1:
        i = i * pair + jax.lax.axis_index("pair")
      tile(i, j, held, leaving)

    plgpu.wait_smem_to_gmem(0)

  def unused(*_):
    return None

  # Held for all tiles: else groups would wait for each other between them.
  held = pipeline(unused, compute_context=unused).get_allocations(
    a, b, of_rows, of_columns
  )
  layout = _in_shared_memory(out.dtype)
  leaving = plgpu.SMEM((GROUPS, ROWS, TILE), out.dtype, transforms=layout)
  pl.run_scoped(work, held, leaving, collective_axes="group")

"""The blocked product of FP8 on Hopper GPUs, with its sums promoted.

Tensor cores keep few bits of a sum of FP8 products, so a sum over 128 of them
is taken out, scaled, and added to a float32 total in registers (section 3.3.2,
figure 7b). Three warp groups share a tile of 128 x 128: one moves operands, two
multiply 64 rows each, one of which can scale while the other multiplies. They
stay for many tiles: the next one's operands are on their way while a result
leaves. Pairs of multiprocessors with tiles below each other share what they
read of the right operand.

Mosaic, because Pallas' other way to GPUs, Triton, decides itself when operands
move and what accumulates where. Run by an interpreter, and compiled for an H100
without one; not yet measured.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.model import tiles

SLICE = 128  # of the contracted dim, between promotions; bytes of a swizzle
TILE = 128  # rows and columns of the result
GROUPS = 2  # that multiply
ROWS = TILE // GROUPS  # of each
PROCESSORS = 132  # of an H100, where there is none to ask


@dataclasses.dataclass(frozen=True)
class Tuning:
  """What changes time alone."""

  stages: int = 4  # slices on their way from memory
  paired: bool = True  # multiprocessors, where tiles of rows are even
  panel: int = 8  # tiles of rows that are made together, to reuse the cache


def supported() -> bool:
  """Whether the first device is a GPU of compute capability 9."""
  device = jax.devices()[0]
  capability = getattr(device, "compute_capability", "")
  return device.platform == "gpu" and str(capability).startswith("9.")


def blocked(
    a: tiles.Tiled,
    b: tiles.Tiled,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    tuning: Tuning = Tuning(),
    interpret: Any = None,
) -> jax.Array:
  """a @ b, [M, K] and [K, N] to [M, N].

  Args:
    a: tiles of 128 columns.
    b: tiles of 128 rows.
    dtype: of the result, float32 or bfloat16; sums are float32.
    tuning: how it is cut.
    interpret: parameters of Pallas' interpreter for GPUs, to run it on CPU.

  Raises:
    NotImplementedError: for other tiles, without elements, or other hardware.
  """
  (m, k), n = a.bits.shape, b.bits.shape[1]
  if a.tile[1] != SLICE or b.tile[0] != SLICE:
    raise NotImplementedError(
        f"tiles {a.tile} and {b.tile}: the sum must be cut into {SLICE}"
    )
  if not m * n * k:
    raise NotImplementedError(f"nothing to multiply: {m} x {k} x {n}")
  if not (interpret or supported()):
    raise NotImplementedError("the first device is no Hopper GPU")
  slices = -(-k // SLICE)
  of_rows = tiles.spread(a.scales, (a.tile[0], 1), (m, slices)).T
  of_columns = tiles.spread(b.scales, (1, b.tile[1]), (slices, n))
  # Both operands with the contracted dim last, as tensor cores want FP8.
  args = _padded(a.bits), _padded(b.bits.T)
  args = [jax.lax.bitcast_convert_type(bits, tiles.E4M3) for bits in args]
  if interpret:  # which knows no transposed views
    args[1] = args[1].T
  one_scale = b.tile[1] % TILE == 0  # for all columns of a tile
  out = _call(
      *args,
      _padded(of_rows, 1),
      _padded(of_columns, 1),
      _Plan(tuning, one_scale, interpret),
      dtype,
  )
  return out[:m, :n]


def _padded(x: jax.Array, rows: int = TILE) -> jax.Array:
  """With zeros to whole tiles of some rows and 128 columns."""
  sizes = zip(x.shape, (rows, TILE), strict=True)
  return jnp.pad(x, [(0, -n % size) for n, size in sizes])


@dataclasses.dataclass(frozen=True)
class _Plan:
  tuning: Tuning
  one_scale: bool
  interpret: Any


def _call(a, b, of_rows, of_columns, plan, dtype):
  (slices, m), n = of_rows.shape, of_columns.shape[1]
  rows, columns = m // TILE, n // TILE
  how, pair = {}, 1
  if plan.interpret:  # which knows no pairs
    how["interpret"] = plan.interpret
  elif plan.tuning.paired and rows % 2 == 0:
    pair = 2
    how |= {"cluster": (pair,), "cluster_names": ("pair",)}
  processors = getattr(jax.devices()[0], "core_count", PROCESSORS)
  workers = min(processors, rows * columns) // pair
  return plgpu.kernel(
      functools.partial(_kernel, plan=plan, pair=pair, slices=slices),
      out_type=jax.ShapeDtypeStruct((m, n), dtype),
      grid=(workers,),
      grid_names=("worker",),
      num_threads=GROUPS + 1,
      thread_name="group",
      **how,
  )(a, b, of_rows, of_columns)


def _operand(dtype: jax.typing.DTypeLike) -> tuple:
  """How a matrix lies in shared memory: rows of 128 bytes, swizzled."""
  across = 128 // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, across)), plgpu.SwizzleTransform(128)


def _place(step, rows, columns, panel):
  """Row and column of the tile of a step: down panels of some rows."""
  first = step // (panel * columns) * panel
  high = jnp.minimum(panel, rows - first)
  within = step - first * columns
  return first + within % high, within // high


def _kernel(a, b, of_rows, of_columns, out, *, plan, pair, slices):
  """A worker's tiles, one after the other."""
  interpret = plan.interpret
  rows, columns = out.shape[0] // TILE, out.shape[1] // TILE
  group = jax.lax.axis_index("group")
  own = pl.ds(group * ROWS, ROWS)

  def scales(ref, where, dim):
    """As they lie along a dim of the accumulator."""
    if interpret:
      return ref[where]
    layout = plgpu.Layout.WGMMA.reduce(1 - dim)
    return plgpu.load(ref, where, layout=layout, optimized=False)

  def along(x, dim):
    return jax.lax.broadcast_in_dim(x, (ROWS, TILE), (dim,))

  def add(_, left, right, row_scales, column_scales, total):
    """Adds the product of a slice."""
    right = right if interpret else plgpu.transpose_ref(right, (1, 0))

    def product(sums):
      plgpu.wgmma(sums, left.at[own], right)
      return sums[...]

    of_rows = scales(row_scales, (0, own), 0)
    if plan.one_scale:
      of_all = along(of_rows * column_scales[0, 0], 0)
    else:
      of_all = along(of_rows, 0) * along(
          scales(column_scales, (0, slice(None)), 1), 1
      )
    sums = pl.run_scoped(product, plgpu.ACC((ROWS, TILE), jnp.float32))
    return total + sums * of_all

  matrix = functools.partial(
      plgpu.BlockSpec, (TILE, SLICE), transforms=_operand(tiles.E4M3)
  )
  of_a, of_scales = (
      matrix(lambda k: (0, k)),
      plgpu.BlockSpec((1, TILE), lambda k: (k, 0)),
  )
  shared = ("pair",) if pair > 1 else ()
  of_b = matrix(lambda k: (0, k), collective_axes=shared)
  if interpret:
    of_b = matrix(lambda k: (k, 0))
  pipeline = functools.partial(
      plgpu.emit_pipeline_warp_specialized,
      grid=(slices,),
      in_specs=[of_a, of_b, of_scales, of_scales],
      memory_registers=40,
      max_concurrent_steps=min(plan.tuning.stages, slices),
      wg_axis="group",
      num_compute_wgs=GROUPS,
  )
  unused = lambda *_: None
  allocations = pipeline(unused, compute_context=unused).get_allocations(
      a, b, of_rows, of_columns
  )
  leaving = plgpu.SMEM(
      (GROUPS, ROWS, TILE), out.dtype, transforms=_operand(out.dtype)
  )

  def work(held, leaving):
    @plgpu.nd_loop((rows // pair * columns,), collective_axes="worker")
    def _(loop):
      i, j = _place(
          loop.index[0], rows // pair, columns, plan.tuning.panel // pair
      )
      if pair > 1:
        i = i * pair + jax.lax.axis_index("pair")
      rows_here, columns_here = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)

      def compute(over_slices):
        total = jnp.zeros((ROWS, TILE), jnp.float32)
        if not interpret:
          total = plgpu.layout_cast(total, plgpu.Layout.WGMMA)
        total = over_slices(total)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result
        leaving[group] = total.astype(out.dtype)
        plgpu.commit_smem()
        there = pl.ds(i * TILE + group * ROWS, ROWS), columns_here
        plgpu.copy_smem_to_gmem(leaving.at[group], out.at[there])

      pipeline(add, compute_context=compute)(
          a.at[rows_here],
          b.at[:, columns_here] if interpret else b.at[columns_here],
          of_rows.at[:, rows_here],
          of_columns.at[:, columns_here],
          allocations=held,
      )

    plgpu.wait_smem_to_gmem(0)

  pl.run_scoped(work, allocations, leaving, collective_axes="group")

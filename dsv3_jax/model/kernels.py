"""The blocked product of FP8 on Hopper GPUs, with its sums promoted.

Tensor cores keep few bits of a sum of FP8 products, so a sum over 128 of them
is taken out, scaled, and added to a float32 total in registers (section 3.3.2,
figure 7b). Three warp groups share a tile of 128 x 128: one moves operands, two
multiply 64 rows each, one of which can scale while the other multiplies.

Run by the interpreter and lowered in tests; not yet measured on a GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.model import tiles

SLICE = 128  # of the contracted dim, between promotions; bytes of a swizzle
TILE = 128  # rows and columns of the result
ROWS = TILE // 2  # of a warp group
STAGES = 4  # slices on their way from memory

_OPERAND = plgpu.TilingTransform((8, SLICE)), plgpu.SwizzleTransform(SLICE)


def supported() -> bool:
  """Whether the first device is a GPU of compute capability 9."""
  device = jax.devices()[0]
  capability = getattr(device, "compute_capability", "")
  return device.platform == "gpu" and str(capability).startswith("9.")


def blocked(
    a: tiles.Tiled, b: tiles.Tiled, *, interpret: Any = None
) -> jax.Array:
  """a @ b, [M, K] and [K, N] to [M, N] f32.

  Args:
    a: tiles of 128 columns.
    b: tiles of 128 rows.
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
  out = _call(*args, _padded(of_rows, 1), _padded(of_columns, 1), interpret)
  return out[:m, :n]


def _padded(x: jax.Array, rows: int = TILE) -> jax.Array:
  """With zeros to whole tiles of some rows and 128 columns."""
  sizes = zip(x.shape, (rows, TILE), strict=True)
  return jnp.pad(x, [(0, -n % size) for n, size in sizes])


def _call(a, b, of_rows, of_columns, interpret):
  (slices, m), n = of_rows.shape, of_columns.shape[1]
  how = {"interpret": interpret} if interpret else {}
  return plgpu.kernel(
      functools.partial(_kernel, slices=slices, interpret=bool(interpret)),
      out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
      grid=(m // TILE, n // TILE),
      grid_names=("rows", "columns"),
      num_threads=3,
      thread_name="group",
      **how,
  )(a, b, of_rows, of_columns)


def _kernel(a, b, of_rows, of_columns, out, *, slices, interpret):
  """A tile of the result. The interpreter knows neither layouts nor views."""
  i, j, group = map(jax.lax.axis_index, ("rows", "columns", "group"))
  rows, columns = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)
  own = pl.ds(group * ROWS, ROWS)

  def vector(ref, where, dim):
    """Scales, as they lie along a dim of the accumulator."""
    if not interpret:
      layout = plgpu.Layout.WGMMA.reduce(1 - dim)
      scales = plgpu.load(ref, where, layout=layout, optimized=False)
    else:
      scales = ref[where]
    return jax.lax.broadcast_in_dim(scales, (ROWS, TILE), (dim,))

  def add(_, left, right, row_scales, column_scales, total):
    """Adds the product of a slice."""
    if not interpret:
      right = plgpu.transpose_ref(right, (1, 0))

    def product(sums):
      plgpu.wgmma(sums, left.at[own], right)
      return sums[...]

    sums = pl.run_scoped(product, plgpu.ACC((ROWS, TILE), jnp.float32))
    sums = sums * vector(row_scales, (0, own), 0)
    return total + sums * vector(column_scales, (0, slice(None)), 1)

  def compute(over_slices):
    total = jnp.zeros((ROWS, TILE), jnp.float32)
    if not interpret:
      total = plgpu.layout_cast(total, plgpu.Layout.WGMMA)
    out[pl.ds(i * TILE + group * ROWS, ROWS), columns] = over_slices(total)

  operand = functools.partial(plgpu.BlockSpec, transforms=_OPERAND)
  of_a = operand((TILE, SLICE), lambda k: (0, k))
  of_scales = plgpu.BlockSpec((1, TILE), lambda k: (k, 0))
  if interpret:
    of_b = plgpu.BlockSpec((SLICE, TILE), lambda k: (k, 0))
    b = b.at[:, columns]
  else:
    of_b, b = of_a, b.at[columns]
  plgpu.emit_pipeline_warp_specialized(
      add,
      grid=(slices,),
      in_specs=[of_a, of_b, of_scales, of_scales],
      memory_registers=40,
      max_concurrent_steps=min(STAGES, slices),
      wg_axis="group",
      num_compute_wgs=2,
      compute_context=compute,
  )(a.at[rows], b, of_rows.at[:, rows], of_columns.at[:, columns])

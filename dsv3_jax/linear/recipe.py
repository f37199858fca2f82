"""What the network computes in: copies of the float32 master parameters."""

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import linear as linear_lib
from dsv3_jax.linear import quantize

_KEPT = ("norm", "router")  # read in float32 whatever the recipe (section 3.3)

Slices = tuple[tuple[int, tuple[str, ...]], ...]  # (dim, mesh axes) of a leaf


def compute_params(
  params: param_spec.Params,
  specs: param_spec.Specs,
  how: config.Precision,
  slices: Any = None,
) -> param_spec.Params:
  """Parameters as the forward pass reads them, made once an optimizer step.

  With `bf16` and `fp8` all are bfloat16 but norm gains and router centroids.
  With `fp8` the weights that `how.fp8` names are `gemm.Fp8`.

  Args:
    params: float32 master parameters; inside a `shard_map`, slices of them.
    specs: of the parameters.
    how: the recipe.
    slices: of each parameter, the dims that it is a slice of, and over which
      mesh axes; None where all are whole.
  """
  if how.recipe == "fp32":
    return params
  chosen = fp8_paths(specs, how)

  def leaf(path, w, spec, slices=()):
    name = param_spec.name(path)
    if name in chosen:
      return _fp8(w, spec, how, slices)
    return w if name.endswith(_KEPT) else w.astype(jnp.bfloat16)

  trees = (params, specs) if slices is None else (params, specs, slices)
  return jax.tree.map_with_path(leaf, *trees)


def fp8_paths(specs: param_spec.Specs, how: config.Precision) -> frozenset[str]:
  """Paths of the weights in FP8: of linear layers, and named by the recipe."""
  if how.recipe != "fp8":
    return frozenset()
  linear = [path for path, spec in param_spec.paths(specs).items() if spec.n_in]
  return frozenset(
    path for pattern in how.patterns for path in fnmatch.filter(linear, pattern)
  )


def problems(specs: param_spec.Specs, how: config.Precision) -> list[str]:
  """What is wrong with an FP8 recipe for a model, a line each."""
  if how.recipe != "fp8":
    return []
  linear = {p: spec for p, spec in param_spec.paths(specs).items() if spec.n_in}
  found = [
    f"Precision.fp8={pattern!r}: names no weight of a linear layer; there are"
    f" {', '.join(linear)}"
    for pattern in how.patterns or ("",)
    if not fnmatch.filter(linear, pattern)
  ]
  sizes = {path: min(linear[path].matrix) for path in fp8_paths(specs, how)}
  path = min(sizes, key=sizes.get, default=None)
  if path and sizes[path] < how.tile:
    found.append(
      f"Precision.tile={how.tile}: {path} has {sizes[path]} rows or columns,"
      f" which is less; set precision.tile to {sizes[path]} or less, or name"
      " in precision.fp8 what is larger"
    )
  return found


def _fp8(
  w: jax.Array,
  spec: param_spec.ParamSpec,
  how: config.Precision,
  slices: Slices,
) -> linear_lib.Fp8:
  """A weight, or the slice of one that is here, with its copy in E4M3."""
  flat, largest, spread = _measured(w, spec, how.tile, slices)
  scales = quantize.scale(largest, how.scales, quantize.LARGEST)
  bits = quantize.encode(flat, spread(scales)).reshape(w.shape)
  # Of a stack of layers, those of each; of experts, of all together.
  layers = w.shape[:1] if spec.axes[0] == "layers" else ()
  shape = *layers, len(linear_lib.CLASSES), len(quantize.COUNTED)
  counts = jnp.zeros_like(w, shape=shape)
  return linear_lib.Fp8(linear_lib.Trained(w, counts), bits, scales, how)


def weight_counts(
  params: param_spec.Params,
  specs: param_spec.Specs,
  how: config.Precision,
  slices: Any = None,
) -> dict[str, jax.Array]:
  """What quantization does to each weight in FP8: by path, [6] f32.

  Args:
    params, specs, how, slices: as `compute_params`.

  Returns:
    `tiles.COUNTED` of the whole weight, all layers and experts together.
  """
  chosen, found = fp8_paths(specs, how), {}

  def leaf(path, w, spec, slices=()):
    name = param_spec.name(path)
    if name not in chosen:
      return
    flat, largest, spread = _measured(w, spec, how.tile, slices)
    scales = spread(quantize.scale(largest, how.scales, quantize.LARGEST))
    parts = (
      quantize.tile_counts(largest),
      quantize.element_counts(flat, quantize.encode(flat, scales), scales),
    )
    # The devices that hold slices of a block agree on its magnitude.
    whole = [_sum(part) for part in parts]
    found[name] = jnp.concatenate(whole)

  trees = (params, specs) if slices is None else (params, specs, slices)
  jax.tree.map_with_path(leaf, *trees)
  return found


def _sum(x: jax.Array) -> jax.Array:
  """Over all devices that differ in it."""
  axes = sorted(varying.varying(x))
  return jax.lax.psum(x, axes) if axes else x


def _measured(
  w: jax.Array, spec: param_spec.ParamSpec, tile: int, slices: Slices
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
  """A weight as matrices, the largest magnitude of each block, and a function
  from numbers of blocks to numbers of elements.

  Blocks are those of the whole, of which the weight may be a slice.
  """
  n_stack = spec.n_stack
  stack, n_in = w.shape[:n_stack], n_stack + spec.n_in
  inside = {dim: axes for dim, axes in slices if dim >= n_stack}
  flat = w.reshape(*stack, math.prod(w.shape[n_stack:n_in]), -1)
  if not inside:
    square = tile, tile
    spread = lambda a: quantize.spread(a, square, flat.shape)
    return flat, quantize.magnitude(flat, square), spread
  of_row, n_rows = _blocks(w.shape, range(n_stack, n_in), inside, tile)
  of_column, n_columns = _blocks(w.shape, range(n_in, w.ndim), inside, tile)
  here = quantize.ordered(flat)
  largest = jnp.zeros_like(here, shape=(*stack, n_rows, of_column.size))
  largest = largest.at[..., of_row, :].max(here)
  blocks = jnp.zeros_like(here, shape=(*stack, n_rows, n_columns))
  blocks = blocks.at[..., of_column].max(largest)
  axes = tuple(axis for group in inside.values() for axis in group)
  magnitude = quantize.from_ordered(jax.lax.pmax(blocks, axes))
  return flat, magnitude, lambda a: a[..., of_row, :][..., of_column]


def _blocks(
  shape: tuple[int, ...],
  dims: range,
  inside: Mapping[int, tuple[str, ...]],
  tile: int,
) -> tuple[jax.Array, int]:
  """The block of each row, or column, that is here, and how many there are.

  Dims together are rows (or columns); a slice of one has an offset.
  """
  index, total = jnp.zeros(1, jnp.int32), 1
  for dim in dims:
    n, axes = shape[dim], inside.get(dim, ())
    whole = n * jax.lax.axis_size(axes) if axes else n
    here = jnp.arange(n) + (jax.lax.axis_index(axes) * n if axes else 0)
    index = (index[:, None] * whole + here[None]).reshape(-1)
    total *= whole
  return index // tile, -(-total // tile)


# --- what has a gradient ---


def _is_weight(leaf: Any) -> bool:
  return isinstance(leaf, linear_lib.Fp8)


def trained(params: param_spec.Params) -> Any:
  """What the loss has a gradient for: the parameters, `Trained` for FP8."""
  return jax.tree.map(linear_lib.trained, params, is_leaf=_is_weight)


def joined(new: Any, params: param_spec.Params) -> param_spec.Params:
  """The parameters, with what is trained replaced."""

  def leaf(w, new):
    return w.replace(trained=new) if _is_weight(w) else new

  return jax.tree.map(leaf, params, new, is_leaf=_is_weight)


def gradients(
  of_trained: Any,
) -> tuple[param_spec.Params, dict[str, dict[str, jax.Array]]]:
  """Gradients of the masters, and what was counted by class and path.

  Args:
    of_trained: the gradient of what `trained` returned.

  Returns:
    Gradients, and for each of `gemm.CLASSES` [..., 6] f32 by path, for each
    layer; nothing without weights in FP8.
  """
  is_leaf = lambda leaf: isinstance(leaf, linear_lib.Trained)
  masters = jax.tree.map(
    lambda g: g.master if is_leaf(g) else g, of_trained, is_leaf=is_leaf
  )
  counts = {
    param_spec.name(path): leaf.counts
    for path, leaf in jax.tree.leaves_with_path(of_trained, is_leaf=is_leaf)
    if is_leaf(leaf)
  }
  by_class = {
    kind: {path: n[..., i, :] for path, n in counts.items()}
    for i, kind in enumerate(linear_lib.CLASSES)
  }
  return masters, by_class if counts else {}

"""Precision recipes: parameters in BF16 or FP8 from float32 masters."""

import fnmatch
import itertools
import math
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import linear as linear_lib
from dsv3_jax.linear import quantize

_FLOAT32 = ("norm", "router")  # in float32 whatever the recipe (section 3.3)
_SHARED = ("embed", "head")  # the main model and all MTP modules read them

Slices = tuple[tuple[int, tuple[str, ...]], ...]  # (dim, mesh axes) of a leaf


def compute_params(
  params: param_spec.Params,
  specs: param_spec.Specs,
  precision: config.Precision,
  slices: Any = None,
  uncast: Container[str] = (),
) -> param_spec.Params:
  """Converts float32 masters to a recipe, once an optimizer step.

  With `bf16` and `fp8` all are bfloat16 except norm scales and router
  centroids. With `fp8` the weights that `precision.fp8` names are `Fp8Weight`.
  Inside a `shard_map` parameters may be slices; `slices` then has the sliced
  dims of each, and over which mesh axes. Groups of layers that are `uncast`
  stay float32 but for their weights in FP8.
  """
  if precision.recipe == "fp32":
    return params
  chosen = fp8_paths(specs, precision)

  def leaf(path, w, spec, slices=()):
    name = param_spec.name(path)
    if name in chosen:
      return _fp8(w, spec, precision, slices)
    group = name.partition("/")[0]
    return w if group in uncast else w.astype(dtype(name, precision))

  trees = (params, specs) if slices is None else (params, specs, slices)
  return jax.tree.map_with_path(leaf, *trees)


def dtype(path: str, precision: config.Precision) -> jax.typing.DTypeLike:
  """The dtype in which a parameter that is not in FP8 is computed with."""
  is_float32 = precision.recipe == "fp32" or path.endswith(_FLOAT32)
  return jnp.float32 if is_float32 else jnp.bfloat16


def fp8_paths(
  specs: param_spec.Specs, precision: config.Precision
) -> frozenset[str]:
  """Paths of the weights in FP8: linear layers that the recipe names."""
  if precision.recipe != "fp8":
    return frozenset()
  linear = _linear_specs(specs)
  matches = (fnmatch.filter(linear, p) for p in precision.patterns)
  return frozenset(itertools.chain.from_iterable(matches))


def _linear_specs(specs: param_spec.Specs) -> dict[str, param_spec.ParamSpec]:
  """Specs of the weights of linear layers, by path."""
  leaves = param_spec.flatten_with_paths(specs).items()
  return {path: spec for path, spec in leaves if spec.n_contracted}


def validate(specs: param_spec.Specs, precision: config.Precision) -> list[str]:
  """Problems of an FP8 recipe for a model, one line each."""
  if precision.recipe != "fp8":
    return []
  linear = _linear_specs(specs)
  problems = [
    f"Precision.fp8={pattern!r}: names no weight of a linear layer; there are"
    f" {', '.join(linear)}"
    for pattern in precision.patterns or ("",)
    if not fnmatch.filter(linear, pattern)
  ]
  chosen = fp8_paths(specs, precision)
  sizes = {path: min(linear[path].matrix) for path in chosen}
  path = min(sizes, key=sizes.get, default=None)
  if path and sizes[path] < precision.tile:
    problems.append(
      f"Precision.tile={precision.tile}: {path} has {sizes[path]} rows or"
      f" columns, which is less; set precision.tile to {sizes[path]} or less,"
      " or name in precision.fp8 what is larger"
    )
  return problems


def _fp8(
  w: jax.Array,
  spec: param_spec.ParamSpec,
  precision: config.Precision,
  slices: Slices,
) -> linear_lib.Fp8Weight:
  """A weight, or this device's slice of one, with its copy in E4M3."""
  flat, absmax, expand = _block_absmax(w, spec, precision.tile, slices)
  scales = quantize.scale(absmax, precision.scales, quantize.E4M3_MAX)
  codes = quantize.encode(flat, expand(scales)).reshape(w.shape)
  # Counts of each layer of a stack; of all experts together.
  layers = w.shape[:1] if spec.axes[0] == "layers" else ()
  shape = *layers, len(linear_lib.CLASSES), len(quantize.COUNTERS)
  counts = jnp.zeros_like(w, shape=shape)
  return linear_lib.Fp8Weight(
    linear_lib.MasterHandle(w, counts), codes, scales, precision
  )


def weight_counts(
  params: param_spec.Params,
  specs: param_spec.Specs,
  precision: config.Precision,
  slices: Any = None,
) -> dict[str, jax.Array]:
  """Counts the quantization of each weight in FP8: {path: [6] f32}.

  They are `quantize.COUNTERS` of the unsliced weight, all layers and experts
  together; the arguments are those of `compute_params`.
  """
  chosen, counts = fp8_paths(specs, precision), {}

  def leaf(path, w, spec, slices=()):
    name = param_spec.name(path)
    if name not in chosen:
      return
    flat, absmax, expand = _block_absmax(w, spec, precision.tile, slices)
    scales = quantize.scale(absmax, precision.scales, quantize.E4M3_MAX)
    scales = expand(scales)
    codes = quantize.encode(flat, scales)
    of_elements = quantize.count_elements(flat, codes, scales)
    # The devices that hold slices of a block agree on its magnitude.
    of_tiles = quantize.count_tiles(absmax)
    counts[name] = jnp.concatenate([_sum(of_tiles), _sum(of_elements)])

  trees = (params, specs) if slices is None else (params, specs, slices)
  jax.tree.map_with_path(leaf, *trees)
  return counts


def _sum(x: jax.Array) -> jax.Array:
  """Sums over all devices whose values differ."""
  axes = sorted(varying.varying(x))
  return jax.lax.psum(x, axes) if axes else x


def _block_absmax(
  w: jax.Array, spec: param_spec.ParamSpec, tile: int, slices: Slices
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
  """Largest magnitude of each block of a weight, which may be a slice.

  Returns:
    The weight as matrices; the magnitudes, of the blocks of the unsliced
    weight; and a function that expands numbers of blocks to elements.
  """
  n_stack = spec.n_stack
  stack, first_output = w.shape[:n_stack], n_stack + spec.n_contracted
  inside = {dim: axes for dim, axes in slices if dim >= n_stack}
  flat = w.reshape(*stack, math.prod(w.shape[n_stack:first_output]), -1)
  if not inside:
    square = tile, tile

    def expand(scales):
      return quantize.expand_scales(scales, square, flat.shape)

    return flat, quantize.magnitude(flat, square), expand
  dims = range(n_stack, first_output), range(first_output, w.ndim)
  (of_row, n_rows), (of_column, n_columns) = (
    _blocks(w.shape, each, inside, tile) for each in dims
  )
  local = quantize.ordered(flat)
  by_row = jnp.zeros_like(local, shape=(*stack, n_rows, of_column.size))
  by_row = by_row.at[..., of_row, :].max(local)
  blocks = jnp.zeros_like(local, shape=(*stack, n_rows, n_columns))
  blocks = blocks.at[..., of_column].max(by_row)
  axes = tuple(axis for group in inside.values() for axis in group)
  magnitude = quantize.from_ordered(jax.lax.pmax(blocks, axes))
  return flat, magnitude, lambda a: a[..., of_row, :][..., of_column]


def _blocks(
  shape: tuple[int, ...],
  dims: range,
  inside: Mapping[int, tuple[str, ...]],
  tile: int,
) -> tuple[jax.Array, int]:
  """The block of each local row (or column), and the number of all blocks.

  The dims together are the rows (or columns); a sliced dim has an offset.
  """
  index, total = jnp.zeros(1, jnp.int32), 1
  for dim in dims:
    n, axes = shape[dim], inside.get(dim, ())
    size = n * jax.lax.axis_size(axes) if axes else n
    local = jnp.arange(n) + (jax.lax.axis_index(axes) * n if axes else 0)
    index = (index[:, None] * size + local[None]).reshape(-1)
    total *= size
  return index // tile, -(-total // tile)


def _is_weight(leaf: Any) -> bool:
  return isinstance(leaf, linear_lib.Fp8Weight)


def differentiable(params: param_spec.Params) -> Any:
  """The tree to differentiate: parameters, and `MasterHandle` for FP8.

  Embedding and head are float32 in it, cast where they are read: a gradient has
  the type of its array, and theirs are sums over tokens and over modules.
  """

  def leaf(path, w):
    if param_spec.name(path) in _SHARED:
      return w.astype(jnp.float32)
    return linear_lib.differentiable(w)

  return jax.tree.map_with_path(leaf, params, is_leaf=_is_weight)


def with_differentiable(
  new: Any, params: param_spec.Params
) -> param_spec.Params:
  """The parameters with their differentiable parts replaced."""

  def leaf(w, new):
    return w.replace(handle=new) if _is_weight(w) else new

  return jax.tree.map(leaf, params, new, is_leaf=_is_weight)


def split_gradients(
  grads: Any,
) -> tuple[param_spec.Params, dict[str, dict[str, jax.Array]]]:
  """Splits gradients into those of the masters and counts of quantization.

  Counts are {class: {path: [..., 6] f32, per layer}} for each of
  `linear.CLASSES`; empty without weights in FP8.
  """

  def is_leaf(leaf):
    return isinstance(leaf, linear_lib.MasterHandle)

  masters = jax.tree.map(
    lambda g: g.master if is_leaf(g) else g, grads, is_leaf=is_leaf
  )
  counts = {
    param_spec.name(path): leaf.counts
    for path, leaf in jax.tree.leaves_with_path(grads, is_leaf=is_leaf)
    if is_leaf(leaf)
  }
  by_class = {
    name: {path: n[..., i, :] for path, n in counts.items()}
    for i, name in enumerate(linear_lib.CLASSES)
  }
  return masters, by_class if counts else {}

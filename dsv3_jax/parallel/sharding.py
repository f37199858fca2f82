"""Sharding of parameters: rules by logical axis, and their collectives.

A layout divides some dims of a parameter over mesh axes for good (experts,
heads), and stores what remains in shards along further axes. These shards are
all-gathered before use: once a step (ZeRO-1 shards master weights and optimizer
state) or layer by layer (FSDP).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import param_spec
from dsv3_jax.linear import linear
from dsv3_jax.parallel import device_mesh
from dsv3_jax.parallel.device_mesh import Axes, Sizes


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Rules of a layout; a mesh axis of size 1 has no effect."""

  # (logical axis, mesh axes that divide it)
  logical_to_mesh: tuple[tuple[str, Axes], ...] = (
    ("experts", device_mesh.EXPERTS),
    ("heads", ("model",)),
    ("ffn", ("model",)),
  )
  fsdp_axes: Axes = ()  # mesh axes that shard what is not divided
  gather_by_layer: bool = False  # all-gather before each layer, not each step

  @property
  def by_layer(self) -> tuple[str, ...]:
    """Groups of parameters that are all-gathered layer by layer."""
    return ("dense", "moe", "mtp") if self.gather_by_layer else ()


LAYOUTS = {
  "replicated": ShardingRules(),
  "zero1": ShardingRules(fsdp_axes=device_mesh.ROWS),
  "fsdp": ShardingRules(fsdp_axes=device_mesh.ROWS, gather_by_layer=True),
}


@dataclasses.dataclass(frozen=True)
class ParamSharding:
  """Sharding of one parameter; a leaf of a tree, not a pytree."""

  dims: tuple[Axes, ...]  # mesh axes of each dim
  # (dim, mesh axes) that are all-gathered before use
  fsdp_dims: tuple[tuple[int, Axes], ...]
  # The type that float32 arrays are cast to before they are all-gathered
  dtype: jax.typing.DTypeLike | None = None

  @property
  def spec(self) -> jax.P:
    """The same as a PartitionSpec."""
    return device_mesh.spec(*self.dims)

  @property
  def axes(self) -> frozenset[str]:
    """All mesh axes that the parameter is divided over."""
    return frozenset(axis for dim in self.dims for axis in dim)

  @property
  def pipe_dim(self) -> int | None:
    """The dim that is sharded over `pipe`."""
    return next((dim for dim, axes in self.fsdp_dims if "pipe" in axes), None)

  def inside_stage(self) -> "ParamSharding":
    """Drops `pipe` from the axes that are all-gathered."""
    fsdp_dims = (
      (dim, tuple(axis for axis in axes if axis != "pipe"))
      for dim, axes in self.fsdp_dims
    )
    fsdp_dims = tuple((dim, axes) for dim, axes in fsdp_dims if axes)
    return dataclasses.replace(self, fsdp_dims=fsdp_dims)

  def of_layer(self) -> "ParamSharding":
    """Drops the leading dim, of layers."""
    fsdp_dims = tuple((dim - 1, axes) for dim, axes in self.fsdp_dims)
    return dataclasses.replace(self, dims=self.dims[1:], fsdp_dims=fsdp_dims)


def param_sharding(
  param: param_spec.ParamSpec, rules: ShardingRules, sizes: Sizes
) -> ParamSharding:
  """Applies the rules to a parameter on a mesh of these sizes by axis.

  Each axis of `rules.fsdp_axes` that divides no dim for good shards the first
  of the other dims that it divides evenly; if there is none, the parameter is
  replicated along that axis.
  """
  mesh_axes, dims, taken = dict(rules.logical_to_mesh), [], set()
  for axis in param.axes:
    axes = device_mesh.active_axes(sizes, mesh_axes.get(axis, ()))
    # Of two dims over the same mesh axis the first is divided.
    dims.append(tuple(a for a in axes if a not in taken))
    taken.update(axes)
  fsdp_dims = {
    i: ()
    for i, axis in enumerate(param.axes)
    if not dims[i] and axis != "layers"
  }
  for axis in device_mesh.active_axes(sizes, rules.fsdp_axes):
    for i in fsdp_dims if axis not in taken else ():
      axes = (*fsdp_dims[i], axis)
      if param.shape[i] % device_mesh.axis_size(sizes, axes) == 0:
        fsdp_dims[i] = dims[i] = axes
        break
  active = tuple((i, axes) for i, axes in fsdp_dims.items() if axes)
  return ParamSharding(tuple(dims), active)


# --- inside shard_map ---


def all_gather(a: jax.Array, sharding: ParamSharding) -> jax.Array:
  """Gathers an array along its `fsdp_dims`."""
  for dim, axes in sharding.fsdp_dims:
    a = jax.lax.all_gather(a, axes, axis=dim, tiled=True)
  return a


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def all_gather_cast(a: jax.Array, sharding: ParamSharding) -> jax.Array:
  """Gathers a float32 array in the `dtype` of its sharding.

  Its gradient, which arrives in that type, is summed over devices in float32.
  """
  return all_gather(a.astype(sharding.dtype), sharding)


all_gather_cast.defvjp(
  lambda a, sharding: (all_gather_cast(a, sharding), None),
  lambda sharding, _, g: (reduce_scatter(g.astype(jnp.float32), sharding),),
)


def reduce_scatter(g: jax.Array, sharding: ParamSharding) -> jax.Array:
  """Sums a gradient over devices, and shards it along its `fsdp_dims`."""
  for dim, axes in sharding.fsdp_dims:
    g = jax.lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
  return g


def map_arrays(
  f: Callable[[jax.Array, ParamSharding], jax.Array],
  params: Any,
  shardings: Any,
) -> Any:
  """Maps f over all arrays, those of FP8 weights too, and their shardings."""
  by_array = jax.tree.map(_by_array, params, shardings, is_leaf=_is_fp8)
  return jax.tree.map(f, params, by_array)


def _is_fp8(leaf: Any) -> bool:
  return isinstance(leaf, (linear.Fp8Weight, linear.MasterHandle))


def _by_array(w: Any, sharding: ParamSharding) -> Any:
  """Returns the shardings of the arrays of an FP8 weight, in its structure."""
  if isinstance(w, linear.MasterHandle):
    return linear.MasterHandle(sharding, ParamSharding((), ()))
  if not isinstance(w, linear.Fp8Weight):
    return sharding
  # Scales are of whole matrices: only shards of a stack have shards of scales.
  n_stack = w.scales.ndim - 2
  fsdp_dims = tuple(pair for pair in sharding.fsdp_dims if pair[0] < n_stack)
  return w.replace(
    handle=_by_array(w.handle, sharding),
    codes=sharding,
    scales=ParamSharding(sharding.dims[:n_stack], fsdp_dims),
  )

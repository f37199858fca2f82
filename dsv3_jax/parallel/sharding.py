"""Where parameters live: tables from their logical axes to mesh axes.

A layout says which dims of a parameter are divided for good (experts, heads),
and over which axes what is left is stored in slices. A slice is made whole
where it is used: once a step (ZeRO-1: master weights and optimizer state are
what is sliced) or layer by layer (FSDP).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import linear, recipe
from dsv3_jax.model import moe, transformer
from dsv3_jax.parallel import device_mesh, dispatch
from dsv3_jax.parallel.pipeline import schedules
from dsv3_jax.parallel.pipeline import stages as stages_lib


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """A layout; an entry of size 1 on a mesh does nothing."""

  # (logical axis, mesh axes that divide it)
  logical_to_mesh: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("experts", device_mesh.EXPERTS),
    ("heads", ("model",)),
    ("ffn", ("model",)),
  )
  fsdp_axes: tuple[str, ...] = ()  # mesh axes that slice what is not divided
  gather_by_layer: bool = False  # slices become whole a layer at a time


LAYOUTS = {
  "replicated": ShardingRules(),
  "zero1": ShardingRules(fsdp_axes=device_mesh.ROWS),
  "fsdp": ShardingRules(fsdp_axes=device_mesh.ROWS, gather_by_layer=True),
}


@dataclasses.dataclass(frozen=True)
class ParamSharding:
  """Where one parameter is; not a pytree, so that trees of them map."""

  dims: tuple[tuple[str, ...], ...]  # mesh axes of each dim
  fsdp_dims: tuple[
    tuple[int, tuple[str, ...]], ...
  ]  # dims that slices run along

  @property
  def spec(self) -> jax.P:
    return device_mesh.spec(*self.dims)

  @property
  def axes(self) -> frozenset[str]:
    """All mesh axes that the parameter is divided over."""
    return frozenset(axis for dim in self.dims for axis in dim)

  @property
  def pipe_dim(self) -> int | None:
    """The dim that is sliced over `pipe`."""
    return next((dim for dim, axes in self.fsdp_dims if "pipe" in axes), None)

  def inside_stage(self) -> "ParamSharding":
    """The same without the slices over `pipe`."""
    slices = (
      (dim, tuple(axis for axis in axes if axis != "pipe"))
      for dim, axes in self.fsdp_dims
    )
    return ParamSharding(
      self.dims, tuple((d, axes) for d, axes in slices if axes)
    )

  def of_layer(self) -> "ParamSharding":
    """The same without the leading dim, of layers."""
    slices = tuple((dim - 1, axes) for dim, axes in self.fsdp_dims)
    return ParamSharding(self.dims[1:], slices)


def param_sharding(
  param: param_spec.ParamSpec, rules: ShardingRules, sizes: Mapping[str, int]
) -> ParamSharding:
  """Where a parameter is on a mesh.

  Each axis of `rules.fsdp_axes` that divides no dim for good slices the first
  of the other dims that it divides evenly; where there is none, the parameter
  is whole along that axis.
  """
  divided, dims, taken = dict(rules.logical_to_mesh), [], set()
  for axis in param.axes:
    axes = device_mesh.active_axes(sizes, divided.get(axis, ()))
    # Of two dims over the same mesh axis the first is divided.
    dims.append(tuple(a for a in axes if a not in taken))
    taken.update(axes)
  slices = {
    i: ()
    for i, (axis, _) in enumerate(param.dims)
    if not dims[i] and axis != "layers"
  }
  for axis in device_mesh.active_axes(sizes, rules.fsdp_axes):
    for i in slices if axis not in taken else ():
      more = (*slices[i], axis)
      if param.shape[i] % device_mesh.axis_size(sizes, more) == 0:
        slices[i] = dims[i] = more
        break
  used = tuple((i, axes) for i, axes in slices.items() if axes)
  return ParamSharding(tuple(dims), used)


# --- inside shard_map ---


def _whole(a: jax.Array, place: ParamSharding) -> jax.Array:
  for dim, axes in place.fsdp_dims:
    a = jax.lax.all_gather(a, axes, axis=dim, tiled=True)
  return a


def _parts(w: linear.Weight | linear.Trained, place: ParamSharding) -> Any:
  """Where the parts of a weight in FP8 are, or an array."""
  if isinstance(w, linear.Trained):
    return linear.Trained(place, ParamSharding((), ()))
  if not isinstance(w, linear.Fp8):
    return place
  # Scales are those of whole matrices: slices of a stack have slices of them.
  n_stack = w.scales.ndim - 2
  slices = tuple((dim, axes) for dim, axes in place.fsdp_dims if dim < n_stack)
  of_scales = ParamSharding(place.dims[:n_stack], slices)
  of_trained = _parts(w.trained, place)
  return w.replace(trained=of_trained, bits=place, scales=of_scales)


def _map(
  f: Callable[[jax.Array, ParamSharding], jax.Array],
  params: Any,
  shardings: Any,
) -> Any:
  """f of every array and its place."""
  is_weight = lambda leaf: isinstance(leaf, (linear.Fp8, linear.Trained))
  places = jax.tree.map(_parts, params, shardings, is_leaf=is_weight)
  return jax.tree.map(f, params, places)


def _scatter(g: jax.Array, place: ParamSharding) -> jax.Array:
  for dim, axes in place.fsdp_dims:
    g = jax.lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
  return g


@dataclasses.dataclass(frozen=True)
class Layout:
  """A run on a mesh: where its parameters are, and how devices share work."""

  shardings: Any  # tree of placements
  fp8: frozenset[str]  # paths of the weights in FP8
  rules: ShardingRules
  sizes: Mapping[str, int]
  batch_axes: tuple[str, ...]  # mesh axes that tokens are divided over
  stages: stages_lib.Stages | None  # of a pipeline
  experts: moe.Experts

  @property
  def specs(self) -> Any:
    """The partition of every parameter."""
    return jax.tree.map(lambda place: place.spec, self.shardings)

  @property
  def fsdp_dims(self) -> Any:
    """Of every parameter, the dims and mesh axes of slices."""
    return jax.tree.map(lambda place: place.fsdp_dims, self.shardings)

  @property
  def grad_specs(self) -> Any:
    """The partition of the gradients that `reduce` returns."""

    def leaf(path, place):
      in_fp8 = param_spec.name(path) in self.fp8
      return linear.Trained(place.spec, jax.P()) if in_fp8 else place.spec

    return jax.tree.map_with_path(leaf, self.shardings)

  @property
  def n_shards(self) -> int:
    """Parts of a batch."""
    return device_mesh.axis_size(self.sizes, self.batch_axes)

  @property
  def varying_axes(self) -> tuple[str, ...]:
    """Mesh axes whose devices do different work."""
    return ("pipe", *self.batch_axes) if self.stages else self.batch_axes

  # The rest is for the inside of a `shard_map` over the whole mesh.

  def gather_for_step(self, params: param_spec.Params) -> param_spec.Params:
    """Makes whole what is whole for a step; of layers, those of this rank.

    Everything is said to differ between the devices that do different work:
    its gradients stay local, and are summed once, by `reduce`.
    """

    def move(kind, place, a):
      if staged := self._staged(kind):
        a = _whole(a, place.inside_stage())
        return stages_lib.to_ranks(a, staged, place.pipe_dim)
      return _whole(a, place) if self._of_step(kind) else a

    def leaf(kind, a, place):
      return varying.vary(move(kind, place, a), self.varying_axes)

    return {
      kind: _map(functools.partial(leaf, kind), p, self.shardings[kind])
      for kind, p in params.items()
    }

  def gather_layer(self, kind: str, p: param_spec.Params) -> param_spec.Params:
    """Makes a layer whole: the `gather` of a forward pass."""
    if self._of_step(kind):
      return p
    places = jax.tree.map(lambda place: place.of_layer(), self.shardings[kind])
    return _map(_whole, p, places)

  def _of_step(self, kind: str) -> bool:
    return not (self.rules.gather_by_layer and kind in ("dense", "moe", "mtp"))

  def _staged(self, kind: str) -> stages_lib.LayerStacks | None:
    return self.stages.stacks.get(kind) if self.stages else None

  def reduce_scatter_grads(
    self, gradients: param_spec.Params
  ) -> param_spec.Params:
    """Local gradients of what `step` returned, as those of its argument."""

    def leaf(kind, g, place):
      if staged := self._staged(kind):
        g = stages_lib.from_ranks(g, staged, place.pipe_dim)
        g = _scatter(g, place.inside_stage())
      elif self._of_step(kind):
        g = _scatter(g, place)
      rest = varying.varying(g) - place.axes
      return jax.lax.psum(g, tuple(sorted(rest)))

    return {
      kind: _map(functools.partial(leaf, kind), g, self.shardings[kind])
      for kind, g in gradients.items()
    }


def make_layout(
  run: config.Run,
  sizes: Mapping[str, int],
  *,
  staged: bool = True,
  micro_batches: int | None = None,
) -> Layout:
  """The layout of a run on a mesh of these sizes by axis.

  Args:
    run: the configuration.
    sizes: of the mesh axes.
    staged: with the layers divided over `pipe` as the run's schedule says;
      otherwise its devices divide the rows of a batch like all others.
    micro_batches: of the step, if not the run's full number.
  """
  rules, schedule = LAYOUTS[run.parallel.layout], None
  specs = transformer.specs(run.model)
  if staged and run.parallel.schedule != "none":
    schedule = schedules.SCHEDULES[run.parallel.schedule](
      sizes.get("pipe", 1), micro_batches or run.train.micro_batches
    )
  return Layout(
    shardings=jax.tree.map(
      lambda param: param_sharding(param, rules, sizes), specs
    ),
    fp8=recipe.fp8_paths(specs, run.precision),
    rules=rules,
    sizes=sizes,
    batch_axes=device_mesh.active_axes(
      sizes, device_mesh.BATCH if schedule else device_mesh.ROWS
    ),
    stages=stages_lib.assign_stages(schedule, run.model) if schedule else None,
    experts=dispatch.make_expert_parallel_ffn(
      run.parallel.dispatch,
      sizes,
      run.model.router,
      rounds=run.parallel.rounds,
      split_wgrad=schedule is not None,
    ),
  )


def validate(run: config.Run, sizes: Mapping[str, int]) -> list[str]:
  """What does not divide evenly over a mesh, a line each, and what would."""
  model, found = run.model, []
  sequences = run.train.micro_batch_size
  for name, size, axes in (
    ("sequences of a micro-batch", sequences, device_mesh.BATCH),
    ("routed experts", model.router.n_experts, device_mesh.EXPERTS),
    ("heads", model.mla.n_heads, ("model",)),
    ("dense_ffn_dim", model.dense_ffn_dim, ("model",)),
    ("moe.ffn_dim", model.moe.ffn_dim, ("model",)),
  ):
    n = device_mesh.axis_size(sizes, axes)
    if size % n:
      over = " x ".join(f"{a}={sizes.get(a, 1)}" for a in axes)
      fits = [i for i in range(1, size + 1) if size % i == 0]
      found.append(
        f"--mesh: {over} devices must divide the {size} {name};"
        f" {', '.join(map(str, fits))} do"
      )
  specs = transformer.specs(model)
  found += recipe.problems(specs, run.precision)
  found += _fp8_problems(run, sizes)
  return found + _pipeline_problems(run, sizes)


def _fp8_problems(run: config.Run, sizes: Mapping[str, int]) -> list[str]:
  """Weights that `model` would divide in the middle of a tile."""
  specs = transformer.specs(run.model)
  divided = {"heads", "ffn"}
  n, tile = sizes.get("model", 1), run.precision.tile
  for path in sorted(recipe.fp8_paths(specs, run.precision)):
    spec = param_spec.paths(specs)[path]
    dims = spec.dims[spec.n_stack :]
    for part in (dims[: spec.n_in], dims[spec.n_in :]):
      names = [axis for axis, _ in part]
      # A dim before the divided one stays whole: it counts pieces.
      start = next((i for i, axis in enumerate(names) if axis in divided), None)
      if n == 1 or start is None:
        continue
      size = math.prod(size for _, size in part[start:]) // n
      if size % tile:
        return [
          f"--mesh: model={n} leaves {size} of {path} to a device, which"
          f" precision.tile={tile} does not divide: tiles would differ;"
          " choose a tile that does, or model=1"
        ]
  return []


def _pipeline_problems(run: config.Run, sizes: Mapping[str, int]) -> list[str]:
  name, n_ranks = run.parallel.schedule, sizes.get("pipe", 1)
  if name == "none":
    if n_ranks == 1:
      return []
    return [
      f"--mesh: pipe={n_ranks} needs a parallel.schedule; one of"
      f" {', '.join(schedules.SCHEDULES)}"
    ]
  micro, n_layers = run.train.micro_batch_size, run.model.n_layers
  known = schedules.validate(name, n_ranks, run.train.micro_batches, n_layers)
  found = list(known)
  for phase in run.phases[:-1]:
    n_micro = phase.batch_size // micro
    for line in schedules.validate(name, n_ranks, n_micro, n_layers):
      if line not in known:
        found.append(
          f"{line}; these are the {phase.batch_size} sequences, {micro} a"
          " micro-batch, of steps while the batch grows: see"
          " train.first_batch_size"
        )
  if sizes.get("model", 1) > 1:
    found.append(
      f"--mesh: model={sizes['model']} with parallel.schedule={name}: layers"
      " of a stage are not divided; leave model at 1"
    )
  if run.data.segment_mask:
    found.append(
      f"data.segment_mask=true with parallel.schedule={name}: stages do not"
      " know segments; leave one of them out"
    )
  if LAYOUTS[run.parallel.layout].gather_by_layer:
    found.append(
      f"parallel.layout={run.parallel.layout} with parallel.schedule={name}:"
      " a stage's layers are whole for a step; zero1 or replicated do"
    )
  return found

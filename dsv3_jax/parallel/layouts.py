"""Layout of a run on a mesh: shardings of parameters, and division of work."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax import config, param_spec, varying
from dsv3_jax.linear import linear, recipe
from dsv3_jax.model import moe, transformer
from dsv3_jax.parallel import device_mesh, dispatch, sharding
from dsv3_jax.parallel.device_mesh import Axes, Sizes
from dsv3_jax.parallel.pipeline import schedules, stages
from dsv3_jax.parallel.sharding import ParamSharding
from dsv3_jax.param_spec import Params


@dataclasses.dataclass(frozen=True)
class Layout:
  """Shardings of all parameters, and how devices divide the work of a step."""

  shardings: Any  # tree of ParamSharding
  fp8: frozenset[str]  # paths of the weights in FP8
  rules: sharding.ShardingRules
  sizes: Sizes
  batch_axes: Axes  # mesh axes that tokens are divided over
  stages: stages.Stages | None  # of a pipeline
  experts: moe.Experts

  @property
  def specs(self) -> Any:
    """PartitionSpecs of the parameters."""
    return jax.tree.map(lambda sharding: sharding.spec, self.shardings)

  @property
  def fsdp_dims(self) -> Any:
    """The (dim, mesh axes) of every parameter that are all-gathered."""
    return jax.tree.map(lambda sharding: sharding.fsdp_dims, self.shardings)

  @property
  def grad_specs(self) -> Any:
    """PartitionSpecs of the result of `reduce_scatter_grads`."""

    def leaf(path: Any, sharding: ParamSharding) -> Any:
      if param_spec.name(path) in self.fp8:
        return linear.MasterHandle(sharding.spec, jax.P())
      return sharding.spec

    return jax.tree.map_with_path(leaf, self.shardings)

  @property
  def n_shards(self) -> int:
    """Number of shards of a batch."""
    return device_mesh.axis_size(self.sizes, self.batch_axes)

  @property
  def varying_axes(self) -> Axes:
    """Mesh axes whose devices compute different gradients."""
    return ("pipe", *self.batch_axes) if self.stages else self.batch_axes

  # The methods below run inside a `shard_map` over the whole mesh.

  def gather_for_step(self, params: Params) -> Params:
    """All-gathers what stays gathered during a step.

    Of pipelined layers, each rank receives those of its stages. All arrays are
    marked as varying over `varying_axes`, so that their gradients stay local
    until `reduce_scatter_grads` sums them once.
    """

    def gather(name: str, a: jax.Array, of: ParamSharding) -> jax.Array:
      if stacks := self._stacks(name):
        a = sharding.all_gather(a, of.inside_stage())
        a = stages.to_ranks(a, stacks, of.pipe_dim)
      elif name not in self.rules.by_layer:
        a = sharding.all_gather(a, of)
      return varying.vary(a, self.varying_axes)

    return self._map(gather, params)

  def gather_layer(self, name: str, p: Params) -> Params:
    """All-gathers one layer; passed to `forward` as `gather`."""
    if name not in self.rules.by_layer:
      return p

    def gather(a: jax.Array, of: ParamSharding) -> jax.Array:
      cast = of.dtype is not None
      return (sharding.all_gather_cast if cast else sharding.all_gather)(a, of)

    shardings = jax.tree.map(lambda of: of.of_layer(), self.shardings[name])
    return sharding.map_arrays(gather, p, shardings)

  def reduce_scatter_grads(self, gradients: Params) -> Params:
    """Sums local gradients of gathered parameters into those of the shards."""

    def reduce(name: str, g: jax.Array, of: ParamSharding) -> jax.Array:
      if stacks := self._stacks(name):
        g = stages.from_ranks(g, stacks, of.pipe_dim)
        g = sharding.reduce_scatter(g, of.inside_stage())
      elif name not in self.rules.by_layer:
        g = sharding.reduce_scatter(g, of)
      remaining = varying.varying(g) - of.axes
      return jax.lax.psum(g, tuple(sorted(remaining)))

    return self._map(reduce, gradients)

  def _map(
    self,
    f: Callable[[str, jax.Array, ParamSharding], jax.Array],
    params: Params,
  ) -> Params:
    return {
      name: sharding.map_arrays(
        functools.partial(f, name), p, self.shardings[name]
      )
      for name, p in params.items()
    }

  def _stacks(self, name: str) -> stages.LayerStacks | None:
    return self.stages.stacks.get(name) if self.stages else None


def make_layout(
  run: config.Run,
  sizes: Sizes,
  *,
  staged: bool = True,
  micro_batches: int | None = None,
) -> Layout:
  """Builds the layout of a run on a mesh.

  Args:
    run: the configuration.
    sizes: of the mesh.
    staged: divide the layers over `pipe` by the run's schedule; else the
      devices of `pipe` divide the rows of a batch.
    micro_batches: of the step, if not the run's full number.
  """
  rules, schedule = sharding.LAYOUTS[run.parallel.layout], None
  specs = transformer.specs(run.model)
  if staged and run.parallel.schedule != "none":
    schedule = schedules.SCHEDULES[run.parallel.schedule](
      sizes.get("pipe", 1), micro_batches or run.train.micro_batches
    )
  fp8 = recipe.fp8_paths(specs, run.precision)

  def shard(path: Any, param: param_spec.ParamSpec) -> ParamSharding:
    of = sharding.param_sharding(param, rules, sizes)
    name = param_spec.name(path)
    if name in fp8 or name.partition("/")[0] not in rules.by_layer:
      return of
    return dataclasses.replace(of, dtype=recipe.dtype(name, run.precision))

  return Layout(
    shardings=jax.tree.map_with_path(shard, specs),
    fp8=fp8,
    rules=rules,
    sizes=sizes,
    batch_axes=device_mesh.active_axes(
      sizes, device_mesh.BATCH if schedule else device_mesh.ROWS
    ),
    stages=stages.assign_stages(schedule, run.model) if schedule else None,
    experts=dispatch.make_expert_parallel_ffn(
      run.parallel.dispatch,
      sizes,
      run.model.router,
      rounds=run.parallel.rounds,
      split_wgrad=schedule is not None,
    ),
  )

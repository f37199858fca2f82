"""Error messages for runs that cannot be divided over a mesh."""

import math
from collections.abc import Iterator

import jax

from dsv3_jax import config, param_spec
from dsv3_jax.linear import recipe
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, sharding
from dsv3_jax.parallel.device_mesh import Sizes
from dsv3_jax.parallel.pipeline import schedules


def validate(run: config.Run, sizes: Sizes) -> list[str]:
  """Lists what a mesh of these sizes does not divide, with sizes that fit."""
  return [
    *_validate_sizes(run, sizes),
    *recipe.validate(transformer.specs(run.model), run.precision),
    *_validate_fp8(run, sizes),
    *_validate_pipeline(run, sizes),
  ]


def _validate_sizes(run: config.Run, sizes: Sizes) -> Iterator[str]:
  model, sequences = run.model, run.train.micro_batch_size
  n_experts = model.router.n_experts
  # An attention may have fewer heads of keys than of queries.
  dims = [
    dim for s in jax.tree.leaves(transformer.specs(model)) for dim in s.dims
  ]
  heads = {size for axis, size in dims if axis == "heads"}
  for label, size, axes in (
    (f"{sequences} sequences of a micro-batch", sequences, device_mesh.BATCH),
    (f"{n_experts} routed experts", n_experts, device_mesh.EXPERTS),
    *((f"{n} heads", n, ("model",)) for n in sorted(heads)),
    (f"dense_ffn_dim={model.dense_ffn_dim}", model.dense_ffn_dim, ("model",)),
    (f"moe.ffn_dim={model.moe.ffn_dim}", model.moe.ffn_dim, ("model",)),
  ):
    if size % device_mesh.axis_size(sizes, axes):
      active = device_mesh.active_axes(sizes, axes)
      devices = " x ".join(f"{axis}={sizes[axis]}" for axis in active)
      yield (
        f"--mesh: {devices} does not divide {label}; use {_divisors(size)}"
        " devices"
      )


def _divisors(n: int) -> str:
  """Lists numbers of devices that divide n, up to the largest clusters."""
  sizes = range(1, min(n, 10_000) + 1)
  *others, last = (str(i) for i in sizes if n % i == 0)
  return f"{', '.join(others)} or {last}" if others else last


def _validate_fp8(run: config.Run, sizes: Sizes) -> Iterator[str]:
  """Describes the first weight that `model` would divide inside a tile."""
  n, tile = sizes.get("model", 1), run.precision.tile
  if n == 1:
    return
  specs = transformer.specs(run.model)
  by_path = param_spec.flatten_with_paths(specs)
  for path in sorted(recipe.fp8_paths(specs, run.precision)):
    spec = by_path[path]
    dims = spec.dims[spec.n_stack :]
    for side in (dims[: spec.n_contracted], dims[spec.n_contracted :]):
      names = [axis for axis, _ in side]
      # A dim before the divided one counts matrices, and is not divided.
      starts = [i for i, axis in enumerate(names) if axis in ("heads", "ffn")]
      if not starts:
        continue
      size = math.prod(size for _, size in side[starts[0] :]) // n
      if size % tile:
        yield (
          f"--mesh: model={n} leaves {size} of {path} to a device, which"
          f" precision.tile={tile} does not divide; choose a tile that divides"
          " it, or model=1"
        )
        return


def _validate_pipeline(run: config.Run, sizes: Sizes) -> Iterator[str]:
  name, n_ranks = run.parallel.schedule, sizes.get("pipe", 1)
  if name == "none":
    if n_ranks > 1:
      yield (
        f"--mesh: pipe={n_ranks} needs a parallel.schedule; use one of"
        f" {', '.join(schedules.SCHEDULES)}, such as"
        " --set=parallel.schedule=1f1b, and enough train.micro_batches"
      )
    return
  yield from _validate_micro_batches(run, n_ranks)
  if sizes.get("model", 1) > 1:
    yield (
      f"--mesh: model={sizes['model']} with parallel.schedule={name}: layers"
      " of a stage cannot be divided; use model=1"
    )
  if sharding.LAYOUTS[run.parallel.layout].gather_by_layer:
    yield (
      f"parallel.layout={run.parallel.layout} with parallel.schedule={name}:"
      " a stage's layers stay gathered during a step; use zero1 or replicated"
    )


def _validate_micro_batches(run: config.Run, n_ranks: int) -> Iterator[str]:
  """Checks the schedule for the micro-batches of every phase of the run."""
  name, n_layers = run.parallel.schedule, run.model.n_layers
  micro = run.train.micro_batch_size
  full = schedules.validate(name, n_ranks, run.train.micro_batches, n_layers)
  yield from full
  for phase in run.batch_phases[:-1]:
    n_micro = phase.batch_size // micro
    for line in schedules.validate(name, n_ranks, n_micro, n_layers):
      if line not in full:
        yield (
          f"{line}; these are the {phase.batch_size} sequences, {micro} a"
          " micro-batch, of steps while the batch grows: see"
          " train.first_batch_size"
        )

"""Forward pass of a run on a mesh, for the inside of a `jax.shard_map`."""

import jax

from dsv3_jax import config, param_spec
from dsv3_jax.linear import recipe
from dsv3_jax.model import layers, transformer
from dsv3_jax.parallel import layouts


def gather_params(
  params: param_spec.Params, run: config.Run, layout: layouts.Layout
) -> param_spec.Params:
  """Master parameters in the run's precision, all-gathered for a step."""
  specs = transformer.specs(run.model)
  slices, by_layer = layout.fsdp_dims, layout.rules.by_layer
  params = recipe.compute_params(
    params, specs, run.precision, slices, uncast=by_layer
  )
  return layout.gather_for_step(params)


def context(layout: layouts.Layout) -> transformer.ForwardContext:
  """The context of a forward pass whose devices share experts and layers."""
  return transformer.ForwardContext(
    experts=layout.experts, gather=layout.gather_layer
  )


def forward(
  params: param_spec.Params,
  bias: jax.Array,
  tokens: jax.Array,
  run: config.Run,
  layout: layouts.Layout,
  cfg: config.Model | None = None,
  segments: layers.Segments = None,
  routes: jax.Array | None = None,
) -> tuple[param_spec.Params, transformer.Output]:
  """Evaluates the model on this device's rows.

  Args:
    params: this device's shards of the master parameters.
    bias: [n_routers, E] f32.
    tokens: [b, T] int32.
    run: the configuration.
    layout: of the run on the mesh.
    cfg: the model, if not the run's.
    segments: [b, T] int32, which attention stays inside of.
    routes: [b, T, n_routers, K] int32, experts to take, see `data.batch.Batch`.

  Returns:
    The gathered parameters, to apply the head with, and the hidden states.
  """
  cfg = cfg or run.model
  params = gather_params(params, run, layout)
  ctx = context(layout)
  out = transformer.forward(
    params, bias, tokens, cfg, ctx, segments, routes=routes
  )
  return params, out

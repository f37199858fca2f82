"""Parameters on a serving mesh: how they are divided, and where experts are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.infer import eplb, inference_params
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.infer.serving_mesh import GROUP, ServingMesh
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, sharding
from dsv3_jax.param_spec import Params


def placement_for_load(
  load: np.ndarray, mesh: ServingMesh, cfg: config.Model
) -> eplb.ExpertPlacement:
  """Returns the expert placement that balances a load.

  Groups of experts stay inside nodes where they divide over them, as tokens go
  to few groups. A layer of the load [n, E] of routed experts that is 0 is
  balanced for an equal load.
  """
  load = np.where(load.any(-1, keepdims=True), load, 1)
  return eplb.balance_experts(
    mesh.with_shared(load, cfg),
    n_replicas=mesh.n_replicas,
    n_devices=mesh.n_devices,
    n_groups=1 if mesh.n_shared(cfg) else cfg.router.n_groups,
    n_nodes=mesh.mesh.shape["node"],
  )


def uniform_placement(
  mesh: ServingMesh, cfg: config.Model
) -> eplb.ExpertPlacement:
  """Returns the expert placement for an equal load of all experts."""
  even = np.ones((cfg.n_routers, cfg.router.n_experts))
  return placement_for_load(even, mesh, cfg)


def _validate(
  placement: eplb.ExpertPlacement, n: int, mesh: ServingMesh, cfg: config.Model
) -> None:
  shape = *placement.count.shape, placement.expert.shape[1]
  expected = n, mesh.n_experts(cfg), mesh.n_replicas
  if shape != expected:
    raise InputError(
      f"a placement of (layers, experts, slots) {shape}: must be {expected}"
    )


def load_specs(cfg: config.Model, mesh: ServingMesh | None) -> Any:
  """Partitions with which `transformer.specs` are read for a serving mesh.

  All but experts are read as they are served. Experts are divided evenly over
  the devices; `shard_params` moves them to their slots. Without a mesh, one
  device holds everything.
  """
  specs = transformer.specs(cfg)
  if mesh is None:
    return jax.tree.map(lambda _: jax.P(), specs)
  others = (r for r in mesh.rules.logical_to_mesh if r[0] != "experts")
  for_experts = sharding.ShardingRules(tuple(others), fsdp_axes=GROUP)

  def leaf(spec):
    rules = for_experts if "experts" in spec.axes else mesh.rules
    return sharding.param_sharding(spec, rules, mesh.mesh.shape).spec

  return jax.tree.map(leaf, specs)


def shard_params(
  params: InferenceParams,
  placement: eplb.ExpertPlacement,
  mesh: ServingMesh,
  cfg: config.Model,
) -> InferenceParams:
  """Divides parameters, on any devices or on the host, over a serving mesh.

  Beside its own part, a device needs room for all experts of one layer.

  Raises:
    InputError: the placement is of other layers, experts or slots.
  """
  ffns = inference_params.moe_ffns(params)
  _validate(placement, len(ffns), mesh, cfg)
  replicated = jax.NamedSharding(mesh.mesh, jax.P())
  # The parameters of an MoE layer that are experts with slots.
  names = ("experts", "shared") if mesh.n_shared(cfg) else ("experts",)

  def experts_in_slots(layer):
    whole = {name: ffns[layer][name] for name in names}
    whole = jax.device_put(whole, replicated)
    experts = _logical_experts(whole, mesh.n_shared(cfg))
    index = placement.expert[layer]
    return _to_slots(mesh, experts, index, placement, layer)

  def put(a, spec):
    spec = sharding.param_sharding(spec, mesh.rules, mesh.mesh.shape).spec
    return jax.device_put(a, jax.NamedSharding(mesh.mesh, spec))

  trees = params, inference_params.specs(cfg)
  others = jax.tree.map(put, *(_without(names, tree) for tree in trees))
  sharded = [
    ffn | {"experts": experts_in_slots(layer)}
    for layer, ffn in enumerate(inference_params.moe_ffns(others))
  ]
  return inference_params.replace_moe_ffns(others, sharded)


def apply_placement(
  params: InferenceParams,
  old: eplb.ExpertPlacement,
  new: eplb.ExpertPlacement,
  mesh: ServingMesh,
  cfg: config.Model,
) -> InferenceParams:
  """Moves experts between devices, from one placement to another.

  Raises:
    InputError: the placement is of other layers, experts or slots.
  """
  ffns = inference_params.moe_ffns(params)
  _validate(new, len(ffns), mesh, cfg)
  moved = []
  for layer, ffn in enumerate(ffns):
    index = old.replicas[layer, new.expert[layer], 0]
    experts = {name: ffn["experts"][name] for name in ("gate_up", "down")}
    experts = _to_slots(mesh, experts, index, new, layer)
    moved.append(ffn | {"experts": experts})
  return inference_params.replace_moe_ffns(params, moved)


def _without(names: tuple[str, ...], tree: Any) -> Any:
  """Returns a tree of inference parameters without these of MoE layers."""
  ffns = [
    {name: p for name, p in ffn.items() if name not in names}
    for ffn in inference_params.moe_ffns(tree)
  ]
  return inference_params.replace_moe_ffns(tree, ffns)


def _logical_experts(ffn: Params, n_shared: int) -> Params:
  """Returns the routed experts, then the shared ones, stacked in order.

  The shared feed-forward is the sum of n_shared experts.
  """
  if not n_shared:
    return ffn["experts"]
  gate_up, down = ffn["shared"]["gate_up"], ffn["shared"]["down"]
  d, pair, width = gate_up.shape
  gate_up = gate_up.reshape(d, pair, n_shared, width // n_shared)
  down = down.reshape(n_shared, width // n_shared, d)
  shared = {"gate_up": jnp.moveaxis(gate_up, 2, 0), "down": down}
  return jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), ffn["experts"], shared
  )


def _to_slots(
  mesh: ServingMesh,
  experts: Params,
  index: np.ndarray,
  placement: eplb.ExpertPlacement,
  layer: int,
) -> Params:
  """Returns the experts with these indices in slots, and tables of replicas.

  These are the slots of each expert's replicas, and their number. Shapes are
  the same for all placements, so that nothing is compiled again.
  """
  replicas, count = placement.replicas[layer], placement.count[layer]
  most = mesh.n_replicas - len(count) + 1
  replicas = np.pad(replicas, ((0, 0), (0, most - replicas.shape[1])))
  tables = {"replicas": replicas, "count": count}
  axes = device_mesh.active_axes(mesh.mesh.shape, GROUP)
  to = jax.NamedSharding(mesh.mesh, jax.P(axes))
  replicated = jax.NamedSharding(mesh.mesh, jax.P())
  index, tables = jax.device_put((index, tables), replicated)
  return _take(experts, index, to) | tables


@functools.partial(jax.jit, static_argnames="to")
def _take(
  experts: Params, index: jax.Array, to: jax.sharding.NamedSharding
) -> Params:
  """Returns experts by their index, divided over devices."""
  return jax.tree.map(lambda a: a.at[index].get(out_sharding=to), experts)

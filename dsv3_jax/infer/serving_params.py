"""Parameters on a serving mesh: how they are divided, and where experts are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.errors import InputError
from dsv3_jax.infer import eplb, inference_params
from dsv3_jax.infer.serving_mesh import GROUP, ServingMesh
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, sharding

# --- placements ---


def placement_for_load(
  load: np.ndarray, mesh: ServingMesh, cfg: config.Model
) -> eplb.ExpertPlacement:
  """Returns the expert placement that balances a load.

  Groups of experts stay inside nodes where they divide over them, as tokens go
  to few groups. A layer without any load is balanced for an equal load.

  Args:
    load: [n, E] of routed experts.
    mesh: that serves.
    cfg: the model.
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
  placement: eplb.ExpertPlacement,
  mesh: ServingMesh,
  cfg: config.Model,
  n_layers: int,
) -> None:
  shape = *placement.count.shape, placement.expert.shape[1]
  expected = n_layers, mesh.n_experts(cfg), mesh.n_replicas
  if shape != expected:
    raise InputError(
      f"a placement of (layers, experts, slots) {shape}: must be {expected}"
    )


# --- parameters ---


def load_specs(cfg: config.Model, mesh: ServingMesh | None) -> Any:
  """Partitions with which `transformer.specs` are read for a serving mesh.

  All but experts are read as they are served. Experts are divided evenly over
  the devices; `shard_params` moves them to their slots.

  Args:
    cfg: the model.
    mesh: that serves; None: one device, which holds everything.
  """
  specs = transformer.specs(cfg)
  if mesh is None:
    return jax.tree.map(lambda _: jax.P(), specs)
  without_experts = tuple(
    rule for rule in mesh.rules.logical_to_mesh if rule[0] != "experts"
  )
  for_experts = sharding.ShardingRules(without_experts, fsdp_axes=GROUP)

  def leaf(spec):
    rules = for_experts if "experts" in spec.axes else mesh.rules
    return sharding.param_sharding(spec, rules, mesh.mesh.shape).spec

  return jax.tree.map(leaf, specs)


def shard_params(
  params: inference_params.InferenceParams,
  placement: eplb.ExpertPlacement,
  mesh: ServingMesh,
  cfg: config.Model,
) -> inference_params.InferenceParams:
  """Divides parameters over a serving mesh.

  Beside its own part, a device needs room for all experts of one layer.

  Args:
    params: of `inference_params.from_params`, on any devices or on the host.
    placement: of `mesh.n_replicas` slots and all routers.
    mesh: that serves.
    cfg: the model.

  Raises:
    InputError: the placement is of other layers, experts or slots.
  """
  ffns = inference_params.moe_ffns(params)
  _validate(placement, mesh, cfg, len(ffns))
  replicated = jax.NamedSharding(mesh.mesh, jax.P())

  def experts_in_slots(layer, ffn):
    ffn = jax.device_put(_only_experts(ffn, mesh, cfg), replicated)
    experts = _logical_experts(ffn, mesh.n_shared(cfg))
    index = placement.expert[layer]
    return _to_slots(mesh, experts, index, placement, layer)

  def put(a, spec):
    spec = sharding.param_sharding(spec, mesh.rules, mesh.mesh.shape).spec
    return jax.device_put(a, jax.NamedSharding(mesh.mesh, spec))

  others = jax.tree.map(
    put,
    _without_experts(params, mesh, cfg),
    _without_experts(inference_params.specs(cfg), mesh, cfg),
  )
  experts = [experts_in_slots(i, ffn) for i, ffn in enumerate(ffns)]
  ffns = zip(inference_params.moe_ffns(others), experts, strict=True)
  return inference_params.replace_moe_ffns(
    others, [ffn | {"experts": p} for ffn, p in ffns]
  )


def apply_placement(
  params: inference_params.InferenceParams,
  old: eplb.ExpertPlacement,
  new: eplb.ExpertPlacement,
  mesh: ServingMesh,
  cfg: config.Model,
) -> inference_params.InferenceParams:
  """Moves experts between devices, from one placement to another.

  Raises:
    InputError: the placement is of other layers, experts or slots.
  """
  ffns = inference_params.moe_ffns(params)
  _validate(new, mesh, cfg, len(ffns))
  moved = []
  for layer, ffn in enumerate(ffns):
    index = old.replicas[layer, new.expert[layer], 0]
    experts = {name: ffn["experts"][name] for name in ("gate_up", "down")}
    experts = _to_slots(mesh, experts, index, new, layer)
    moved.append(ffn | {"experts": experts})
  return inference_params.replace_moe_ffns(params, moved)


def _expert_names(mesh: ServingMesh, cfg: config.Model) -> tuple[str, ...]:
  """Returns the keys of an MoE layer that hold experts in slots."""
  return ("experts", "shared") if mesh.n_shared(cfg) else ("experts",)


def _only_experts(
  ffn: param_spec.Params, mesh: ServingMesh, cfg: config.Model
) -> param_spec.Params:
  return {name: ffn[name] for name in _expert_names(mesh, cfg)}


def _without_experts(tree: Any, mesh: ServingMesh, cfg: config.Model) -> Any:
  """Returns a tree of inference parameters without those in expert slots."""
  names = _expert_names(mesh, cfg)
  return inference_params.replace_moe_ffns(
    tree,
    [
      {name: p for name, p in ffn.items() if name not in names}
      for ffn in inference_params.moe_ffns(tree)
    ],
  )


def _logical_experts(
  ffn: param_spec.Params, n_shared: int
) -> param_spec.Params:
  """Returns the routed experts, then the shared ones, stacked in order."""
  if not n_shared:
    return ffn["experts"]
  shared = _split_shared(ffn["shared"], n_shared)
  return jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), ffn["experts"], shared
  )


def _split_shared(shared: param_spec.Params, n: int) -> param_spec.Params:
  """Splits the shared feed-forward into n experts, whose sum it is."""
  gate_up, down = shared["gate_up"], shared["down"]
  d, pair, width = gate_up.shape
  return {
    "gate_up": jnp.moveaxis(gate_up.reshape(d, pair, n, width // n), 2, 0),
    "down": down.reshape(n, width // n, d),
  }


def _to_slots(
  mesh: ServingMesh,
  experts: param_spec.Params,
  index: np.ndarray,
  placement: eplb.ExpertPlacement,
  layer: int,
) -> param_spec.Params:
  """Returns the experts with these indices in slots, and tables of replicas."""
  axes = device_mesh.active_axes(mesh.mesh.shape, GROUP)
  replicated = jax.NamedSharding(mesh.mesh, jax.P())
  index = jax.device_put(index, replicated)
  to = jax.NamedSharding(mesh.mesh, jax.P(axes))
  tables = _replica_tables(mesh, placement, layer)
  return _take(experts, index, to) | jax.device_put(tables, replicated)


@functools.partial(jax.jit, static_argnames="to")
def _take(
  experts: param_spec.Params, index: jax.Array, to: jax.sharding.NamedSharding
) -> param_spec.Params:
  """Returns experts by their index, divided over devices."""
  return jax.tree.map(lambda a: a.at[index].get(out_sharding=to), experts)


def _replica_tables(
  mesh: ServingMesh, placement: eplb.ExpertPlacement, layer: int
) -> dict[str, np.ndarray]:
  """Returns the slots of each expert's replicas, and their number.

  Shapes are the same for all placements, so that nothing is compiled again.
  """
  replicas, count = placement.replicas[layer], placement.count[layer]
  most = mesh.n_replicas - len(count) + 1
  replicas = np.pad(replicas, ((0, 0), (0, most - replicas.shape[1])))
  return {"replicas": replicas, "count": count}

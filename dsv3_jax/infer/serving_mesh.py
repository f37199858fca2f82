"""Units of a deployment: a mesh, and how it divides a model that serves.

A prefill unit and a decode unit (arXiv:2412.19437, sections 3.4.1 and 3.4.2)
divide texts over the data-parallel axes, heads over `model`, and experts over
all devices of a group, so that each holds a few of them or one. Between its
attention and the next, a token belongs to one of the devices of its `model`
group: there it chooses experts and is sent to them. Some experts have replicas,
which share its tokens: see `placement.py`. In a decode unit the shared experts
are among the routed ones, chosen by every token.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.errors import InputError
from dsv3_jax.infer import eplb, inference_params
from dsv3_jax.model import moe
from dsv3_jax.parallel import device_mesh, dispatch, sharding

GROUP = (*device_mesh.EXPERTS, "model")  # one copy of all experts is over these
DISPATCH = ("allgather", "all_to_all", "hierarchical_all_to_all")

_COMMON = (
  ("slots", device_mesh.BATCH),
  ("experts", GROUP),
  ("heads", ("model",)),
)
# Dense layers are whole on each device for prefill: they are few.
PREFILL = sharding.ShardingRules(logical_to_mesh=_COMMON)
DECODE = sharding.ShardingRules(logical_to_mesh=(*_COMMON, ("ffn", ("model",))))


RULES = {"prefill": PREFILL, "decode": DECODE}


@dataclasses.dataclass(frozen=True)
class ServingConfig:
  """What a user says of a unit."""

  mesh: Mapping[str, int]  # sizes of axes
  role: str = "decode"  # one of RULES
  redundant_experts: int | None = None  # None: the fewest that divide evenly
  dispatch: str = "allgather"


@dataclasses.dataclass(frozen=True)
class ServingMesh:
  """Devices that serve together."""

  mesh: jax.sharding.Mesh
  rules: sharding.ShardingRules
  n_replicas: int  # slots for experts, in all
  dispatch: str = "allgather"  # one of DISPATCH
  shared_routed: bool = False  # shared experts are placed like routed ones

  @property
  def batch(self) -> jax.P:
    """The partition of what has a row for each text."""
    return device_mesh.batch_spec(self.mesh.shape, 0)

  @property
  def n_shards(self) -> int:
    """Parts that texts are divided into."""
    return device_mesh.axis_size(self.mesh.shape, device_mesh.BATCH)

  @property
  def n_devices(self) -> int:
    """Devices that experts are divided over."""
    return device_mesh.axis_size(self.mesh.shape, GROUP)

  def n_experts(self, cfg: config.Model) -> int:
    """Experts to be placed."""
    return cfg.router.n_experts + self.n_shared(cfg)

  def n_shared(self, cfg: config.Model) -> int:
    """Shared experts among them."""
    return cfg.moe.n_shared if self.shared_routed else 0

  def load(self, load: np.ndarray, cfg: config.Model) -> np.ndarray:
    """Load [n, E] of routed experts, with that of the others to be placed."""
    tokens = load.sum(-1, keepdims=True) / cfg.router.top_k
    return np.concatenate([load, *[tokens] * self.n_shared(cfg)], axis=-1)


def make_serving_mesh(wanted: ServingConfig, cfg: config.Model) -> ServingMesh:
  """The unit of a deployment.

  Raises:
    InputError: there is no such kind, or what is wanted does not divide.
  """
  if wanted.role not in RULES:
    raise InputError(f"role={wanted.role}: must be one of {', '.join(RULES)}")
  if wanted.dispatch not in DISPATCH:
    raise InputError(
      f"dispatch={wanted.dispatch}: must be one of {', '.join(DISPATCH)}"
    )
  made = ServingMesh(
    mesh=device_mesh.make_mesh(wanted.mesh),
    rules=RULES[wanted.role],
    n_replicas=0,
    dispatch=wanted.dispatch,
    shared_routed=wanted.role == "decode",
  )
  n, more = made.n_experts(cfg), wanted.redundant_experts
  fewest = -n % made.n_devices
  if more is None:
    more = fewest
  elif more < 0 or (n + more) % made.n_devices:
    raise InputError(
      f"redundant_experts={more}: with {n} experts on {made.n_devices}"
      f" devices it must be {fewest} or so many {made.n_devices}s more"
    )
  return dataclasses.replace(made, n_replicas=n + more)


def validate(unit: ServingMesh, cfg: config.Model, n_slots: int) -> list[str]:
  """What does not divide evenly over a unit, a line each."""
  sizes, found = unit.mesh.shape, []
  divided = dict(unit.rules.logical_to_mesh)
  for name, size, axes in (
    (f"n_slots={n_slots}", n_slots, device_mesh.BATCH),
    (f"mla.n_heads={cfg.mla.n_heads}", cfg.mla.n_heads, ("model",)),
    (f"n_replicas={unit.n_replicas}", unit.n_replicas, GROUP),
    (
      f"dense_ffn_dim={cfg.dense_ffn_dim}",
      cfg.dense_ffn_dim,
      divided.get("ffn", ()),
    ),
  ):
    if size % (n := device_mesh.axis_size(sizes, axes)):
      over = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
      found.append(f"{name}: must be a multiple of {n}, the devices {over}")
  if unit.n_replicas < unit.n_experts(cfg):
    found.append(
      f"n_replicas={unit.n_replicas}: must be at least"
      f" {unit.n_experts(cfg)}, the experts to be placed"
    )
  return found


# --- parameters ---


def _shared_as_experts(ffn: param_spec.Params, n: int) -> param_spec.Params:
  """Shared experts [n, ...], whose sum the shared feed-forward is."""
  gate_up, down = ffn["shared"]["gate_up"], ffn["shared"]["down"]
  d, pair, width = gate_up.shape
  return {
    "gate_up": jnp.moveaxis(gate_up.reshape(d, pair, n, width // n), 2, 0),
    "down": down.reshape(n, width // n, d),
  }


def _logical(ffn: param_spec.Params, n_shared: int) -> param_spec.Params:
  """All experts to be placed, in order."""
  if not n_shared:
    return ffn["experts"]
  shared = _shared_as_experts(ffn, n_shared)
  return jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), ffn["experts"], shared
  )


def _tables(
  unit: ServingMesh, placed: eplb.ExpertPlacement, layer: int
) -> dict[str, jax.Array]:
  """Where the replicas of a layer's experts are; a shape for all placements."""
  replicas, count = placed.replicas[layer], placed.count[layer]
  most = unit.n_replicas - len(count) + 1
  replicas = np.pad(replicas, ((0, 0), (0, most - replicas.shape[1])))
  whole = jax.NamedSharding(unit.mesh, jax.P())
  return jax.device_put({"replicas": replicas, "count": count}, whole)


@functools.partial(jax.jit, static_argnames="to")
def _taken(
  experts: param_spec.Params, index: jax.Array, to: jax.sharding.NamedSharding
) -> param_spec.Params:
  """Experts by their index, divided over devices."""
  return jax.tree.map(lambda a: a.at[index].get(out_sharding=to), experts)


def _moved(
  unit: ServingMesh,
  experts: param_spec.Params,
  index: np.ndarray,
  placed: eplb.ExpertPlacement,
  layer: int,
) -> param_spec.Params:
  """The experts that a placement wants, and its tables."""
  axes = device_mesh.active_axes(unit.mesh.shape, GROUP)
  index = jax.device_put(index, jax.NamedSharding(unit.mesh, jax.P()))
  taken = _taken(experts, index, jax.NamedSharding(unit.mesh, jax.P(axes)))
  return taken | _tables(unit, placed, layer)


def shard_params(
  params: inference_params.InferenceParams,
  placed: eplb.ExpertPlacement,
  unit: ServingMesh,
  cfg: config.Model,
) -> inference_params.InferenceParams:
  """The parameters of a unit, every device with its part.

  Args:
    params: of `served.params`.
    placed: of `unit.n_replicas` slots and all routers.
    unit: where to.
    cfg: the model.

  Raises:
    InputError: the placement is of other layers, experts or slots.
  """
  mixtures = inference_params.moe_ffns(params)
  _check(placed, unit, cfg, len(mixtures))
  whole = jax.NamedSharding(unit.mesh, jax.P())
  found = []
  for layer, ffn in enumerate(mixtures):
    experts = jax.device_put(_logical(ffn, unit.n_shared(cfg)), whole)
    index = placed.expert[layer]
    found.append(_moved(unit, experts, index, placed, layer))
  rest = _without_placed(params, unit, cfg)
  rest_specs = _without_placed(inference_params.specs(cfg), unit, cfg)

  def put(a, spec):
    to = sharding.param_sharding(spec, unit.rules, unit.mesh.shape).spec
    return jax.device_put(a, jax.NamedSharding(unit.mesh, to))

  rest = jax.tree.map(put, rest, rest_specs)
  ffns = zip(inference_params.moe_ffns(rest), found, strict=True)
  return inference_params.replace_moe_ffns(
    rest, [ffn | {"experts": experts} for ffn, experts in ffns]
  )


def _without_placed(tree: Any, unit: ServingMesh, cfg: config.Model) -> Any:
  """A served tree without experts that have their places in a placement."""
  placed = ("experts", "shared") if unit.n_shared(cfg) else ("experts",)
  return inference_params.replace_moe_ffns(
    tree,
    [
      {name: p for name, p in ffn.items() if name not in placed}
      for ffn in inference_params.moe_ffns(tree)
    ],
  )


def apply_placement(
  params: inference_params.InferenceParams,
  old: eplb.ExpertPlacement,
  new: eplb.ExpertPlacement,
  unit: ServingMesh,
  cfg: config.Model,
) -> inference_params.InferenceParams:
  """The parameters in another placement; experts travel between devices.

  Raises:
    InputError: the placement is of other layers, experts or slots.
  """
  mixtures = inference_params.moe_ffns(params)
  _check(new, unit, cfg, len(mixtures))
  found = []
  for layer, ffn in enumerate(mixtures):
    index = old.replicas[layer, new.expert[layer], 0]
    experts = {name: ffn["experts"][name] for name in ("gate_up", "down")}
    moved = _moved(unit, experts, index, new, layer)
    found.append(ffn | {"experts": moved})
  return inference_params.replace_moe_ffns(params, found)


def placement_for_load(
  load: np.ndarray, unit: ServingMesh, cfg: config.Model
) -> eplb.ExpertPlacement:
  """The placement for a load [n, E] of routed experts.

  Inside nodes where groups of experts divide over them, as tokens do that go
  to few groups. A layer without any load is placed as if its experts had the
  same.
  """
  n_shared, n_nodes = unit.n_shared(cfg), unit.mesh.shape["node"]
  load = np.where(load.any(-1, keepdims=True), load, 1)
  return eplb.place(
    unit.load(load, cfg),
    n_replicas=unit.n_replicas,
    n_devices=unit.n_devices,
    n_groups=1 if n_shared else cfg.router.n_groups,
    n_nodes=n_nodes,
  )


def uniform_placement(
  unit: ServingMesh, cfg: config.Model
) -> eplb.ExpertPlacement:
  """The one for the same load of all experts."""
  even = np.ones((cfg.n_routers, cfg.router.n_experts))
  return placement_for_load(even, unit, cfg)


def _check(
  placed: eplb.ExpertPlacement,
  unit: ServingMesh,
  cfg: config.Model,
  n_layers: int,
) -> None:
  there = *placed.count.shape, placed.expert.shape[1]
  here = n_layers, unit.n_experts(cfg), unit.n_replicas
  if there != here:
    raise InputError(
      f"a placement of (layers, experts, slots) {there}: must be {here}"
    )


# --- inside shard_map ---


def make_experts(unit: ServingMesh, cfg: config.Model) -> moe.Experts:
  """The routed experts of a unit."""
  sizes = unit.mesh.shape
  inner = dispatch.make_expert_parallel_ffn(
    unit.dispatch, sizes, cfg.router, group=GROUP
  )
  return moe.Experts(
    functools.partial(
      _ffn,
      inner=inner.ffn,
      n_shared=unit.n_shared(cfg),
      axes=device_mesh.active_axes(sizes, (*device_mesh.BATCH, "model")),
    )
  )


def _ffn(
  p: param_spec.Params,
  x: jax.Array,
  chosen: jax.Array,
  gates: jax.Array,
  n_slots: int | None = None,
  *,
  inner: Callable[..., jax.Array],
  n_shared: int,
  axes: tuple[str, ...],
) -> jax.Array:
  """Sends each token to one replica of each of its experts.

  The devices of a `model` group, which all have the same tokens, take a part
  of them each.
  """
  del n_slots
  n_experts, n_rows = len(p["count"]), len(x)
  chosen, gates = _with_shared(chosen, gates, n_experts, n_shared)
  split = "model" in axes
  if split:
    x, chosen, gates = _own_part(x, chosen, gates, n_experts)
  # Every device begins with another one.
  first = jax.lax.axis_index(axes) if axes else 0
  turn = first + jnp.arange(len(x), dtype=jnp.int32)[:, None]
  pick = lambda a, *at: a.at[at].get(mode="fill", fill_value=0)
  count = jnp.maximum(pick(p["count"], chosen), 1)
  slot = pick(p["replicas"], chosen, turn % count)
  n_here = len(p["down"]) * (_group_size(axes))
  slot = jnp.where(chosen < n_experts, slot, n_here)
  weights = {name: p[name] for name in ("gate_up", "down")}
  y = inner(weights, x, slot, gates)
  if split:
    y = jax.lax.all_gather(y, "model", tiled=True, to="invarying")[:n_rows]
  return y


def _group_size(axes: tuple[str, ...]) -> int:
  """Devices that experts are divided over."""
  used = tuple(axis for axis in GROUP if axis in axes)
  return jax.lax.axis_size(used) if used else 1


def _with_shared(
  chosen: jax.Array, gates: jax.Array, n_experts: int, n_shared: int
) -> tuple[jax.Array, jax.Array]:
  """Choices [M, K + n_shared] of placed experts, n_experts: none; gates."""
  n_routed = n_experts - n_shared
  own = jnp.arange(n_routed, n_experts, dtype=chosen.dtype)
  own = jnp.broadcast_to(own[None], (len(chosen), n_shared))
  both = jnp.concatenate([chosen, own], axis=1)
  both = jnp.where(chosen[:, :1] < n_routed, both, n_experts)
  one = jnp.ones_like(gates, shape=(len(gates), n_shared))
  return both, jnp.concatenate([gates, one], axis=1)


def _own_part(
  x: jax.Array, chosen: jax.Array, gates: jax.Array, none: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """This device's share of the rows; what pads them chooses no expert."""
  n, i = jax.lax.axis_size("model"), jax.lax.axis_index("model")
  size = -(-len(x) // n)

  def part(a, fill):
    padding = (0, n * size - len(a)), (0, 0)
    whole = jnp.pad(a, padding, constant_values=fill)
    return jax.lax.dynamic_slice_in_dim(whole, i * size, size)

  return part(x, 0), part(chosen, none), part(gates, 0)


# --- programs ---


def shard_mapped(
  f: Callable[..., Any], unit: ServingMesh | None
) -> Callable[..., Any]:
  """A function of parameters, a state and rows, on the devices of a unit.

  f returns the state, what has a row for each text, and sums over texts.
  """
  if unit is None:
    return f
  axes = device_mesh.active_axes(unit.mesh.shape, device_mesh.BATCH)

  def local(params, state, rows):
    state, written, sums = f(params, state, rows)
    total = lambda a: jax.lax.psum(a, axes) if axes else a
    return state, written, jax.tree.map(total, sums)

  # What comes in is where its types say.
  return jax.shard_map(
    local, mesh=unit.mesh, out_specs=(unit.batch, unit.batch, jax.P())
  )

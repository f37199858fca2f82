"""Serving meshes: devices that serve together, for prefill or for decode.

The units of arXiv:2412.19437, sections 3.4.1 and 3.4.2, divide texts over the
data-parallel axes, heads over `model`, and experts over all devices of a group,
so that each holds a few of them or one. Between two attentions a token belongs
to one device of its `model` group, which chooses its experts and sends it to
them. Some experts have replicas, which share its tokens: see `eplb.py`. For
decode the shared experts are among the routed ones, chosen by every token.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.parallel import device_mesh, sharding

GROUP = (*device_mesh.EXPERTS, "model")  # axes that experts are divided over
DISPATCH = ("allgather", "all_to_all", "hierarchical_all_to_all")

_COMMON = (
  ("slots", device_mesh.BATCH),
  ("experts", GROUP),
  ("heads", ("model",)),
)
# Dense layers, which are few, are replicated for prefill.
PREFILL = sharding.ShardingRules(logical_to_mesh=_COMMON)
DECODE = sharding.ShardingRules(logical_to_mesh=(*_COMMON, ("ffn", ("model",))))
ROLES = {"prefill": PREFILL, "decode": DECODE}


@dataclasses.dataclass(frozen=True)
class ServingConfig:
  """User settings of a serving mesh."""

  mesh: Mapping[str, int]  # sizes of axes
  role: str = "decode"  # one of ROLES
  redundant_experts: int | None = None  # None: the fewest that divide evenly
  dispatch: str = "allgather"  # one of DISPATCH


@dataclasses.dataclass(frozen=True)
class ServingMesh:
  """Devices that serve together, and how they divide a model."""

  mesh: jax.sharding.Mesh
  rules: sharding.ShardingRules
  n_replicas: int  # slots for experts, on all devices of a group
  dispatch: str = "allgather"  # one of DISPATCH
  shared_routed: bool = False  # shared experts have slots as routed ones do

  @property
  def batch(self) -> jax.P:
    """Partition of an array with a row for each text."""
    return device_mesh.batch_spec(self.mesh.shape, 0)

  @property
  def n_shards(self) -> int:
    """Number of parts that texts are divided into."""
    return device_mesh.axis_size(self.mesh.shape, device_mesh.BATCH)

  @property
  def n_devices(self) -> int:
    """Number of devices that experts are divided over."""
    return device_mesh.axis_size(self.mesh.shape, GROUP)

  def n_experts(self, cfg: config.Model) -> int:
    """Returns the number of experts that have slots."""
    return cfg.router.n_experts + self.n_shared(cfg)

  def n_shared(self, cfg: config.Model) -> int:
    """Returns the number of shared experts among them."""
    return cfg.moe.n_shared if self.shared_routed else 0

  def with_shared(self, load: np.ndarray, cfg: config.Model) -> np.ndarray:
    """Appends the load of shared experts: [n, E] -> [n, n_experts]."""
    tokens = load.sum(-1, keepdims=True) / cfg.router.top_k
    return np.concatenate([load, *[tokens] * self.n_shared(cfg)], axis=-1)


def make_serving_mesh(serving: ServingConfig, cfg: config.Model) -> ServingMesh:
  """Makes the serving mesh that the settings describe.

  Raises:
    InputError: a setting is unknown, or slots do not divide over the devices.
  """
  for name, allowed in (("role", ROLES), ("dispatch", DISPATCH)):
    if (value := getattr(serving, name)) not in allowed:
      raise InputError(f"{name}={value}: must be one of {', '.join(allowed)}")
  mesh = ServingMesh(
    mesh=device_mesh.make_mesh(serving.mesh),
    rules=ROLES[serving.role],
    n_replicas=0,
    dispatch=serving.dispatch,
    shared_routed=serving.role == "decode",
  )
  n, redundant = mesh.n_experts(cfg), serving.redundant_experts
  fewest = -n % mesh.n_devices
  if redundant is None:
    redundant = fewest
  elif redundant < 0 or (n + redundant) % mesh.n_devices:
    raise InputError(
      f"redundant_experts={redundant}: with {n} experts on {mesh.n_devices}"
      f" devices it must be {fewest}, or a multiple of {mesh.n_devices} more"
    )
  return dataclasses.replace(mesh, n_replicas=n + redundant)


def validate(mesh: ServingMesh, cfg: config.Model, max_batch: int) -> list[str]:
  """Lists what does not divide evenly over a serving mesh, a line each."""
  sizes, problems = mesh.mesh.shape, []
  ffn_axes = dict(mesh.rules.logical_to_mesh).get("ffn", ())
  for name, size, axes in (
    ("max_batch", max_batch, device_mesh.BATCH),
    ("attention.n_heads", cfg.attention.n_heads, ("model",)),
    ("n_replicas", mesh.n_replicas, GROUP),
    ("dense_ffn_dim", cfg.dense_ffn_dim, ffn_axes),
  ):
    if size % (n := device_mesh.axis_size(sizes, axes)):
      over = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
      problems.append(
        f"{name}={size}: must be a multiple of {n}, the devices {over}"
      )
  if mesh.n_replicas < (n := mesh.n_experts(cfg)):
    problems.append(
      f"n_replicas={mesh.n_replicas}: must be at least {n}, the number of"
      " experts"
    )
  return problems


def shard_mapped(
  f: Callable[..., Any], mesh: ServingMesh | None
) -> Callable[..., Any]:
  """Maps a function of parameters, a state and rows over a serving mesh.

  It returns the state, arrays with a row for each text, and sums over texts.
  Without a mesh it is returned itself.
  """
  if mesh is None:
    return f
  axes = device_mesh.active_axes(mesh.mesh.shape, device_mesh.BATCH)

  def local(params, state, rows):
    state, output, sums = f(params, state, rows)
    return state, output, jax.lax.psum(sums, axes) if axes else sums

  # The arguments' types say how they are divided.
  return jax.shard_map(
    local, mesh=mesh.mesh, out_specs=(mesh.batch, mesh.batch, jax.P())
  )

"""Load of the routed experts while serving, and their rebalancing by EPLB."""

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.infer import eplb, serving_mesh, serving_params
from dsv3_jax.infer.inference_params import InferenceParams

MAX_PENDING = 100  # loads that stay on devices before they are added up


class ExpertBalancer:
  """Counts tokens of each routed expert; moves experts to even the load."""

  def __init__(
    self,
    cfg: config.Model,
    mesh: serving_mesh.ServingMesh | None = None,
    placement: eplb.ExpertPlacement | None = None,
  ):
    """Starts counting at 0; on one device, mesh None, it can only count."""
    self.cfg, self.mesh, self.placement = cfg, mesh, placement
    self._total = np.zeros((cfg.n_routers, cfg.router.n_experts), np.int64)
    self._pending: list[jax.Array] = []

  def add(self, load: jax.Array) -> None:
    """Counts a load [n, E] without waiting for the device."""
    self._pending.append(load)

  @property
  def load(self) -> np.ndarray:
    """Tokens of each routed expert, [n, E] int64, since the last rebalance.

    Layers of the main model come first, then the MTP modules: the first one
    counts if it drafts, the others are 0.
    """
    for load in jax.device_get(self._pending):
      self._total[: len(load)] += load
    self._pending = []
    return self._total.copy()

  def flush(self) -> None:
    """Adds up loads on the host once there are many on the devices."""
    if len(self._pending) > MAX_PENDING:
      _ = self.load

  def imbalance(self) -> np.ndarray:
    """Largest over mean load of the mesh's devices, [n] of each router."""
    load = self.mesh.with_shared(self.load, self.cfg)
    return eplb.imbalance(self.placement.loads(load, self.mesh.n_devices))

  def rebalance(self, params: InferenceParams) -> InferenceParams:
    """Returns parameters moved to the best placement; counts from 0 again."""
    new = serving_params.placement_for_load(self.load, self.mesh, self.cfg)
    params = serving_params.apply_placement(
      params, self.placement, new, self.mesh, self.cfg
    )
    self.placement, self._total = new, np.zeros_like(self._total)
    return params

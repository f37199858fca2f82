"""Expert-parallel load balancer (EPLB): places experts on devices by load.

Loaded experts get several copies, called replicas; the replicas are packed so
that devices have about the same load (arXiv:2412.19437, sections 3.4.1, 3.4.2).
It runs on the host, in NumPy, every few minutes. N is a number of items or
experts, R the number of replicas, which is also the number of slots.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertPlacement:
  """Experts in slots. Each device has R / n_devices slots, in order."""

  expert: np.ndarray  # [L, R] int32, of each slot
  # [L, E, largest count] int32: slots of each expert's replicas, then -1. The
  # last dim changes with the load.
  replicas: np.ndarray
  count: np.ndarray  # [L, E] int32, replicas of each expert

  def loads(self, load: np.ndarray, n_devices: int) -> np.ndarray:
    """Returns device loads [L, n_devices] float64 of expert loads [L, E].

    Replicas share the load of their expert equally; n_devices divides R.

    Raises:
      ValueError: a load of another shape, negative or not finite, or devices
        the slots cannot be divided among.
    """
    load = _checked("load", load, 2)
    if load.shape != self.count.shape:
      raise ValueError(
        f"load has shape {load.shape}: must be {self.count.shape}, the layers"
        " and experts of the placement"
      )
    n_layers, n_slots = self.expert.shape
    _must_divide(n_devices=n_devices, n_replicas=n_slots)
    slot_load = np.take_along_axis(load / self.count, self.expert, axis=-1)
    return slot_load.reshape(n_layers, n_devices, -1).sum(-1)


def pack(weights: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
  """Packs N items into bins of exactly N / n_bins items, of about equal weight.

  By decreasing weight, each item goes to the lightest bin with room; ties go to
  the lower item and the lower bin. Bins of one item keep the order of items.

  Returns:
    The bin of each item, [N], and its rank in the bin, [N].

  Raises:
    ValueError: not [N], negative or not finite, or N is no multiple of n_bins.
  """
  weights = _checked("weights", weights, 1)
  _must_divide(n_bins=n_bins, n_items=weights.size)
  if weights.size == n_bins:
    return np.arange(n_bins), np.zeros(n_bins, int)
  chosen, rank = np.zeros((2, weights.size), int)
  total, filled = np.zeros(n_bins), np.zeros(n_bins, int)
  for item in np.argsort(-weights, stable=True):
    room = np.flatnonzero(filled < weights.size // n_bins)
    lightest = room[total[room].argmin()]
    chosen[item], rank[item] = lightest, filled[lightest]
    total[lightest] += weights[item]
    filled[lightest] += 1
  return chosen, rank


def replicate(
  weights: np.ndarray, n_replicas: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Gives each expert one replica, and more to the heaviest.

  Each further replica goes to the expert with the largest weight / count, ties
  to the lower. No other choice has a smaller maximum of weight / count. Without
  any load the first expert gets all of them.

  Returns:
    The expert of each replica, [R]: all experts in order, then the further
    replicas; its rank among the replicas of that expert, [R]; and the number of
    replicas of each expert, [N].

  Raises:
    ValueError: not [N], negative or not finite, or too few replicas.
  """
  weights = _checked("weights", weights, 1)
  _must_hold_all(n_replicas, weights.size)
  expert, rank = np.arange(n_replicas), np.zeros(n_replicas, int)
  count = np.ones(weights.size, int)
  for i in range(weights.size, n_replicas):
    heaviest = (weights / count).argmax()
    expert[i], rank[i] = heaviest, count[heaviest]
    count[heaviest] += 1
  return expert, rank, count


def balance_experts(
  load: np.ndarray,
  *,
  n_replicas: int,
  n_devices: int,
  n_groups: int = 1,
  n_nodes: int = 1,
) -> ExpertPlacement:
  """Replicates the experts of each layer, and packs them into devices.

  If n_nodes divides n_groups, balancing is hierarchical: groups are packed into
  nodes, and each node replicates and packs its own experts. Tokens, which go to
  few groups, then go to few nodes too: for prefill, where nodes are few.
  Otherwise it is global, as with one group on one node: for decode, with more
  nodes than groups. Two replicas of an expert may share a device, where the
  second is of no use.

  Args:
    load: [L, E], for example moving averages of each expert's tokens.
    n_replicas: R, number of slots; R - E of them are redundant.
    n_devices: a divisor of n_replicas.
    n_groups: the router's groups of experts, a divisor of E.
    n_nodes: a divisor of n_devices.

  Raises:
    ValueError: a load that is not [L, E], negative or not finite, or numbers
      that do not divide each other.
  """
  load = _checked("load", load, 2)
  n_experts = load.shape[1]
  _must_hold_all(n_replicas, n_experts)
  _must_divide(n_devices=n_devices, n_replicas=n_replicas)
  _must_divide(n_nodes=n_nodes, n_devices=n_devices)
  _must_divide(n_groups=n_groups, n_experts=n_experts)
  if n_groups % n_nodes:
    n_groups = n_nodes = 1
  layers = [
    _balance_layer(row, n_replicas, n_devices, n_groups, n_nodes)
    for row in load
  ]
  expert, rank = np.stack(layers, axis=1)
  return _placement(expert, rank, n_experts)


def identity(n_layers: int, n_experts: int) -> ExpertPlacement:
  """Returns the placement with every expert once, in order."""
  if n_layers < 1 or n_experts < 1:
    raise ValueError(
      f"n_layers={n_layers}, n_experts={n_experts}: must be at least 1"
    )
  expert = np.tile(np.arange(n_experts), (n_layers, 1))
  return _placement(expert, np.zeros_like(expert), n_experts)


def imbalance(loads: np.ndarray) -> np.ndarray:
  """Returns largest over mean load, [..., n_devices] -> [...] float64.

  It is 1 if devices are balanced, or without any load.

  Raises:
    ValueError: no device, or a load that is negative or not finite.
  """
  loads = _checked("loads", loads, max(1, np.ndim(loads)))
  mean = loads.mean(-1)
  return np.divide(loads.max(-1), mean, out=np.ones_like(mean), where=mean > 0)


def _balance_layer(
  load: np.ndarray, n_replicas: int, n_devices: int, n_groups: int, n_nodes: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the expert of each slot, [R], and its rank, [R], for a load [E]."""
  by_group = np.arange(load.size).reshape(n_groups, -1)
  groups = _packing_order(load[by_group].sum(-1), n_nodes)
  expert, rank = [], []
  for experts in by_group[groups].reshape(n_nodes, -1):
    local, local_rank, count = replicate(load[experts], n_replicas // n_nodes)
    slots = _packing_order((load[experts] / count)[local], n_devices // n_nodes)
    expert.append(experts[local[slots]])
    rank.append(local_rank[slots])
  return np.concatenate(expert), np.concatenate(rank)


def _packing_order(weights: np.ndarray, n_bins: int) -> np.ndarray:
  """Returns items sorted by the bin that `pack` chooses, then by rank in it."""
  chosen, rank = pack(weights, n_bins)
  return np.lexsort((rank, chosen))


def _placement(
  expert: np.ndarray, rank: np.ndarray, n_experts: int
) -> ExpertPlacement:
  """Makes a placement from each slot's expert [L, R] and rank [L, R]."""
  n_layers, n_slots = expert.shape
  layer = np.arange(n_layers)[:, None]
  count = np.zeros((n_layers, n_experts), np.int32)
  np.add.at(count, (layer, expert), 1)
  replicas = np.full((*count.shape, count.max()), -1, np.int32)
  replicas[layer, expert, rank] = np.arange(n_slots)
  return ExpertPlacement(expert.astype(np.int32), replicas, count)


def _checked(name: str, values: np.ndarray, n_dims: int) -> np.ndarray:
  """Returns loads in float64; raises a ValueError if one is invalid."""
  values = np.asarray(values, np.float64)
  if values.ndim != n_dims or not values.size:
    raise ValueError(
      f"{name} has shape {values.shape}: must have {n_dims} dim(s), none of"
      " them 0"
    )
  bad = values[~(np.isfinite(values) & (values >= 0))]
  if bad.size:
    raise ValueError(f"{name} holds {bad[0]}: must be finite and at least 0")
  return values


def _must_divide(**numbers: int) -> None:
  """Raises a ValueError unless the first of two divides the second."""
  (name, divisor), (other, number) = numbers.items()
  if divisor < 1:
    raise ValueError(f"{name}={divisor}: must be at least 1")
  if number % divisor:
    raise ValueError(
      f"{other}={number}: must be a multiple of {name}={divisor}"
    )


def _must_hold_all(n_replicas: int, n_experts: int) -> None:
  """Raises a ValueError unless there is a replica for every expert."""
  if n_replicas < n_experts:
    raise ValueError(
      f"n_replicas={n_replicas}: must be at least n_experts={n_experts}"
    )

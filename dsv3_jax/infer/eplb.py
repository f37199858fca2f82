"""Which device holds which experts, from their load (EPLB).

Loaded experts get several copies, called replicas, and the replicas are packed
so that devices carry about the same (arXiv:2412.19437, sections 3.4.1, 3.4.2).
Host side, in NumPy: a placement is made anew every few minutes. N is the number
of items or experts at hand, R that of replicas, and so of slots to hold them.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertPlacement:
  """What every slot holds. Devices own R / n_devices slots each, in order."""

  expert: np.ndarray  # [L, R] int32, that of each slot
  # [L, E, most] int32: slots of each expert in the order its replicas were
  # made, then -1. `most` is the largest count, so it changes with the load.
  replicas: np.ndarray
  count: np.ndarray  # [L, E] int32, replicas of each expert

  def loads(self, load: np.ndarray, n_devices: int) -> np.ndarray:
    """Load of each device if an expert's is shared equally by its replicas.

    Args:
      load: [L, E], that of each expert.
      n_devices: a divisor of R.

    Returns:
      [L, n_devices] float64.

    Raises:
      ValueError: a load of another shape, negative or not finite, or devices
        the slots cannot be divided among.
    """
    load = _checked("load", load, 2)
    if load.shape != self.count.shape:
      raise ValueError(
        f"load has shape {load.shape}: must be {self.count.shape}, the layers"
        " and experts that were placed"
      )
    n_layers, n_slots = self.expert.shape
    _must_divide(n_devices=n_devices, n_replicas=n_slots)
    of_slots = np.take_along_axis(load / self.count, self.expert, axis=-1)
    return of_slots.reshape(n_layers, n_devices, -1).sum(-1)


def pack(weights: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
  """Packs N items into bins of exactly N / n_bins items, of about equal weight.

  By decreasing weight, each goes to the lightest bin with room; ties go to the
  lower item and the lower bin. Bins of one item hold them in their own order.

  Args:
    weights: [N].
    n_bins: a divisor of N.

  Returns:
    The bin of each item, [N], and its place there, [N].

  Raises:
    ValueError: not [N], negative or not finite, or N is no multiple of n_bins.
  """
  weights = _checked("weights", weights, 1)
  _must_divide(n_bins=n_bins, n_items=weights.size)
  if weights.size == n_bins:
    return np.arange(n_bins), np.zeros(n_bins, int)
  chosen, place = np.zeros((2, weights.size), int)
  total, held = np.zeros(n_bins), np.zeros(n_bins, int)
  for item in np.argsort(-weights, stable=True):
    room = np.flatnonzero(held < weights.size // n_bins)
    lightest = room[total[room].argmin()]
    chosen[item], place[item] = lightest, held[lightest]
    total[lightest] += weights[item]
    held[lightest] += 1
  return chosen, place


def replicate(
  weights: np.ndarray, n_replicas: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Gives each expert one replica, and more to the heaviest.

  Each further one goes to the expert whose replicas carry most, ties to the
  lower. No other choice has a smaller maximum of weight / count. Where no
  expert has any load they are all the first one's.

  Args:
    weights: [N].
    n_replicas: at least N.

  Returns:
    The expert of each replica, [R]: all in order, then the further ones as
    they were made. Its rank among the replicas of that expert, [R]. Replicas of
    each expert, [N].

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
  """Replicates and packs the experts of each layer.

  Hierarchical where n_nodes divides n_groups: groups are packed into nodes,
  and a node replicates and packs the experts of its own. Tokens, which go to
  few groups, then go to few nodes too. This is for prefill, where nodes are
  few. Elsewhere global, as if all were one group on one node: for decode, with
  nodes more than groups. Nothing keeps two replicas of an expert from sharing a
  device, where the second is of no use.

  Args:
    load: [L, E], such as moving averages of the tokens of each expert.
    n_replicas: R, slots in all; R - E of them are redundant.
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
  # With these, nodes divide the replicas too.
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
  """Every expert once, in order.

  Raises:
    ValueError: no layer or no expert.
  """
  if n_layers < 1 or n_experts < 1:
    raise ValueError(
      f"n_layers={n_layers}, n_experts={n_experts}: must be at least 1"
    )
  expert = np.tile(np.arange(n_experts), (n_layers, 1))
  return _placement(expert, np.zeros_like(expert), n_experts)


def imbalance(loads: np.ndarray) -> np.ndarray:
  """Largest over mean load of devices, [..., n_devices] -> [...] float64.

  1 is balance, and what it is where nothing was routed.

  Raises:
    ValueError: no device, or a load that is negative or not finite.
  """
  loads = _checked("loads", loads, max(1, np.ndim(loads)))
  mean = loads.mean(-1)
  return np.divide(loads.max(-1), mean, out=np.ones_like(mean), where=mean > 0)


def _balance_layer(
  load: np.ndarray,
  n_replicas: int,
  n_devices: int,
  n_groups: int,
  n_nodes: int,
) -> tuple[np.ndarray, np.ndarray]:
  """What each slot holds, [R], and which replica of it, [R], from load [E]."""
  of_groups = np.arange(load.size).reshape(n_groups, -1)
  groups = _in_order(*pack(load[of_groups].sum(-1), n_nodes))
  expert, rank = [], []
  for experts in of_groups[groups].reshape(n_nodes, -1):
    own, own_rank, count = replicate(load[experts], n_replicas // n_nodes)
    share = load[experts] / count
    slots = _in_order(*pack(share[own], n_devices // n_nodes))
    expert.append(experts[own[slots]])
    rank.append(own_rank[slots])
  return np.concatenate(expert), np.concatenate(rank)


def _in_order(chosen: np.ndarray, place: np.ndarray) -> np.ndarray:
  """Items of the first bin by their place, then of the next, and so on."""
  return np.lexsort((place, chosen))


def _placement(
  expert: np.ndarray, rank: np.ndarray, n_experts: int
) -> ExpertPlacement:
  """From the expert [L, R] of each slot and which replica [L, R] of it."""
  n_layers, n_slots = expert.shape
  layer = np.arange(n_layers)[:, None]
  count = np.zeros((n_layers, n_experts), np.int32)
  np.add.at(count, (layer, expert), 1)
  replicas = np.full((*count.shape, count.max()), -1, np.int32)
  replicas[layer, expert, rank] = np.arange(n_slots)
  return ExpertPlacement(expert.astype(np.int32), replicas, count)


def _checked(name: str, values: np.ndarray, n_dims: int) -> np.ndarray:
  """Loads in float64, or a ValueError that says what is wrong with them."""
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

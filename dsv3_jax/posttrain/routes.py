"""Experts that a sampler chose, put at their tokens in rows, and checked."""

import dataclasses

import numpy as np

ABSENT = -1


@dataclasses.dataclass(frozen=True)
class Routes:
  """Experts of N tokens in any order; the key is (sample, position)."""

  samples: np.ndarray  # [N], at least 0
  positions: np.ndarray  # [N] of the token in its sample
  tokens: np.ndarray  # [N] ids that the sampler read there
  experts: np.ndarray  # [N, n_routers, K]; -1: the router did not run


def pack(
  routes: Routes, samples: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Puts routes at the places of their keys.

  Args:
    routes: those of the samples in the rows.
    samples: [..., T] of each place; -1: padding.
    positions: [..., T] of the place in its sample.

  Returns:
    Experts [..., T, n_routers, K] and ids of tokens [..., T], both int32, -1
    where there is no route.

  Raises:
    ValueError: two routes or two places have one key, or a route no place.
  """
  if len({len(a) for a in dataclasses.astuple(routes)}) > 1:
    raise ValueError("routes: samples, positions, tokens, experts differ in N")
  keys = _keys(routes.samples, routes.positions)
  order = np.argsort(keys, kind="stable")
  wanted = _keys(samples, positions)
  at = np.searchsorted(keys[order], wanted)
  # The last entry is of no key: -1 is that of padding, which has no route.
  found = np.append(keys[order], ABSENT)[at] == wanted
  found &= np.asarray(samples) >= 0
  if len(np.unique(keys)) < len(keys):
    raise ValueError("routes: two have the same sample and position")
  if (n := len(np.unique(wanted[found]))) < found.sum():
    raise ValueError("rows: two places have the same sample and position")
  if n < len(keys):
    raise ValueError(f"routes: {len(keys) - n} of {len(keys)} have no place")
  index = np.where(found, np.append(order, 0)[at], -1)
  last = [(0, 1), (0, 0), (0, 0)]
  experts = np.pad(np.int32(routes.experts), last, constant_values=ABSENT)
  return experts[index], np.append(np.int32(routes.tokens), ABSENT)[index]


def _keys(samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
  return np.asarray(samples, np.int64) << 32 | np.asarray(positions, np.int64)


def validate(
  routes: np.ndarray,
  keys: np.ndarray,
  tokens: np.ndarray,
  required: np.ndarray,
  n_experts: int,
  n_moe_layers: int,
) -> None:
  """Checks routes before a trainer takes them.

  Args:
    routes: [..., T, n_routers, K], of MoE layers, then of MTP modules, -1 where
      there is none.
    keys: [..., T] ids of the tokens that the sampler read there.
    tokens: [..., T] ids that the trainer reads.
    required: [..., T] bool, tokens whose MoE layers must have a route.
    n_experts: of a router.
    n_moe_layers: routers of the main model.

  Raises:
    ValueError: lengths differ, a route is missing, repeats or exceeds experts,
      or is one of another token.
  """
  if not routes.shape[:-2] == keys.shape == tokens.shape == required.shape:
    raise ValueError(
      f"routes {routes.shape}, keys {keys.shape}, tokens {tokens.shape} and"
      f" required {required.shape}: must be of the same tokens"
    )
  present = (routes != ABSENT).any(-1)
  in_range = (routes >= 0) & (routes < n_experts)
  ordered = np.sort(routes, axis=-1)
  problems = {
    "no route": required & ~present[..., :n_moe_layers].all(-1),
    f"no expert of 0 to {n_experts - 1}": (present & ~in_range.all(-1)).any(-1),
    "an expert twice": (
      present & (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    ).any(-1),
    "the route of another token": present.any(-1) & (keys != tokens),
  }
  for problem, where in problems.items():
    if where.any():
      first = tuple(int(i) for i in np.argwhere(where)[0])
      raise ValueError(
        f"routes: {problem} at {where.sum()} of {where.size} tokens, the first"
        f" at {first}"
      )

"""Reward of an answer, and the weighted sum of several with what went wrong.

A reward is a function of a prompt, an answer and a reference, all texts. One
that fails, hangs or is not finite is an error with a name, and its value is
NaN: a 0 always means that the answer is bad.
"""

import collections
import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Iterable, Mapping

from dsv3_jax import display
from dsv3_jax.errors import InputError

NAN = float("nan")
TIMEOUT = 600.0  # seconds; rewards of this package have tighter limits inside


@dataclasses.dataclass(frozen=True)
class Reward:
  """The value of an answer; NaN with an error, finite without one.

  Raises:
    ValueError: the value is not finite without an error, or finite with one.
  """

  value: float
  parts: dict[str, float] = dataclasses.field(default_factory=dict)
  error: str = ""  # a kind that can be counted, then ": " and details, if any

  def __post_init__(self):
    if math.isfinite(self.value) == bool(self.error):
      raise ValueError(
        f"not finite without an error, or finite with one: {self.value},"
        f" {self.error!r}"
      )

  @property
  def kind(self) -> str:
    """The error without its details."""
    return self.error.split(":")[0]


Triple = tuple[str, str, str]  # prompt, answer, reference
RewardFunction = Callable[[str, str, str], Reward]


def failed(error: str, **parts: float) -> Reward:
  """Returns the reward of an answer that could not be judged."""
  return Reward(NAN, parts, error)


@dataclasses.dataclass(frozen=True, repr=False)
class Scores(display.Table):
  """Rewards of answers, in the order of the answers, and counts of errors."""

  rewards: list[Reward]
  errors: collections.Counter[str]  # by "reward: kind of error"

  def _rows(self) -> Mapping[str, object]:
    values = [r.value for r in self.rewards if not r.error]
    mean = f"{sum(values) / len(values):.4f}" if values else "none"
    n_failed = len(self.rewards) - len(values)
    rows = {"answers": len(self.rewards), "mean": mean, "not judged": n_failed}
    return rows | dict(self.errors.most_common())


def score_all(
  functions: Mapping[str, RewardFunction],
  triples: Iterable[Triple],
  weights: Mapping[str, float] | None = None,
  timeout: float = TIMEOUT,
) -> Scores:
  """Scores answers by the weighted sum of rewards.

  Args:
    functions: rewards by name.
    triples: prompt, answer and reference of each answer.
    weights: of the rewards, 1 where absent. A reward of weight 0 is computed,
      counted and shown in the parts; its errors do not reach the sum.
    timeout: seconds that one reward of one answer may take.

  Returns:
    A reward for each triple, in their order: parts are the values by name, and
    the parts of each as "name/part". The value is NaN if a reward of another
    weight than 0 failed for this answer; the others are as if it was not there.

  Raises:
    InputError: no reward, a weight of an unknown one, one that is not finite;
      or a reward cannot be computed on this machine at all.
  """
  weights = dict.fromkeys(functions, 1.0) | dict(weights or {})
  if not functions:
    raise InputError("rewards: none is given")
  if unknown := weights.keys() - functions.keys():
    raise InputError(
      f"weights of {', '.join(sorted(unknown))}: must be of"
      f" {', '.join(functions)}"
    )
  if wrong := [k for k, w in weights.items() if not math.isfinite(w)]:
    raise InputError(f"weights of {', '.join(wrong)}: must be finite")
  errors, rewards = collections.Counter(), []
  for triple in triples:
    each = {k: _score(f, triple, timeout) for k, f in functions.items()}
    errors.update(f"{k}: {r.kind}" for k, r in each.items() if r.error)
    rewards.append(_weighted_sum(each, weights))
  return Scores(rewards, errors)


def _weighted_sum(
  each: Mapping[str, Reward], weights: Mapping[str, float]
) -> Reward:
  """Returns the sum of rewards by name, with the parts of all of them."""
  parts = {name: reward.value for name, reward in each.items()}
  for name, reward in each.items():
    parts |= {f"{name}/{part}": v for part, v in reward.parts.items()}
  weighted = {k: r for k, r in each.items() if weights[k]}
  if wrong := [f"{k}: {r.error}" for k, r in weighted.items() if r.error]:
    return failed("; ".join(wrong), **parts)
  return Reward(sum(weights[k] * r.value for k, r in weighted.items()), parts)


def _score(function: RewardFunction, triple: Triple, timeout: float) -> Reward:
  """Returns one reward of one answer, whatever the function does.

  It runs in a thread, because nothing else ends the wait for a function that
  hangs; that thread is left behind.
  """
  results: queue.SimpleQueue = queue.SimpleQueue()

  def call():
    try:
      results.put(function(*triple))
    except BaseException as error:
      results.put(error)

  threading.Thread(target=call, daemon=True, name="reward").start()
  try:
    result = results.get(timeout=timeout)
  except queue.Empty:
    return failed(f"timeout: no result after {timeout:g} s")
  if isinstance(result, InputError):
    raise result
  if isinstance(result, BaseException):
    return failed(f"{type(result).__name__}: {result}")
  if not isinstance(result, Reward):
    return failed(f"no Reward: returned {type(result).__name__}")
  return result

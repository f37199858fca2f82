"""Dataclasses that validate themselves by types and limits of fields."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dsv3_jax.errors import raise_problems

T = typing.TypeVar("T")
# Whole numbers up to here are exact as floats, and in JSON, everywhere.
LARGEST = 2**53


def number(
  default: Any = dataclasses.MISSING,
  *,
  low: float | None = None,
  high: float | None = None,
  above: float | None = None,
  below: float | None = None,
  doc: str = "",
) -> Any:
  """A numeric field with low <= value <= high and above < value < below.

  Whole numbers are at most LARGEST, negative ones at least -LARGEST. Others are
  finite in float32, in which `above` and `below` hold too: an epsilon that
  devices read as 0, or a decay that they read as 1, is refused.
  """
  limits = {"low": low, "high": high, "above": above, "below": below}
  return dataclasses.field(default=default, metadata=limits | {"doc": doc})


def choice(default: str, *others: str, doc: str = "") -> Any:
  """A text field that must be one of the values given."""
  metadata = {"choices": (default, *others), "doc": doc}
  return dataclasses.field(default=default, metadata=metadata)


def plain(default: Any, doc: str) -> Any:
  """A field without limits, other than its type."""
  return dataclasses.field(default=default, metadata={"doc": doc})


def allowed(field: dataclasses.Field, field_type: type) -> str:
  """Describes the values of a field, such as `>= 1` or `none, block`."""
  if choices := field.metadata.get("choices"):
    return ", ".join(choices)
  if field_type in (bool, str):
    return {bool: "true, false", str: "text"}[field_type]
  low, high = map(field.metadata.get, ("low", "high"))
  if low is not None and high is not None:
    return f"{low:g} to {high:g}"
  signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
  limits = [
    f"{sign} {field.metadata[name]:g}"
    for name, sign in signs.items()
    if field.metadata.get(name) is not None
  ]
  return ", ".join(limits) or "any"


def _float32(value: float) -> float:
  """Returns the number that a device reads: most take subnormal ones for 0."""
  with np.errstate(over="ignore", under="ignore"):
    rounded = np.float32(value)
  return 0.0 if abs(rounded) < np.finfo(np.float32).tiny else float(rounded)


def _limit_problems(
  value: float, rounded: float, limits: Mapping[str, Any]
) -> Iterator[str]:
  """Limits that a number exceeds; `rounded` is the number that devices read."""
  low, high, above, below = map(limits.get, ("low", "high", "above", "below"))
  if not math.isfinite(rounded):
    yield "must be finite" + " in float32" * math.isfinite(value)
    return
  if low is not None and value < low:
    yield f"must be at least {low:g}"
  if high is not None and value > high:
    yield f"must be at most {high:g}"
  if above is not None and rounded <= above:
    yield f"must be above {above:g}" + " in float32" * (value > above)
  if below is not None and rounded >= below:
    yield f"must be below {below:g}" + " in float32" * (value < below)


def _field_problems(cfg: Any) -> Iterator[str]:
  """Values of the wrong type, not finite, or out of the range declared."""
  hints = typing.get_type_hints(type(cfg))
  for field in dataclasses.fields(cfg):
    value, expected = getattr(cfg, field.name), hints[field.name]
    setting = f"{type(cfg).__name__}.{field.name}={value!r}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected in (int, str, bool):
      accepted = type(value) is expected
    else:
      accepted = is_number if expected is float else isinstance(value, expected)
    if not accepted:
      yield f"{setting}: expected {expected.__name__}"
    elif type(value) is int and abs(value) > LARGEST:
      yield f"{setting}: must be at most {LARGEST}, or -{LARGEST} at least"
    elif is_number:
      rounded = _float32(value) if expected is float else value
      for problem in _limit_problems(value, rounded, field.metadata):
        yield f"{setting}: {problem}"
    elif choices := field.metadata.get("choices"):
      yield from unknown(f"{type(cfg).__name__}.{field.name}", value, choices)


def nearest(word: str, known: Iterable[str]) -> str:
  """A hint `; did you mean ...?` where a known word is close, else nothing."""
  known = list(known)
  close = difflib.get_close_matches(word, known, n=1)
  close = close or [name for name in known if word and name.startswith(word)]
  return f"; did you mean {close[0]!r}?" if close else ""


def unknown(setting: str, name: str, table: Iterable[str]) -> list[str]:
  """A one-line problem unless the table has the name."""
  if name in table:
    return []
  known = ", ".join(table)
  return [f"{setting}={name!r}: must be one of {known}{nearest(name, table)}"]


def _validate(cfg: Any) -> None:
  problems = list(_field_problems(cfg))
  if not problems and hasattr(cfg, "validate"):
    problems = list(cfg.validate())
  raise_problems(problems)


@typing.dataclass_transform(
  frozen_default=True,
  kw_only_default=True,
  field_specifiers=(number, choice, plain, dataclasses.field),
)
def checked(cls: type[T]) -> type[T]:
  """Makes a frozen keyword-only dataclass that validates itself.

  A class may have a method `validate` that yields problems of fields with each
  other; it is called once the types and limits of all fields hold.
  """
  cls.__post_init__ = _validate
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)

"""Lists, overrides and compares settings of a configuration by their paths."""

import copy
import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from dsv3_jax.config import fields, model, synonyms
from dsv3_jax.errors import InputError, raise_problems

# Old name -> new name of a setting or of a group of settings, both without a
# leading `model.`. Old names are read for one release: in `--set`, in
# config.json, and in the settings that a checkpoint's manifest holds.
RENAMED = {
  "data.heldout": "data.heldout_fraction",
  "data.on_bad_text": "data.on_decode_error",
  "mla": "attention",
  "mtp.hidden": "mtp.input_state",
  "optim.tail_lr": "optim.final_lr",
  "parallel.check_every": "parallel.replica_check_every",
  "schedule.bias_until": "schedule.bias_update_until",
  "train.kept": "train.saved_activations",
}
# (new name of the setting, old value) -> new value; old values too are read for
# one release.
RENAMED_VALUES = {
  ("parallel.dispatch", "gather"): "allgather",
  ("parallel.dispatch", "one_hop"): "all_to_all",
  ("parallel.dispatch", "two_hop"): "hierarchical_all_to_all",
  ("parallel.dispatch", "ragged_one_hop"): "ragged_all_to_all",
  ("parallel.dispatch", "ragged_two_hop"): "ragged_hierarchical_all_to_all",
}


# It was a number of steps; `schedule.warmup_until` is a share of the tokens.
WARMUP_STEPS = "schedule.warmup_steps"


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning("%s; the old one is read for one release", message)


def _current_name(path: str) -> str:
  """The present path of a setting, with a leading `model.` if it had one."""
  short = path.removeprefix("model.")
  words = short.split(".")
  for n in range(len(words), 0, -1):
    old, rest = ".".join(words[:n]), words[n:]
    if new := RENAMED.get(old):
      _warn_once(f"setting {old}{'.*' if rest else ''} is now {new}")
      return path[: len(path) - len(short)] + ".".join([new, *rest])
  return path


def _current_value(path: str, value: Any) -> Any:
  """The present value for a value, maybe an old one, of a present setting."""
  path = path.removeprefix("model.")
  if not isinstance(value, str) or (path, value) not in RENAMED_VALUES:
    return value
  new = RENAMED_VALUES[path, value]
  _warn_once(f"value {value} of setting {path} is now {new}")
  return new


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Replaces old names and values in stored settings {path: value}."""
  renamed = {_current_name(path): value for path, value in settings.items()}
  return {path: _current_value(path, v) for path, v in renamed.items()}


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
  """All settings as {"model.attention.n_heads": value}, in order."""
  out = {}
  for field in dataclasses.fields(cfg):
    value, path = getattr(cfg, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      out |= flatten(value, path + ".")
    else:
      out[path] = value
  return out


@dataclasses.dataclass(frozen=True)
class Setting:
  """A setting of a configuration, as `--list_settings` shows it."""

  path: str  # without a leading `model.`
  value: Any
  allowed: str
  doc: str


def describe(cfg: Any, prefix: str = "") -> list[Setting]:
  """All settings with what is allowed and what they mean, in order."""
  settings, types = [], typing.get_type_hints(type(cfg))
  for field in dataclasses.fields(cfg):
    value, path = getattr(cfg, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      settings += describe(value, path + ".")
      continue
    path = path.removeprefix("model.")
    allowed = fields.allowed(field, types[field.name])
    if path == "attention.type":
      allowed = ", ".join(model.attention_types())
    settings.append(
      Setting(path, value, allowed, field.metadata.get("doc", ""))
    )
  return settings


def default_settings(
  cls: type, settings: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
  """Default values of a settings class, {prefix + path: value}.

  `attention.type` of the stored settings picks the attention's class; MLA
  without it.
  """
  out, hints = {}, typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    path, nested = prefix + field.name, hints[field.name]
    if nested is model.Attention:
      name = settings.get(f"{path}.type")
      nested = model.attention_types().get(name, model.MLA)
    if dataclasses.is_dataclass(nested):
      out |= default_settings(nested, settings, path + ".")
    elif field.default is not dataclasses.MISSING:
      out[path] = field.default
  return out


def _parse(text: str, expected: type) -> Any:
  if expected is bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
  if expected is not int:
    return expected(text)
  try:
    return int(text)
  except ValueError:
    if (value := float(text)) != int(value):  # 1e9 is a valid int
      raise
    return int(value)


def _assignments(
  cfg: Any, texts: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
  """Parses `path=value` texts to ({path: value}, problems)."""
  known, values, problems = flatten(cfg), {}, []
  for text in texts:
    path, equals, value = text.partition("=")
    path = _current_name(path)
    # `model.` may be left out: router.bias_speed is model.router.bias_speed.
    path = path if path in known else f"model.{path}"
    if not equals:
      problems.append(f"{text!r}: expected path=value")
    elif path not in known:
      path = path.removeprefix("model.")
      docs = {s.path: f"{s.allowed}: {s.doc}" for s in describe(cfg)}
      problems.append(f"{path}: no such setting{synonyms.hint(path, docs)}")
    else:
      expected = type(known[path])
      try:
        values[path] = _parse(_current_value(path, value), expected)
      except (ValueError, KeyError, OverflowError):
        problems.append(f"{path}={value!r}: expected {expected.__name__}")
  return values, problems


def _rebuild(
  cfg: Any, values: dict[str, Any], prefix: str, problems: list[str]
) -> Any:
  """The config with values replaced, or None if it is not valid."""
  changes = {}
  for field in dataclasses.fields(cfg):
    value, path = getattr(cfg, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      changes[field.name] = _rebuild(value, values, path + ".", problems)
    elif path in values:
      changes[field.name] = values[path]
  if any(value is None for value in changes.values()):
    return None
  try:
    return dataclasses.replace(cfg, **changes)
  except InputError as error:
    problems.extend(str(error).splitlines())
    return None


def _with_attention(cfg: Any, cls: type[model.Attention]) -> Any:
  """A config, not yet validated, with settings of another attention.

  Settings of the same name keep their value; others have their default, or 0
  where there is none: `override` refuses these unless they are assigned.
  """
  new = copy.copy(cfg)
  if not isinstance(cfg, model.Model):
    object.__setattr__(new, "model", _with_attention(cfg.model, cls))
    return new
  hints, settings = typing.get_type_hints(cls), object.__new__(cls)
  for field in dataclasses.fields(cls):
    value = vars(cfg.attention).get(field.name, field.default)
    if value is dataclasses.MISSING:
      value = hints[field.name]()
    object.__setattr__(settings, field.name, value)
  object.__setattr__(settings, "type", cls.type)
  object.__setattr__(new, "attention", settings)
  return new


def _missing(cfg: Any, cls: type[model.Attention]) -> list[str]:
  """Settings that an attention requires and the one before does not have."""
  attention = (cfg if isinstance(cfg, model.Model) else cfg.model).attention
  return [
    field.name
    for field in dataclasses.fields(cls)
    if field.default is dataclasses.MISSING
    and not hasattr(attention, field.name)
  ]


def _with_attention_type(
  cfg: Any, assignments: Sequence[str]
) -> tuple[Any, list[str]]:
  """The config with the attention that is assigned, and problems."""
  types, problems = model.attention_types(), []
  paths = [text.partition("=")[0] for text in assignments]
  assigned = {path.removeprefix("model.attention.") for path in paths}
  assigned |= {path.removeprefix("attention.") for path in paths}
  for text in assignments:
    path, _, name = text.partition("=")
    if path.removeprefix("model.") == "attention.type":
      if name in types:
        for required in _missing(cfg, types[name]):
          if required not in assigned:
            problems.append(f"attention.{required}: needed by {text}")
        cfg = _with_attention(cfg, types[name])
      else:
        hint = fields.nearest(name, types)
        problems.append(f"{text}: must be one of {', '.join(types)}{hint}")
  return cfg, problems


def _with_warmup_steps(run: Any, assignment: str) -> Any:
  """The run with the warm-up of an old setting, a number of steps."""
  text = assignment.partition("=")[2]
  try:
    steps = _parse(text, int)
  except (ValueError, OverflowError):
    steps = -1
  if steps < 0:
    raise InputError(f"{WARMUP_STEPS}={text!r}: expected int, at least 0")
  _warn_once(f"setting {WARMUP_STEPS} is now schedule.warmup_until, a share")
  tokens = run.rows_before(steps) * run.data.seq_len
  share = tokens / run.train.tokens
  return override(run, f"schedule.warmup_until={share}")


def override(cfg: Any, *assignments: str) -> Any:
  """The config with settings such as `router.top_k=4` or `train.tokens=1e6`.

  Paths start at `cfg`; a leading `model.` may be left out. Values take the type
  of the setting.

  Raises:
    InputError: one line a problem, of all assignments together.
  """
  old = [text for text in assignments if text.startswith(f"{WARMUP_STEPS}=")]
  assignments = [text for text in assignments if text not in old]
  cfg, problems = _with_attention_type(cfg, assignments)
  values, invalid = _assignments(cfg, assignments)
  problems += invalid
  result = _rebuild(cfg, values, "", problems)
  raise_problems(problems)
  return _with_warmup_steps(result, old[-1]) if old else result


def diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """One line for each setting that differs between two `flatten` dicts."""
  missing = "(not there)"
  return [
    f"{path}: {old.get(path, missing)!r} -> {new.get(path, missing)!r}"
    for path in sorted(old.keys() | new.keys())
    if old.get(path, missing) != new.get(path, missing)
  ]

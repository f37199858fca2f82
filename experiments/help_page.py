"""Prints `--help` and `--list_settings` of experiments."""

import sys
from collections.abc import Iterator, Mapping

from absl import flags

from dsv3_jax import config, optim
from dsv3_jax.config import presets
from dsv3_jax.data import chat, sources
from dsv3_jax.plan import flops
from experiments import flag_parser

# Flags of all experiments by group; the rest is the last group.
_COMMON = "workdir variant steps seed set mesh init_from list_settings".split()
_PROCESSES = (
  "coordinator processes process join_timeout heartbeat watchdog_timeout"
  " grace_period"
).split()
# Settings that are keys of a table.
_TABLES = {
  "data.source": (*sources.SOURCES, *config.SUPERVISED),
  "data.template": chat.TEMPLATES,
  "optim.name": optim.OPTIMIZERS,
  "schedule.name": optim.SCHEDULES,
}
# Widths of the columns: most rows fit 100 characters, and none is cut.
_WIDTHS = 28, 8, 12


def _size(n: int) -> str:
  """A number of parameters in three digits, such as 37.6B."""
  unit, name = (1e9, "B") if n >= 1e9 else (1e6, "M")
  return f"{n / unit:.3g}{name}"


def variants(runs: Mapping[str, config.Run]) -> str:
  """Describes variants, a line each: parameters, active ones, purpose."""
  if recipes := [name for name in runs if name in presets.RECIPE_PURPOSES]:
    return "\n".join(
      ["variants, of the training of the model given:"]
      + [f"  {name:12}{presets.RECIPE_PURPOSES[name]}" for name in recipes]
    )
  lines = [
    "variants, with parameters without MTP, in all and active for a token:"
  ]
  for name, run in runs.items():
    counts = flops.parameter_counts(run.model)
    sizes = f"{_size(counts['main']):>5} {_size(counts['active']):>5}"
    text = f"{name:12}{sizes}  {presets.PURPOSES.get(name, '')}"
    lines += flag_parser.wrap(text, 26)
  return "\n".join(lines)


def _groups(own: list[flags.Flag], shared: list[flags.Flag]) -> Iterator[str]:
  """Yields flags by group, the common ones first."""
  by_name = {one.name: one for one in shared}
  groups = {
    "common flags": [by_name.pop(name) for name in _COMMON],
    "flags of this experiment": own,
    "several processes, timeouts": [by_name.pop(name) for name in _PROCESSES],
    "other flags": list(by_name.values()),
  }
  for title, group in groups.items():
    if group:
      rows = (flag_parser.describe(f.name, f.help, f.default) for f in group)
      yield f"{title}:\n" + "\n".join(rows)


def experiment(
  module: str, shared_module: str, runs: Mapping[str, config.Run]
) -> str:
  """The docstring of an experiment's module, its variants and all flags."""
  known = flags.FLAGS
  # absl knows the module that was started by the name of its file.
  name = sys.argv[0] if module == "__main__" else module
  own, shared = (
    known.flags_by_module_dict().get(name, []) for name in (name, shared_module)
  )
  parts = [str(sys.modules[module].__doc__), variants(runs)]
  return "\n\n".join([*parts, *_groups(own, shared)])


def _text(value: object) -> str:
  """A value as `--set` reads it; quotes where it is empty."""
  return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def settings(run: config.Run, preset: config.Run, variant: str) -> str:
  """All settings of a run, a line each: value, what is allowed, meaning.

  A star marks those that differ from the preset, whose value is at the end.
  """
  before = {setting.path: setting.value for setting in config.describe(preset)}
  lines = [
    f"settings of {variant}: value, allowed, meaning; --set=PATH=VALUE changes"
    " one; * is not the variant's"
  ]
  for setting in config.describe(run):
    allowed = ", ".join(_TABLES.get(setting.path, ())) or setting.allowed
    cells = setting.path, _text(setting.value), allowed
    columns = (
      f"{cell:{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)
    )
    line = f"{'  '.join(columns)}  {setting.doc}"
    changed = before.get(setting.path) != setting.value
    if changed:
      there = _text(before.get(setting.path, "not there"))
      line += f" ({variant}: {there})"
    lines.append(f"{'*' if changed else ' '} {line}".rstrip())
  return "\n".join(lines)

"""Command line flags as the typed fields of a dataclass.

  @dataclasses.dataclass(frozen=True)
  class Args:
    workdir: str = flag("", "folder of the run")
    step: int | None = flag(None, "step of a checkpoint; default: all")

  args = parse(Args, sys.argv)

The type of a field is int, float, bool, str, one of these or None, or
tuple[str, ...], which is a list with commas or a flag to be repeated.
"""

import dataclasses
import difflib
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags

from dsv3_jax import config
from dsv3_jax.config import fields, presets, synonyms
from dsv3_jax.errors import InputError, raise_problems

# Names of flags elsewhere, and the flag that is meant: the first of these that
# the program has and that is not given.
SYNONYMS = {
  **dict.fromkeys(
    (
      "output output_dir out_dir outdir run_dir save_dir log_dir logdir dir"
      " folder"
    ).split(),
    ("workdir", "hf", "out"),
  ),
  **dict.fromkeys(
    "checkpoint ckpt model_path load resume run".split(), ("workdir", "hf")
  ),
  **dict.fromkeys(
    "model model_name config preset".split(), ("variant", "workdir", "hf")
  ),
  "model_name_or_path": ("hf", "workdir"),
  "out": ("workdir",),
  "hf": ("workdir",),
  **dict.fromkeys(
    "max_steps num_steps train_steps max_iters iters iterations".split(),
    ("steps",),
  ),
  **dict.fromkeys("random_seed rng_seed".split(), ("seed",)),
  **dict.fromkeys("pretrained finetune_from weights".split(), ("init_from",)),
  **dict.fromkeys("settings override opts".split(), ("set",)),
  **dict.fromkeys(
    "world_size num_processes nnodes num_nodes".split(), ("processes",)
  ),
  **dict.fromkeys("rank node_rank process_id".split(), ("process",)),
  **dict.fromkeys(
    "master_addr coordinator_address host port".split(), ("coordinator",)
  ),
  **dict.fromkeys(
    "max_new_tokens num_tokens n_tokens length max_length".split(),
    ("max_tokens",),
  ),
  "temp": ("temperature",),
  **dict.fromkeys("text input".split(), ("prompt",)),
  "batch_size": ("max_batch",),
  "context": ("max_len",),
  "num_microbatches": ("microbatches",),
  "stages": ("ranks",),
}
# Axes of a mesh elsewhere, and the one that is meant.
AXIS_SYNONYMS = {
  **dict.fromkeys(
    "dp ddp fsdp devices gpus num_devices n_gpus".split(), "data"
  ),
  **dict.fromkeys("tp tensor mp".split(), "model"),
  **dict.fromkeys("ep experts".split(), "expert"),
  **dict.fromkeys("pp pipeline stage stages".split(), "pipe"),
  **dict.fromkeys("nodes host hosts".split(), "node"),
}
T = TypeVar("T")
_NOUNS = {int: "a whole number", float: "a number"}
_EXPECTED = {  # words of absl's errors
  "for int()": _NOUNS[int],
  "to float": _NOUNS[float],
  "Non-boolean": "true or false",
}


def flag(
  default: Any,
  help_text: str,
  *,
  choices: Sequence[str] = (),
  low: float | None = None,
  repeated: bool = False,
  old_name: str = "",
) -> Any:
  """A dataclass field that is a flag.

  Args:
    default: its value if it is not given.
    help_text: what `--help` prints.
    choices: values of a text, or of the texts of a list, if not any.
    low: the least value of a number.
    repeated: of a tuple: given once for each text, instead of with commas.
    old_name: an earlier name, read for one release.
  """
  metadata = {"help": help_text, "choices": tuple(choices), "low": low}
  metadata |= {"repeated": repeated, "old_name": old_name}
  return dataclasses.field(default=default, metadata=metadata)


def with_current_names(
  argv: Sequence[str], renamed: Mapping[str, str]
) -> list[str]:
  """Replaces the keys of `renamed` by its values, with warnings on stderr."""
  current = []
  for text in argv:
    match = re.fullmatch(r"(--?(?:no)?)(\w+)(=.*)?", text, re.DOTALL)
    if match and (new := renamed.get(match[2])):
      print(
        f"warning: --{match[2]} is now --{new}; the old name is read for one"
        " release",
        file=sys.stderr,
      )
      text = f"{match[1]}{new}{match[3] or ''}"
    current.append(text)
  return current


def _assignment(setting: config.Setting, value: str) -> str:
  """An assignment to a setting; of a value that may mean something else, how.

  A number of epochs, for example, is no number of tokens.
  """
  text = f"{setting.path}={value}"
  try:
    config.override(presets.TINY, text)
  except InputError:
    return f"{setting.path}=VALUE ({setting.allowed}: {setting.doc})"
  return text


def _meant(name: str, value: str, known: flags.FlagValues) -> str:
  """A hint for a flag that there is not: another one, or a setting."""
  for flag_name in SYNONYMS.get(name.lower().replace("-", "_"), ()):
    if flag_name in known and not known[flag_name].present:
      return f"; write --{flag_name}={value or 'VALUE'}"
  if "mesh" in known and name in AXIS_SYNONYMS:
    return f"; write --mesh={AXIS_SYNONYMS[name]}={value or 'N'}"
  if close := difflib.get_close_matches(name, list(known), n=1, cutoff=0.8):
    return f"; did you mean --{close[0]}?"
  if "set" in known:
    docs = {s.path: s for s in config.describe(presets.TINY)}
    match synonyms.meant(name, docs):
      case [path, *_] if path in docs:
        return f"; write --set={_assignment(docs[path], value)}"
  close = difflib.get_close_matches(name, list(known), n=1)
  return f"; did you mean --{close[0]}?" if close else "; --help lists all"


def problem(error: Exception) -> str:
  """Describes an error of absl: the flag, its value, what is expected."""
  match = re.match(r"(?i:flag) (--\w+=.*?): (.*)", str(error), re.DOTALL)
  if not match:
    return str(error)
  for words, expected in _EXPECTED.items():
    if words in match[2]:
      return f"{match[1]}: expected {expected}"
  return f"{match[1]}: {match[2]}"


def unread(rest: Sequence[str], known: flags.FlagValues) -> Iterator[str]:
  """Yields a problem for each argument that is no flag."""
  for text in rest:
    name, equals, value = text.lstrip("-").partition("=")
    if text.startswith("-"):
      yield f"unknown flag {text!r}{_meant(name, value, known)}"
    elif equals:
      yield f"stray argument {text!r}{_meant(name, value, known)}"
    elif (
      "workdir" in known
      and not known["workdir"].present
      and os.path.isdir(text)
    ):
      yield f"stray argument {text!r}; write --workdir={text}"
    else:
      yield f"stray argument {text!r}: settings are --flag=value"


def _types(cls: type) -> dict[str, type]:
  """The type of each flag, without None."""
  found = {}
  for name, hint in typing.get_type_hints(cls).items():
    if isinstance(hint, types.UnionType):
      (hint,) = set(typing.get_args(hint)) - {type(None)}
    found[name] = typing.get_origin(hint) or hint
  return found


def _define(cls: type) -> flags.FlagValues:
  """The flags of a class; numbers are texts, so that all are checked."""
  known = flags.FlagValues()
  for field in dataclasses.fields(cls):
    value_type, default = _types(cls)[field.name], field.default
    if value_type is bool:
      define = flags.DEFINE_boolean
    elif value_type is tuple:
      repeated = field.metadata["repeated"]
      define = flags.DEFINE_multi_string if repeated else flags.DEFINE_list
      default = list(default)
    else:
      define = flags.DEFINE_string
      default = None if default is None else str(default)
    define(field.name, default, field.metadata["help"], flag_values=known)
  return known


def _value(field: dataclasses.Field, value_type: type, value: Any) -> Any:
  """The value of a flag; the ValueError of a wrong one says what it must be."""
  if value is None or value_type is bool:
    return value
  choices, low = field.metadata["choices"], field.metadata["low"]
  texts = value if value_type is tuple else [value]
  for text in texts:
    if choices and text not in choices:
      raise ValueError(
        f"--{field.name}={text}: must be one of {', '.join(choices)}"
        f"{fields.nearest(text, choices)}"
      )
  try:
    value = value_type(value)
  except ValueError as error:
    raise ValueError(
      f"--{field.name}={value}: expected {_NOUNS[value_type]}"
    ) from error
  if low is not None and not value >= low:
    raise ValueError(f"--{field.name}={value}: must be at least {low}")
  return value


def read(cls: type[T], argv: Sequence[str]) -> tuple[T, list[str]]:
  """The flags of a command line, and its problems; `argv[0]` is the program.

  A flag with a wrong value has its default. A class may have a method
  `validate` that yields more problems.

  Raises:
    InputError: a flag has no value, or one that its form does not allow.
  """
  known, values = _define(cls), {}
  renamed = {
    field.metadata["old_name"]: field.name
    for field in dataclasses.fields(cls)
    if field.metadata["old_name"]
  }
  try:
    _, *rest = known(with_current_names(argv, renamed), known_only=True)
  except flags.Error as error:
    raise InputError(problem(error)) from error
  problems, flag_types = list(unread(rest, known)), _types(cls)
  for field in dataclasses.fields(cls):
    value_type, value = flag_types[field.name], known[field.name].value
    try:
      values[field.name] = _value(field, value_type, value)
    except ValueError as error:
      problems.append(str(error))
  args = cls(**values)
  if hasattr(args, "validate"):
    problems += args.validate()
  return args, problems


def parse(cls: type[T], argv: Sequence[str]) -> T:
  """The flags of a command line, see `read`.

  Raises:
    InputError: all problems, one a line.
  """
  args, problems = read(cls, argv)
  raise_problems(problems)
  return args


def wrap(text: str, indent: int) -> list[str]:
  """Breaks a line for the terminal, of at most 80 columns.

  It is indented by 2, and its further lines by `indent`.
  """
  width = min(shutil.get_terminal_size().columns, 80) - 1
  later = " " * indent if width >= 2 * indent else " " * 4
  return textwrap.wrap(
    text,
    max(width, 20),
    initial_indent="  ",
    subsequent_indent=later,
    break_on_hyphens=False,
    break_long_words=False,
  )


def describe(name: str, text: str, default: Any) -> str:
  """Describes a flag for `--help`."""
  if isinstance(default, (list, tuple)):
    default = ",".join(default)
  if default is True:
    default = f"true; --no{name} turns it off"
  end = f" (default: {default})" if default or default == 0 else ""
  if default is False:
    end = ""
  text = " ".join(text.split())  # absl adds spaces
  return "\n".join(wrap(f"--{name}: {text}{end}", 6))


def help_text(cls: type) -> str:
  """The docstring of the module that has the class, and the flags."""
  lines = [str(sys.modules[cls.__module__].__doc__), "flags:"]
  for field in dataclasses.fields(cls):
    lines.append(describe(field.name, field.metadata["help"], field.default))
  return "\n".join(lines)

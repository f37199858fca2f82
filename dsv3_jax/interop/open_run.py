"""Reads the configuration and the parameters of a run from its workdir."""

import dataclasses
import json
import os
import pathlib
import shlex
from typing import Any

import jax
import numpy as np

from dsv3_jax import config, io, param_spec, train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.config import fields, presets
from dsv3_jax.data import chat
from dsv3_jax.errors import InputError
from dsv3_jax.interop import (
  hf_config,
  hf_import,
  hf_mapping,
  hf_write,
  load_sharded,
  tokenizer_files,
)
from dsv3_jax.parallel import device_mesh, layouts

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
_KEYS = {"variant", "seed", "settings"}


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads the config.json of a run: its variant, seed and all settings.

  Settings that have been renamed since get their new names.

  Raises:
    InputError: the file is missing, or is not the config.json of a run.
  """
  path = workdir / CONFIG
  try:
    metadata = json.loads(path.read_text(encoding="utf-8"))
    settings = metadata["settings"]
    if not (isinstance(settings, dict) and metadata.keys() >= _KEYS):
      raise ValueError
    metadata["settings"] = config.with_current_names(settings)
  except OSError as error:
    raise InputError(
      f"{workdir}: holds no run, {path.name} is missing{what_else(workdir)}"
    ) from error
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise InputError(
      f"{path}: is not the configuration of a run{what_else(workdir)}"
    ) from error
  return metadata


def what_else(folder: pathlib.Path) -> str:
  """Says what a folder without a run is or holds, and what to do."""
  if not os.path.isdir(folder):  # also where a name is too long
    near = (path.name for path in folder.parent.glob("*"))
    return f", and so is the folder{fields.nearest(folder.name, near)}"
  if any(folder.glob("*.safetensors")):
    return (
      "; it is a released checkpoint, to import: python -m scripts.convert"
      f" --mode=import --hf={folder} --workdir=NEW"
    )
  runs = sorted(path.parent for path in folder.glob(f"*/{CHECKPOINTS}"))
  if runs:
    return f"; there is one in {', '.join(map(str, runs[:3]))}"
  return "; --workdir is the folder that experiments.pretrain wrote"


def run_from_config(metadata: dict[str, Any]) -> config.Run:
  """Returns the run that a config.json describes."""
  base = next(iter(presets.PRESETS.values()))
  settings = metadata["settings"].items()
  return config.override(base, *(f"{path}={value}" for path, value in settings))


def flags_of(metadata: dict[str, Any]) -> str:
  """Returns the flags of the run that a config.json describes.

  They are "" if its variant is none of the presets.
  """
  variant, seed = metadata["variant"], metadata["seed"]
  if variant not in presets.PRESETS:
    return ""
  preset = config.flatten(presets.PRESETS[variant])
  words = [f"--variant={variant}", *[f"--seed={seed}"] * bool(seed)]
  words += [
    f"--set={path.removeprefix('model.')}={value}"
    for path, value in metadata["settings"].items()
    if preset.get(path) != value
  ]
  return " ".join(map(shlex.quote, words))


def read_defaults(workdir: pathlib.Path) -> tokenizer_files.GenerationDefaults:
  """Returns what an import says about generation.

  A run has the chat template that it was fine-tuned with, or V3's.
  """
  folder = workdir / hf_import.FOLDER
  if not folder.is_dir():
    data = run_from_config(read_config(workdir)).data
    template = chat.find(data.template) if data.supervised else chat.V3
    return dataclasses.replace(tokenizer_files.DEFAULTS, template=template)
  config_json = io.read_json_object(folder / CONFIG)
  return tokenizer_files.read_defaults(folder, config_json)


def load_newest_params(
  folder: pathlib.Path,
  run: config.Run,
  mesh: jax.sharding.Mesh,
  *,
  average: bool = False,
  specs: Any = None,
) -> tuple[param_spec.Params, jax.Array]:
  """Loads parameters and router bias of the newest checkpoint, or an import.

  `average` loads the moving average of the parameters instead. `specs` are
  their partition specs; those of the run's layout if None.

  Raises:
    InputError: the run has no average, or another architecture than the run
      given, or devices have not the memory.
    MissingError: the run has no checkpoint, or all of them are damaged.
  """
  if average and not run.optim.ema_decay:
    raise InputError(f"{folder}: has no average, optim.ema_decay is 0")
  if (folder / hf_import.FOLDER).is_dir():
    return _load_imported(folder, run, mesh, specs)
  hf_import.check_format(folder)
  saved = folder / CHECKPOINTS
  if not saved.is_dir():
    raise manifest.MissingError(
      f"{folder}: has no checkpoints yet; the run that writes there saves one"
      " when it begins"
    )
  checkpoints = checkpointer.Checkpointer(saved, run.checkpoint)
  like = train.abstract_state(run, mesh)
  if specs:
    like = like.replace(params=load_sharded.sharded(like.params, specs, mesh))
  load_sharded.check_memory(folder, like.params)

  def load(step: int) -> Any:
    return checkpoints.restore_parameters(step, like, average=average)

  try:
    newest = checkpoints.newest(load, quarantine=False)
  finally:
    checkpoints.close()
  if newest is None:
    raise manifest.MissingError(f"{folder}: has no finished checkpoint")
  return newest[1]


def _load_imported(
  workdir: pathlib.Path, run: config.Run, mesh: jax.sharding.Mesh, specs: Any
) -> tuple[param_spec.Params, jax.Array]:
  source = hf_import.open_import(workdir)
  if source.model != run.model:
    there, here = config.flatten(source.model), config.flatten(run.model)
    raise InputError(
      f"{source.folder}: has another model (there -> here):\n"
      + "\n".join(config.diff(there, here))
    )
  specs = specs or layouts.make_layout(run, mesh.shape).specs
  return load_sharded.load(source, specs, mesh, np.float32)


def open_source(
  workdir: pathlib.Path, *, average: bool
) -> tuple[hf_write.ParamSource, dict[str, Any]]:
  """Opens a run or an import for export: its parameters and config.json.

  `average` takes the moving average of a run's parameters instead.

  Raises:
    InputError: the workdir holds no run, the run has no average, or a
      released checkpoint cannot express it.
    MissingError: the run has no checkpoint.
  """
  run = run_from_config(read_config(workdir))
  if run.model.reward_head:
    raise InputError(
      f"{workdir}: is a reward model, whose scalar head the released formats"
      " have no place for"
    )
  if (workdir / hf_import.FOLDER).is_dir():
    if average:
      raise InputError(f"--ema: {workdir} is imported and has no average")
    source = hf_import.open_import(workdir)
    return source, source.config_json
  mesh = device_mesh.make_mesh({})
  params, bias = load_newest_params(workdir, run, mesh, average=average)
  arrays = param_spec.flatten_with_paths(params) | {hf_mapping.BIAS: bias}
  arrays = {path: np.asarray(array) for path, array in arrays.items()}
  score = run.model.router.score
  if not hf_config.has_router_bias(score) and arrays[hf_mapping.BIAS].any():
    raise InputError(
      f"router.score={score} with a bias that is not 0: the format of V2 has"
      " none; train with router.bias_speed=0"
    )
  config_json = hf_config.make_config_json(run) | {"torch_dtype": "float32"}
  config_json |= tokenizer_files.TOKEN_IDS
  return hf_write.ParamArrays(run.model, arrays), config_json

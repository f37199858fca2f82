"""Reads the configuration and the parameters of a run from its workdir."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from dsv3_jax import config, param_spec, train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError
from dsv3_jax.interop import hf_import, hf_read, load_sharded
from dsv3_jax.parallel import layouts

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
    if not (
      isinstance(metadata["settings"], dict) and metadata.keys() >= _KEYS
    ):
      raise ValueError
    metadata["settings"] = config.with_current_names(metadata["settings"])
  except OSError as error:
    raise InputError(
      f"{workdir}: holds no run, {path.name} is missing"
    ) from error
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise InputError(f"{path}: is not the configuration of a run") from error
  return metadata


def run_from_config(metadata: dict[str, Any]) -> config.Run:
  """Returns the run that a config.json describes."""
  base = next(iter(presets.PRESETS.values()))
  settings = metadata["settings"].items()
  return config.override(base, *(f"{path}={value}" for path, value in settings))


def load_newest_params(
  folder: pathlib.Path,
  run: config.Run,
  mesh: jax.sharding.Mesh,
  *,
  average: bool = False,
  specs: Any = None,
) -> tuple[param_spec.Params, jax.Array]:
  """Loads parameters and router bias of the newest checkpoint, or an import.

  Args:
    folder: the workdir.
    run: the run of the workdir; its layout shards the parameters.
    mesh: the devices.
    average: load the parameters' moving average instead.
    specs: partition specs of the parameters; those of the run's layout if None.

  Raises:
    InputError: the run has no average, or another architecture than the run
      given.
    MissingError: the run has no checkpoint, or all of them are damaged.
  """
  if average and not run.optim.ema_decay:
    raise InputError(f"{folder}: has no average, optim.ema_decay is 0")
  if (folder / hf_import.FOLDER).is_dir():
    return _load_imported(hf_import.open_import(folder), run, mesh, specs)
  hf_import.check_format(folder)
  saved = folder / CHECKPOINTS
  if not saved.is_dir():
    raise manifest.MissingError(f"{folder}: has no checkpoints yet")
  checkpoints = checkpointer.Checkpointer(saved, run.checkpoint)
  like = train.abstract_state(run, mesh)
  if specs:
    like = like.replace(params=_resharded(like.params, mesh, specs))

  def load(step: int) -> Any:
    return checkpoints.restore_parameters(step, like, average=average)

  try:
    found = checkpoints.newest(load, quarantine=False)
  finally:
    checkpoints.close()
  if found is None:
    raise manifest.MissingError(f"{folder}: has no finished checkpoint")
  return found[1]


def _resharded(
  params: param_spec.Params, mesh: jax.sharding.Mesh, specs: Any
) -> param_spec.Params:
  """Returns abstract parameters with these partition specs on a mesh."""

  def leaf(a: jax.ShapeDtypeStruct, spec: jax.P) -> jax.ShapeDtypeStruct:
    to = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to)

  return jax.tree.map(leaf, params, specs)


def _load_imported(
  source: hf_read.ReleasedCheckpoint,
  run: config.Run,
  mesh: jax.sharding.Mesh,
  specs: Any,
) -> tuple[param_spec.Params, jax.Array]:
  if source.model != run.model:
    changes = config.diff(
      config.flatten(source.model), config.flatten(run.model)
    )
    raise InputError(
      f"{source.folder}: has another model (there -> here):\n"
      + "\n".join(changes)
    )
  specs = specs or layouts.make_layout(run, mesh.shape).specs
  return load_sharded.load(source, specs, mesh, np.float32)

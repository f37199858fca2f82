"""What the folder of a run holds: its configuration and its parameters."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from dsv3_jax import config, param_spec
from dsv3_jax.checkpoint import manifest
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError
from dsv3_jax.interop import weights

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
_FACTS = {"variant", "seed", "settings"}


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """The config.json of a run: its variant, its seed and all its settings.

  Settings that have been renamed since get their new names.

  Raises:
    InputError: there is none, or it is not one.
  """
  path = workdir / CONFIG
  try:
    facts = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(facts["settings"], dict) and facts.keys() >= _FACTS):
      raise ValueError
    facts["settings"] = config.with_current_names(facts["settings"])
  except OSError as error:
    raise InputError(
      f"{workdir}: holds no run, {path.name} is missing"
    ) from error
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise InputError(f"{path}: is not the configuration of a run") from error
  return facts


def run_of(facts: dict[str, Any]) -> config.Run:
  """The run that a config.json describes."""
  base = next(iter(presets.PRESETS.values()))
  settings = facts["settings"].items()
  return config.override(base, *(f"{path}={value}" for path, value in settings))


def newest(
  folder: pathlib.Path,
  run: config.Run,
  mesh: jax.sharding.Mesh,
  *,
  average: bool = False,
) -> tuple[param_spec.Params, jax.Array]:
  """Parameters and router bias, where the run's layout has them.

  Args:
    folder: the workdir.
    run: of it.
    mesh: where to.
    average: the parameters' average instead.

  Raises:
    InputError: there is no average, or it is of another architecture.
    MissingError: there is none, or all are damaged.
  """
  if average and not run.optim.ema_decay:
    raise InputError(f"{folder}: has no average, optim.ema_decay is 0")
  imported = folder / weights.FOLDER
  if imported.is_dir():
    return _imported(weights.open_weights(imported), run, mesh)
  # Slow to import, and not needed to look at a configuration.
  from dsv3_jax import train
  from dsv3_jax.checkpoint import checkpointer

  saved = folder / CHECKPOINTS
  if not saved.is_dir():
    raise manifest.MissingError(f"{folder}: has no checkpoints yet")
  checkpoints = checkpointer.Checkpointer(saved, run.checkpoint)
  like = train.abstract_state(run, mesh)

  def load(step):
    return checkpoints.restore_parameters(step, like, average=average)

  try:
    found = checkpoints.newest(load, quarantine=False)
  finally:
    checkpoints.close()
  if found is None:
    raise manifest.MissingError(f"{folder}: has no finished checkpoint")
  return found[1]


def _imported(
  source: weights.Weights, run: config.Run, mesh: jax.sharding.Mesh
) -> tuple[param_spec.Params, jax.Array]:
  if source.model != run.model:
    changes = config.diff(
      config.flatten(source.model), config.flatten(run.model)
    )
    raise InputError(
      f"{source.folder}: is of another model (there -> here):\n"
      + "\n".join(changes)
    )
  from dsv3_jax.interop import load_sharded
  from dsv3_jax.parallel import layouts

  return load_sharded.load(
    source, layouts.make_layout(run, mesh.shape), mesh, np.float32
  )

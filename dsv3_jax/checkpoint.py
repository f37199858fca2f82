"""Saving and restoring the training state with orbax.

A checkpoint holds the `TrainState` and a JSON object of facts beside it: the
data position and whatever the caller wants compared on the way back.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsv3_jax import config
from dsv3_jax import schema
from dsv3_jax import train


def manager(
    directory: pathlib.Path, cfg: config.Checkpoint
) -> ocp.CheckpointManager:
  """Keeps the newest checkpoints under directory; saves in the background."""
  options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep, create=True)
  return ocp.CheckpointManager(directory.absolute(), options=options)


def save(
    checkpoints: ocp.CheckpointManager,
    state: train.TrainState,
    facts: dict[str, Any],
    average: schema.Params | None = None,
) -> None:
  """Starts saving the state, and the parameters' average, under its step."""
  step = int(state.step)
  items = {
      "state": ocp.args.StandardSave(_raw(state)),
      "facts": ocp.args.JsonSave(facts),
  }
  if average is not None:
    items["ema"] = ocp.args.StandardSave(average)
  checkpoints.save(step, args=ocp.args.Composite(**items))


def restore(
    checkpoints: ocp.CheckpointManager, step: int, like: train.TrainState
) -> tuple[train.TrainState, dict[str, Any]]:
  """The state of a step and the facts beside it.

  Args:
    checkpoints: where they are.
    step: which one.
    like: shapes, types and places, see `train.abstract_state`; the places need
      not be those it was saved from.

  Raises:
    ValueError: the checkpoint is damaged or of another architecture.
  """
  template = jax.tree.map(
      lambda s, to: s.update(sharding=to.sharding),
      jax.eval_shape(_raw, like),
      like,
  )
  restored = _restore(
      checkpoints,
      step,
      state=ocp.args.StandardRestore(template),
      facts=ocp.args.JsonRestore(),
  )
  state = restored.state
  return state.replace(key=jax.random.wrap_key_data(state.key)), restored.facts


def restore_average(
    checkpoints: ocp.CheckpointManager, step: int, like: schema.Params
) -> schema.Params:
  """The average of the parameters of a step.

  Args:
    checkpoints: where they are.
    step: which one.
    like: shapes, types and places, as of `restore`.

  Raises:
    ValueError: there is none, or it is damaged.
  """
  like = ocp.args.StandardRestore(like)
  return _restore(checkpoints, step, ema=like).ema


def _restore(
    checkpoints: ocp.CheckpointManager, step: int, **items: Any
) -> Any:
  try:
    return checkpoints.restore(step, args=ocp.args.Composite(**items))
  except Exception as error:  # orbax raises many kinds for a damaged file
    raise ValueError(
        f"checkpoint {checkpoints.directory / str(step)} cannot be read:"
        f" {error}"
    ) from error


def _raw(state: train.TrainState) -> train.TrainState:
  """The state with its key as plain integers, which files can hold."""
  return state.replace(key=jax.random.key_data(state.key))

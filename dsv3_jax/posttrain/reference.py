"""Reference policy, from which the KL divergence is measured."""

import pathlib

import jax

from dsv3_jax import config, param_spec, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.errors import InputError
from dsv3_jax.interop import open_run
from dsv3_jax.trainer import initial_state, run_args

FOLDER = "reference"  # of the workdir


def open_reference(
  args: run_args.RunArgs, state: train.TrainState, mesh: jax.sharding.Mesh
) -> tuple[param_spec.Params, jax.Array]:
  """Returns parameters and router bias of the reference policy.

  It is that of `grpo.reference`, or the policy that the run began with; the
  workdir keeps a copy.

  Raises:
    InputError: the copy is gone, or the reference is of another architecture.
  """
  checkpoints = checkpointer.Checkpointer(
    args.workdir / FOLDER, config.Checkpoint(keep=1)
  )
  try:
    if 0 not in checkpoints.steps():
      if int(state.step):
        raise InputError(
          f"{checkpoints.directory}: the reference policy is missing; restore"
          " it, or start in a new --workdir"
        )
      checkpoints.save(_first(args, state, mesh), {})
      checkpoints.wait()
    like = train.abstract_state(args.run, mesh)
    return checkpoints.restore_parameters(0, like)
  finally:
    checkpoints.close()


def _first(
  args: run_args.RunArgs, state: train.TrainState, mesh: jax.sharding.Mesh
) -> train.TrainState:
  """Returns the state with the parameters of `grpo.reference`, if any."""
  if not args.run.grpo.reference:
    return state
  folder = pathlib.Path(args.run.grpo.reference)
  source = initial_state.check_source(folder, args.run, "grpo.reference")
  params, bias = open_run.load_newest_params(folder, source, mesh)
  return state.replace(params=params, router_bias=bias)

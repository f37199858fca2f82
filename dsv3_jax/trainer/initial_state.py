"""State that training starts from: checkpoint, another run's, or random."""

import pathlib

import jax

from dsv3_jax import config, ema, param_spec, train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.data import loader
from dsv3_jax.errors import InputError, NotFiniteError
from dsv3_jax.interop import open_run
from dsv3_jax.model import transformer
from dsv3_jax.trainer import compilation, hooks, metrics_writer, run_args

# Parameters that a run may have and that of --init_from may lack: they begin
# at random.
NEW = {"reward"}


def restore_or_create(
  args: run_args.RunArgs,
  checkpoints: checkpointer.Checkpointer,
  source: loader.BatchSource,
  mesh: jax.sharding.Mesh,
) -> tuple[train.TrainState, ema.Average | None]:
  """Restores state and average of the newest good checkpoint, or makes them.

  A new state is saved at once: this shows before any work that saving works,
  and from then on a workdir without a checkpoint must have lost it.

  Raises:
    InputError: the checkpoint has another architecture or other data.
    MissingError: the workdir has metrics but no checkpoint.
  """
  run, expected = args.run, hooks.checkpoint_metadata(source, 0)
  like = train.abstract_state(run, mesh)

  def load(step):
    saved = checkpoints.metadata(step)
    # A setting newer than the checkpoint had its default's effect then.
    model = config.with_current_names(saved["model"])
    saved["model"] = config.default_settings(config.Model, model) | model
    for part in ("model", "data"):
      if changes := config.diff(saved[part], expected[part]):
        raise InputError(
          f"the {part} is not that of {checkpoints.folder(step)} (there ->"
          " here):\n" + "\n".join(f"  {line}" for line in changes)
        )
    state = checkpoints.restore(step, like)
    return state, _average(run.optim.ema_decay, checkpoints, state)

  if newest := checkpoints.newest(load, quarantine=True):
    return newest[1]
  if metrics_writer.read(args.workdir / metrics_writer.METRICS):
    raise manifest.MissingError(
      f"{args.workdir} holds metrics of a run but no checkpoint under"
      f" {checkpoints.directory}; restore it, or start in a new --workdir"
    )
  options = compilation.options_to_run_once()
  state = train.make_state(run, mesh, args.seed, options)
  if args.init_from:
    state = _with_parameters(state, args, mesh)
  try:
    checkpoints.save(state, expected)
  except NotFiniteError as error:
    if not args.init_from:
      raise
    raise InputError(f"--init_from={args.init_from}: {error}") from error
  checkpoints.wait()
  return state, _average(run.optim.ema_decay, checkpoints, state)


def check_source(
  folder: pathlib.Path, run: config.Run, name: str = "--init_from"
) -> config.Run:
  """Returns the run of a folder, in the layout of `run`.

  Raises InputError, with the name of the flag, if its parameters have other
  shapes than those of `run`.
  """
  source = config.override(
    open_run.run_from_config(open_run.read_config(folder)),
    f"parallel.layout={run.parallel.layout}",
  )
  if changes := config.diff(_shapes(source.model), _shapes(run.model)):
    there, here = (config.flatten(m) for m in (source.model, run.model))
    sizes = [
      f"--set={path}={value}"
      for path, value in there.items()
      if path in here and here[path] != value
    ]
    raise InputError(
      f"{name}={folder} has another architecture (there -> here):\n"
      + "\n".join(f"  {line}" for line in changes)
      + f"\nto train that model: {' '.join(sizes)}"
    )
  return source


def _with_parameters(
  state: train.TrainState, args: run_args.RunArgs, mesh: jax.sharding.Mesh
) -> train.TrainState:
  """Replaces parameters and router bias by those of `args.init_from`."""
  source = check_source(args.init_from, args.run)
  params, bias = open_run.load_newest_params(args.init_from, source, mesh)
  names = state.params.keys()
  params = {name: params.get(name, state.params[name]) for name in names}
  return state.replace(params=params, router_bias=bias)


def _shapes(model: config.Model) -> dict[str, str]:
  specs = param_spec.flatten_with_paths(transformer.specs(model))
  return {
    path: str(spec.shape) for path, spec in specs.items() if path not in NEW
  }


def _average(
  decay: float, checkpoints: checkpointer.Checkpointer, state: train.TrainState
) -> ema.Average | None:
  """Restores the average of the parameters, or starts one at step 0."""
  if not decay:
    return None
  step = int(state.step)
  if not step:
    return ema.Average(state.params, decay)
  in_host = jax.tree.map(ema.in_host_memory, state.params)
  params, _ = checkpoints.restore_parameters(
    step, state.replace(params=in_host), average=True
  )
  return ema.Average(params, decay)

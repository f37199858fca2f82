r"""Pre-training (arXiv:2412.19437, section 4).

  python -m experiments.pretrain --variant=tiny --workdir=runs/tiny
  python -m experiments.pretrain --variant=v3_671b --dry_run
  python -m experiments.pretrain --variant=v3_671b --dry_run \
      --mesh=pipe=16,data=2,node=8,expert=8 --set=parallel.schedule=dualpipe \
      --set=train.first_batch_size=4096

tiny: a complete small DeepSeek-V3, trained on two novels in minutes on two
cores; expect held-out bits per byte below 1.85.
"""

import jax
from absl import flags

from dsv3_jax import config, train
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError
from dsv3_jax.parallel import device_mesh
from dsv3_jax.plan import flops
from dsv3_jax.trainer import memory, replay, run_args, trainer
from experiments import cli

_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "print sizes and plan; with --mesh, also lower the train step for it;"
  " allocates and writes nothing",
)
_REPLAY = flags.DEFINE_integer(
  "replay_step",
  None,
  "repeat a logged step from the newest checkpoint before it, and compare"
  " the result bit by bit; writes nothing",
)


def variants() -> dict[str, config.Run]:
  """Runs by the name of their variant."""
  return presets.PRESETS


def dry_run(command: run_args.RunArgs) -> None:
  """Prints sizes and plan of a run."""
  run = command.run
  counts = flops.parameter_counts(run.model)
  length = run.data.seq_len
  sizes = [f"{phase.batch_size * length:,}" for phase in run.batch_phases]
  steps = f"{run.total_steps:,}, of {', '.join(sizes)} tokens each"
  lines = {
    "main model": f"{counts['main']:,} parameters",
    "router biases": f"{counts['router_bias']:,}, apart from those",
    "MTP modules": f"{counts['mtp']:,} more, biases included",
    "active a token": f"{counts['active']:,} with the output head,"
    f" {counts['active_no_head']:,} without",
    "optimizer steps": steps,
    "token budget": f"{run.train.tokens:,}",
  }
  if command.mesh:
    lines |= _on_mesh(run, device_mesh.abstract_mesh(command.mesh))
  print(f"variant {command.variant}")
  for name, value in lines.items():
    print(f"  {name:16} {value}")


def _on_mesh(
  run: config.Run, mesh: jax.sharding.AbstractMesh
) -> dict[str, str]:
  """Lowers the train step for a mesh whose devices need not exist."""
  train.trace_step(run, mesh).lower(lowering_platforms=("cpu", "cuda", "tpu"))
  held = memory.bytes_per_device(train.abstract_state(run, mesh))
  return {
    "train step": f"lowers for {mesh.size:,} devices",
    "state a device": f"{held / 2**30:.2f} GiB, of master weights and"
    " optimizer moments",
  }


def execute(command: run_args.RunArgs) -> None:
  """Trains, repeats a step, or prints the plan, as the flags say."""
  if _DRY_RUN.value:
    dry_run(command)
    return
  if command.workdir is None:
    raise InputError(
      "--workdir is missing: the folder that the run writes to, such as"
      f" --workdir=runs/{command.variant}"
    )
  cli.start_jax(command)
  if _REPLAY.value is None:
    trainer.fit(command)
  else:
    replay.replay(command, _REPLAY.value)


def main() -> None:
  """Runs the program from the command line."""
  cli.main(variants(), execute)


if __name__ == "__main__":
  main()

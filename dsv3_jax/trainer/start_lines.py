"""Lines at the start of a run: what is trained, on what, and where."""

from collections.abc import Iterator

import jax

from dsv3_jax.plan import flops
from dsv3_jax.trainer import run_args, terminal, workdir


def first_line(args: run_args.RunArgs) -> str:
  """Describes model and budget of a run; starts no device."""
  run = args.run
  counts = flops.parameter_counts(run.model)
  n_tokens = args.stop * run.tokens_per_step
  if args.stop == run.total_steps:
    n_tokens = run.train.tokens
  return (
    f"{args.variant}: {counts['main'] + counts['mtp']:,} parameters,"
    f" {counts['mtp']:,} of them of MTP, {counts['active']:,} active a token;"
    f" {args.stop:,} steps, {n_tokens:,} tokens"
  )


def print_first(args: run_args.RunArgs) -> None:
  """Prints `first_line` at once, where no other process is to be waited for."""
  if not args.processes.coordinator:
    print(first_line(args), flush=True)


def print_all(
  lines: terminal.Terminal, args: run_args.RunArgs, mesh: jax.sharding.Mesh
) -> None:
  """Prints and logs all lines, but the first where `print_first` printed it."""
  lines.print(first_line(args), to_stream=bool(args.processes.coordinator))
  for line in more_lines(args, mesh):
    lines.print(line)


def more_lines(
  args: run_args.RunArgs, mesh: jax.sharding.Mesh
) -> Iterator[str]:
  """Yields lines on devices, text, workdir and compilation of a run."""
  kinds = {device.device_kind for device in mesh.devices.flat}
  axes = ",".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
  yield (
    f"devices: {mesh.size} x {', '.join(sorted(kinds))}"
    + (f", mesh {axes}" if axes else "")
  )
  yield f"text: {args.run.data.path or 'two novels of the package'}"
  done = workdir.newest_step(args.workdir)
  yield f"workdir: {args.workdir}, " + (
    f"step {done} is saved" if done else "new"
  )
  if done < args.stop:
    cache = jax.config.jax_compilation_cache_dir
    kept = cache if cache and jax.config.jax_enable_compilation_cache else ""
    yield "compiling, about a minute the first time" + (
      f"; later starts find the programs in {kept}" if kept else ""
    )

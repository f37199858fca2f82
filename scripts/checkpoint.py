r"""Lists, verifies and compares the checkpoints of a run.

  python -m scripts.checkpoint --mode=list --workdir=runs/demo
  python -m scripts.checkpoint --mode=verify --workdir=runs/demo [--step=N]
  python -m scripts.checkpoint --mode=diff --workdir=runs/demo --step=N \\
      [--other=runs/another] [--other_step=M]

list says what is there, and what of it is no checkpoint and why. verify reads
every array and compares it with its digest; exit code 4 if one is not as it was
saved. diff compares two, array by array.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import rich.box
import rich.console
import rich.table

from dsv3_jax import config, io
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.errors import InputError
from dsv3_jax.interop import open_run
from experiments import cli
from experiments.flag_parser import flag

MODES = "list", "verify", "diff"


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  mode: str = flag("list", f"one of {', '.join(MODES)}", choices=MODES)
  workdir: str = flag("", "folder of the run")
  other: str = flag("", "workdir of the other checkpoint; default: the same")
  step: int | None = flag(None, "step of a checkpoint; default: all")
  other_step: int | None = flag(None, "step of the other; default: --step")

  def validate(self) -> Iterator[str]:
    """Yields what is wrong with the flags."""
    if not self.workdir:
      yield "--workdir is missing: the folder of the run"
    if self.mode == "list" and self.step is not None:
      yield "--step: --mode=list shows all steps; --mode=verify reads one"
    if self.mode == "diff" and self.step is None:
      yield "--step is missing: the checkpoint to compare"


def _open(workdir: pathlib.Path) -> checkpointer.Checkpointer:
  folder = workdir / open_run.CHECKPOINTS
  if not folder.is_dir():
    raise InputError(
      f"{workdir}: has no folder {open_run.CHECKPOINTS}"
      f"{open_run.what_else(workdir)}"
    )
  return checkpointer.Checkpointer(folder, config.Checkpoint())


def _chosen(
  checkpoints: checkpointer.Checkpointer, step: int | None
) -> list[int]:
  """The step asked for, or all that could be checkpoints."""
  there = sorted({*checkpoints.steps(), *checkpoints.problems()})
  if step is None:
    return there
  if step not in there:
    names = ", ".join(map(str, there)) or "none"
    raise InputError(f"--step={step}: {checkpoints.directory} has {names}")
  return [step]


def show(checkpoints: checkpointer.Checkpointer) -> None:
  """Prints a line for each folder."""
  table = rich.table.Table(box=rich.box.SIMPLE)
  for name in ("folder", "MB", "arrays", "sequences read", "state"):
    right = name in ("MB", "arrays", "sequences read")
    table.add_column(name, justify="right" if right else "left")
  problems = checkpoints.problems()
  for step in _chosen(checkpoints, None):
    if step in problems:
      table.add_row(str(step), "", "", "", problems[step])
      continue
    saved = manifest.read(checkpoints.folder(step))
    table.add_row(
      str(step),
      f"{sum(saved.files.values()) / 1e6:,.1f}",
      str(len(saved.arrays)),
      str(saved.metadata.get("rows", "")),
      "whole",
    )
  for folder in sorted(checkpoints.directory.iterdir()):
    if folder.suffix in (checkpointer.CORRUPT, checkpointer.SUSPECT):
      table.add_row(folder.name, "", "", "", "quarantined")
  rich.console.Console().print(table)


def verify(checkpoints: checkpointer.Checkpointer, step: int | None) -> None:
  """Reads all arrays.

  Raises:
    MissingError: some are not as they were saved; names them.
  """
  problems = []
  for one in _chosen(checkpoints, step):
    try:
      checkpoints.verify(one)
      print(f"{checkpoints.folder(one)}: as it was saved")
    except checkpointer.DamagedError as error:
      problems.append(str(error))
  if problems:
    raise checkpointer.MissingError("\n".join(problems))


def diff(
  checkpoints: checkpointer.Checkpointer,
  step: int,
  others: checkpointer.Checkpointer,
  other_step: int,
) -> None:
  """Prints what differs between two checkpoints."""
  _chosen(checkpoints, step), _chosen(others, other_step)
  one = manifest.read(checkpoints.folder(step))
  other = manifest.read(others.folder(other_step))
  print(f"{checkpoints.folder(step)} -> {others.folder(other_step)}")
  lines = config.diff(io.flatten(one.metadata), io.flatten(other.metadata))
  types, digests = (
    [{name: a[key] for name, a in each.arrays.items()} for each in (one, other)]
    for key in ("type", "digest")
  )
  lines += config.diff(*types)
  changed = {
    name
    for name in one.arrays.keys() & other.arrays.keys()
    if types[0][name] == types[1][name] and digests[0][name] != digests[1][name]
  }
  pairs = zip(checkpoints.arrays(step), others.arrays(other_step), strict=False)
  if types[0] == types[1]:
    for (name, a), (_, b) in pairs:
      if name in changed:
        lines.append(f"{name}: {_distance(np.asarray(a), np.asarray(b))}")
  else:
    lines += [f"{name}: other values" for name in sorted(changed)]
  same = len(one.arrays.keys() & other.arrays.keys()) - len(changed)
  print("\n".join([*lines, f"{same} arrays are the same, bit for bit"]))


def _distance(a: np.ndarray, b: np.ndarray) -> str:
  a, b = a.astype(np.float64), b.astype(np.float64)
  apart, largest = np.abs(a - b).max(), np.abs(a).max()
  return (
    f"{np.mean(a != b):.1%} of the values differ, by {apart:.3g} at most; the"
    f" largest is {largest:.3g}"
  )


def execute(args: Args) -> None:
  """Does what the flags say."""
  checkpoints = _open(pathlib.Path(args.workdir))
  if args.mode == "list":
    show(checkpoints)
  elif args.mode == "verify":
    verify(checkpoints, args.step)
  else:
    others = _open(pathlib.Path(args.other or args.workdir))
    step = args.step if args.other_step is None else args.other_step
    diff(checkpoints, args.step, others, step)


def main() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)


if __name__ == "__main__":
  main()

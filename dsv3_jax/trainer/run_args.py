"""RunArgs: arguments of a training run."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from dsv3_jax import config, optim
from dsv3_jax.interop import hf_import
from dsv3_jax.parallel import device_mesh, layout_check
from dsv3_jax.trainer import distributed, heartbeat, metrics_writer


@dataclasses.dataclass(frozen=True)
class RunArgs:
  """A configuration, and where and how far to train it."""

  run: config.Run
  workdir: pathlib.Path | None  # required to train; a str will do
  _: dataclasses.KW_ONLY
  variant: str = "custom"  # name of the configuration
  seed: int = 0
  stop: int | None = None  # steps done at the end; None: the token budget
  mesh: Mapping[str, int] | None = None  # sizes of axes; None: all data
  init_from: pathlib.Path | None = None  # run whose parameters to start with
  writers: tuple[str, ...] = metrics_writer.DEFAULT  # of metrics
  processes: distributed.Processes = distributed.Processes()
  timeouts: heartbeat.Timeouts = heartbeat.Timeouts()
  ignore_crash_loop: bool = False
  deterministic: bool = True  # sums in a fixed order on GPUs
  # The process does nothing else: SIGTERM and SIGINT save and end the run, and
  # a watchdog ends a process that hangs. Several processes always have one.
  own_process: bool = False
  # Makes the batches of a run that does not read them: a function of these
  # arguments, data source, state, mesh and watchdog.
  open_batches: Callable[..., Any] | None = None

  def __post_init__(self):
    """Fills in defaults and turns strings into paths."""
    for name in ("workdir", "init_from"):
      if (path := getattr(self, name)) is not None:
        object.__setattr__(self, name, pathlib.Path(path))
    if self.stop is None:
      object.__setattr__(self, "stop", self.run.total_steps)

  def validate(self) -> list[str]:
    """Returns what is wrong with the arguments, one line each."""
    mesh = dict(self.mesh or {})
    problems = layout_check.validate(self.run, mesh) + optim.validate(self.run)
    if not 0 <= self.seed < 2**32:
      problems.append(f"--seed={self.seed}: must be in [0, 2^32)")
    if not 0 < self.stop <= self.run.total_steps:
      more = self.stop * self.run.tokens_per_step
      problems.append(
        f"--steps={self.stop}: must be in 1 to {self.run.total_steps}, the"
        " steps of the token budget train.tokens"
        + f"; --set=train.tokens={more} has as many"
        * (self.stop > 0)
      )
    sample, longest = self.run.evaluate.sample_tokens, self.run.model.attention
    if sample >= longest.max_len:
      problems.append(
        f"Evaluate.sample_tokens={sample}: must be below {longest.max_len:g},"
        " the longest context of model.attention"
      )
    for axis, size in mesh.items():
      if axis not in device_mesh.AXES or size < 1:
        problems.append(
          f"--mesh={axis}={size}: axes are {', '.join(device_mesh.AXES)},"
          " sizes at least 1"
        )
    for name in self.writers:
      if name not in metrics_writer.WRITERS:
        problems.append(
          f"--writers={name}: one of {', '.join(metrics_writer.WRITERS)}"
        )
    problems += self.processes.validate() + self.timeouts.validate()
    n_devices, n = math.prod(mesh.values()), self.processes.count
    if mesh and n > 1 and n_devices % n:
      given = ",".join(f"{axis}={size}" for axis, size in mesh.items())
      problems.append(
        f"--mesh={given}: {n_devices} devices do not divide over"
        f" --processes={n}"
      )
    # Not `Path.is_dir`, which raises where a name is too long.
    if self.init_from and not any(
      os.path.isdir(self.init_from / folder)
      for folder in ("checkpoints", hf_import.FOLDER, hf_import.OLD_FOLDER)
    ):
      problems.append(
        f"--init_from={self.init_from}: must have checkpoints/ or an"
        " imported hf/; python -m scripts.convert --mode=import --hf=DIR"
        " --workdir=NEW imports a released checkpoint"
      )
    return problems

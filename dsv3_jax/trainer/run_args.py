"""RunArgs: what to train, where, and until which step."""

import dataclasses
import pathlib

from dsv3_jax import config
from dsv3_jax.trainer import distributed, heartbeat


@dataclasses.dataclass(frozen=True)
class RunArgs:
  """Arguments of a run beside its configuration; validated by the caller."""

  variant: str
  run: config.Run
  workdir: pathlib.Path | None
  seed: int
  stop: int  # steps
  mesh: dict[str, int]  # sizes of the axes named
  processes: distributed.Processes
  init_from: pathlib.Path | None = None
  timeouts: heartbeat.Timeouts = heartbeat.Timeouts()
  ignore_crash_loop: bool = False  # although starts failed
  deterministic: bool = True  # on GPUs

"""The folder of a run: what it was made with, and where it stands."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
import jaxlib
from absl import logging

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.interop import open_run

ENV, SUMMARY, LOCK = "env.json", "summary.json", "lock"

# Settings that change when things are looked at and where they are computed,
# not what is trained.
_HARMLESS = ("settings.checkpoint.", "settings.evaluate.", "settings.parallel.")


def run_identity(variant: str, seed: int, run: config.Run) -> dict[str, Any]:
  """What config.json holds."""
  return {"variant": variant, "seed": seed, "settings": config.flatten(run)}


def _write(path: pathlib.Path, facts: dict[str, Any]) -> None:
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
  os.replace(partial, path)


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
  settings = {f"settings.{k}": v for k, v in facts["settings"].items()}
  return {"seed": facts["seed"], "variant": facts["variant"]} | settings


def check_or_create(workdir: pathlib.Path, facts: dict[str, Any]) -> None:
  """Makes the workdir of a run, or checks that it is this run's.

  It becomes the run's by `write_config`: settings that turn out to be wrong
  before that do not stand in the way of right ones.

  Raises:
    InputError: it cannot be written, or was made by another configuration.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".probe"
    probe.write_text("")
    probe.unlink()
    if not (workdir / open_run.CONFIG).exists():
      return
  except OSError as error:
    raise InputError(
      f"--workdir={workdir}: cannot be written: {error}"
    ) from error
  check_same(workdir, facts)


def check_same(workdir: pathlib.Path, facts: dict[str, Any]) -> None:
  """Checks that a workdir is of the run described.

  Raises:
    InputError: it was made by another configuration, or by none.
  """
  there, here = _flat(open_run.read_config(workdir)), _flat(facts)
  # A setting newer than the run: its default is what was done without it.
  for name, value in config.default_settings(config.Run).items():
    there.setdefault(f"settings.{name}", value)
  changes = [
    line for line in config.diff(there, here) if not line.startswith(_HARMLESS)
  ]
  if changes:
    raise InputError(
      "\n".join(
        [
          f"--workdir={workdir} belongs to another configuration; take"
          " another folder or the old settings (there -> here):",
          *(f"  {line.removeprefix('settings.')}" for line in changes),
        ]
      )
    )


def write_config(workdir: pathlib.Path, facts: dict[str, Any]) -> None:
  """Makes the workdir that of the run described, if it is of none."""
  if not (workdir / open_run.CONFIG).exists():
    _write(workdir / open_run.CONFIG, facts)


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of the workdir while the block runs.

  The system lets go of it when the process ends, however it does.

  Raises:
    InputError: another process has it; names it.
  """
  with open(workdir / LOCK, "a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise InputError(
        f"--workdir={workdir}: {file.read().strip() or 'another process'} is"
        " at work there; wait for it, or take another folder"
      ) from error
    except OSError as error:  # not every shared file system has locks
      logging.warning("%s: cannot be locked: %s", workdir, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def _revision() -> str:
  """The git revision of this code, or that there is none."""
  folder = pathlib.Path(__file__).parent
  command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return "not a git checkout"
  return done.stdout.strip()


def write_environment(workdir: pathlib.Path) -> None:
  """Writes env.json: versions, devices, git revision."""
  _write(
    workdir / ENV,
    {
      "python": platform.python_version(),
      "jax": jax.__version__,
      "jaxlib": jaxlib.__version__,
      "platform": platform.platform(),
      "processors": os.cpu_count(),
      "devices": [d.device_kind for d in jax.devices()],
      "revision": _revision(),
    },
  )


def write_summary(workdir: pathlib.Path, facts: dict[str, Any]) -> None:
  """Writes summary.json: figures for the report."""
  _write(workdir / SUMMARY, facts)

"""Workdir of a run: configuration, environment, summary and lock."""

import contextlib
import fcntl
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jaxlib
from absl import logging

from dsv3_jax import config, io
from dsv3_jax.config import overrides
from dsv3_jax.errors import InputError
from dsv3_jax.interop import open_run

ENV, SUMMARY, LOCK = "env.json", "summary.json", "lock"
CHECKPOINTS = "checkpoints"

# Settings of when to evaluate or save and where to compute, not of what is
# trained: a run may change them.
_CHANGEABLE = "settings.checkpoint.", "settings.evaluate.", "settings.parallel."


# Redirected output of a first start, or of a batch system.
LOGS = {".err", ".log", ".out", ".txt"}


def run_identity(variant: str, seed: int, run: config.Run) -> dict[str, Any]:
  """Returns the content of config.json, which identifies the run."""
  return {"variant": variant, "seed": seed, "settings": config.flatten(run)}


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
  settings = {f"settings.{k}": v for k, v in identity["settings"].items()}
  return {"seed": identity["seed"], "variant": identity["variant"]} | settings


def check_or_create(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
  """Creates the workdir of a run, or checks that it belongs to this run.

  `write_config` makes it the run's, later: settings that prove wrong before
  that do not claim the folder. Raises InputError if it cannot be written,
  belongs to another configuration, or holds something else than a run.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".probe"
    probe.write_text("")
    probe.unlink()
    if not (workdir / open_run.CONFIG).exists():
      return _check_own(workdir)
  except OSError as error:
    raise InputError(
      f"--workdir={workdir}: cannot be written: {error}"
    ) from error
  return check_same(workdir, identity)


def _check_own(workdir: pathlib.Path) -> None:
  """Raises InputError if a folder without config.json holds foreign files.

  A start that ended early has left its lock. Checkpoints without config.json
  are those of a run that lost it.
  """
  if (workdir / LOCK).exists():
    return
  for path in sorted(workdir.iterdir()):
    hidden = path.name.startswith(".")
    if not hidden and path.name != CHECKPOINTS and path.suffix not in LOGS:
      kind = "folder" if path.is_dir() else "file"
      raise InputError(
        f"--workdir={workdir}: holds no run but other things, such as the"
        f" {kind} {path.name}; take a new or an empty folder, such as"
        f" --workdir={workdir / 'run'}"
      )


def check_same(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
  """Raises InputError if a workdir belongs to another run, or to none."""
  saved = open_run.read_config(workdir)
  # A setting newer than the run: its default is what was done without it.
  default = config.default_settings(config.Run, saved["settings"])
  saved["settings"] = default | saved["settings"]
  if overrides.WARMUP_STEPS in saved["settings"]:
    saved["settings"] = config.flatten(open_run.run_from_config(saved))
  changes = [
    f"  {line.removeprefix('settings.')}"
    for line in config.diff(_flat(saved), _flat(identity))
    if not line.startswith(_CHANGEABLE)
  ]
  if changes:
    old = ", ".join(
      filter(None, ["the old settings", open_run.flags_of(saved)])
    )
    raise InputError(
      f"--workdir={workdir} belongs to another configuration; take another"
      f" folder or {old} (there -> here):\n" + "\n".join(changes)
    )


def newest_step(workdir: pathlib.Path) -> int:
  """Returns the newest saved step by the names of folders; 0: there is none."""
  names = [path.name for path in (workdir / CHECKPOINTS).glob("*")]
  return max((int(name) for name in names if name.isdecimal()), default=0)


def rerun(purpose: str, *, own_process: bool) -> str:
  """Says how to go on: with which command, in a process of the run's own."""
  command = f": {command_line()}" if own_process else ""
  return f"rerun the command to {purpose}{command}"


def what_is_saved(workdir: pathlib.Path, *, own_process: bool = False) -> str:
  """Says which checkpoint there is, and how to go on.

  It may be called from any thread, at any time.
  """
  if not any((workdir / CHECKPOINTS).glob("[0-9]*")):
    again = rerun("start again", own_process=own_process)
    return f"nothing is saved yet; {again}"
  again = rerun("resume", own_process=own_process)
  return f"step {newest_step(workdir)} is saved; {again}"


def command_line() -> str:
  """Returns the command that started this process."""
  return shlex.join(["python", *sys.orig_argv[1:]])


def write_config(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
  """Writes config.json, if there is none."""
  if not (workdir / open_run.CONFIG).exists():
    io.write_json(workdir / open_run.CONFIG, identity)


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[int]:
  """Locks the workdir while the block runs; InputError names another holder.

  The block gets the descriptor of the lock. The system releases the lock when
  the process ends, however it does, and all that have inherited the descriptor.
  """
  with open(workdir / LOCK, "a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise InputError(
        f"--workdir={workdir} is locked by"
        f" {file.read().strip() or 'another process'}; wait for it, or use"
        " another folder"
      ) from error
    except OSError as error:  # not every shared file system has locks
      logging.warning("%s: cannot be locked: %s", workdir, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield file.fileno()


def _revision() -> str:
  """Returns the git revision of this code, or that there is none."""
  folder = pathlib.Path(__file__).parent
  command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return "not a git checkout"
  return done.stdout.strip()


def write_environment(workdir: pathlib.Path, *, own_process: bool) -> None:
  """Writes env.json: command line, host, versions, devices, git revision.

  The command line is that of a process of the run's own, not of a notebook.
  """
  environment = {"command": command_line()} if own_process else {}
  environment |= {
    "host": socket.gethostname(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "platform": platform.platform(),
    "processors": os.cpu_count(),
    "devices": [d.device_kind for d in jax.devices()],
    "revision": _revision(),
  }
  io.write_json(workdir / ENV, environment)

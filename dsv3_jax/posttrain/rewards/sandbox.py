"""Sandbox for programs that a model has written: Linux namespaces and limits.

A program has no network, no environment, no other program, no file but Python
and the system's libraries, which it cannot change, and an empty /tmp in memory.
It sees no process but its own, and all of them end with it. `sandbox_init.py`
is the part that runs inside.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

from dsv3_jax.errors import InputError

_INIT = str(pathlib.Path(__file__).with_name("sandbox_init.py"))
_GRACE = 30.0  # seconds that the sandbox itself may need on a busy machine
_NEEDED = (
  "programs of a model run in a sandbox only, which needs Linux 5.12 or later,"
  " util-linux's unshare, and leave to make user namespaces; use another"
  " machine, or leave out the reward `code`"
)


class SandboxError(RuntimeError):
  """The sandbox failed, whatever the program is."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """Most that one program may use."""

  seconds: float = 5.0  # of wall time, and of CPU time in each process
  memory_bytes: int = 512 * 2**20  # address space of each process
  processes: int = 16  # with threads
  output_bytes: int = 2**20  # of stdout, of stderr, and of each file
  disk_bytes: int = 16 * 2**20  # of /tmp, which is in memory
  open_files: int = 64

  def resources(self) -> dict[str, int]:
    """Returns the limits of the `resource` module, by name."""
    return {
      "RLIMIT_CPU": int(self.seconds) + 1,
      "RLIMIT_AS": self.memory_bytes,
      "RLIMIT_NPROC": self.processes,
      "RLIMIT_FSIZE": self.output_bytes,
      "RLIMIT_NOFILE": self.open_files,
      "RLIMIT_CORE": 0,
      "RLIMIT_MEMLOCK": 0,
      "RLIMIT_MSGQUEUE": 0,
    }


LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class ProgramResult:
  """End of a program, and what it wrote."""

  timed_out: bool
  output_full: bool  # it wrote as much as it may, or tried to write more
  exit_code: int  # -N: signal N ended it
  stdout: str
  stderr: str


def run(source: str, stdin: str = "", limits: Limits = LIMITS) -> ProgramResult:
  """Runs a Python program in a sandbox of its own.

  Raises:
    SandboxError: a protection is missing; the program has not run.
  """
  if (unshare := shutil.which("unshare")) is None:
    raise SandboxError("unshare is not on the PATH")
  as_root = os.geteuid() == 0
  python = os.path.realpath(sys.executable)
  namespaces = "--mount --net --pid --ipc --uts --fork --kill-child".split()
  if not as_root:
    namespaces += ["--user", "--map-root-user"]
  prefixes = sys.base_prefix, sys.base_exec_prefix
  task = dataclasses.asdict(limits) | {
    "source": source,
    "stdin": stdin,
    "as_root": as_root,
    "python": [
      *{
        os.path.join(p, d): 0 for p in prefixes for d in ("lib", sys.platlibdir)
      },
      python,
    ],
    "command": [python, "-I", "-B", "-X", "utf8", "/tmp/program.py"],
    "limits": limits.resources(),
  }
  try:
    done = subprocess.run(
      [unshare, *namespaces, python, "-I", "-S", "-B", _INIT],
      input=json.dumps(task),
      capture_output=True,
      text=True,
      env={},
      cwd="/",
      timeout=limits.seconds + _GRACE,
    )
  except subprocess.TimeoutExpired as error:
    raise SandboxError(f"no result after {error.timeout:g} s") from error
  try:
    result = json.loads(done.stdout)
  except json.JSONDecodeError as error:
    message = done.stderr.strip() or f"exit code {done.returncode}"
    raise SandboxError(message.splitlines()[-1]) from error
  if "error" in result:
    raise SandboxError(result["error"])
  return ProgramResult(**result)


def check() -> None:
  """Raises InputError if this machine cannot make a sandbox."""
  if not sys.platform.startswith("linux"):
    raise InputError(f"allow_code on {sys.platform}: {_NEEDED}")
  try:
    result = run("print(6 * 7)")
  except SandboxError as error:
    raise InputError(f"allow_code: {error}: {_NEEDED}") from error
  if result.stdout != "42\n":
    problem = "allow_code: Python does not start in the sandbox"
    raise InputError(f"{problem}: {result.stderr[-500:]}")

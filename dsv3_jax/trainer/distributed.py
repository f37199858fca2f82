"""Start of several processes that train as one, and their mesh.

Each runs the same command with `--coordinator=HOST:PORT --processes=N
--process=I`, process 0 on HOST. `--coordinator=auto` asks the environment, as
on the virtual machines of a TPU slice.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.checkpoint import manifest
from dsv3_jax.errors import InputError
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import exit_codes, peers


@dataclasses.dataclass(frozen=True)
class Processes:
  """The processes of a run; by default this one alone."""

  coordinator: str = ""
  count: int = 1
  index: int = 0
  timeout_s: int = 300  # for all to join

  @property
  def host(self) -> str:
    """Address of process 0; "" if only the environment knows it."""
    return self.coordinator.rpartition(":")[0]

  def validate(self) -> list[str]:
    """Returns what is wrong with the values, one line each."""
    if not self.coordinator:
      missing = "--coordinator is missing: HOST:PORT of process 0"
      return [missing] if self.count != 1 or self.index else []
    problems = []
    _, colon, port = self.coordinator.rpartition(":")
    if self.coordinator != "auto" and not (colon and port.isdecimal()):
      problems.append(
        f"--coordinator={self.coordinator}: expected HOST:PORT or auto"
      )
    if self.count < 1:
      problems.append(f"--processes={self.count}: must be at least 1")
    elif not 0 <= self.index < self.count:
      problems.append(
        f"--process={self.index}: must be in 0 to {self.count - 1}, below"
        f" --processes={self.count}"
      )
    if not 1 <= self.timeout_s <= 1e9:
      problems.append(
        f"--join_timeout={self.timeout_s}: must be from 1 to 1e9 s"
      )
    return problems

  def join(self) -> None:
    """Connects JAX to the others; InputError names those that did not join."""
    if not self.coordinator:
      return
    # JAX's service would handle SIGTERM; `preemption` does.
    jax.config.update("jax_enable_preemption_service", False)
    if self.coordinator == "auto":
      jax.distributed.initialize(initialization_timeout=self.timeout_s)
      return
    # JAX would exit if a process is missing, without saying which.
    if problem := _roll_call(self):
      raise InputError(problem)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = self.coordinator, self.count, self.index
    jax.distributed.initialize(*address, initialization_timeout=self.timeout_s)


def _roll_call(processes: Processes) -> str:
  """Lets process 0 hear from all others; returns what is wrong, in all.

  The connections end here: the port is JAX's next. The heartbeat makes its own,
  since there is no roll call with `--coordinator=auto`.
  """
  host, _, port = processes.coordinator.rpartition(":")
  deadline = time.monotonic() + processes.timeout_s
  if processes.index:
    return _answer(processes, (host, int(port)), deadline)
  return _call(processes, int(port), deadline)


def _call(processes: Processes, port: int, deadline: float) -> str:
  missing, problem = set(range(1, processes.count)), ""
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(socket.create_server(("", port)))
    except OSError as error:
      return _port_problem(processes, port, error)
    channels = []
    while missing and not problem:
      try:
        channel, hello = peers.accept(server, deadline)
      except TimeoutError:
        names = ", ".join(map(str, sorted(missing)))
        problem = (
          f"--processes={processes.count}: {names} did not join within"
          f" {processes.timeout_s} s; start them, or raise --join_timeout"
        )
        break
      stack.enter_context(channel)
      match hello:
        case [int(count), int(index)]:
          channels.append(channel)
        case _:  # not a process of this run
          continue
      if count != processes.count:
        problem = f"--processes: {processes.count} here, {count} at {index}"
      elif index not in missing:
        problem = f"--process={index}: was started twice"
      missing.discard(index)
    for channel in channels:
      with contextlib.suppress(OSError):  # one is lost; answer the others
        channel.sendall(json.dumps(problem).encode() + b"\n")
  return problem


def _port_problem(processes: Processes, port: int, error: OSError) -> str:
  problem = f"--coordinator={processes.coordinator}: cannot listen there"
  if error.errno != errno.EADDRINUSE:
    return f"{problem}: {error}"
  with socket.create_server(("", 0)) as server:
    free = server.getsockname()[1]
  return (
    f"{problem}: port {port} is in use, by another run or program; port {free}"
    f" is free: start all processes with --coordinator={processes.host}:{free}"
  )


def _answer(
  processes: Processes, address: tuple[str, int], deadline: float
) -> str:
  hello = json.dumps([processes.count, processes.index]).encode() + b"\n"
  while True:
    timeout_s = peers.seconds_left(deadline)
    try:
      with socket.create_connection(address, timeout=timeout_s) as channel:
        channel.settimeout(timeout_s + 5)  # process 0 may have begun later
        channel.sendall(hello)
        with channel.makefile() as file:
          return json.loads(file.readline())
    except (OSError, ValueError):
      if time.monotonic() >= deadline:
        return (
          f"--coordinator={processes.coordinator}: process 0 did not answer"
          f" within {processes.timeout_s} s"
        )
      time.sleep(0.1)


def use_virtual_devices(n: int, *, spare_threads: bool) -> None:
  """Makes n devices of a CPU; has no effect on other platforms.

  A device that waits for others blocks a thread. With one thread a device,
  XLA's default, a step of a layout that gathers may wait for ever; more threads
  than needed cost a tenth of the speed. Call before JAX starts.
  """
  jax.config.update("jax_num_cpu_devices", n)
  if spare_threads:
    os.environ.setdefault("NPROC", str(3 * n))


def fix_order_of_sums() -> None:
  """Makes sums on GPUs deterministic. Call before JAX starts.

  By default XLA's threads add to one address in the order of their arrival, as
  in the gradient of an embedding, and no two runs are bitwise identical. On an
  H100 the fixed order cost a small model a sixth of its speed.
  """
  name, given = "--xla_gpu_deterministic_ops", os.environ.get("XLA_FLAGS", "")
  if name not in given:
    os.environ["XLA_FLAGS"] = f"{given} {name}=true".strip()


def run_on_process_zero(work: Callable[..., Any], *args: Any) -> Any:
  """Calls `work` in process 0 while the others wait, for files with one writer.

  Returns its result in process 0, None in the others. Raises its error in
  process 0, one of the same exit code in the others.
  """
  result, error, code = None, None, exit_codes.OK
  if jax.process_index() == 0:
    try:
      result = work(*args)
    except Exception as e:
      error, code = e, exit_codes.code_of(e) or exit_codes.INTERNAL
  if jax.process_count() > 1:
    code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
  if code and error is None:
    error_type = {
      exit_codes.BAD_INPUT: InputError,
      exit_codes.NO_CHECKPOINT: manifest.MissingError,
    }.get(code, RuntimeError)
    error = error_type("process 0 failed; see its output")
  if error:
    raise error
  return result


def mesh(sizes: Mapping[str, int] | None = None) -> jax.sharding.Mesh:
  """Makes a mesh of all devices of all processes; by default on axis `data`.

  Raises InputError if the sizes do not multiply to the number of devices.
  """
  n = jax.device_count()
  sizes = sizes or {"data": n}
  product = math.prod(sizes.values())
  if product == n:
    return device_mesh.make_mesh(sizes)
  given = ",".join(f"{axis}={size}" for axis, size in sizes.items())
  others = product // sizes.get("data", 1)
  fits = f"data={n // others} and the other axes as given"
  if n % others:
    fits = f"data={n}"
  raise InputError(
    f"--mesh={given}: multiplies to {product}, and there are {n} devices;"
    f" {fits} would fit"
  )

"""Several processes that train as one.

Each runs the same command with `--coordinator=HOST:PORT --processes=N
--process=I`, process 0 on HOST. `--coordinator=auto` asks the environment, as
on the virtual machines of a TPU slice.
"""

import contextlib
import dataclasses
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
from dsv3_jax.trainer import exit_codes


@dataclasses.dataclass(frozen=True)
class Processes:
  """Who takes part; the default: this process alone."""

  coordinator: str = ""
  count: int = 1
  index: int = 0
  timeout_s: int = 300  # for all to join

  @property
  def host(self) -> str:
    """Of process 0; "": its environment knows."""
    return self.coordinator.rpartition(":")[0]

  def problems(self) -> list[str]:
    """What is wrong with it, a line each."""
    found = []
    if not self.coordinator:
      if self.count != 1 or self.index:
        found.append("--coordinator is missing: HOST:PORT of process 0")
      return found
    _, colon, port = self.coordinator.rpartition(":")
    if self.coordinator != "auto" and not (colon and port.isdecimal()):
      found.append(
        f"--coordinator={self.coordinator}: expected HOST:PORT or auto"
      )
    if self.count < 1:
      found.append(f"--processes={self.count}: must be at least 1")
    elif not 0 <= self.index < self.count:
      found.append(
        f"--process={self.index}: must be in 0 to {self.count - 1}, below"
        f" --processes={self.count}"
      )
    if self.timeout_s < 1:
      found.append(f"--join_timeout={self.timeout_s}: must be at least 1 s")
    return found

  def join(self) -> None:
    """Waits for the others and connects JAX to them.

    Raises:
      InputError: some did not come in time; names them.
    """
    if not self.coordinator:
      return
    # It would take SIGTERM for itself: `preemption` hears it.
    jax.config.update("jax_enable_preemption_service", False)
    if self.coordinator == "auto":
      jax.distributed.initialize(initialization_timeout=self.timeout_s)
      return
    # JAX would end the process where one is missing, and not say which.
    if problem := _roll_call(self):
      raise InputError(problem)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
      self.coordinator,
      self.count,
      self.index,
      initialization_timeout=self.timeout_s,
    )


def _roll_call(who: Processes) -> str:
  """Process 0 hears from all others and tells them what is wrong, if it is."""
  host, _, port = who.coordinator.rpartition(":")
  address, deadline = (host, int(port)), time.monotonic() + who.timeout_s
  return (_answer if who.index else _call)(who, address, deadline)


def _left(deadline: float) -> float:
  return max(deadline - time.monotonic(), 0.01)


def _call(who: Processes, address: tuple[str, int], deadline: float) -> str:
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(socket.create_server(("", address[1])))
    except OSError as error:
      return f"--coordinator={who.coordinator}: cannot listen there: {error}"
    missing, peers, problem = set(range(1, who.count)), [], ""
    while missing and not problem:
      server.settimeout(_left(deadline))
      try:
        peer = stack.enter_context(server.accept()[0])
        peer.settimeout(_left(deadline))
        count, index = json.loads(_line(peer))
      except TimeoutError:
        names = ", ".join(map(str, sorted(missing)))
        problem = (
          f"--processes={who.count}: {names} did not join within"
          f" {who.timeout_s} s; start them, or raise --join_timeout"
        )
        break
      except (OSError, ValueError, TypeError):  # not one of ours
        continue
      peers.append(peer)
      if count != who.count:
        problem = f"--processes: {who.count} here, {count} at {index}"
      elif index not in missing:
        problem = f"--process={index}: was started twice"
      missing.discard(index)
    for peer in peers:
      with contextlib.suppress(OSError):  # it has gone; the others matter
        peer.sendall(json.dumps(problem).encode() + b"\n")
  return problem


def _line(peer: socket.socket) -> str:
  with peer.makefile() as file:
    return file.readline()


def _answer(who: Processes, address: tuple[str, int], deadline: float) -> str:
  while True:
    try:
      with socket.create_connection(address, timeout=_left(deadline)) as peer:
        peer.settimeout(_left(deadline) + 5)  # process 0 may have begun later
        peer.sendall(json.dumps([who.count, who.index]).encode() + b"\n")
        return json.loads(_line(peer))
    except (OSError, ValueError):
      if time.monotonic() >= deadline:
        return (
          f"--coordinator={who.coordinator}: process 0 did not answer within"
          f" {who.timeout_s} s"
        )
      time.sleep(0.1)


def use_virtual_devices(n: int, *, spare_threads: bool) -> None:
  """Makes n devices of a processor; does nothing where there are others.

  A device that waits for the others keeps a thread. With one for each device,
  which is XLA's choice, some step of a layout that gathers waits for ever; more
  threads than are needed cost a tenth of the speed. Call before JAX starts.
  """
  jax.config.update("jax_num_cpu_devices", n)
  if spare_threads:
    os.environ.setdefault("NPROC", str(3 * n))


def fix_order_of_sums() -> None:
  """Has GPUs add in the same order every time. Call before JAX starts.

  Left alone, XLA's threads add to one place in the order they come, as in the
  gradient of an embedding: no two runs end in the same bits then. On an H100
  the fixed order cost a small model a sixth of its speed.
  """
  name, given = "--xla_gpu_deterministic_ops", os.environ.get("XLA_FLAGS", "")
  if name not in given:
    os.environ["XLA_FLAGS"] = f"{given} {name}=true".strip()


def run_on_process_zero(work: Callable[[], Any]) -> Any:
  """Process 0 works while the others wait, so that a file has one writer.

  Returns:
    What `work` returns in process 0, None in the others.

  Raises:
    Exception: work's own in process 0; in the others one with its exit code.
  """
  result, error, code = None, None, exit_codes.OK
  if jax.process_index() == 0:
    try:
      result = work()
    except Exception as e:
      error, code = e, exit_codes.code_of(e) or exit_codes.INTERNAL
  if jax.process_count() > 1:
    code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
  if code and error is None:
    kinds = {
      exit_codes.BAD_INPUT: InputError,
      exit_codes.NO_CHECKPOINT: manifest.MissingError,
    }
    error = kinds.get(code, RuntimeError)("process 0 failed; see its output")
  if error:
    raise error
  return result


def mesh(sizes: Mapping[str, int]) -> jax.sharding.Mesh:
  """The mesh over all devices of all processes; without sizes, all of `data`.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  n = jax.device_count()
  sizes = sizes or {"data": n}
  product = math.prod(sizes.values())
  if product == n:
    return device_mesh.make_mesh(sizes)
  given = ",".join(f"{axis}={size}" for axis, size in sizes.items())
  rest = product // sizes.get("data", 1)
  fits = f"data={n}" if n % rest else f"data={n // rest} with the others kept"
  raise InputError(
    f"--mesh={given}: multiplies to {product}, and there are {n} devices;"
    f" {fits} would fit"
  )

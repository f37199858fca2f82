"""Connections between the processes of a run: JSON, one value a line."""

import contextlib
import json
import secrets
import socket
import time
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.errors import InputError

_TOKEN_BYTES, _ADDRESS_BYTES = 16, 300


def seconds_left(deadline: float) -> float:
  """Returns the time until `deadline`, but never 0, which sockets refuse."""
  return max(deadline - time.monotonic(), 0.01)


def accept(server: socket.socket, deadline: float) -> tuple[socket.socket, Any]:
  """Accepts a connection and reads its first line, a JSON value.

  Drops connections that send something else. Raises TimeoutError at `deadline`.
  """
  while True:
    server.settimeout(seconds_left(deadline))
    channel, _ = server.accept()
    channel.settimeout(seconds_left(deadline))
    try:
      with channel.makefile() as file:
        return channel, json.loads(file.readline(200))
    except (OSError, ValueError):
      channel.close()


class Peer:
  """A connection to another process."""

  def __init__(self, channel: socket.socket, index: int):
    """Wraps a connected socket to process `index`."""
    self.channel, self.index = channel, index
    self.heard_at = time.monotonic()
    self._unread = b""

  def send(self, **message: Any) -> None:
    """Sends a message; `receive` reports it if the peer is lost."""
    with contextlib.suppress(OSError):
      self.channel.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> list[dict[str, Any]] | None:
    """Returns the messages that have arrived; None: the peer is lost."""
    try:
      data = self.channel.recv(1 << 16)
    except OSError:
      data = b""
    if not data:
      return None
    self.heard_at = time.monotonic()
    *lines, self._unread = (self._unread + data).split(b"\n")
    return [json.loads(line) for line in lines]


def connect_all(
  index: int, count: int, timeout_s: float, host: str = ""
) -> dict[int, Peer]:
  """Connects process 0 to each other process.

  Process 0 listens at a free port; JAX's collectives tell the others where, and
  a token that proves that they belong to the run.

  Its address is `host`, or the name of its machine. Returns peers by index: all
  others in process 0, process 0 in the others. InputError names those that did
  not connect in time.
  """
  shared = np.zeros(_TOKEN_BYTES + _ADDRESS_BYTES, np.uint8)
  with contextlib.ExitStack() as stack:
    if index == 0:
      server = stack.enter_context(socket.create_server(("", 0)))
      host, port = host or socket.gethostname(), server.getsockname()[1]
      text = secrets.token_bytes(_TOKEN_BYTES) + f"{host} {port}".encode()
      shared[: len(text)] = list(text)
    shared = bytes(multihost_utils.broadcast_one_to_all(shared))
    token = shared[:_TOKEN_BYTES].hex()
    host, port = shared[_TOKEN_BYTES:].rstrip(b"\0").decode().split()
    if index == 0:
      return _accept_all(server, token, count, timeout_s)
    try:
      channel = socket.create_connection((host, int(port)), timeout=timeout_s)
    except OSError as error:
      raise InputError(
        f"process 0 does not answer at {host}:{port}, where it expects the"
        f" heartbeat of the others: {error}"
      ) from error
    peer = Peer(channel, 0)
    peer.send(hello=index, token=token)
    return {0: peer}


def _accept_all(
  server: socket.socket, token: str, count: int, timeout_s: float
) -> dict[int, Peer]:
  deadline, peers = time.monotonic() + timeout_s, {}
  while missing := set(range(1, count)) - peers.keys():
    try:
      channel, hello = accept(server, deadline)
    except TimeoutError:
      raise InputError(
        f"{names(missing)}: no connection to process 0 within {timeout_s:g} s"
      ) from None
    match hello:
      case {"hello": int(index), "token": str(word)} if (
        index in missing and word == token
      ):
        channel.settimeout(timeout_s)
        peers[index] = Peer(channel, index)
      case _:
        channel.close()
  return peers


def names(indices: set[int]) -> str:
  """Formats indices as `process 1, 3`."""
  return "process " + ", ".join(map(str, sorted(indices)))

"""What keeps the processes of a run from waiting for each other for ever.

Each has a thread that watches. It notices that the process makes no steps any
more. With several processes, all tell process 0 each second where they are, and
it tells them what all have to know: that one has gone, is silent or stuck, and
after which step to leave. Whoever hears of an end says why and ends at once,
which a main thread that waits for a collective could not.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import json
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.errors import InputError
from dsv3_jax.trainer import exit_codes, preemption

BEAT_S = 1.0
TEXT = 2000  # characters of an error that others are told
_TOKEN_BYTES, _ADDRESS_BYTES = 16, 300
_AGAIN = "; start all again: the run goes on from its newest checkpoint"


@dataclasses.dataclass(frozen=True)
class Timeouts:
  """How long to wait, in seconds."""

  heartbeat_s: float = 10.0  # for a sign of life from another process
  # For a step, or what else is done once there was one; 0: for ever.
  stuck_s: float = 1800.0
  grace_s: float = 25.0  # to save after the first signal

  def problems(self) -> list[str]:
    """What is wrong with it, a line each."""
    return [
      f"--{flag}={value:g}: must be at least {low:g} s"
      for flag, value, low in (
        ("heartbeat", self.heartbeat_s, 2 * BEAT_S),
        ("watchdog_timeout", self.stuck_s, 0),
        ("grace_period", self.grace_s, 0),
      )
      if not value >= low
    ]


class _Peer:
  """A connection to another process; messages are JSON objects, a line each."""

  def __init__(self, channel: socket.socket, index: int):
    self.channel, self.index = channel, index
    self.heard = time.monotonic()
    self._unread = b""

  def send(self, **message: Any) -> None:
    with contextlib.suppress(OSError):  # that it has gone is read, not written
      self.channel.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> list[dict[str, Any]] | None:
    """Whole messages that have arrived; None: the other end has gone."""
    try:
      got = self.channel.recv(1 << 16)
    except OSError:
      got = b""
    if not got:
      return None
    self.heard = time.monotonic()
    *lines, self._unread = (self._unread + got).split(b"\n")
    return [json.loads(line) for line in lines]


class Heartbeat:
  """Watches a process while it is entered; else it only counts steps."""

  def __init__(self, timeouts: Timeouts = Timeouts(), host: str = ""):
    """Prepares to watch.

    Args:
      timeouts: how long to wait for what.
      host: where others reach process 0; "": by the name of its machine.
    """
    self._timeouts, self._host = timeouts, host
    self._index, self._count = 0, 1
    self._peers: dict[int, _Peer] = {}
    self._step, self._progress = -1, time.monotonic()  # this process
    self._steps = collections.defaultdict(lambda: -1)  # others, by index
    # About leaving, guarded by `_changed`:
    self._changed = threading.Condition()
    self._told = False
    self._ready: dict[int, int] = {}  # in process 0: who waits after which step
    self._stop_at: int | None = None

  def __enter__(self) -> "Heartbeat":
    self._index, self._count = jax.process_index(), jax.process_count()
    if self._count > 1:
      self._connect()
    self._wake, self._waker = socket.socketpair()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    self._listener = preemption.Listener(self._timeouts.grace_s, self.tell)
    self._listener.__enter__()
    return self

  def __exit__(
    self, kind: type | None, error: BaseException | None, _: Any
  ) -> None:
    if error and self._count > 1 and exit_codes.code_of(error) is None:
      # Where another process has gone, this is what it led to; the thread is
      # about to say so.
      time.sleep(BEAT_S)
    self._listener.__exit__()
    code = exit_codes.code_of(error) if error else exit_codes.OK
    if code in (exit_codes.OK, exit_codes.PREEMPTED):
      self._send(leaving=True)
    else:
      text = f"{kind.__name__}: {error}"[:TEXT]
      self._send(end=[code or exit_codes.INTERNAL, text])
    self._waker.close()
    self._thread.join()
    for peer in self._peers.values():
      peer.channel.close()
    self._wake.close()

  def tell(self) -> None:
    """Asks all processes to leave after a step; from any thread."""
    with self._changed:
      if not self._told:
        self._told = True
        self._send(stop=True)
      self._decide()

  def progress(self) -> None:
    """Says that something was done that is no step."""
    self._progress = time.monotonic()

  def should_continue(self, done: int, last: bool = False) -> bool:
    """Whether to do another step; called before each, and after the last.

    Once a process was told to leave, all of them wait here until each has said
    how far it is, and go on to the step of the farthest: one may be ahead of
    another by the steps that are under way.

    Args:
      done: steps that were started.
      last: there is no other one.
    """
    self._step = done
    self.progress()
    with self._changed:
      if last or (self._told and self._stop_at is None):
        self._say_ready(done)
      if not last and self._told:
        self._changed.wait_for(lambda: self._stop_at is not None)
      return self._stop_at is None or done < self._stop_at

  def _say_ready(self, done: int) -> None:
    if self._index:
      self._send(ready=done)
    else:
      self._ready[0] = done
      self._decide()

  def _decide(self) -> None:
    """In process 0, once all have said how far they are."""
    everyone = len(self._ready) == self._count
    if self._told and everyone and self._stop_at is None:
      self._stop_at = max(self._ready.values())
      self._send(stop_at=self._stop_at)
      self._changed.notify_all()

  def _connect(self) -> None:
    """Process 0 listens; where, and a word to know each other by, is shared."""
    shared = np.zeros(_TOKEN_BYTES + _ADDRESS_BYTES, np.uint8)
    with contextlib.ExitStack() as stack:
      if self._index == 0:
        server = stack.enter_context(socket.create_server(("", 0)))
        host, port = self._host or socket.gethostname(), server.getsockname()[1]
        text = secrets.token_bytes(_TOKEN_BYTES) + f"{host} {port}".encode()
        shared[: len(text)] = list(text)
      shared = bytes(multihost_utils.broadcast_one_to_all(shared))
      token = shared[:_TOKEN_BYTES].hex()
      host, port = shared[_TOKEN_BYTES:].rstrip(b"\0").decode().split()
      if self._index == 0:
        self._accept(server, token)
      else:
        address, timeouts = (host, int(port)), self._timeouts.heartbeat_s
        try:
          channel = socket.create_connection(address, timeout=timeouts)
        except OSError as error:
          raise InputError(
            f"process 0 does not answer at {host}:{port}, where it hears from"
            f" the others: {error}"
          ) from error
        self._peers[0] = _Peer(channel, 0)
        self._peers[0].send(hello=self._index, token=token)

  def _accept(self, server: socket.socket, token: str) -> None:
    deadline = time.monotonic() + self._timeouts.heartbeat_s
    while missing := set(range(1, self._count)) - self._peers.keys():
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        channel, _ = server.accept()
      except TimeoutError:
        raise InputError(
          f"{_names(missing)}: no connection to process 0 within"
          f" {self._timeouts.heartbeat_s:g} s"
        ) from None
      channel.settimeout(self._timeouts.heartbeat_s)
      try:
        with channel.makefile() as file:
          hello = json.loads(file.readline(200))
        if hello["hello"] not in missing or hello["token"] != token:
          raise ValueError
      except (OSError, ValueError, TypeError, KeyError):  # not one of ours
        channel.close()
        continue
      self._peers[hello["hello"]] = _Peer(channel, hello["hello"])

  def _watch(self) -> None:
    with selectors.DefaultSelector() as selector:
      selector.register(self._wake, selectors.EVENT_READ)
      for peer in self._peers.values():
        selector.register(peer.channel, selectors.EVENT_READ, peer)
      beat = now = time.monotonic()
      while True:
        ready = selector.select(BEAT_S / 4)
        before, now = now, time.monotonic()
        if self._peers and now - before > self._timeouts.heartbeat_s:
          self._end(
            exit_codes.INTERNAL,
            f"process {self._index}, this one, was stopped for"
            f" {now - before:.0f} s; the others did not wait{_AGAIN}",
          )
        for key, _ in ready:
          if key.data is None:
            return
          if not self._hear(key.data):
            selector.unregister(key.fileobj)
            del self._peers[key.data.index]
        if now - beat >= BEAT_S:
          self._send(step=self._step)
          beat = now
        self._look_for_silence(now)
        self._look_for_stuck(now)

  def _hear(self, peer: _Peer) -> bool:
    """Takes in what a process says; false: it says no more."""
    messages = peer.receive()
    if messages is None:
      self._lose(peer, "has gone")
    for message in messages:
      match message:
        case {"step": step}:
          self._steps[peer.index] = step
        case {"stop": _}:
          self.tell()
        case {"ready": step}:
          with self._changed:
            self._ready[peer.index] = step
            self._decide()
        case {"stop_at": step}:
          with self._changed:
            self._stop_at = step
            self._changed.notify_all()
        case {"stuck": _}:
          self._end_stuck()
        case {"end": [code, text]} if self._index:
          self._end(code, text)
        case {"end": [code, text]}:
          self._end(code, f"process {peer.index}: {text}")
        case {"leaving": _}:
          return False
    return True

  def _look_for_silence(self, now: float) -> None:
    for peer in list(self._peers.values()):
      if now - peer.heard > self._timeouts.heartbeat_s:
        self._lose(peer, f"is silent for {self._timeouts.heartbeat_s:g} s")

  def _lose(self, peer: _Peer, how: str) -> None:
    step = self._steps[peer.index]
    self._end(
      exit_codes.INTERNAL, f"process {peer.index} {how}, at step {step}{_AGAIN}"
    )

  def _look_for_stuck(self, now: float) -> None:
    limit, begun = self._timeouts.stuck_s, self._step >= 0
    if not (limit and begun and now - self._progress > limit):
      return
    if self._index:  # process 0 knows who is behind
      self._send(stuck=True)
      self.progress()
    else:
      self._end_stuck()

  def _end_stuck(self) -> None:
    """Names who is behind, and therefore who is waited for."""
    steps = dict(self._steps) | {self._index: self._step}
    least = min(steps.values())
    behind = {index for index, step in steps.items() if step == least}
    text = f"{_names(behind)}: nothing done for {self._timeouts.stuck_s:g} s"
    text += f" after step {least} was started"
    if ahead := steps.keys() - behind:
      text += f"; {_names(ahead)} did more, and would wait for ever"
    self._end(exit_codes.STUCK, text)

  def _end(self, code: int, text: str) -> None:
    """Ends this process, and the others too if this is process 0."""
    if self._index == 0:
      self._send(end=[code, text])
    if code == exit_codes.STUCK:
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    preemption.leave(code, text)

  def _send(self, **message: Any) -> None:
    for peer in list(self._peers.values()):
      peer.send(**message)


def _names(indices: set[int]) -> str:
  return "process " + ", ".join(map(str, sorted(indices)))

"""Heartbeat and watchdog: ends all processes when one dies, hangs or is silent.

A thread of each process notices when the process makes no progress. With
several processes, each sends its step to process 0 every second, and process 0
tells all others when one is lost or stuck, and after which step to stop. A
process that learns of an end prints why and exits at once, which a main thread
that waits for a collective could not.
"""

import collections
import dataclasses
import faulthandler
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.errors import InputError
from dsv3_jax.trainer import exit_codes, peers, preemption

BEAT_S = 1.0
LONGEST_S = 1e9  # timers and sockets refuse more
MAX_TEXT = 2000  # characters of an error that other processes get
_RESTART = "; restart all processes to resume from the newest checkpoint"


@dataclasses.dataclass(frozen=True)
class Timeouts:
  """Seconds to wait before a process is given up."""

  heartbeat_s: float = 10.0  # for a message from another process
  # Watchdog timeout of one step or phase, after the first step; 0 disables it.
  stuck_s: float = 1800.0
  grace_s: float = 25.0  # to save after the first signal

  def validate(self) -> list[str]:
    """Returns what is wrong with the values, one line each."""
    problems = []
    for flag, value, low in (
      ("heartbeat", self.heartbeat_s, 2 * BEAT_S),
      ("watchdog_timeout", self.stuck_s, 0),
      ("grace_period", self.grace_s, 0),
    ):
      if not value >= low:
        problems.append(f"--{flag}={value:g}: must be at least {low:g} s")
      elif value > LONGEST_S:
        problems.append(f"--{flag}={value:g}: must be at most {LONGEST_S:g} s")
    return problems


class Heartbeat:
  """Watches a process, and its peers, while it is entered."""

  def __init__(
    self,
    timeouts: Timeouts = Timeouts(),
    host: str = "",
    own_process: bool = True,
    what_is_saved: Callable[[], str] = lambda: "nothing was to be saved",
  ):
    """Prepares to watch; `host`: address of process 0, "": of its machine.

    With `own_process`, SIGTERM and SIGINT stop the run, and the process exits
    where it is stuck. Else a process without peers is not watched. A signal
    before `begin` ends all processes at once, and `what_is_saved` says what is
    true of the checkpoints then.
    """
    self._what_is_saved = what_is_saved
    self._timeouts, self._host = timeouts, host
    self._own_process, self._index = own_process, 0
    self._peers: dict[int, peers.Peer] = {}
    self._left: list[peers.Peer] = []  # have said that they leave
    self._step, self._progress_at = -1, time.monotonic()  # of this process
    self._steps = collections.defaultdict(lambda: -1)  # of others, by index

  def __enter__(self) -> "Heartbeat":
    main = threading.current_thread() is threading.main_thread()
    if self._own_process and not main:
      raise InputError("own_process: train in the main thread, or unset it")
    self._index, count = jax.process_index(), jax.process_count()
    if count > 1:
      self._peers = peers.connect_all(
        self._index, count, self._timeouts.heartbeat_s, self._host
      )
    self._vote = preemption.StopVote(self._index, count, self._send)
    self._thread = None
    if self._own_process or self._peers:
      self._wake, self._waker = socket.socketpair()
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()
    self._listener = None
    if self._own_process:
      grace_s = self._timeouts.grace_s
      self._listener = preemption.Listener(
        grace_s, self.request_stop, self._leave
      )
      self._listener.__enter__()
    return self

  def __exit__(
    self, error_type: type | None, error: BaseException | None, _: Any
  ) -> None:
    if error and self._peers and exit_codes.code_of(error) is None:
      # A lost process may have caused this error; the thread then reports the
      # loss, and exits.
      time.sleep(BEAT_S)
    if self._listener:
      self._listener.__exit__()
    code = exit_codes.code_of(error) if error else exit_codes.OK
    if code in (exit_codes.OK, exit_codes.PREEMPTED):
      self._send(leaving=True)
    else:
      text = f"{error_type.__name__}: {error}"[:MAX_TEXT]
      self._send(end=[code or exit_codes.INTERNAL, text])
    if self._thread:
      self._waker.close()
      self._thread.join()
      self._wake.close()
    for peer in (*self._peers.values(), *self._left):
      peer.channel.close()

  def request_stop(self) -> None:
    """Asks all processes to stop after a step; from any thread."""
    self._vote.request()

  def begin(self) -> None:
    """States that a step was done, which a signal must not lose."""
    if self._listener:
      self._listener.begin()

  def _leave(self, name: str) -> None:
    """Ends all processes at once, before the first step was done."""
    code = exit_codes.PREEMPTED
    text = f"{name} before the end of the first step; {self._what_is_saved()}"
    self._send(end=[code, text])
    preemption.exit_now(code, text)

  def progress(self) -> None:
    """Resets the watchdog after work that is no step."""
    self._progress_at = time.monotonic()

  def should_continue(self, done: int, last: bool = False) -> bool:
    """Returns whether to start a step after `done`; see `StopVote`."""
    self._step = done
    self.progress()
    return self._vote.should_continue(done, last=last)

  def _watch(self) -> None:
    with selectors.DefaultSelector() as selector:
      selector.register(self._wake, selectors.EVENT_READ)
      for peer in self._peers.values():
        selector.register(peer.channel, selectors.EVENT_READ, peer)
      beat_at = now = time.monotonic()
      while True:
        ready = selector.select(BEAT_S / 4)
        before, now = now, time.monotonic()
        if self._peers and now - before > self._timeouts.heartbeat_s:
          self._end(
            exit_codes.INTERNAL,
            f"process {self._index}, this one, was stopped for"
            f" {now - before:.0f} s; the others did not wait{_RESTART}",
          )
        if any(key.data is None for key, _ in ready):
          return  # whatever peers do while this process leaves
        for key, _ in ready:
          if not self._receive(key.data):
            selector.unregister(key.fileobj)
            # Not closed yet: a peer that leaves, and still listens, would take
            # that for a lost process.
            self._left.append(self._peers.pop(key.data.index))
        if now - beat_at >= BEAT_S:
          self._send(step=self._step)
          beat_at = now
        self._check_silence(now)
        self._check_progress(now)

  def _receive(self, peer: peers.Peer) -> bool:
    """Handles the messages of a peer; returns False if it leaves."""
    messages = peer.receive()
    if messages is None:
      self._lose(peer, "disconnected")
    for message in messages:
      match message:
        case {"step": step}:
          self._steps[peer.index] = step
        case {"stop": _}:
          self._vote.request()
        case {"ready": step}:
          self._vote.set_started(peer.index, step)
        case {"stop_at": step}:
          self._vote.set_stop(step)
        case {"stuck": _}:
          self._end_stuck()
        case {"end": [code, text]} if self._index:
          self._end(code, text)
        case {"end": [code, text]}:
          self._end(code, f"process {peer.index}: {text}")
        case {"leaving": _}:
          return False
    return True

  def _check_silence(self, now: float) -> None:
    limit = self._timeouts.heartbeat_s
    for peer in list(self._peers.values()):
      if now - peer.heard_at > limit:
        self._lose(peer, f"sent no heartbeat for {limit:g} s")

  def _lose(self, peer: peers.Peer, what: str) -> None:
    step = self._steps[peer.index]
    self._end(
      exit_codes.INTERNAL,
      f"process {peer.index} {what}, at step {step}{_RESTART}",
    )

  def _check_progress(self, now: float) -> None:
    limit, begun = self._timeouts.stuck_s, self._step >= 0
    if not (limit and begun and now - self._progress_at > limit):
      return
    if self._index:  # process 0 knows who is behind
      self._send(stuck=True)
      self.progress()
    else:
      self._end_stuck()

  def _end_stuck(self) -> None:
    """Names the processes that are behind, for which the others wait."""
    steps = dict(self._steps) | {self._index: self._step}
    least = min(steps.values())
    behind = {index for index, step in steps.items() if step == least}
    text = f"{peers.names(behind)}: no progress for {self._timeouts.stuck_s:g}"
    text += f" s after step {least} was started"
    if ahead := steps.keys() - behind:
      text += f"; {peers.names(ahead)} did more, and would wait for ever"
    self._end(exit_codes.STUCK, text)

  def _end(self, code: int, text: str) -> None:
    """Ends this process, and the others too if this is process 0."""
    if self._index == 0:
      self._send(end=[code, text])
    if code == exit_codes.STUCK:
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    preemption.exit_now(code, text)

  def _send(self, **message: Any) -> None:
    for peer in list(self._peers.values()):
      peer.send(**message)

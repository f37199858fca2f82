"""Pre-training with a fault built in: dying.py POINT N FLAGS...

Kills itself, fails or hangs at a point of the work, the N-th time it is there.
"""

import os
import runpy
import signal
import sys
import time

from dsv3_jax.checkpoint import checkpointer, manifest, orbax_io
from dsv3_jax.trainer import heartbeat, loop


def die():
  os.kill(os.getpid(), signal.SIGKILL)


def fail():
  raise RuntimeError("as it always does here")


def hang():
  while True:
    time.sleep(0.1)


def at(module, name, n, fault, after=False):
  """Faults before, or after, the n-th call of a function."""
  whole, left = getattr(module, name), [n]

  def faulty(*args, **kwargs):
    left[0] -= 1
    if not left[0] and not after:
      fault()
    result = whole(*args, **kwargs)
    if not left[0]:
      fault()
    return result

  setattr(module, name, faulty)


def main():
  _, point, n, *flags = sys.argv
  where = {
    "compile": (heartbeat.Heartbeat, "should_continue", die),
    "step": (heartbeat.Heartbeat, "should_continue", die),
    "arrays": (orbax_io, "orbax_keys", die),
    "manifest": (manifest, "write", die),
    "rename": (manifest, "write", die, True),
    "remove": (checkpointer, "_remove", die),
    "fail": (heartbeat.Heartbeat, "should_continue", fail),
    "hang": (heartbeat.Heartbeat, "should_continue", hang),
  }
  if point == "removing":
    checkpointer.shutil.rmtree = lambda *_, **__: die()
  elif point == "data":
    loop.global_batches = lambda *_: fail()
  else:
    module, name, fault, *after = where[point]
    at(module, name, int(n), fault, *after)
  sys.argv = ["pretrain", *flags]
  runpy.run_module("experiments.pretrain", run_name="__main__")


if __name__ == "__main__":
  main()

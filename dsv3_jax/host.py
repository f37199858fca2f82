"""Settings of the host process."""

import ctypes
import sys


def keep_freed_memory() -> None:
  """Tells glibc to keep freed memory instead of returning it to the system.

  A step on CPU allocates all of its temporary memory afresh: returned memory
  costs a page fault and a cleared page for every 4 KiB of every step. Call
  before JAX starts; does nothing elsewhere.
  """
  if not sys.platform.startswith("linux"):
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:  # a C library without it, such as musl
    return
  trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, -1)
  mallopt(top_pad, 64 << 20)
  mallopt(arena_max, 1)  # other arenas map every large block separately

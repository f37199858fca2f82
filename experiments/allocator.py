"""Settings of the memory allocator; only the dynamic loader can replace it."""

import importlib.metadata
import os
import sys


def mimalloc(*, keep_freed: bool) -> dict[str, str]:
  """Environment variables that start a program with mimalloc preloaded.

  On CPU, a training step makes tens of thousands of short-lived allocations
  from several threads and a few of hundreds of MiB. glibc's allocator searches
  and waits for the former, and hands the latter back to the system, which
  clears every page anew.

  Empty outside Linux, where mimalloc is not installed, and where LD_PRELOAD is
  set already.

  Args:
    keep_freed: whether freed memory is kept for a second, which the next
      training step begins in, before the system gets it back. If not, for a
      millisecond: for a program that allocates little once it is compiled.
      Neither holds what compiling took.
  """
  if not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ:
    return {}
  try:
    package = importlib.metadata.distribution("cmeel-mimalloc")
  except importlib.metadata.PackageNotFoundError:
    return {}
  library = str(package.locate_file("cmeel.prefix/lib/libmimalloc.so"))
  delay = "1000" if keep_freed else "1"  # in ms
  return {"LD_PRELOAD": library, "MIMALLOC_PURGE_DELAY": delay}


def keep_large_blocks() -> None:
  """Starts this program again with glibc keeping the memory that is freed.

  A stream through buffers of tens of MiB has the system clear their pages each
  time anew: without that, blocks of a checkpoint are read from the cache and
  transposed at 2.9 instead of 2.2 GB/s. Does nothing outside Linux, and where
  MALLOC_MMAP_THRESHOLD_ is set already.
  """
  name = "MALLOC_MMAP_THRESHOLD_"
  if sys.platform.startswith("linux") and name not in os.environ:
    env = {name: str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    os.execve(sys.executable, sys.orig_argv, os.environ | env)

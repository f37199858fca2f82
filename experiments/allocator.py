"""The memory allocator of the process."""

import importlib.metadata
import os
import sys


def use_mimalloc() -> None:
  """Starts this program again with mimalloc as its memory allocator.

  On CPU, a training step makes tens of thousands of short-lived allocations
  from several threads and a few of hundreds of MiB. glibc's allocator searches
  and waits for the former, and hands the latter back to the system, which
  clears every page anew. Only the dynamic loader can replace it, hence the new
  start: same process, same arguments. Call before JAX starts.

  Does nothing outside Linux, where mimalloc is not installed, and where
  LD_PRELOAD is set already; setting it to nothing keeps glibc's allocator.
  """
  if not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ:
    return
  try:
    package = importlib.metadata.distribution("cmeel-mimalloc")
  except importlib.metadata.PackageNotFoundError:
    return
  library = str(package.locate_file("cmeel.prefix/lib/libmimalloc.so"))
  keep_freed_memory = {"MIMALLOC_PURGE_DELAY": "-1"}
  env = os.environ | {"LD_PRELOAD": library} | keep_freed_memory
  os.execve(sys.executable, sys.orig_argv, env)

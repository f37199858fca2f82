"""Library of the decode kernel: compiled once, kept in the user's cache.

Its name holds a hash of all that it depends on, and one of its own bytes: a
half-written file, or one of another processor or version, is never loaded.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import tempfile

import jax
import numpy as np
from absl import logging

SOURCES = pathlib.Path(__file__).parent
COMPILERS = "g++", "clang++"
FLAGS = "-O3 -std=c++17 -shared -fPIC -fno-math-errno".split()
TIME_LIMIT = 120  # seconds of a compiler
_X86 = "x86_64", "AMD64", "i386", "i686"


class Unavailable(Exception):
  """Reason, in a sentence, why there is no kernel for this."""


@functools.cache
def shared_library() -> ctypes.CDLL:
  """Returns the library, from the cache or newly built.

  Raises:
    Unavailable: no compiler builds it.
  """
  reasons = []
  for compiler in _compilers():
    try:
      return _load_or_build(compiler)
    except (Unavailable, OSError) as reason:
      reasons.append(str(reason))
  raise Unavailable("; ".join(reasons) or "there is no C++ compiler")


def _compilers() -> list[list[str]]:
  """Returns the commands of compilers: $CXX alone, or those that are there."""
  if given := os.environ.get("CXX", "").split():
    return [given]
  return [[path] for name in COMPILERS if (path := shutil.which(name))]


def cache_folder() -> pathlib.Path:
  """Returns the folder of libraries: that of programs, or one in ~/.cache."""
  programs = jax.config.jax_compilation_cache_dir
  if programs and "://" not in programs:
    return pathlib.Path(programs) / "native"
  caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return pathlib.Path(caches, "dsv3_jax", "native")


def _load_or_build(compiler: list[str]) -> ctypes.CDLL:
  folder, key = cache_folder(), _key(compiler)
  for path in sorted(folder.glob(f"decode-{key}-*.so")):
    try:
      _validate(path)
      return _load(path)
    except (Unavailable, OSError) as reason:
      logging.warning("%s: %s; it is built again", path, reason)
  with tempfile.TemporaryDirectory(prefix="dsv3_jax_") as temporary:
    built = pathlib.Path(temporary) / "decode.so"
    _compile(compiler, built)
    library = _load(built)
    try:
      _keep(built, folder, key)
    except OSError as error:
      logging.warning("the decode kernel is not kept for later: %s", error)
    return library


def _key(compiler: list[str]) -> str:
  """Returns a hash of sources, flags, compiler, jaxlib and processor."""
  version = _run([*compiler, "--version"])
  parts = [version, *compiler, *FLAGS, importlib.metadata.version("jaxlib")]
  parts += [platform.system(), platform.machine(), _processor()]
  digest = hashlib.sha256("\n".join(parts).encode())
  for path in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cc"))):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def _processor() -> str:
  """Returns model and instructions of the processor, where Linux tells them."""
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    fields = "model", "flags", "Features", "CPU part"
    return "\n".join(sorted({x for x in lines if x.startswith(fields)}))
  return platform.processor()


def _run(command: list[str]) -> str:
  """Runs a compiler; returns what it prints.

  Raises:
    Unavailable: it cannot be started, fails, or takes too long.
  """
  name = command[0]
  with tempfile.TemporaryFile("w+", errors="replace") as output:
    try:
      compiler = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
    except OSError as error:
      raise Unavailable(f"{name} cannot be run: {error.strerror}") from None
    try:
      code = compiler.wait(TIME_LIMIT)
    except BaseException as error:
      os.killpg(compiler.pid, signal.SIGKILL)  # also what it has started
      compiler.wait()
      if isinstance(error, subprocess.TimeoutExpired):
        limit = f"{name} took more than {TIME_LIMIT} s"
        raise Unavailable(limit) from None
      raise
    output.seek(0)
    text = output.read()
  if code:
    lines = text.splitlines() or [f"it ended with exit code {code}"]
    first = next((line for line in lines if "error" in line), lines[0])
    raise Unavailable(f"{name}: {first.strip()}")
  return text


def _compile(compiler: list[str], to: pathlib.Path) -> None:
  x86 = platform.machine() in _X86
  tune = "-march=native" if x86 else "-mcpu=native"
  include = f"-I{jax.ffi.include_dir()}"
  source = str(SOURCES / "decode.cc")
  _run([*compiler, *FLAGS, tune, include, source, "-o", str(to)])
  if not to.exists():
    raise Unavailable(f"{compiler[0]} ended without a library")


def _digest(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _validate(path: pathlib.Path) -> None:
  """Raises Unavailable if a library is not whole, or not this user's own."""
  if path.stat().st_uid != os.getuid():
    raise Unavailable("the library is another user's")
  if not path.stem.endswith(_digest(path)):
    raise Unavailable("the library is damaged")


def _keep(built: pathlib.Path, folder: pathlib.Path, key: str) -> None:
  """Puts a library into the folder; others see all of it or nothing."""
  folder.mkdir(parents=True, exist_ok=True)
  beside = tempfile.NamedTemporaryFile(dir=folder, delete=False)
  try:
    with beside:
      beside.write(built.read_bytes())
    os.replace(beside.name, folder / f"decode-{key}-{_digest(built)}.so")
  except OSError:
    os.unlink(beside.name)
    raise


def _load(path: pathlib.Path) -> ctypes.CDLL:
  """Loads a library, and tries it with small products.

  Raises:
    Unavailable: it is not a library of this machine, or its numbers are wrong.
  """
  try:
    library = ctypes.CDLL(str(path))
    products = library.dsv3_products
  except (OSError, AttributeError) as error:
    raise Unavailable(f"the library cannot be loaded: {error}") from None
  for m in (1, 3, 13):
    n, k = 70, 37
    # Whole numbers, whose sums are exact in any order.
    x, w = (np.arange(r * c) % 7 - 3.0 for r, c in ((m, k), (k, n)))
    x, w = (a.astype(np.float32) for a in (x.reshape(m, k), w.reshape(k, n)))
    v, y, z = np.ascontiguousarray(w.T), *np.empty((2, m, n), np.float32)
    pointers = (ctypes.c_void_p(a.ctypes.data) for a in (x, w, v, y, z))
    products(*pointers, *map(ctypes.c_int64, (m, n, k)))
    if not (np.array_equal(y, x @ w) and np.array_equal(z, x @ w)):
      raise Unavailable("the library computes wrong products")
  return library

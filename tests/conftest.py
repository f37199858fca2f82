"""Tests run on 16 virtual CPU devices, with implicit broadcasts refused."""

import atexit
import ctypes
import gc
import os
import shutil
import sys
import tempfile
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time is compilation. Less optimised code, with no MLIR for
# fusions, is compiled in a third of it; `XLA_FLAGS= pytest` tests what users
# run.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)

# Threads to spare for devices that wait for each other, see
# `dsv3_jax/trainer/distributed.py`.
os.environ.setdefault("NPROC", "48")

# What one process of a session has compiled, its workers and the programs that
# tests start read. No entry outlives the session: none is of another CPU.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  cache = tempfile.mkdtemp(prefix="jax_cache_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A tenth of the time of tracing is garbage collection of what stays.
gc.set_threshold(50_000, 20, 50)

pytest_plugins = ["fault_table"]


def pytest_collection_finish():
  """Collections pass over what imports have made, which stays."""
  gc.collect()
  gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def programs_in_this_process():
  """A program that a test calls does not decide how this process ends."""
  with mock.patch("dsv3_jax.trainer.compilation.exit_at_once"):
    yield


@pytest.fixture(autouse=True, scope="module")
def clear_caches(request):
  """Frees what a module has compiled or cached, which no other one uses."""
  yield
  for value in list(vars(request.module).values()):
    members = vars(value).values() if isinstance(value, type) else ()
    for cached in (value, *members):
      clear = getattr(getattr(cached, "__func__", cached), "cache_clear", None)
      if clear is not None:
        clear()
  jax.clear_caches()
  gc.collect()
  if sys.platform.startswith("linux"):  # glibc keeps what was freed
    ctypes.CDLL(None).malloc_trim(0)

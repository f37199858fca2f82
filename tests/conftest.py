"""Tests run on 16 virtual CPU devices, with implicit broadcasts refused."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time is compilation. Less optimised code is compiled in half of
# it; `XLA_FLAGS= pytest` tests what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Threads to spare for devices that wait for each other, see
# `dsv3_jax/trainer/distributed.py`.
os.environ.setdefault("NPROC", "48")

import jax

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_numpy_rank_promotion", "raise")

pytest_plugins = ["fault_table"]

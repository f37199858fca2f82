"""Parallelism over devices: mesh, sharding, expert dispatch and pipelines."""

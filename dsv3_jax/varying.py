"""Helpers that make code valid inside and outside `jax.shard_map`.

Inside a `shard_map` the type of an array says along which mesh axes its value
may differ between devices: the axes it varies over. Outside it varies over
none, and each of these functions returns its argument.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp


def varying(x: jax.Array) -> frozenset[str]:
  """Mesh axes that x varies over."""
  return jax.typeof(x).mat.varying


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
  """Casts x to vary over the axes too; its gradient is summed over them.

  The sum is in float32, whatever the type.
  """
  new = tuple(axis for axis in axes if axis not in varying(x))
  if not new:
    return x
  return jax.lax.pcast(_widened(x), new, to="varying").astype(x.dtype)


def _widened(x: jax.Array) -> jax.Array:
  """x, in float32 if it is bfloat16."""
  return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def same_varying(*trees: Any) -> tuple[Any, ...]:
  """Casts arrays of trees to vary over all axes that any of them varies over.

  A `custom_vjp` needs it: its gradients have the types of its arguments.
  """
  axes = sorted(frozenset().union(*map(varying, jax.tree.leaves(trees))))
  return jax.tree.map(lambda x: vary(x, axes), trees)


def data_dependent_on(x: jax.Array, done: jax.Array) -> jax.Array:
  """x with a data dependency on `done`, a count >= 0, so that XLA keeps order.

  XLA on CPU may start a collective while a loop with collectives still runs,
  unless one depends on the other; devices then confuse the two.
  """
  return jnp.where(done < 0, jnp.zeros_like(x), x)


def psum_if_varying(x: jax.Array, axis: str) -> jax.Array:
  """Sums x over a mesh axis that it varies over, in float32; else returns x."""
  if axis not in varying(x):
    return x
  return jax.lax.psum(_widened(x), axis).astype(x.dtype)

"""What lets one source run alone, on one device, and inside `jax.shard_map`.

Inside a `shard_map` the type of an array says along which mesh axes its value
may differ between devices. Where nothing is sharded nothing differs, and each
of these functions returns its argument.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp


def varying(x: jax.Array) -> frozenset[str]:
  """Mesh axes along which x may differ."""
  return jax.typeof(x).mat.varying


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
  """x, said to differ along the axes too; its gradient is summed over them."""
  new = tuple(axis for axis in axes if axis not in varying(x))
  return jax.lax.pcast(x, new, to="varying") if new else x


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays, said to differ wherever one of them does.

  A `custom_vjp` needs it: its gradients have the types of its arguments.
  """
  axes = frozenset().union(*map(varying, arrays))
  return tuple(vary(x, sorted(axes)) for x in arrays)


def after(x: jax.Array, done: jax.Array) -> jax.Array:
  """x, not before `done` is there, a count whose sign XLA can't tell.

  XLA's runtime on CPU starts a collective while a loop that communicates, too,
  still runs, unless one needs the other; devices then take one for the other.
  """
  return jnp.where(done < 0, jnp.zeros_like(x), x)


def total(x: jax.Array, axis: str) -> jax.Array:
  """The sum over a mesh axis of what differs along it, else x itself."""
  return jax.lax.psum(x, axis) if axis in varying(x) else x

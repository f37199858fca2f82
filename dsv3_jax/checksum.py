"""Checksums of arrays that do not depend on how an array is sharded."""

import jax
import jax.numpy as jnp
import numpy as np


def compute(a: jax.Array) -> jax.Array:
  """Returns a checksum [2] u32 of the array's bits; see `with_finite`."""
  return with_finite(a)[0]


def with_finite(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns a checksum [2] u32 of the bits, and if all is finite, [] bool.

  Sums, modulo 2^32, a hash of each element's value and index: devices can add
  the sums of their shards in any order. A change of one element always changes
  the checksum, since the hash is one-to-one in the value; any other change goes
  unnoticed with probability 2^-64.

  Raises:
    ValueError: elements are larger than 4 bytes.
  """
  if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
    a = jax.random.key_data(a)
  if a.dtype.itemsize > 4:
    raise ValueError(
      f"arrays of {a.dtype} have no checksum: elements have 4 bytes at most"
    )
  is_float = jnp.issubdtype(a.dtype, jnp.floating)
  finite = jnp.isfinite(a) if is_float else jnp.ones_like(a, bool)
  bits = jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")
  bits = bits.astype(jnp.uint32)
  first = _mix(bits + _indices(bits) * np.uint32(0x9E3779B1))
  second = _mix(first ^ np.uint32(0x5BD1E995))
  # One reduction of all: ten times as fast on a CPU as several, and compiled in
  # half the time.
  *sums, finite = jax.lax.reduce(
    (first, second, finite),
    (np.uint32(0), np.uint32(0), np.True_),
    lambda x, y: (x[0] + y[0], x[1] + y[1], x[2] & y[2]),
    range(bits.ndim),
  )
  return jnp.stack(sums), finite


def to_hex(checksum: np.ndarray) -> str:
  """Formats a checksum [2] as sixteen hexadecimal digits."""
  return "".join(f"{word:08x}" for word in np.asarray(checksum).tolist())


def _mix(x: jax.Array) -> jax.Array:
  """Hashes u32 one-to-one; every bit of x changes every bit of the result."""
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    x = (x ^ (x >> shift)) * np.uint32(factor)
  return x ^ (x >> 16)


def _indices(a: jax.Array) -> jax.Array:
  """Returns the row-major index of each element, modulo 2^32."""
  index, stride = jnp.zeros_like(a), 1
  for dim in reversed(range(a.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, a.shape, dim)
    index += along * np.uint32(stride % 2**32)
    stride *= a.shape[dim]
  return index

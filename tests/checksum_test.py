"""Tests of checksums of arrays."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dsv3_jax import checksum
from dsv3_jax.parallel import device_mesh

MASK = 0xFFFFFFFF


def mixed(x):
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    x = (x ^ (x >> shift)) * factor & MASK
  return x ^ (x >> 16)


def expected(array):
  """The same in Python's integers."""
  kind = f"u{array.dtype.itemsize}"
  sums = [0, 0]
  for index, bits in enumerate(array.ravel().view(kind).tolist()):
    first = mixed((bits + index * 0x9E3779B1) & MASK)
    for i, h in enumerate((first, mixed(first ^ 0x5BD1E995))):
      sums[i] = (sums[i] + h) & MASK
  return sums


@pytest.mark.fault("F15")
class DigestTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16", "int32", "uint8", "uint32")
  def test_is_what_its_definition_says(self, dtype):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 4, 5), scale=50).astype("float32")
    a = np.asarray(jnp.abs(a).astype(dtype))
    result = jax.jit(checksum.compute)(a)
    self.assertEqual(result.tolist(), expected(a))
    self.assertEqual(
      checksum.to_hex(result), "".join(f"{part:08x}" for part in expected(a))
    )

  @parameterized.product(
    dtype=("float32", "bfloat16", "float8_e4m3fn", "int32", "uint8"),
    bad=(None, "nan", "inf"),
  )
  def test_of_an_array_on_the_host(self, dtype, bad):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 4, 5), scale=50).astype("float32")
    if bad:
      a[1, 2, 3] = bad
    with np.errstate(invalid="ignore"):
      a = np.asarray(a.astype(jnp.dtype(dtype)).swapaxes(0, 2))
    with mock.patch.object(checksum, "_CHUNK", 7):
      sums, finite = checksum.of_host(a)
    self.assertEqual((sums.tolist(), sums.dtype), (expected(a), np.uint32))
    self.assertEqual(finite, checksum.with_finite(jnp.asarray(a))[1])
    is_float = dtype.startswith(("float", "bfloat"))
    self.assertEqual(finite, not (bad and is_float))

  def test_elements_are_not_too_large_on_the_host(self):
    with self.assertRaisesRegex(ValueError, "int64 have no checksum"):
      checksum.of_host(np.arange(3))

  @parameterized.parameters((), (0,), (1,), (2, 0, 3))
  def test_of_scalars_and_of_nothing(self, *shape):
    a = np.full(shape, 7, np.int32)
    self.assertEqual(checksum.compute(jnp.asarray(a)).tolist(), expected(a))
    self.assertEqual(checksum.of_host(a)[0].tolist(), expected(a))

  def test_does_not_depend_on_where_the_parts_are(self):
    mesh = device_mesh.make_mesh({"data": 2, "expert": 4})
    a = jax.random.normal(jax.random.key(0), (8, 6, 4))
    unsharded = checksum.compute(a).tolist()
    for spec in (("data",), (None, "data"), ("expert", None, "data"), ()):
      placed = jax.device_put(a, jax.NamedSharding(mesh, jax.P(*spec)))
      self.assertEqual(jax.jit(checksum.compute)(placed).tolist(), unsharded)

  def test_every_bit_counts(self):
    a = np.zeros(3, np.float32)
    seen = {tuple(checksum.compute(jnp.asarray(a)).tolist())}
    for byte in range(12):
      for bit in range(8):
        raw = bytearray(a.tobytes())
        raw[byte] ^= 1 << bit
        other = np.frombuffer(bytes(raw), np.float32)
        seen.add(tuple(checksum.compute(jnp.asarray(other)).tolist()))
    self.assertLen(seen, 1 + 96)

  def test_two_signs_do_not_cancel(self):
    a = np.ones(64, np.float32)
    unsharded = checksum.compute(jnp.asarray(a)).tolist()
    for i in range(1, 64):
      other = a.copy()
      other[[0, i]] *= -1
      self.assertNotEqual(
        checksum.compute(jnp.asarray(other)).tolist(), unsharded
      )

  def test_a_key_is_its_data(self):
    key = jax.random.key(3)
    data = jax.random.key_data(key)
    self.assertEqual(
      checksum.compute(key).tolist(), checksum.compute(data).tolist()
    )

  def test_wide_types_are_refused(self):
    with self.assertRaisesRegex(ValueError, "complex64 .* 4 bytes at most"):
      checksum.compute(jnp.zeros(2, jnp.complex64))


if __name__ == "__main__":
  absltest.main()

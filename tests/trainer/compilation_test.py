"""A program compiled in a thread is found by calls; a cache may be missing."""

import contextlib
import io
import os
import pathlib
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.trainer import compilation

NAMES = "jax_enable_compilation_cache", "jax_compilation_cache_dir"


class StartTest(absltest.TestCase):
  def test_a_call_finds_the_program(self):
    traced = []

    @jax.jit
    def double(a):
      traced.append(threading.current_thread())
      return 2 * a

    compilation.start(double, jax.ShapeDtypeStruct((3,), jnp.float32)).join()
    self.assertEqual(double(jnp.ones(3)).tolist(), [2, 2, 2])
    self.assertLen(traced, 1)
    self.assertNotEqual(traced[0], threading.current_thread())
    self.assertFalse(compilation.is_running())

  def test_an_error_is_left_to_the_call(self):
    def wrong(_):
      raise KeyError("wrong")

    step = jax.jit(wrong)
    compilation.start(step, jax.ShapeDtypeStruct((), jnp.float32)).join()
    with self.assertRaises(KeyError):
      step(1.0)

  def test_says_that_it_is_running(self):
    ready = threading.Event()
    slow = mock.Mock()
    slow.trace.side_effect = lambda: ready.wait()
    thread = compilation.start(slow)
    self.assertTrue(compilation.is_running())
    ready.set()
    thread.join()
    self.assertFalse(compilation.is_running())


class CacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    for name in (
      *NAMES,
      "jax_compilation_cache_max_size",
      "jax_persistent_cache_min_compile_time_secs",
    ):
      self.addCleanup(jax.config.update, name, getattr(jax.config, name))

  def test_is_the_users_unless_the_environment_names_another(self):
    environ = {"XDG_CACHE_HOME": str(self.folder)}
    with mock.patch.dict(os.environ, environ):
      os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
      path = pathlib.Path(compilation.default_cache())
      self.assertEqual(path.parent, self.folder / "dsv3_jax")
      os.environ["JAX_COMPILATION_CACHE_DIR"] = "/other"
      self.assertEqual(compilation.default_cache(), "/other")

  def test_is_made(self):
    folder = self.folder / "a" / "b"
    compilation.use_cache(str(folder))
    self.assertTrue(folder.is_dir())
    self.assertEqual(jax.config.jax_compilation_cache_dir, str(folder))

  def test_is_off_without_a_folder(self):
    compilation.use_cache("")
    self.assertFalse(jax.config.jax_enable_compilation_cache)

  def test_a_folder_that_cannot_be_made_is_a_warning(self):
    (self.folder / "file").touch()
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
      compilation.use_cache(str(self.folder / "file" / "cache"))
    self.assertRegex(
      stderr.getvalue(), "^warning: --compile_cache=.*: .* are not kept\n$"
    )
    self.assertFalse(jax.config.jax_enable_compilation_cache)


if __name__ == "__main__":
  absltest.main()

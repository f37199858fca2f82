"""Tests of building the decode kernel: compilers and folders of any kind."""

import os
import pathlib
import shutil
import subprocess
import sys
import time
from unittest import mock

import jax
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.infer.native import build

ROOT = pathlib.Path(__file__).parents[2]
# In place of a compiler: what it does after it has told its version.
COMPILERS = {
  "broken": ("echo 'cc1plus: internal error' >&2; exit 1", "internal error"),
  "silent": ("exit 3", "exit code 3"),
  "too old": (
    "echo \"error: unrecognized option '-std=c++17'\"; exit 1",
    "unrecognized option '-std=c\\+\\+17'",
  ),
  "hanging": ("sleep 60 & wait", "took more than 0.3 s"),
  "idle": ("exit 0", "ended without a library"),
  "odd": (
    'while [ "$1" != -o ]; do shift; done; echo text > "$2"',
    "cannot be loaded",
  ),
}
VERSION = '#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; exit; fi\n'


def compiler(folder, body):
  path = folder / "compiler"
  path.write_text(VERSION + body)
  path.chmod(0o755)
  return str(path)


def build_with(command):
  build.shared_library.cache_clear()
  with mock.patch.dict(os.environ, {"CXX": command}):
    try:
      return build.shared_library.__wrapped__()
    finally:
      build.shared_library.cache_clear()


class CompilerTest(parameterized.TestCase):
  @parameterized.named_parameters((name, name) for name in COMPILERS)
  def test_one_that_fails_is_a_reason(self, name):
    folder = testing.folder(self)
    body, reason = COMPILERS[name]
    path, began = compiler(folder, body), time.monotonic()
    with mock.patch.object(build, "TIME_LIMIT", 0.3):
      with self.assertRaisesRegex(build.Unavailable, reason):
        build_with(path)
    self.assertLess(time.monotonic() - began, 30)

  def test_one_that_is_not_there_is_a_reason(self):
    with self.assertRaisesRegex(build.Unavailable, "No such file"):
      build_with("/nowhere/g++")

  def test_no_room_for_temporary_files_is_a_reason(self):
    full = OSError("No space left on device")
    with (
      mock.patch.object(build.tempfile, "TemporaryFile", side_effect=full),
      self.assertRaisesRegex(build.Unavailable, "No space left on device"),
    ):
      build_with("g++")

  def test_none_is_a_reason(self):
    with (
      mock.patch.object(build, "COMPILERS", ()),
      mock.patch.dict(os.environ, {"CXX": ""}),
      self.assertRaisesRegex(build.Unavailable, "there is no C\\+\\+ compiler"),
    ):
      build.shared_library.__wrapped__()


class CacheTest(parameterized.TestCase):
  """A stand-in for the library, so that nothing is compiled."""

  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    self.cache = self.folder / "cache"
    self.compiled = []
    self.loaded = []

    def compiled(command, to):
      self.compiled.append(command)
      to.write_bytes(b"library")

    def load(path):
      self.loaded.append(path)
      if path.read_bytes() != b"library":
        raise build.Unavailable("it cannot be loaded")
      return path.read_bytes()

    for name, value in (
      ("_compile", compiled),
      ("_load", load),
      ("_run", lambda command: "1.0"),
      ("cache_folder", lambda: self.cache),
    ):
      self.enter_context(mock.patch.object(build, name, value))

  def build(self):
    return build._load_or_build(["g++"])

  def test_is_compiled_once(self):
    self.assertEqual([self.build() for _ in range(3)], [b"library"] * 3)
    self.assertLen(self.compiled, 1)
    self.assertLen(list(self.cache.iterdir()), 1)

  @parameterized.parameters("_processor", "_run")
  def test_another_processor_or_version_builds_its_own(self, name):
    self.build()
    with mock.patch.object(build, name, lambda *_: "2.0"):
      self.build()
    self.assertLen(self.compiled, 2)
    self.assertLen(list(self.cache.iterdir()), 2)

  def test_half_a_library_is_never_loaded(self):
    self.build()
    (kept,) = self.cache.iterdir()
    kept.write_bytes(b"libr")
    self.loaded.clear()
    with self.assertLogs(level="WARNING") as logs:
      self.assertEqual(self.build(), b"library")
    self.assertIn("the library is damaged", logs.output[0])
    self.assertNotIn(kept, self.loaded[:1])
    self.assertEqual(kept.read_bytes(), b"library")

  def test_one_of_another_user_is_never_loaded(self):
    self.build()
    with (
      mock.patch.object(os, "getuid", lambda: 12345),
      self.assertLogs(level="WARNING") as logs,
    ):
      self.build()
    self.assertIn("another user's", logs.output[0])
    self.assertLen(self.compiled, 2)

  def test_one_that_cannot_be_loaded_is_built_again(self):
    self.build()
    (kept,) = self.cache.iterdir()
    kept.write_bytes(b"other")
    digest = build._digest(kept)
    kept.rename(kept.with_stem(kept.stem[: -len(digest)] + digest))
    with self.assertLogs(level="WARNING") as logs:
      self.assertEqual(self.build(), b"library")
    self.assertIn("it is built again", logs.output[0])

  def test_a_folder_that_cannot_be_written_keeps_nothing(self):
    self.cache.write_text("a file")
    with self.assertLogs(level="WARNING") as logs:
      self.assertEqual(self.build(), b"library")
    self.assertIn("is not kept for later", logs.output[0])

  def test_a_full_disk_keeps_nothing(self):
    full = OSError(28, "No space left on device")
    with (
      mock.patch.object(os, "replace", side_effect=full),
      self.assertLogs(level="WARNING") as logs,
    ):
      self.assertEqual(self.build(), b"library")
    self.assertIn("No space left on device", logs.output[0])
    self.assertEmpty(list(self.cache.iterdir()))


class FolderTest(absltest.TestCase):
  def test_is_beside_compiled_programs_or_the_users(self):
    with mock.patch.object(build.jax, "config") as jax_config:
      jax_config.jax_compilation_cache_dir = "/tmp/programs"
      self.assertEqual(str(build.cache_folder()), "/tmp/programs/native")
      for elsewhere in (None, "gs://bucket/programs"):
        jax_config.jax_compilation_cache_dir = elsewhere
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": "/tmp/own"}):
          self.assertEqual(
            str(build.cache_folder()), "/tmp/own/dsv3_jax/native"
          )


# Loads the library and says where from.
PROGRAM = "from dsv3_jax.infer.native import build; build.shared_library()"


@pytest.mark.slow
class ProcessesTest(absltest.TestCase):
  def start(self, folder, **env):
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder)} | env
    return subprocess.Popen(
      [sys.executable, "-c", PROGRAM],
      cwd=ROOT,
      env=env,
      stderr=subprocess.PIPE,
      text=True,
    )

  def test_two_may_build_at_once(self):
    folder = testing.folder(self)
    for process in [self.start(folder) for _ in range(2)]:
      _, errors = process.communicate(timeout=300)
      self.assertEqual(process.returncode, 0, errors)
    kept = list((folder / "native").iterdir())
    self.assertContainsSubset({".so"}, {path.suffix for path in kept})
    # A third finds it without a compiler that works.
    began = time.monotonic()
    process = self.start(folder)
    _, errors = process.communicate(timeout=300)
    self.assertEqual(process.returncode, 0, errors)
    self.assertLess(time.monotonic() - began, 60)
    self.assertEqual(list((folder / "native").iterdir()), kept)

  def test_one_that_is_ended_leaves_nothing_that_others_load(self):
    folder = testing.folder(self)
    process = self.start(folder)
    time.sleep(3)
    process.terminate()
    process.communicate(timeout=60)
    kept = list(folder.glob("native/decode-*"))
    process = self.start(folder)
    _, errors = process.communicate(timeout=300)
    self.assertEqual(process.returncode, 0, errors)
    self.assertContainsSubset(kept, list(folder.glob("native/decode-*")))


@pytest.mark.slow
class SanitizerTest(parameterized.TestCase):
  """The kernel under sanitizers, with a pool of threads in place of XLA's."""

  @parameterized.parameters("address,undefined", "thread")
  def test_finds_nothing(self, sanitizers):
    program = testing.folder(self) / "program"
    flags = f"-O1 -g -march=native -std=c++17 -fsanitize={sanitizers}".split()
    source = ROOT / "tests" / "infer" / "native_main.cc"
    includes = [f"-I{build.SOURCES}", f"-I{jax.ffi.include_dir()}"]
    subprocess.run(
      [
        shutil.which("g++"),
        *flags,
        "-fno-sanitize-recover=all",
        "-DMAX_THREADS=8L",
        *includes,
        source,
        "-o",
        program,
        "-lpthread",
      ],
      check=True,
    )
    done = subprocess.run(
      [program], capture_output=True, text=True, timeout=300
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(done.stdout, "same\n")


if __name__ == "__main__":
  absltest.main()

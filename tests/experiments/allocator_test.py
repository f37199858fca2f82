"""Tests of settings of the memory allocator."""

import os
import subprocess
import sys
import unittest
from unittest import mock

from absl.testing import absltest

from experiments import allocator

PROGRAM = 'print("libmimalloc" in open("/proc/self/maps").read())'


@unittest.skipUnless(sys.platform.startswith("linux"), "Linux alone preloads")
class MimallocTest(absltest.TestCase):
  def test_the_program_has_the_allocator(self):
    with mock.patch.dict(os.environ):
      os.environ.pop("LD_PRELOAD", None)
      env = os.environ | allocator.mimalloc(keep_freed=True)
    done = subprocess.run(
      [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True
    )
    self.assertEqual((done.stdout, done.stderr), ("True\n", ""))

  def test_leaves_a_preload_alone(self):
    with mock.patch.dict(os.environ, LD_PRELOAD=""):
      self.assertEqual(allocator.mimalloc(keep_freed=True), {})

  def test_is_empty_without_the_package(self):
    missing = allocator.importlib.metadata.PackageNotFoundError
    find = mock.patch.object(
      allocator.importlib.metadata, "distribution", side_effect=missing
    )
    with find, mock.patch.dict(os.environ, clear=True):
      self.assertEqual(allocator.mimalloc(keep_freed=True), {})


if __name__ == "__main__":
  absltest.main()

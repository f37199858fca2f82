import os
import subprocess
import sys
import unittest
from unittest import mock

from absl.testing import absltest

from experiments import allocator

PROGRAM = """
import sys
from experiments import allocator
print("start")
sys.stdout.flush()
allocator.use_mimalloc()
print(sys.argv[1], "libmimalloc" in open("/proc/self/maps").read())
"""


def _run(**env):
  """Runs the program without a preloaded library; returns its output."""
  inherited = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
  command = [sys.executable, "-c", PROGRAM, "--flag=a b"]
  done = subprocess.run(
    command, env=inherited | env, capture_output=True, text=True, check=True
  )
  return done.stdout.splitlines()


@unittest.skipUnless(sys.platform.startswith("linux"), "Linux alone preloads")
class UseMimallocTest(absltest.TestCase):
  def test_starts_once_more_with_the_same_arguments(self):
    self.assertEqual(_run(), ["start", "start", "--flag=a b True"])

  def test_leaves_a_preload_alone(self):
    self.assertEqual(_run(LD_PRELOAD=""), ["start", "--flag=a b False"])

  def test_does_nothing_without_the_package(self):
    missing = allocator.importlib.metadata.PackageNotFoundError
    find = mock.patch.object(
      allocator.importlib.metadata, "distribution", side_effect=missing
    )
    with find, mock.patch.dict(os.environ, clear=True):
      allocator.use_mimalloc()  # or this test would never end


if __name__ == "__main__":
  absltest.main()

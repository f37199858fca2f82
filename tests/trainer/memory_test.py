"""Tests of comparing the state with the memory of devices and host."""

from unittest import mock

import testing
from absl.testing import absltest, parameterized

from dsv3_jax import train
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import Trainer, memory


class Accelerator:
  platform = "gpu"

  def __init__(self, limit):
    self._limit = limit

  def memory_stats(self):
    return {"bytes_limit": self._limit}


def problems(run, sizes, host, limit=None):
  """Lists problems on devices of the CPU, or on accelerators with a limit."""
  mesh = device_mesh.make_mesh(sizes)
  devices = [Accelerator(limit) for _ in mesh.local_devices]
  devices = devices if limit else mesh.local_devices
  with (
    mock.patch.object(memory, "host_bytes", lambda: host),
    mock.patch.dict(vars(mesh), local_devices=devices),
  ):
    return list(memory.validate(run, mesh))


class MemoryTest(parameterized.TestCase):
  def test_devices_of_a_processor_share_its_memory(self):
    run = testing.run("parallel.layout=replicated", "optim.ema_decay=0.9")
    mesh = device_mesh.make_mesh({"data": 2})
    state = train.abstract_state(run, mesh)
    average = memory.bytes_per_device(state.params)
    needed = 2 * memory.bytes_per_device(state) + average
    self.assertEmpty(problems(run, {"data": 2}, needed))
    (line,) = problems(run, {"data": 2}, needed - 1)
    self.assertIn("GiB of this machine's memory, which has 0.00 GiB", line)
    self.assertIn("what would fit: --mesh=data=2 with parallel.layout=", line)

  def test_the_peak_is_of_the_process_and_of_the_fullest_device(self):
    mib = 2**20
    peak = memory.peak_bytes()
    self.assertEqual(list(peak), ["host"])
    self.assertBetween(peak["host"], 100 * mib, 2**40)
    used = [{"peak_bytes_in_use": n} for n in (5, 7, 6)]
    devices = [mock.Mock(memory_stats=lambda s=s: s) for s in (*used, None)]
    with mock.patch.object(memory.jax, "local_devices", lambda: devices):
      self.assertEqual(memory.peak_bytes()["device"], 7)

  def test_more_devices_are_proposed(self):
    gib = 2**30
    first, second = problems(presets.V3_671B, {}, 32 * gib, 80 * gib)
    self.assertIn(
      "needs 5,086.04 GiB on each of 1 devices, which have 80.00 GiB", first
    )
    self.assertIn("--mesh=data=64 with parallel.layout=fsdp", first)
    self.assertIn("--variant=tiny or nano or small", first)
    self.assertIn("average needs 2,543.02 GiB", second)
    self.assertEmpty(problems(presets.TINY, {}, 32 * gib, 80 * gib))

  def test_is_refused_before_anything_is_read_or_written(self):
    folder = testing.folder(self) / "run"
    with self.assertRaisesRegex(InputError, "the state needs [0-9,.]+ GiB of"):
      Trainer(presets.V3_671B, folder).fit()
    self.assertFalse(folder.exists())


if __name__ == "__main__":
  absltest.main()

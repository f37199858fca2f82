"""Tests of steps traced, lowered and compiled for more devices than exist."""

import collections
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from absl.testing import absltest, parameterized

from dsv3_jax import config, train
from dsv3_jax.config import presets
from dsv3_jax.parallel import device_mesh

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30

# Runs a command; the last line it says is the most memory that it held.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""

COMPILE = """
import jax
from dsv3_jax import config, train
from dsv3_jax.config import presets
from dsv3_jax.parallel import device_mesh
jax.config.update("jax_num_cpu_devices", 64)
run = config.override(
    presets.V3_671B,
    "train.batch_size=512",
    "train.micro_batches=8",
    "train.first_batch_size=0",
    "schedule.ramp_until=0",
)
mesh = device_mesh.make_mesh({"node": 8, "expert": 8})
compiled = train.trace_step(run, mesh).lower().compile()
print(compiled.memory_analysis().argument_size_in_bytes)
"""

PIPELINE = """
import jax
from dsv3_jax import config, train
from dsv3_jax.parallel import device_mesh
from scripts import layout_matrix
jax.config.update("jax_num_cpu_devices", 64)
run = config.override(
    layout_matrix.DEEP,
    "n_layers=16",
    "train.tokens=51200",
    "train.batch_size=256",
    "train.micro_batches=64",
    "parallel.schedule=dualpipe",
)
mesh = device_mesh.make_mesh({"pipe": 16, "expert": 4})
train.trace_step(run, mesh).lower().compile()
"""


@dataclasses.dataclass(frozen=True)
class Ended:
  """Output, memory and time of a program."""

  out: str
  peak_bytes: int


def python(*arguments, timeout_s):
  """Runs a program at full optimisation, unlike the tests."""
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "",
  }
  env.pop("NPROC", None)
  done = subprocess.run(
    [sys.executable, "-c", MEASURE, sys.executable, *arguments],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=timeout_s,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  *lines, kib = done.stdout.splitlines()
  return Ended("\n".join(lines), int(kib) * 1024)


class AbstractTest(parameterized.TestCase):
  @parameterized.product(
    layout=("zero1", "fsdp"),
    sizes=({"data": 2, "expert": 4}, {"node": 2, "expert": 2, "model": 2}),
  )
  def test_the_state_is_that_of_a_real_mesh(self, layout, sizes):
    run = config.override(presets.SMALL, f"parallel.layout={layout}")
    abstract, real = (
      train.abstract_state(run, mesh)
      for mesh in (
        device_mesh.abstract_mesh(sizes),
        device_mesh.make_mesh(sizes),
      )
    )

    def facts(leaf):
      to = leaf.sharding
      return leaf.shape, leaf.dtype, to.spec, to.shard_shape(leaf.shape)

    self.assertEqual(jax.tree.map(facts, abstract), jax.tree.map(facts, real))

  def test_the_step_is_that_of_a_real_mesh(self):
    run = config.override(
      presets.SMALL, "train.scan_layers=true", "parallel.layout=zero1"
    )
    sizes = {"data": 2, "expert": 4}
    abstract, real = (
      train.trace_step(run, mesh)
      for mesh in (
        device_mesh.abstract_mesh(sizes),
        device_mesh.make_mesh(sizes),
      )
    )
    facts = lambda traced: [
      (a.shape, a.dtype, a.sharding.spec) for a in traced.jaxpr.out_avals
    ]
    self.assertEqual(facts(abstract), facts(real))
    sent = lambda lowered: collections.Counter(
      re.findall(
        r'"stablehlo\.(\w+)".* replica_groups = dense<(.*?)>', lowered.as_text()
      )
    )
    expected = sent(real.lower())
    self.assertLessEqual(
      {"all_gather", "reduce_scatter", "all_to_all"},
      {kind for kind, _ in expected},
    )
    self.assertEqual(
      sent(abstract.lower(lowering_platforms=("cpu",))), expected
    )


class FullSizeTest(parameterized.TestCase):
  def test_671b_lowers_for_2048_devices(self):
    # The report's own (section 3.2): 16 stages, 64 devices to an expert's
    # layer, two replicas, 120 micro-batches.
    self.check_671b(
      "--mesh=pipe=16,data=2,node=8,expert=8",
      "--set=parallel.schedule=dualpipe",
      "--set=train.first_batch_size=4096",
    )

  @pytest.mark.slow
  def test_671b_lowers_for_2048_devices_without_a_pipeline(self):
    self.check_671b(
      "--mesh=data=32,node=8,expert=8",
      "--set=train.batch_size=16384",
      "--set=train.micro_batches=8",
      "--set=train.first_batch_size=4096",
    )

  def check_671b(self, *layout):
    done = python(
      "-m",
      "experiments.pretrain",
      "--variant=v3_671b",
      "--dry_run",
      *layout,
      timeout_s=300,
    )
    self.assertIn("lowers for 2,048 devices", done.out)
    # 682.6e9 parameters, MTP included, of 8 bytes: a master weight and two
    # moments of bfloat16; over 2,048 devices, but for norm gains and the like.
    self.assertIn("2.48 GiB", done.out)
    self.assertLess(done.peak_bytes, 2 * GIB)

  @pytest.mark.slow
  def test_671b_compiles_for_64_devices(self):
    done = python("-c", COMPILE, timeout_s=500)
    # As above, over 64; and a batch.
    state = 682.6e9 * 8 / 64
    self.assertAlmostEqual(int(done.out) / state, 1, delta=0.01)
    print(f"{done.peak_bytes / GIB:.1f} GiB")

  @pytest.mark.slow
  def test_dualpipe_of_16_stages_and_64_micro_batches_compiles(self):
    python("-c", PIPELINE, timeout_s=300)


if __name__ == "__main__":
  absltest.main()

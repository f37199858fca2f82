"""Does a layout change the maths? Every way to divide a step, against none.

  python -m scripts.layout_matrix

Trains a small model for three steps on one device and on meshes of up to eight
virtual ones, and prints the largest relative difference of each quantity: the
loss, the worst gradient leaf, its global norm, the clipped update and the worst
parameter after the third step. Counts and bias are compared bit for bit.
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax import losses
from dsv3_jax import optim
from dsv3_jax import presets
from dsv3_jax import train
from dsv3_jax.parallel import topology
from experiments import cluster

STEPS = 3
RUN = config.override(
    presets.TINY,
    "vocab_size=256",
    "d_model=16",
    "n_layers=2",
    "dense_ffn_dim=32",
    "mla.n_heads=4",
    "mla.q_rank=8",
    "mla.kv_rank=8",
    "mla.nope_dim=4",
    "mla.rope_dim=4",
    "mla.v_dim=4",
    "moe.ffn_dim=8",
    "router.n_experts=16",
    "router.top_k=4",
    "router.n_groups=8",
    "router.top_groups=4",
    "init_std=0.2",
    "data.seq_len=8",
    "train.tokens=6400",
    "train.batch_size=16",
    "train.micro_batches=2",
    "train.scan_layers=true",
    "schedule.warmup_steps=2",
    "optim.clip_norm=0.1",
    # Adam divides by the size of a gradient: one that is all but 0 would turn
    # its rounding into a difference of the learning rate.
    "optim.eps=1e-3",
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A mesh, such as `data=2,expert=4`, and how it is used."""

  mesh: str
  layout: str = "zero1"
  dispatch: str = "auto"
  settings: tuple[str, ...] = ()

  @property
  def sizes(self) -> dict[str, int]:
    parts = (part.split("=") for part in self.mesh.split(","))
    return {axis: int(size) for axis, size in parts}

  @property
  def run(self) -> config.Run:
    return config.override(
        RUN,
        f"parallel.layout={self.layout}",
        f"parallel.dispatch={self.dispatch}",
        *self.settings,
    )


# One case or more for each axis, pair of axes, layout and dispatch; these run
# in the fast tests.
QUICK = (
    Case("data=2"),
    Case("model=2", "fsdp"),
    Case("expert=4", "zero1", "one_hop"),
    Case("node=2,expert=2", "zero1", "two_hop"),
    Case("data=2,expert=2", "fsdp", "gather", ("train.remat=block",)),
    Case("node=2,model=2", "replicated", "one_hop"),
)
CASES = (
    *QUICK,
    Case("data=1"),
    Case("data=4", "fsdp"),
    Case("data=8", "replicated"),
    Case("expert=2", "replicated", "gather"),
    Case("expert=8", "fsdp", "one_hop"),
    Case("node=2"),
    Case("node=4", "fsdp", "gather"),
    Case("model=4", "replicated"),
    Case("data=2,node=2", "fsdp"),
    Case("data=4,node=2", "zero1", "gather"),
    Case("data=2,expert=4", "zero1", "one_hop"),
    Case("data=4,expert=2", "replicated"),
    Case("data=2,model=2"),
    Case("data=4,model=2", "fsdp"),
    Case("node=2,expert=4", "fsdp", "two_hop"),
    Case("node=4,expert=2", "replicated", "two_hop"),
    Case("node=2,expert=2", "fsdp", "gather"),
    Case("node=2,expert=2", "replicated", "one_hop"),
    Case("expert=2,model=2", "fsdp"),
    Case("expert=4,model=2", "zero1", "gather"),
    Case("node=2,model=4", "fsdp", "one_hop"),
    Case("data=2,node=2,expert=2"),
    Case("data=2,node=2,expert=2", "fsdp", "two_hop", ("train.remat=block",)),
    Case("data=2,expert=2,model=2", "fsdp", "one_hop"),
    Case("node=2,expert=2,model=2", "zero1", "two_hop"),
)


@dataclasses.dataclass(frozen=True)
class Differences:
  """Largest differences of a case from one device, relative to the largest."""

  loss: float
  gradients: float
  norm: float
  update: float
  params: float
  counts_equal: bool  # expert counts and router bias, bit for bit


def _batch(step: int) -> losses.Batch:
  rng = np.random.default_rng(step)
  shape = (RUN.train.micro_batches, RUN.train.micro_batch_size)
  shape = (*shape, RUN.data.seq_len + 1)
  rows = rng.integers(RUN.model.vocab_size, size=shape, dtype=np.int32)
  return losses.batch(rows, RUN.model.vocab_size)


def _first_state() -> train.TrainState:
  state = train.init_state(RUN, jax.random.key(0))
  noise = np.random.default_rng(0).normal(size=state.router_bias.shape)
  return state.replace(router_bias=0.01 * noise.astype(np.float32))


def _train(run: config.Run, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
  """Three steps; what is to be compared, on the host."""
  state = _first_state()
  if mesh is not None:
    state = jax.device_put(state, train.shardings(run, mesh))
  gradients = jax.jit(functools.partial(train.gradients, run=run, mesh=mesh))
  update = jax.jit(functools.partial(train.update, run=run))
  clipped = jax.jit(lambda *args: optim.adamw(run.optim).update(*args)[0])
  seen = {"gradients": [], "update": [], "loss": [], "norm": [], "counts": []}
  for step in range(STEPS):
    batch = _batch(step)
    if mesh is not None:
      batch = train.place(batch, run.train.micro_batch_size, mesh)
    grads, terms, stats = gradients(state, batch)
    moved = clipped(grads, state.opt_state, state.params)
    state, metrics = update(state, grads, terms, stats)
    seen["gradients"].append(jax.device_get(grads))
    seen["update"].append(jax.device_get(moved))
    seen["loss"].append(jax.device_get(metrics["loss"]))
    seen["norm"].append(jax.device_get(metrics["grad_norm"]))
    seen["counts"] += jax.device_get([stats.load, state.router_bias])
  return seen | {"params": jax.device_get(state.params)}


@functools.cache
def _expected() -> dict[str, Any]:
  return _train(RUN, None)


def _worst(actual: Any, expected: Any) -> float:
  differences = jax.tree.map(
      lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()),
      actual,
      expected,
  )
  return max(jax.tree.leaves(differences))


def measure(case: Case) -> Differences:
  """How far a case is from one device."""
  expected, run = _expected(), case.run
  actual = _train(run, topology.mesh(case.sizes))
  names = ("loss", "gradients", "norm", "update", "params")
  same = map(np.array_equal, actual["counts"], expected["counts"])
  return Differences(
      **{name: _worst(actual[name], expected[name]) for name in names},
      counts_equal=all(same),
  )


def main() -> None:
  """Prints the matrix as it goes, in Markdown."""
  cluster.use_virtual_devices(8, spare_threads=True)
  names = [field.name for field in dataclasses.fields(Differences)]
  print("| mesh | layout | dispatch |", " | ".join(names), "|")
  print("|---" * (3 + len(names)) + "|")
  for case in CASES:
    values = dataclasses.astuple(measure(case))
    cells = [f"{v:.0e}" if isinstance(v, float) else str(v) for v in values]
    cells = [case.mesh, case.layout, case.dispatch, *cells]
    print("|", " | ".join(cells), "|")
    sys.stdout.flush()


if __name__ == "__main__":
  main()

"""Compares a training step in every layout with that of one device.

  python -m scripts.layout_matrix [--write]

Trains a small model for three steps on one device and on meshes of up to 16
virtual ones, and prints the largest relative difference of each quantity: the
loss, the worst gradient leaf, its global norm, the clipped update and the worst
parameter after the third step. Counts and bias are compared bit for bit, and so
are the copies of everything that several devices hold. `--write` writes the
table to docs/layouts.md.
"""

import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from dsv3_jax import config, optim, train
from dsv3_jax.config import presets
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.parallel import device_mesh, replica_check
from dsv3_jax.trainer import distributed

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "layouts.md"
STEPS = 3
# Adam divides by the size of a gradient: with a smaller eps, one that is all
# but 0 would turn its rounding into a difference of the learning rate.
_SETTINGS = """
  vocab_size=256 d_model=16 n_layers=2 dense_ffn_dim=32 init_std=0.2
  attention.n_heads=4 attention.q_rank=8 attention.kv_rank=8
  attention.nope_dim=4 attention.rope_dim=4 attention.v_dim=4
  moe.ffn_dim=8 router.n_experts=16 router.top_k=4
  router.n_groups=8 router.top_groups=4 data.seq_len=8 data.segment_mask=true
  train.tokens=6400 train.batch_size=16 train.micro_batches=2
  train.scan_layers=true schedule.warmup_until=0.04
  optim.clip_norm=0.1 optim.eps=1e-3
"""
RUN = config.override(presets.TINY, *_SETTINGS.split())
# For pipelines: a layer for each stage and micro-batches for all schedules.
# Larger weights multiply rounding from layer to layer, without a pipeline too.
_DEEP_SETTINGS = """
  n_layers=8 init_std=0.1
  train.tokens=25600 train.batch_size=64 train.micro_batches=16
"""
DEEP = config.override(RUN, *_DEEP_SETTINGS.split())


@dataclasses.dataclass(frozen=True)
class Case:
  """A mesh, such as `data=2,expert=4`, and how it is used."""

  mesh: str
  layout: str = "zero1"
  dispatch: str = "auto"
  settings: tuple[str, ...] = ()
  base: config.Run = RUN  # what it must equal on one device

  @property
  def sizes(self) -> dict[str, int]:
    parts = (part.split("=") for part in self.mesh.split(","))
    return {axis: int(size) for axis, size in parts}

  @property
  def run(self) -> config.Run:
    return config.override(
      self.base,
      f"parallel.layout={self.layout}",
      f"parallel.dispatch={self.dispatch}",
      *self.settings,
    )


def _pipeline(
  mesh: str, schedule: str, layout: str = "zero1", dispatch: str = "auto", *more
) -> Case:
  settings = f"parallel.schedule={schedule}", *more
  return Case(mesh, layout, dispatch, settings, DEEP)


# A mesh without pipeline and one with; these run in the fast tests.
QUICK = (Case("model=2", "fsdp"), _pipeline("pipe=4,expert=2", "dualpipe"))
CASES = (
  *QUICK,
  Case("node=2,expert=2", "zero1", "hierarchical_all_to_all"),
  Case("expert=4", "zero1", "all_to_all"),
  Case("data=2"),
  Case("node=2,model=2", "replicated", "all_to_all"),
  Case("data=2,expert=2", "fsdp", "allgather", ("train.remat=block",)),
  _pipeline("pipe=2", "1f1b", "replicated"),
  _pipeline("pipe=4", "zb1p"),
  _pipeline("pipe=2,data=2", "dualpipev", "zero1", "auto", "train.remat=block"),
  Case("data=1"),
  Case("data=4", "fsdp"),
  Case("data=8", "replicated"),
  Case("expert=2", "replicated", "allgather"),
  Case("expert=8", "fsdp", "all_to_all"),
  Case("node=2"),
  Case("node=4", "fsdp", "allgather"),
  Case("model=4", "replicated"),
  Case("data=2,node=2", "fsdp"),
  Case("data=4,node=2", "zero1", "allgather"),
  Case("data=2,expert=4", "zero1", "all_to_all"),
  Case("data=4,expert=2", "replicated"),
  Case("data=2,model=2"),
  Case("data=4,model=2", "fsdp"),
  Case("node=2,expert=4", "fsdp", "hierarchical_all_to_all"),
  Case("node=4,expert=2", "replicated", "hierarchical_all_to_all"),
  Case("node=2,expert=2", "fsdp", "allgather"),
  Case("node=2,expert=2", "replicated", "all_to_all"),
  Case("expert=2,model=2", "fsdp"),
  Case("expert=4,model=2", "zero1", "allgather"),
  Case("node=2,model=4", "fsdp", "all_to_all"),
  Case("data=2,node=2,expert=2"),
  Case(
    "data=2,node=2,expert=2",
    "fsdp",
    "hierarchical_all_to_all",
    ("train.remat=block",),
  ),
  Case("data=2,expert=2,model=2", "fsdp", "all_to_all"),
  Case("node=2,expert=2,model=2", "zero1", "hierarchical_all_to_all"),
  _pipeline("pipe=1", "1f1b"),
  _pipeline("pipe=4", "1f1b"),
  _pipeline("pipe=8", "1f1b"),
  _pipeline("pipe=2,expert=2", "1f1b"),
  _pipeline("pipe=4,expert=2", "1f1b"),
  _pipeline("pipe=8,expert=2", "1f1b"),
  _pipeline("pipe=2", "zb1p"),
  _pipeline("pipe=8", "zb1p"),
  _pipeline("pipe=2,expert=2", "zb1p"),
  _pipeline("pipe=4,expert=2", "zb1p", "replicated"),
  _pipeline("pipe=8,expert=2", "zb1p"),
  _pipeline("pipe=2", "dualpipe", "replicated"),
  _pipeline("pipe=4", "dualpipe"),
  _pipeline("pipe=8", "dualpipe"),
  _pipeline("pipe=2,expert=2", "dualpipe", "zero1", "allgather"),
  _pipeline("pipe=8,expert=2", "dualpipe"),
  _pipeline("pipe=2,node=2,expert=2", "dualpipe"),
  _pipeline(
    "pipe=2,data=2,expert=2", "dualpipe", "zero1", "auto", "train.remat=block"
  ),
  _pipeline("pipe=2,data=2,node=2", "dualpipe"),
  _pipeline("pipe=1", "dualpipev"),
  _pipeline("pipe=2", "dualpipev"),
  _pipeline("pipe=4", "dualpipev"),
  _pipeline("pipe=1,expert=2", "dualpipev"),
  _pipeline("pipe=2,expert=2", "dualpipev"),
  _pipeline("pipe=4,expert=2", "dualpipev"),
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
  diverged: str  # where devices hold different copies of the final state


def _batch(run: config.Run, step: int) -> Batch:
  rng = np.random.default_rng(step)
  sizes = run.train.micro_batches, run.train.micro_batch_size
  shape = *sizes, run.data.seq_len + 1
  rows = rng.integers(run.model.vocab_size, size=shape, dtype=np.int32)
  # Two documents in a row, then perhaps padding.
  position, second = np.arange(shape[-1]), rng.integers(2, 5, (*sizes, 1))
  end = rng.integers(second + 1, shape[-1] + 1)
  segments = np.where(position < end, 1 + (position >= second), 0)
  return make_batch(rows, segments, segment_mask=run.data.segment_mask)


def _first_state(run: config.Run) -> train.TrainState:
  state = train.init_state(run, jax.random.key(0))
  noise = np.random.default_rng(0).normal(size=state.router_bias.shape)
  return state.replace(router_bias=0.01 * noise.astype(np.float32))


def _train(run: config.Run, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
  """Three steps; what is to be compared, on the host."""
  state = _first_state(run)
  if mesh is not None:
    state = jax.device_put(state, train.shardings(run, mesh))
  gradients = jax.jit(functools.partial(train.gradients, run=run, mesh=mesh))

  @jax.jit
  def update(state, sums):
    moved, _ = optim.make(run).update(sums.grads, state.opt_state, state.params)
    return moved, *train.update(state, sums, run)

  seen = {"gradients": [], "update": [], "loss": [], "norm": [], "counts": []}
  for step in range(STEPS):
    batch = _batch(run, step)
    if mesh is not None:
      batch = device_mesh.make_global_batch(
        batch, run.train.micro_batch_size, mesh, dim=1
      )
    sums = gradients(state, batch)
    moved, state, metrics = update(state, sums)
    seen["gradients"].append(jax.device_get(sums.grads))
    seen["update"].append(jax.device_get(moved))
    seen["loss"].append(jax.device_get(metrics["loss"]))
    seen["norm"].append(jax.device_get(metrics["grad_norm"]))
    seen["counts"] += jax.device_get([sums.stats.load, state.router_bias])
  diverged = _diverged(state, mesh) if mesh is not None else ""
  params = jax.device_get(state.params)
  return seen | {"params": params, "diverged": diverged}


def _diverged(state: train.TrainState, mesh: jax.sharding.Mesh) -> str:
  try:
    replica_check.check_replicas(state, mesh)
  except replica_check.DivergedError as error:
    return str(error)
  return ""


@functools.cache
def _expected(run: config.Run) -> dict[str, Any]:
  return _train(run, None)


def _worst(actual: Any, expected: Any) -> float:
  differences = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), actual, expected
  )
  return max(jax.tree.leaves(differences))


def measure(case: Case) -> Differences:
  """Differences of a case to one device."""
  expected = _expected(case.base)
  actual = _train(case.run, device_mesh.make_mesh(case.sizes))
  names = ("loss", "gradients", "norm", "update", "params")
  same = map(np.array_equal, actual["counts"], expected["counts"])
  return Differences(
    **{name: _worst(actual[name], expected[name]) for name in names},
    counts_equal=all(same),
    diverged=actual["diverged"],
  )


INTRODUCTION = """# Layouts

Three optimizer steps in float32 on each mesh and on one device: the largest
relative difference of the loss, of any gradient leaf, of the global norm, of
the clipped update, and of any parameter after the third step. Counts of tokens
by expert and the router's bias are compared bit for bit, and so are the copies
that several devices hold. A sum of 128 tokens in another order is off by some
1e-6 of its terms. `python -m scripts.layout_matrix --write` writes this page.

"""
HEAD = (
  *"mesh layout dispatch loss gradients norm update parameters".split(),
  "counts, bias",
  "copies",
)


def markdown(cells: Iterable[str]) -> str:
  """A row of a table."""
  return f"| {' | '.join(cells)} |"


def names(case: Case) -> tuple[str, str, str]:
  """Cells of the table that name a case."""
  return case.mesh, ", ".join((case.layout, *case.settings)), case.dispatch


def _power(value: float) -> str:
  """Formats 3.4e-7 as 3e-7."""
  mantissa, _, exponent = f"{value:.0e}".partition("e")
  return f"{mantissa}e{int(exponent)}" if value else "0"


def row(case: Case, differences: Differences) -> str:
  """A row of the table, in Markdown."""
  *values, counts_equal, diverged = dataclasses.astuple(differences)
  equal = [counts_equal, not diverged]
  verdicts = ("equal" if same else "DIFFER" for same in equal)
  return markdown([*names(case), *map(_power, values), *verdicts])


def heading() -> list[str]:
  """The rows above those of the cases."""
  return [markdown(HEAD), markdown(["---"] * len(HEAD))]


def page(rows: Sequence[str]) -> str:
  """Text of docs/layouts.md."""
  return INTRODUCTION + "\n".join([*heading(), *rows]) + "\n"


def main(argv: Sequence[str]) -> int:
  """Prints the rows as they are measured; returns the exit code."""
  _, *arguments = argv
  if arguments == ["--help"]:
    print(__doc__)
    return 0
  if arguments not in ([], ["--write"]):
    wrong = " ".join(arguments)
    print(f"error: {wrong!r}: the only flag is --write", file=sys.stderr)
    return 2
  n_devices = max(math.prod(case.sizes.values()) for case in CASES)
  distributed.use_virtual_devices(n_devices, spare_threads=True)
  print(*heading(), sep="\n")
  rows = []
  for case in CASES:
    rows.append(row(case, measure(case)))
    print(rows[-1], flush=True)
  if arguments:
    PAGE.write_text(page(rows), encoding="utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

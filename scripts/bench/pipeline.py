"""Compares the time of pipelined steps with the prediction of the simulator.

  python -m scripts.bench.pipeline [--ranks=4] [--microbatches=8] [--ms=50]

Runs the executor on layers that sleep: they need no processor, so that all
ranks work at the same time on any machine, each on one thing at a time. Prints
a JSON object for each schedule: the measured seconds of a step, what the
lock-step form and the simulator predict, the ratio to 1f1b on the same layers.
"""

import dataclasses
import functools
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, train, varying
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.model import moe
from dsv3_jax.parallel import device_mesh
from dsv3_jax.parallel.pipeline import executor as executor_lib
from dsv3_jax.parallel.pipeline import schedules, simulate
from dsv3_jax.trainer import distributed
from experiments import cli
from experiments.flag_parser import flag
from scripts import layout_matrix

ROUNDS = 3

Event = tuple[int, str, int, int]  # rank, kind, layer, micro-batch


class Sleeper:
  """A layer that sleeps for F, for I and for W, and notes when it did.

  Its router bias holds the number of the layer, its input that of the
  micro-batch: see `inputs`.
  """

  def __init__(self, n_ranks: int, seconds: float):
    self.events: list[Event] = []
    self._seconds = seconds
    self._busy = [threading.Lock() for _ in range(n_ranks)]

  def _sleep(self, kind, rank, layer, x, *_):
    rank = int(np.asarray(rank))
    with self._busy[rank]:
      time.sleep(self._seconds)
      which = int(np.asarray(layer)), int(np.asarray(x).flat[0])
      self.events.append((rank, kind, *which))
    return np.zeros((), np.float32)

  def _call(self, kind: str, *args: jax.Array) -> jax.Array:
    """0, after a while."""
    zero = jax.pure_callback(
      functools.partial(self._sleep, kind),
      jax.ShapeDtypeStruct((), jnp.float32),
      jax.lax.axis_index("pipe"),
      *args,
    )
    return varying.vary(zero, sorted(varying.varying(args[-1])))

  def layer(self, p, constants, x, cfg, experts):
    """Stands in for an MoE layer; uses one of its weights."""
    del cfg, experts
    bias, *_ = constants

    @jax.custom_vjp
    def work(w, layer, x):
      del w
      return x + self._call("F", layer, x)

    def forward(w, layer, x):
      return work(w, layer, x), (w, layer, x)

    def backward(residuals, dy):
      w, layer, x = residuals
      dx = dy + self._call("I", layer, x, dy)
      dw = jnp.zeros_like(w) + self._call("W", layer, x, dy)
      return dw, jnp.zeros_like(layer), dx

    work.defvjp(forward, backward)
    zeros = jnp.zeros_like(bias[0])
    load = zeros.astype(jnp.int32)
    stats = moe.MoEStats(load=load, balance=zeros.sum(), sent=load[:2])
    return (work(p["ffn"]["router"], bias[0, 0], x), stats.balance), stats


def make_run(schedule: str, n_layers: int, n_micro: int) -> config.Run:
  """Layers of one kind, one sequence a micro-batch."""
  return config.override(
    layout_matrix.RUN,
    "mtp.depth=0",
    "n_dense_layers=0",
    f"n_layers={n_layers}",
    "data.seq_len=4",
    f"train.batch_size={n_micro}",
    f"train.micro_batches={n_micro}",
    f"parallel.schedule={schedule}",
  )


def inputs(
  run: config.Run, mesh: jax.sharding.Mesh
) -> tuple[train.TrainState, Batch]:
  """Micro-batch i holds tokens i, whose embeddings are i; layer i a bias i."""
  state = train.init_state(run, jax.random.key(0))

  def count(a):
    rows = np.arange(a.shape[0], dtype=np.float32)[:, None]
    return np.broadcast_to(rows, a.shape)

  state = state.replace(
    params=state.params | {"embed": count(state.params["embed"])},
    router_bias=count(state.router_bias),
  )
  state = jax.device_put(state, train.shardings(run, mesh))
  n_micro = run.train.micro_batches
  rows = np.arange(n_micro, dtype=np.int32)[:, None, None]
  rows = np.broadcast_to(rows, (n_micro, 1, run.data.seq_len + 1))
  batch = make_batch(np.ascontiguousarray(rows))
  n_rows = run.train.micro_batch_size
  return state, device_mesh.make_global_batch(batch, n_rows, mesh, dim=1)


def executor(
  run: config.Run, mesh: jax.sharding.Mesh, sleeper: Sleeper
) -> Callable[[], Any]:
  """Returns a function that runs a step of sleeping layers, without update."""
  state, batch = inputs(run, mesh)
  gradients = functools.partial(train.gradients, run=run, mesh=mesh)
  layers = executor_lib.LAYERS
  executor_lib.LAYERS = {"moe": sleeper.layer}
  try:
    compiled = jax.jit(gradients).lower(state, batch).compile()
  finally:
    executor_lib.LAYERS = layers
  return lambda: jax.block_until_ready(compiled(state, batch))


def measure(
  name: str, n_ranks: int, n_layers: int, n_micro: int, seconds: float
) -> dict[str, Any]:
  """A line of the output, but for the ratio."""
  mesh = device_mesh.make_mesh({"pipe": n_ranks})
  schedule = schedules.SCHEDULES[name](n_ranks, n_micro)
  sleeper = Sleeper(n_ranks, seconds)
  step = executor(make_run(name, n_layers, n_micro), mesh, sleeper)
  step()
  spent = []
  for _ in range(ROUNDS):
    began = time.monotonic()
    step()
    spent.append(time.monotonic() - began)
  unit = seconds * n_layers / schedule.n_stages  # of a stage
  # The layers of a pair run one after the other here.
  times = simulate.Times(F=unit, B=2 * unit, W=unit, FB=3 * unit)
  return {
    "schedule": name,
    "ranks": n_ranks,
    "microbatches": n_micro,
    "seconds": statistics.median(spent),
    "lockstep": simulate.lockstep_makespan(schedule, times),
    "simulated": simulate.simulate(schedule, times).makespan,
  }


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  ranks: int = flag(4, "pipeline ranks, even", low=1)
  microbatches: int = flag(
    8, "micro-batches of a step, even, two or more for each rank", low=1
  )
  ms: int = flag(50, "time that a layer sleeps for each of F, I and W", low=1)

  def validate(self) -> Iterator[str]:
    """Yields what is wrong with the flags."""
    yield from schedules.validate("dualpipe", self.ranks, self.microbatches)


def execute(args: Args) -> None:
  """Measures every schedule on the same layers and micro-batches."""
  n_ranks, n_micro = args.ranks, args.microbatches
  distributed.use_virtual_devices(n_ranks, spare_threads=True)
  baseline = None
  for name in schedules.SCHEDULES:
    # DualPipeV has two stages on a rank: as many stages, half of the ranks.
    of_name = n_ranks // 2 if name == "dualpipev" else n_ranks
    line = measure(name, of_name, 2 * n_ranks, n_micro, args.ms / 1e3)
    baseline = baseline or line["seconds"]
    line["to_1f1b"] = line["seconds"] / baseline
    print(json.dumps(line), flush=True)


def main() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)


if __name__ == "__main__":
  main()

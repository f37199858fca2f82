"""Cost of checksums and manifest in a save, next to Orbax alone, in turns.

  python -m scripts.bench.checkpoint [--variant=small] [--rounds=5]

Prints the seconds of each round and the ratio of the medians: `blocking`, until
training may go on, and `total`, until the checkpoint is finished.
"""

import dataclasses
import pathlib
import shutil
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsv3_jax import config, param_spec, train
from dsv3_jax.checkpoint import checkpointer, orbax_io
from dsv3_jax.config import presets
from dsv3_jax.parallel import device_mesh
from experiments import cli
from experiments.flag_parser import flag


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  variant: str = flag("small", "whose state", choices=list(presets.PRESETS))
  rounds: int = flag(5, "saves of each", low=1)


class _Plain:
  """Orbax alone, with the same arrays."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder / "plain"
    self._saver = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

  def save(self, state: train.TrainState) -> None:
    key = jax.random.key_data(state.key)
    leaves = param_spec.flatten_with_paths({"state": state.replace(key=key)})
    tree = ocp.args.PyTreeSave(orbax_io.orbax_keys(leaves))
    self._saver.save(self.folder / "0", args=tree)

  def wait(self) -> None:
    self._saver.wait_until_finished()


class _Ours:
  def __init__(self, folder: pathlib.Path):
    self.folder = folder / "ours"

  def save(self, state: train.TrainState) -> None:
    self._store = checkpointer.Checkpointer(self.folder, config.Checkpoint())
    self._store.save(state, {})

  def wait(self) -> None:
    self._store.wait()


def _moved(state: train.TrainState) -> train.TrainState:
  """The state with moments that are not zero, which would compress well."""
  rng = np.random.default_rng(0)

  def moved(a):
    if not np.issubdtype(a.dtype, np.floating):
      return a
    noise = rng.standard_normal(a.shape, np.float32)
    return jax.device_put(noise.astype(a.dtype), a.sharding)

  return state.replace(opt_state=jax.tree.map(moved, state.opt_state))


def execute(args: Args) -> None:
  """Measures and prints."""
  mesh = device_mesh.make_mesh({})
  state = _moved(train.make_state(presets.PRESETS[args.variant], mesh, 0))
  n_bytes = sum(a.nbytes for a in jax.tree.leaves(state.params))
  print(f"{args.variant}: parameters of {n_bytes / 1e6:,.0f} MB, and moments")
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root)
    savers = {"orbax alone": _Plain(folder), "ours": _Ours(folder)}
    seconds = {name: [] for name in savers}
    for i in range(args.rounds + 1):
      for name, saver in savers.items():
        began = time.perf_counter()
        saver.save(state)
        blocked = time.perf_counter() - began
        saver.wait()
        times = blocked, time.perf_counter() - began
        shutil.rmtree(saver.folder)
        if i:  # the first compiles
          seconds[name].append(times)
  medians = {name: np.median(times, axis=0) for name, times in seconds.items()}
  for name, times in seconds.items():
    rounds = ", ".join(f"{blocked:.2f}/{total:.2f}" for blocked, total in times)
    print(f"{name}: blocking/total s: {rounds}")
  ratio = medians["ours"] / medians["orbax alone"]
  print(f"ours: {ratio[0]:.2f} times as long blocking, {ratio[1]:.2f} in all")


if __name__ == "__main__":
  cli.run_script(execute, Args)

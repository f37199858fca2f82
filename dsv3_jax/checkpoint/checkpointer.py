"""Verified checkpoints: Orbax arrays with checksums; fallback to older steps.

Each step has a folder. Orbax writes the arrays under a temporary name; then a
manifest gets the checksum of every array and the caller's metadata; then the
folder gets its name, so that a folder with a name and a complete manifest is
finished. Checksums are of arrays in device memory, and are compared after the
arrays were read back into it: damage anywhere in between is detected.
"""

import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from dsv3_jax import checksum, config, param_spec, train
from dsv3_jax.checkpoint import manifest, orbax_io
from dsv3_jax.errors import InputError, NotFiniteError

DamagedError, MissingError = manifest.DamagedError, manifest.MissingError
SaveError = manifest.SaveError
T = TypeVar("T")

# Suffixes of folders that are no checkpoints: being written, being removed,
# quarantined as damaged, quarantined since runs from it failed.
_TEMPORARY, _REMOVED = ".orbax-checkpoint-tmp", ".removed"
CORRUPT, SUSPECT = ".corrupt", ".suspect"


class Checkpointer:
  """Saves, verifies and restores the checkpoints of a run."""

  def __init__(self, directory: pathlib.Path, cfg: config.Checkpoint):
    """Opens the folder of a run's checkpoints, and makes it if needed."""
    orbax_io.silence()
    self.directory = directory.absolute()
    self.directory.mkdir(parents=True, exist_ok=True)
    self._cfg = cfg
    self._saving: int | None = None  # step
    self._finish: Callable[[pathlib.Path], None] = lambda folder: None
    self._saver = ocp.AsyncCheckpointer(
      ocp.PyTreeCheckpointHandler(),
      async_options=ocp.options.AsyncOptions(
        post_finalization_callback=self._finalize
      ),
    )

  def folder(self, step: int) -> pathlib.Path:
    """Returns the folder of a step."""
    return self.directory / str(step)

  def steps(self) -> list[int]:
    """Lists finished steps with the files of their manifests, oldest first."""
    return [step for step, problem in self._check_all().items() if not problem]

  def problems(self) -> dict[int, str]:
    """Maps each damaged step to its problem."""
    return {
      step: problem for step, problem in self._check_all().items() if problem
    }

  def _check_all(self) -> dict[int, str]:
    """Maps each step, oldest first, to the problem of its manifest, or ""."""
    names = os.listdir(self.directory)
    steps = sorted(int(name) for name in names if _is_step(name))
    return {step: self._try_manifest(step)[1] for step in steps}

  def _try_manifest(self, step: int) -> tuple[manifest.Manifest | None, str]:
    """Reads the manifest of a step, or returns why that is impossible."""
    try:
      return manifest.read(self.folder(step)), ""
    except DamagedError as error:
      return None, str(error)

  def metadata(self, step: int) -> dict[str, Any]:
    """Reads the metadata of a step; all processes call it.

    Raises:
      DamagedError: it is damaged.
    """
    return self._manifest(step).metadata

  def _manifest(self, step: int) -> manifest.Manifest:
    """Reads the manifest of a step, if all processes can."""
    saved, problem = self._try_manifest(step)
    _agree(problem)
    return saved

  def save(
    self,
    state: train.TrainState,
    metadata: dict[str, Any],
    average: param_spec.Params | None = None,
  ) -> None:
    """Starts saving the state, and the parameters' average, under its step.

    Waits for the save before. All processes call it.

    Raises:
      SaveError: that one failed, or this one cannot begin.
      NotFiniteError: an array holds NaN or infinity, and nothing is saved.
    """
    self.wait()
    step = int(state.step)
    tree = {"state": _raw(state)}
    if average is not None:
      tree["average"] = {"params": average}
    leaves = param_spec.flatten_with_paths(tree)
    digests, finite = _start_digests(leaves)  # before the state is donated
    if wrong := _false(finite):
      raise NotFiniteError(
        f"checkpoint {self.folder(step)} is not saved, since numbers are not"
        f" finite: {wrong}"
      )
    types = _types(leaves)

    def finish(folder):
      arrays = {
        name: {"type": of, "digest": checksum.to_hex(digests[name])}
        for name, of in types.items()
      }
      manifest.write(folder, step, arrays, metadata)

    self._saving, self._finish = step, finish
    self._run(
      lambda: self._saver.save(
        self.folder(step), args=ocp.args.PyTreeSave(orbax_io.orbax_keys(leaves))
      )
    )

  def _finalize(self) -> None:
    """Writes the manifest, in process 0 before the folder gets its name.

    A thread of Orbax calls it.
    """
    (folder,) = self.directory.glob(f"{self._saving}{_TEMPORARY}*")
    self._finish(folder)

  def check(self) -> int | None:
    """Returns the step that was being saved, once it is; does not wait.

    Raises:
      SaveError: saving it failed.
    """
    if self._saving is None:
      return None
    self._run(self._saver.check_for_errors)
    if not self.folder(self._saving).exists():
      return None
    return self.wait()

  def wait(self) -> int | None:
    """Waits for the save that was started; returns its step, if any.

    Raises:
      SaveError: it failed.
    """
    if self._saving is None:
      return None
    self._run(self._saver.wait_until_finished)
    step, self._saving = self._saving, None
    self._remove_old()
    return step

  def _run(self, work: Callable[[], None]) -> None:
    """Runs a part of saving; if it fails, removes what was written."""
    if not (problem := orbax_io.first_error_line(work)):
      return
    step, self._saving = self._saving, None
    if jax.process_index() == 0:
      for left in self.directory.glob(f"{step}{_TEMPORARY}*"):
        _remove_unfinished(left)
    good = self.steps()
    raise SaveError(
      f"checkpoint {self.folder(step)} could not be saved: {problem}; the"
      f" newest good one is {good[-1] if good else 'none'}"
    )

  def _remove_old(self) -> None:
    if jax.process_index():
      return
    steps, every = self.steps(), self._cfg.keep_every
    for step in steps[: -self._cfg.keep]:
      if not (every and step % every == 0):
        _remove(self.folder(step))

  def close(self) -> None:
    """Waits for the save under way and ends the threads; never raises."""
    if problem := orbax_io.first_error_line(self._saver.close):
      logging.warning("%s: %s", self.directory, problem)

  def repair(self) -> list[str]:
    """Removes leftovers of a killed run; quarantines damaged checkpoints.

    Only the process that writes here may call it. Returns a line for each
    quarantined checkpoint.
    """
    for name in os.listdir(self.directory):
      if _TEMPORARY in name or name.endswith(_REMOVED):
        shutil.rmtree(self.directory / name, ignore_errors=True)
    return [
      f"{self.quarantine(step, CORRUPT)}: {problem}"
      for step, problem in self.problems().items()
    ]

  def quarantine(self, step: int, suffix: str) -> pathlib.Path:
    """Renames a checkpoint so that it is not read, and returns its new folder.

    The suffix is CORRUPT or SUSPECT. The last such folder of a step is kept.
    """
    folder = self.folder(step).with_suffix(suffix)
    if folder.exists():
      _remove(folder)
    self.folder(step).rename(folder)
    return folder

  def restore(self, step: int, like: train.TrainState) -> train.TrainState:
    """Restores the state of a step.

    `like` has its shapes, types and shardings, see `train.abstract_state`; the
    shardings may differ from those that the state was saved with.

    Raises:
      DamagedError: it is damaged.
      InputError: the architecture differs; names the arrays.
    """
    template = jax.tree.map(
      lambda s, to: s.update(sharding=to.sharding),
      jax.eval_shape(_raw, like),
      like,
    )
    state = self._restore(step, {"state": template})["state"]
    return state.replace(key=jax.random.wrap_key_data(state.key))

  def restore_parameters(
    self, step: int, like: train.TrainState, *, average: bool = False
  ) -> tuple[param_spec.Params, jax.Array]:
    """Restores only parameters, or their moving average, and router bias.

    Raises:
      DamagedError: it is damaged.
      InputError: it is of another architecture, or has no average.
    """
    params = {"params": like.params}
    parts = {"state": {"router_bias": like.router_bias}}
    if average:
      parts["average"] = params
    else:
      parts["state"] |= params
    found = self._restore(step, parts)
    params = found["average" if average else "state"]["params"]
    return params, found["state"]["router_bias"]

  def _restore(self, step: int, like: Any) -> Any:
    folder, saved = self.folder(step), self._manifest(step).arrays
    names = param_spec.flatten_with_paths(like)
    asked = {_group(name) for name in names}
    there = {k: v["type"] for k, v in saved.items() if _group(k) in asked}
    if changes := config.diff(there, _types(names)):
      raise InputError(
        f"{folder} is of another architecture (there -> here):\n"
        + "\n".join(f"  {line}" for line in changes)
      )
    found = self._read(folder, names, saved)
    return jax.tree.unflatten(jax.tree.structure(like), found.values())

  def verify(self, step: int) -> None:
    """Reads and verifies all arrays of a step, one by one, on one device.

    Raises:
      DamagedError: an array is not as it was saved; names it.
    """
    for _ in self.arrays(step):
      pass

  def arrays(self, step: int) -> Iterator[tuple[str, jax.Array]]:
    """Yields names and unsharded arrays of a step, on one device.

    Raises:
      DamagedError: one is not as it was saved.
    """
    folder, saved = self.folder(step), self._manifest(step).arrays
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for name, facts in saved.items():
      dtype, _, shape = facts["type"].rstrip("]").partition("[")
      like = jax.ShapeDtypeStruct(
        tuple(map(int, filter(None, shape.split(",")))), dtype, sharding=place
      )
      yield name, self._read(folder, {name: like}, saved)[name]

  def _read(
    self,
    folder: pathlib.Path,
    like: dict[str, jax.ShapeDtypeStruct],
    saved: dict[str, dict[str, Any]],
  ) -> dict[str, jax.Array]:
    """Reads arrays by name and compares their checksums."""
    arrays = {}
    problem = orbax_io.first_error_line(
      lambda: arrays.update(orbax_io.read(folder, like))
    )
    _agree(problem and f"{folder} cannot be read: {problem}")
    digests, finite = _start_digests(arrays)
    same = {
      name: checksum.to_hex(found) == saved[name]["digest"]
      for name, found in digests.items()
    }
    if wrong := _false(same):
      raise DamagedError(f"{folder} is damaged: not what was saved: {wrong}")
    if wrong := _false(finite):  # an earlier version saved it
      raise DamagedError(f"{folder} is of no use: not finite: {wrong}")
    return arrays

  def newest(
    self, load: Callable[[int], T], *, quarantine: bool
  ) -> tuple[int, T] | None:
    """Loads the newest step that is not damaged; all processes call it.

    With `quarantine`, as only the run itself may, quarantines damaged steps.

    Returns:
      The step and the result of `load`; None if there are no checkpoints.

    Raises:
      MissingError: there are checkpoints, and all are damaged.
    """
    steps, problems = self.steps(), list(self.problems().values())
    corrupt = sorted(self.directory.glob(f"*{CORRUPT}"))
    problems += [f"{folder}: was damaged, quarantined" for folder in corrupt]
    for step in reversed(_of_first(steps)):
      try:
        return step, load(step)
      except DamagedError as error:
        problems.append(str(error))
        logging.error("%s; trying the checkpoint before", error)
        if quarantine and jax.process_index() == 0:
          self.quarantine(step, CORRUPT)
    if problems:
      raise MissingError(
        f"{self.directory}: no checkpoint can be used:\n" + "\n".join(problems)
      )
    return None


def _is_step(name: str) -> bool:
  return name.isascii() and name.isdecimal() and name == str(int(name))


def _group(name: str) -> str:
  """Returns the group that is restored together, such as `state/params`."""
  return "/".join(name.split("/")[:2])


def _types(leaves: dict[str, Any]) -> dict[str, str]:
  return {name: orbax_io.dtype_and_shape(leaf) for name, leaf in leaves.items()}


def _remove(folder: pathlib.Path) -> None:
  """Removes a folder; renames it first, so that a kill leaves no torn one."""
  going = folder.with_name(folder.name + _REMOVED)
  shutil.rmtree(going, ignore_errors=True)
  folder.rename(going)
  shutil.rmtree(going, ignore_errors=True)


def _remove_unfinished(folder: pathlib.Path) -> None:
  """Removes the folder of a save that failed.

  Other writers of that save may still create files there for a moment; what is
  left after a second, `repair` removes.
  """
  for _ in range(20):
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
      return
    time.sleep(0.05)


def _agree(problem: str) -> None:
  """Raises DamagedError in all processes if there is a problem in one."""
  bad = np.int32(bool(problem))
  if jax.process_count() > 1:
    bad = multihost_utils.process_allgather(bad).any()
  if bad:
    raise DamagedError(problem or "another process cannot read it")


def _of_first(steps: Sequence[int]) -> list[int]:
  """Returns the list of process 0; others may see a folder later."""
  if jax.process_count() == 1:
    return list(steps)
  n = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
  own = np.resize(np.asarray(steps or [0], np.int32), n)
  return multihost_utils.broadcast_one_to_all(own).tolist()


def _false(checks: dict[str, Any]) -> str:
  """Returns the names of the checks that are false, or ""."""
  return ", ".join(name for name, ok in checks.items() if not ok)


def _start_digests(
  leaves: dict[str, jax.Array],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Computes checksums [2] of all leaves, and whether each is finite, []."""
  digests, finite = {}, {}
  for name, leaf in leaves.items():
    digests[name], finite[name] = _digest(leaf)
  return digests, finite


def _digest(leaf: jax.Array) -> tuple[Any, Any]:
  """Returns the checksum of a leaf; on a CPU it is there at once."""
  if leaf.is_fully_addressable and jax.default_backend() == "cpu":
    # A program for each shape would take seconds to compile.
    return checksum.of_host(np.asarray(leaf))
  on_device = leaf.sharding.with_memory_kind("device")
  return _compiled_digest(jax.device_put(leaf, on_device))  # may be on the host


# By leaf: a program for each shape, where one for all would take twice as long
# to compile.
_compiled_digest = jax.jit(checksum.with_finite)


def _raw(state: train.TrainState) -> train.TrainState:
  """Replaces the PRNG key by plain integers, which files can hold."""
  return state.replace(key=jax.random.key_data(state.key))

"""Moving average of the parameters in host memory (section 3.2.3).

It estimates early how good the model will be after the learning rate's decay.
Devices hold none of it and do not wait: a step's parameters are copied to the
host while the next step begins, and averaged there by a thread, in NumPy.
"""

import concurrent.futures
import functools

import jax
import numpy as np

from dsv3_jax import param_spec

BLOCK = 1 << 16  # numbers averaged at a time: they stay in a core's cache


def decay_at(step: int, decay: float) -> float:
  """Computes the weight of the average so far at a step >= 1.

  (1 + step) / (10 + step) until that reaches `decay`, so that the first
  parameters are soon forgotten.
  """
  return min(decay, (1 + step) / (10 + step))


def in_host_memory(a: jax.Array) -> jax.ShapeDtypeStruct:
  """Describes the array in the host memory of its devices."""
  to = a.sharding.with_memory_kind("pinned_host")
  return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to)


class Average:
  """Average of all parameters seen; each process holds its own slices."""

  def __init__(self, params: param_spec.Params, decay: float):
    """Starts from parameters, or from a saved average."""
    self._decay = decay
    leaves, self._structure = jax.tree.flatten(params)
    self._types = [in_host_memory(leaf) for leaf in leaves]
    self._slices = [
      {key: np.array(part, order="C") for key, part in _slices(leaf).items()}
      for leaf in leaves
    ]
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._job = None

  def update(
    self, step: int, params: param_spec.Params, finite: jax.Array
  ) -> None:
    """Starts to add the parameters after a step to the average.

    Waits for the update before, which bounds memory and raises its error, not
    for this one. The parameters may be donated right after. If `finite`, []
    bool, is false, nothing changes.
    """
    self._wait()
    # One copy of each slice, also if several devices hold it.
    slices = [_slices(leaf) for leaf in jax.tree.leaves(params)]
    in_host = jax.tree.map(
      lambda part: part.sharding.with_memory_kind("pinned_host"), slices
    )
    copies = jax.device_put(slices, in_host)
    decay = decay_at(step, self._decay)
    self._job = self._thread.submit(self._average, copies, finite, decay)

  def _average(self, copies, finite, decay):
    if not finite:
      return
    weight = np.float32(1 - decay)
    for slices, copy in zip(self._slices, copies, strict=True):
      for key, new in copy.items():
        _mix(slices[key], np.asarray(new), weight)

  def _wait(self) -> None:
    if self._job:
      self._job.result()

  def params(self) -> param_spec.Params:
    """Returns the average, sharded like the parameters, in host memory."""
    self._wait()
    arrays = []
    for like, slices in zip(self._types, self._slices, strict=True):
      # Copies: later updates must not change arrays that are being saved.
      copies = {key: part.copy() for key, part in slices.items()}
      get_slice = functools.partial(_slice_of, copies, like.shape)
      arrays.append(
        jax.make_array_from_callback(like.shape, like.sharding, get_slice)
      )
    return jax.tree.unflatten(self._structure, arrays)

  def close(self) -> None:
    """Ends the thread."""
    self._thread.shutdown()


def _mix(average: np.ndarray, new: np.ndarray, weight: np.float32) -> None:
  """average += weight * (new - average), in place."""
  # The average was made in rows, so that this is a view of it.
  average, new = average.reshape(-1), new.reshape(-1)
  for start in range(0, average.size, BLOCK):
    here = slice(start, start + BLOCK)
    difference = new[here] - average[here]
    difference *= weight
    average[here] += difference


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
  return tuple(i.indices(n) for i, n in zip(index, shape, strict=True))


def _slices(a: jax.Array) -> dict[tuple, jax.Array]:
  """Returns the slices of an array that this process holds, each once."""
  slices = {}
  for shard in a.addressable_shards:
    slices.setdefault(_key(shard.index, a.shape), shard.data)
  return slices


def _slice_of(slices, shape, index):
  return slices[_key(index, shape)]

"""Memory of a run's state, compared with what devices and host have."""

import itertools
import math
import resource
from collections.abc import Iterator

import jax

from dsv3_jax import config, train
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError
from dsv3_jax.parallel import device_mesh, layout_check
from dsv3_jax.plan.memory import bytes_per_device, device_bytes, gib, host_bytes

_MOST_DEVICES = 1 << 14  # of a mesh that is proposed


def peak_bytes() -> dict[str, int]:
  """Returns the most memory so far, of this process and of its fullest device.

  A processor's virtual devices have none of their own.
  """
  # Linux counts in KiB.
  peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  key = "peak_bytes_in_use"
  if used := [each[key] for each in stats if key in each]:
    peak["device"] = max(used)
  return peak


def validate(run: config.Run, mesh: jax.sharding.Mesh) -> Iterator[str]:
  """Yields a line where the state exceeds memory; allocates nothing.

  The state is master weights, optimizer moments and the parameters' average. A
  step needs more, which is not counted: what is refused here can never run.
  """
  devices = mesh.local_devices
  state = train.abstract_state(run, mesh)
  held, average, host = bytes_per_device(state), 0, host_bytes()
  if run.optim.ema_decay:  # each slice once
    full = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.params))
    average = min(bytes_per_device(state.params) * len(devices), full)
  if devices[0].platform == "cpu":  # virtual devices share the host's memory
    if (needed := held * len(devices) + average) > host:
      yield (
        f"the state needs {gib(needed)} of this machine's memory, which has"
        f" {gib(host)}; {_what_fits(run, mesh, host, 1)}"
      )
    return
  there = device_bytes(devices)
  if held > there:
    fits = _what_fits(run, mesh, there * len(devices), _MOST_DEVICES)
    yield (
      f"the state needs {gib(held)} on each of {mesh.size} devices, which have"
      f" {gib(there)}; {fits}"
    )
  if average > host:
    yield (
      f"optim.ema_decay={run.optim.ema_decay:g}: the average needs"
      f" {gib(average)} of this machine's memory, which has {gib(host)};"
      " optim.ema_decay=0 keeps none"
    )


def out_of_memory(
  run: config.Run, sizes: device_mesh.Sizes, error: BaseException
) -> str:
  """Describes an allocation that failed during training, and what needs less.

  `sizes` are those of the mesh. The settings change memory only, the last two
  also rounding.
  """
  batch, parts = run.train.batch_size, run.train.micro_batches
  fewer = (n for n in range(parts + 1, batch + 1) if batch % n == 0)
  remats = {
    "none": ("selective", "block"),
    "selective": ("block",),
    "block": (),
  }
  proposed = [
    *(f"train.micro_batches={n}" for n in itertools.islice(fewer, 1)),
    *(f"train.remat={remat}" for remat in remats[run.train.remat]),
    "train.scan_layers=true",
    *["parallel.layout=fsdp"] * (sizes.get("data", 1) > 1),
    "optim.moments=bfloat16",
    *["precision.recipe=bf16"] * (run.precision.recipe == "fp32"),
  ]
  useful = [text for text in proposed if _changes(run, text, sizes)]
  lines = str(error).splitlines() or [type(error).__name__]
  return (
    f"out of memory: {lines[0]}\na micro-batch is"
    f" {run.train.micro_batch_size} sequences of {run.data.seq_len} tokens, on"
    f" {math.prod(sizes.values())} devices. What needs less, in this order:"
    f" {' '.join(f'--set={text}' for text in useful)}, or a --mesh of more"
    " devices. A run with other settings than those of parallel begins in a new"
    " --workdir"
  )


def _changes(run: config.Run, text: str, sizes: device_mesh.Sizes) -> bool:
  """Returns whether a setting is another one, and allowed."""
  try:
    other = config.override(run, text)
  except InputError:
    return False
  return other != run and not layout_check.validate(other, sizes)


def _what_fits(
  run: config.Run, mesh: jax.sharding.Mesh, local: float, most: int
) -> str:
  """Describes a mesh or layout, and presets, whose state fits in memory.

  `local` is the memory of all devices of this process in bytes, `most` the
  largest factor of more devices.
  """
  per_device = local / len(mesh.local_devices)

  def fits(other: config.Run, sizes: device_mesh.Sizes) -> bool:
    if layout_check.validate(other, sizes):
      return False
    state = train.abstract_state(other, device_mesh.abstract_mesh(sizes))
    return bytes_per_device(state) <= per_device

  known = []
  for layout in ("zero1", "fsdp"):
    other = config.override(run, f"parallel.layout={layout}")
    factors = (2**i for i in range(most.bit_length()))
    meshes = ({**mesh.shape, "data": mesh.shape["data"] * n} for n in factors)
    if sizes := next((s for s in meshes if fits(other, s)), None):
      text = ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
      known.append(f"--mesh={text or 'data=1'} with parallel.layout={layout}")
  names = [
    name for name, one in presets.PRESETS.items() if fits(one, mesh.shape)
  ]
  if names:
    known.append(f"--variant={' or '.join(names)}")
  return f"what would fit: {'; '.join(known) or 'no preset'}"

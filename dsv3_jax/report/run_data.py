"""Reads a workdir for the report: rows, settings and figures of merit."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax import config, io
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError
from dsv3_jax.infer import eplb
from dsv3_jax.interop import open_run
from dsv3_jax.trainer import event_log, metrics_writer
from dsv3_jax.trainer import workdir as workdir_lib

NEEDLES = "needles.json"
# What a report reads of a workdir.
FILES = (
  metrics_writer.METRICS,
  event_log.FILE,
  open_run.CONFIG,
  workdir_lib.ENV,
  workdir_lib.SUMMARY,
  NEEDLES,
)
LAST = 0.1  # "at the end" is this share of the steps
# Of conversations, and of tasks in reinforcement learning; followed by / and
# the name of a task.
EXACT_MATCH, ACCURACY = "heldout_exact_match", "heldout_accuracy"
DOMAIN = "heldout_bpb/"  # before the name of a domain, in evaluation rows
LAST_LOADS = 0.25  # experts are placed for the loads of this share of them


@dataclasses.dataclass(frozen=True)
class Record:
  """The content of a workdir."""

  name: str
  steps: list[dict]  # rows of optimizer steps
  evals: list[dict]  # rows of evaluations
  config: dict[str, Any]  # flat: {"model.n_layers": 5}
  env: dict[str, Any]
  summary: dict[str, Any]
  needles: dict[str, Any]  # see experiments/context.py; empty without it
  events: list[dict]  # see dsv3_jax/trainer/event_log.py
  missing: tuple[str, ...]  # sentences
  run: config.Run | None = None  # `config` as a configuration, if it is one


@dataclasses.dataclass(frozen=True)
class ExpertBalance:
  """Load of serving devices with experts in order, and with EPLB."""

  n_devices: int
  n_experts: int
  # [routers] largest over mean load of the devices.
  in_order: np.ndarray  # all experts once
  placed: np.ndarray  # with as many replicas more as there are devices


def _read_object(path: pathlib.Path, missing: list[str]) -> dict[str, Any]:
  """Reads and flattens an object; returns {} and reports a missing one."""
  if not path.exists():
    missing.append(f"{path.name}: not written.")
    return {}
  try:
    return io.flatten(io.read_json_object(path))
  except InputError:
    missing.append(f"{path.name}: not valid JSON.")
    return {}


def read(workdir: str | os.PathLike) -> Record:
  """Reads everything that the report needs from a workdir.

  Raises:
    InputError: there is no training step in it.
  """
  workdir = pathlib.Path(workdir).absolute()
  path = workdir / metrics_writer.METRICS
  if not path.is_file():
    raise InputError(
      f"--workdir={workdir}: has no {metrics_writer.METRICS}; expected the"
      " workdir of a training run"
    )
  try:
    rows = metrics_writer.read(path)
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error}") from error
  steps = [row for row in rows if "loss" in row]
  if not steps:
    raise InputError(f"{path}: has no training step yet; try again later")
  missing, needles = [], workdir / NEEDLES
  settings = _read_object(workdir / open_run.CONFIG, missing)
  try:
    metadata = open_run.read_config(workdir)
    run = open_run.run_from_config(metadata)
  except InputError:  # of another version, or reported above
    run = None
  return Record(
    name=workdir.name,
    steps=steps,
    evals=[row for row in rows if "heldout_loss" in row],
    config=config.with_current_names(
      {k.removeprefix("settings."): v for k, v in settings.items()}
    ),
    env=_read_object(workdir / workdir_lib.ENV, missing),
    summary=_read_object(workdir / workdir_lib.SUMMARY, missing),
    needles=io.read_json_object(needles) if needles.is_file() else {},
    events=event_log.read(workdir),
    missing=tuple(missing),
    run=run,
  )


def domains(run: Record) -> list[str]:
  """Names of the domains that evaluations tell apart; none if it is one."""
  keys = {key for row in run.evals for key in row}
  return sorted(
    key.removeprefix(DOMAIN)
    for key in keys
    # `evaluate.ema` adds the averaged parameters under a name of their own.
    if key.startswith(DOMAIN) and key.removesuffix("_ema") not in keys - {key}
  )


def changes(run: Record) -> dict[str, Any] | None:
  """Preset's values of the settings that differ; None if that is unknown."""
  preset = presets.PRESETS.get(run.config.get("variant", ""))
  if preset is None or run.run is None:
    return None
  now, before = config.flatten(run.run), config.flatten(preset)
  missing = "(not there)"
  return {
    path: before.get(path, missing)
    for path, value in now.items()
    if before.get(path, missing) != value
  }


def column(rows: Sequence[dict], key: str) -> np.ndarray | None:
  """[rows] values of a key, NaN where a row has none; None if no row has."""
  values = [row.get(key) for row in rows]
  if all(value is None for value in values):
    return None
  return np.array(values, float)  # None becomes NaN


def match_key(run: Record) -> str:
  """Returns the name of the share of held-out answers that match."""
  return ACCURACY if run.config.get("grpo.prompts") else EXACT_MATCH


def nested(rows: Sequence[dict], key: str) -> tuple[list[int], np.ndarray]:
  """Returns indices of rows with a nested list, and the lists as one array."""
  at = [i for i, row in enumerate(rows) if row.get(key)]
  return at, np.array([rows[i][key] for i in at], float)


def tokens_at(run: Record, steps: Sequence[int]) -> np.ndarray:
  """Training tokens seen by the end of steps."""
  known = [0, *(row["step"] for row in run.steps)]
  seen = [0, *(row["tokens"] for row in run.steps)]
  return np.interp(steps, known, seen)


def router_names(run: Record, n: int) -> list[str]:
  """Names of the n routers: layers counted from 0, then the MTP modules."""
  depth = run.config.get("model.mtp.depth", 0)
  first = run.config.get("model.n_dense_layers")
  if first is None:
    return [f"router {i}" for i in range(n)]
  names = [f"layer {first + i}" for i in range(n - depth)]
  return names + [f"MTP {i + 1}" for i in range(depth)]


def final_violation(run: Record) -> dict[str, tuple[float, float]]:
  """(mean, highest) MaxVio over the last tenth of the steps, by router."""
  _, vio = nested(last_steps(run), "max_vio_per_layer")
  if not vio.size:
    return {}
  names = router_names(run, vio.shape[1])
  return {
    name: (float(np.nanmean(column)), float(np.nanmax(column)))
    for name, column in zip(names, vio.T, strict=True)
    if np.isfinite(column).any()
  }


def shares(run: Record) -> tuple[list[int], np.ndarray]:
  """Rows with expert loads, and those [rows, routers, experts], 1 if even."""
  at, load = nested(run.steps, "load")
  if not load.size:
    return at, load
  mean = load.mean(-1, keepdims=True)
  return at, np.divide(load, mean, np.full_like(load, np.nan), where=mean > 0)


def expert_balance(run: Record) -> ExpertBalance | None:
  """Balances the mean load at the end; None without experts to divide."""
  at, load = nested(run.steps, "load")
  if not load.size:
    return None
  mean = load[-max(1, round(LAST_LOADS * len(at))) :].mean(0)
  n_layers, n_experts = mean.shape
  if (n := _devices(n_experts)) < 2:
    return None
  in_order, placed = (
    eplb.imbalance(placement.loads(mean, n))
    for placement in (
      eplb.identity(n_layers, n_experts),
      eplb.balance_experts(mean, n_replicas=n_experts + n, n_devices=n),
    )
  )
  return ExpertBalance(n, n_experts, in_order, placed)


def _devices(n_experts: int) -> int:
  """The largest power of two that divides experts, with two each or more."""
  most = n_experts & -n_experts
  return most if most < n_experts else n_experts // 2


def baselines(run: Record) -> dict[str, float]:
  """Bits per byte that other compressors need for the held-out text."""
  known = {"bzip2 -9": "bzip2_bpb", "xz -9e": "xz_bpb"}
  return {
    name: run.summary[key]
    for name, key in known.items()
    if run.summary.get(key) is not None
  }


def last_steps(run: Record) -> list[dict]:
  """Rows of the last tenth of the steps, at least one."""
  return run.steps[-max(1, round(LAST * len(run.steps))) :]


def budget_steps(run: Record) -> int | None:
  """Steps in the token budget of the configuration."""
  keys = ("train.tokens", "train.batch_size", "data.seq_len")
  tokens, rows, length = map(run.config.get, keys)
  return tokens // (rows * length) if tokens and rows and length else None

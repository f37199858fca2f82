"""Workdir of a run that was never trained, with the course of a real one."""

import contextlib
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from dsv3_jax.trainer import event_log, metrics_writer, terminal

E, ROUTERS, STEPS, TOKENS = 16, 5, 488, 4096

SETTINGS = {
  "model.vocab_size": 2048,
  "model.n_layers": 5,
  "model.n_dense_layers": 1,
  "model.router.n_experts": E,
  "model.router.top_k": 4,
  "model.moe.n_shared": 1,
  "model.mtp.depth": 1,
  "data.seq_len": 256,
  "data.path": "",
  "train.tokens": 2_000_000,
  "train.batch_size": 16,
}

PROMPT = "In the morning, the fog"
COMMAND = (
  "python -m experiments.pretrain --variant=tiny --workdir=runs/a-long-name"
  " --set=train.batch_size=16 --set=train.tokens=2e6"
)
SAMPLE = """It was the evening of the day when the old lady came down to the
house, and said she would not be <b>a moment</b> longer & that was all.

“My dear,” said he, “you must be very tired.”"""


def step_row(rng: np.random.Generator, step: int, total: int) -> dict:
  """A row with the course that a real small run takes."""
  t = step / total
  main = 3.4 + 4.2 * np.exp(-9 * t) - 0.5 * t + rng.normal(0, 0.05)
  skew = 1.3 * np.exp(-8 * t) + 0.03 + 0.08 * np.sin(12 * t) ** 2
  tilt = np.sin(np.outer(np.arange(1, ROUTERS + 1), np.arange(E)))
  share = np.exp(skew * tilt) + rng.normal(0, 0.05, (ROUTERS, E))
  load = np.maximum(share, 0) / share.sum(-1, keepdims=True) * TOKENS * 4
  load = np.round(load).astype(int)
  vio = load.max(-1) / load.mean(-1) - 1
  row = {
    "step": step,
    "tokens": step * TOKENS,
    "loss": main * 1.3 + 0.3,
    "main_loss": main,
    "mtp_loss": main + 0.7 + rng.normal(0, 0.05),
    "balance_loss": 1e-4,
    "lr": 3e-3 * min(step / 30, 1) * (1 if t < 0.3 else 1.25 - 0.85 * t),
    "grad_norm": 0.4 + 3 * np.exp(-20 * t) + rng.gamma(2, 0.05),
    "tokens_per_s": 12_000 + rng.normal(0, 400) - 11_000 * (step == 1),
    "max_vio": vio.max(),
    "max_vio_per_layer": vio,
    "bias_speed": 1e-3 if t < 0.97 else 0.0,
    "mtp_weight": 0.3 if t < 0.5 else 0.1,
    "skipped_steps": int(t > 0.4),
  }
  return row | ({"load": load} if step % 4 == 1 or step == total else {})


def write(
  workdir: pathlib.Path,
  steps: int = STEPS,
  *,
  spikes: Mapping[int, float] = MappingProxyType({}),
  domains: Sequence[str] = (),
) -> None:
  """Writes a workdir like that of a finished run.

  Args:
    workdir: written to.
    steps: of the run, all evaluated that divide by 50.
    spikes: gradient norms that jump, by step.
    domains: of the held-out text.
  """
  rng = np.random.default_rng(0)
  workdir.mkdir(parents=True, exist_ok=True)
  lines = terminal.Terminal(workdir, io.StringIO())
  with (
    contextlib.closing(lines),
    metrics_writer.MetricsWriter(workdir, steps, lines=lines) as log,
  ):
    for step in range(1, steps + 1):
      row = step_row(rng, step, steps)
      row["grad_norm"] = spikes.get(step, row["grad_norm"])
      log.write(row)
      if step % 50 == 0 or step == steps:
        loss = row["main_loss"] + 0.1
        bits = loss / np.log(2) / 2.9
        log.write(
          {
            "step": step,
            "heldout_loss": loss,
            "heldout_bpb": bits,
            **{f"heldout_bpb/{d}": bits + i for i, d in enumerate(domains)},
            "sample_prompt": PROMPT,
            "sample": SAMPLE,
          }
        )
  config = {"variant": "tiny", "seed": 0, "settings": SETTINGS}
  env = {
    "command": COMMAND,
    "host": "node-17",
    "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
    "devices": ["cpu:0"],
    "python": "3.11.14",
    "git_revision": "0123abc",
  }
  summary = {
    "parameters": 5_012_352,
    "active_parameters": 2_345_472,
    "bzip2_bpb": 1.99,
    "xz_bpb": 2.21,
    "train_seconds": 251.3,
    "compile_seconds": 21.4,
  }
  peak = {"host": 3 << 30, "device": 70 << 30}
  seconds = dict.fromkeys(event_log.PHASES, 10.0)
  began = 1_796_000_000.0
  event_log.add(workdir, "start", step=0, began=began, seen_at=0.0, host="n")
  event_log.add(workdir, "end", code=0, seconds=seconds, peak_bytes=peak)
  for name, tree in (("config", config), ("env", env), ("summary", summary)):
    (workdir / f"{name}.json").write_text(json.dumps(tree))

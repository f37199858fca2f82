"""Results of a run, in words, in figures of merit and in tables."""

import collections
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsv3_jax.plan import flops
from dsv3_jax.report import axes, run_data
from dsv3_jax.trainer import event_log

# --- numbers and values as text ---


def seconds(s: float) -> str:
  """Formats 281 as 4 min 41 s."""
  if s < 60:
    return f"{s:.1f} s"
  minutes, rest = divmod(round(s), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def as_text(value: Any) -> str:
  """Formats a setting or a figure of any type."""
  if isinstance(value, bool) or value is None:
    return {True: "yes", False: "no", None: "none"}[value]
  if isinstance(value, int):
    return f"{value:,}"
  if isinstance(value, float):
    return f"{value:.6g}"
  if value == "":
    return "empty"
  if isinstance(value, list):
    unique = list(dict.fromkeys(map(as_text, value)))
    times = f"{len(value)} x " if len(unique) == 1 < len(value) else ""
    return times + ", ".join(unique)
  return str(value)


# --- figures of merit, in words and tables ---


@dataclasses.dataclass(frozen=True)
class Results:
  """Figures of merit; None where a run lacks them."""

  steps: int
  budget: int | None  # steps in the token budget
  tokens: int
  tokens_per_s: float | None
  loss: float | None  # of the main model, mean of the last tenth
  heldout_loss: float | None
  heldout_bpb: float | None
  exact_match: float | None  # share of held-out answers, of conversations
  worst: tuple[str, float] | None  # layer with the highest mean MaxVio


def results(run: run_data.Record) -> Results:
  """Computes the figures of merit of a run."""
  last = run_data.last_steps(run)
  loss = run_data.column(last, "main_loss")
  if loss is None:
    loss = run_data.column(last, "loss")
  rate = run_data.column(run.steps, "tokens_per_s")
  final = run.evals[-1] if run.evals else {}
  violation = run_data.final_violation(run)
  worst = max(violation, key=lambda name: violation[name][0], default=None)
  return Results(
    steps=run.steps[-1]["step"],
    budget=run_data.budget_steps(run),
    tokens=run.steps[-1]["tokens"],
    tokens_per_s=None if rate is None else float(np.nanmedian(rate)),
    loss=None if loss is None else float(np.nanmean(loss)),
    heldout_loss=final.get("heldout_loss"),
    heldout_bpb=final.get("heldout_bpb"),
    exact_match=final.get(run_data.match_key(run)),
    worst=None if worst is None else (worst, violation[worst][0]),
  )


def summary(run: run_data.Record, r: Results) -> str:
  """Describes model, training, quality and expert balance in a paragraph."""
  sizes = run.summary.get("parameters")
  active = run.summary.get("active_parameters")
  text = "A DeepSeek-V3 model"
  if sizes is not None:
    text += f" with {axes.count(sizes)} parameters"
    if active is not None:
      text += f", {axes.count(active)} of them active for a token,"
  text += f" read {axes.count(r.tokens)} tokens of text in {r.steps:,} steps"
  if "train_seconds" in run.summary:
    text += f" and {seconds(run.summary['train_seconds'])}"
  text += "."
  if r.budget and r.steps < r.budget:
    text += f" Its token budget is {r.budget:,} steps: training can continue."
  if r.heldout_bpb is not None:
    text += f" It needs {r.heldout_bpb:.2f} bits for a byte of text that it"
    text += " has never seen"
    for name, bits in run_data.baselines(run).items():
      text += f"; {name} needs {bits:.2f}"
    text += "."
  elif r.exact_match is not None:
    text += f" It answers {r.exact_match:.1%} of the held-out questions with"
    text += " exactly the text expected."
  else:
    text += " It has not been evaluated on held-out text."
  if r.worst:
    name, violation = r.worst
    text += " Over the last tenth of the steps, the busiest expert of the least"
    text += f" even layer ({name}) had on average {violation:.0%} more than its"
    text += " even share of the tokens."
  return text


def tiles(run: run_data.Record, r: Results) -> Iterator[tuple[str, str]]:
  """Yields (figure, caption) of the most important results."""
  if r.heldout_bpb is not None:
    yield f"{r.heldout_bpb:.3f}", "bits per byte of held-out text"
  if r.exact_match is not None:
    yield f"{r.exact_match:.1%}", "of held-out questions answered exactly"
  if r.loss is not None:
    yield f"{r.loss:.3f}", "training loss in nats per token, last tenth"
  if r.worst:
    yield f"{r.worst[1]:.2f}", "MaxVio of the least even layer, last tenth"
  if r.tokens_per_s is not None:
    yield f"{r.tokens_per_s:,.0f}", "training tokens per second (median)"


def table(run: run_data.Record, r: Results) -> dict[str, dict[str, Any]]:
  """Returns {group: {name: value}}, without the values that the run lacks."""
  c, s, baselines = run.config, run.summary, run_data.baselines(run).items()

  def size(key: str) -> str | None:
    return f"{axes.count(s[key])} ({s[key]:,})" if s.get(key) else None

  def time(key: str) -> str | None:
    return seconds(s[key]) if s.get(key) is not None else None

  groups = {
    "Model": {
      "Variant": c.get("variant"),
      "Parameters": size("parameters"),
      "Active for a token": size("active_parameters"),
      "Layers": _layers(c),
      "Experts": _experts(c),
      "Vocabulary": c.get("model.vocab_size"),
    },
    "Training": {
      "Steps": f"{r.steps:,}" + (f" of {r.budget:,}" if r.budget else ""),
      "Tokens": f"{axes.count(r.tokens)} ({r.tokens:,})",
      "Batch": _batch(c),
      "Time, training": time("train_seconds"),
      "Time, compiling": time("compile_seconds"),
      "Tokens per second (median)": _digits(r.tokens_per_s, 0),
      "Seed": c.get("seed"),
    },
    "Time of all starts": _time(run),
    f"Changed from the preset {c.get('variant')}": _changes(run),
    "Result": {
      "Training loss, last tenth (nats per token)": _digits(r.loss, 4),
      "Held-out loss (nats per token)": _digits(r.heldout_loss, 4),
      "Held-out bits per byte": _digits(r.heldout_bpb, 3),
      **_by_domain(run),
      **_answers(run),
      **{f"{name}, same bytes": _digits(b, 3) for name, b in baselines},
      "MaxVio of the least even layer, last tenth": (
        r.worst and f"{r.worst[1]:.3f} ({r.worst[0]})"
      ),
      "Steps skipped": run.steps[-1].get("skipped_steps"),
    },
    "Environment": {
      key.removeprefix("versions.").replace("_", " "): value
      for key, value in run.env.items()
      if key != "command"
    },
  }
  return {
    group: {k: v for k, v in values.items() if v is not None}
    for group, values in groups.items()
  }


def _by_domain(run: run_data.Record) -> dict[str, str | None]:
  """Returns the final bits per byte of each domain."""
  final = run.evals[-1] if run.evals else {}
  return {
    f"Held-out bits per byte, {name}": _digits(
      final.get(f"{run_data.DOMAIN}{name}"), 3
    )
    for name in run_data.domains(run)
  }


def _answers(run: run_data.Record) -> dict[str, str | None]:
  """Returns the final scores of held-out answers, and what was trained on."""
  final = run.evals[-1] if run.evals else {}
  names = {
    "heldout_prompt_loss": "Held-out loss of prompts (nats per token)",
    run_data.EXACT_MATCH: "Held-out answers that match exactly",
    "heldout_lenient": "Held-out answers, lenient score",
  }
  rows = {
    f"{name}{key.removeprefix(start).replace('/', ', ')}": _digits(value, 4)
    for start, name in names.items()
    for key, value in final.items()
    if key == start or key.startswith(f"{start}/")
  }
  share = run_data.column(run.steps, "supervised_share")
  if share is not None:
    mean = float(np.nanmean(share))
    rows["Supervised share of tokens"] = _digits(mean, 3)
  return rows


def _changes(run: run_data.Record) -> dict[str, str]:
  """Returns the settings that differ from the preset, with its values."""
  changes = run_data.changes(run)
  if changes is None:
    return {}
  if not changes:
    return {"Settings": "all as in the preset"}
  return {
    path: f"{as_text(run.config.get(path))} (preset: {as_text(before)})"
    for path, before in changes.items()
  }


def _time(run: run_data.Record) -> dict[str, Any]:
  """Returns the wall time of all starts by what it was spent on."""
  spent = event_log.goodput(run.events)
  total = sum(spent.values())
  if not total:
    return {}
  starts = [event for event in run.events if event["event"] == "start"]
  return {
    "Starts": len(starts),
    **{
      name.capitalize(): f"{seconds(s)} ({s / total:.1%})"
      for name, s in spent.items()
      if s
    },
  }


# --- the head of the page ---


def head(run: run_data.Record, r: Results) -> dict[str, str]:
  """Returns {name: value} of when and where a run was made, and how fast."""
  starts = [event for event in run.events if event["event"] == "start"]
  began = starts[0]["time"] if starts else run.env.get("time")
  host = run.env.get("host") or (starts[-1].get("host") if starts else None)
  jax_version = run.env.get("jax") or run.env.get("versions.jax")
  facts = {
    "Started": _date(began),
    "Host": host,
    "Devices": _devices(run.env.get("devices")),
    "JAX": jax_version,
    "Tokens per second": _digits(r.tokens_per_s, 0),
    **_model_flops(run, r),
    "Peak memory": _peak_memory(run.events),
    "Goodput": _goodput(run.events),
  }
  return {name: str(value) for name, value in facts.items() if value}


def _date(seconds_since_1970: float | None) -> str | None:
  if seconds_since_1970 is None:
    return None
  return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds_since_1970))


def _devices(kinds: list[str] | None) -> str | None:
  if not kinds:
    return None
  counts = collections.Counter(kinds)
  return ", ".join(f"{n} x {kind}" for kind, n in counts.items())


def _model_flops(run: run_data.Record, r: Results) -> dict[str, str]:
  """Returns MFU, or the FLOP/s themselves for devices of unknown peak."""
  if run.run is None or r.tokens_per_s is None:
    return {}
  length = run.run.data.seq_len
  per_token = flops.train_flops(run.run.model, length) / length
  achieved = per_token * r.tokens_per_s
  peaks = [flops.peak_flops(kind) for kind in run.env.get("devices") or [""]]
  text = f"{achieved / 1e9:,.1f} GFLOP/s"
  if achieved >= 1e12:
    text = f"{achieved / 1e12:,.1f} TFLOP/s"
  if None in peaks:
    return {"Model FLOP/s": text}
  return {"MFU": f"{achieved / sum(peaks):.1%} of the BF16 peak, {text}"}


def _peak_memory(events: list[dict]) -> str | None:
  """Formats the peak of the newest start that has noted one."""
  peaks = [event["peak_bytes"] for event in events if "peak_bytes" in event]
  if not peaks:
    return None
  names = {"device": "device", "host": "host"}
  return ", ".join(
    f"{peaks[-1][key] / 2**30:.3g} GiB {name}"
    for key, name in names.items()
    if key in peaks[-1]
  )


def _goodput(events: list[dict]) -> str | None:
  spent = event_log.goodput(events)
  total = sum(spent.values())
  if not total:
    return None
  return f"{spent['training'] / total:.0%} of {seconds(total)} in training"


def _digits(value: float | None, digits: int) -> str | None:
  return None if value is None else f"{value:,.{digits}f}"


def _layers(c: dict[str, Any]) -> str | None:
  n, dense = c.get("model.n_layers"), c.get("model.n_dense_layers")
  if n is None or dense is None:
    return None
  depth = c.get("model.mtp.depth", 0)
  modules = f", and {depth} for MTP" if depth else ""
  return f"{n}, of which {dense} dense{modules}"


def _experts(c: dict[str, Any]) -> str | None:
  names = ("router.n_experts", "router.top_k", "moe.n_shared")
  n, top, shared = (c.get(f"model.{name}") for name in names)
  if n is None or top is None:
    return None
  always = f", and {shared} shared" if shared else ""
  return f"{n} in a layer, {top} chosen for a token{always}"


def _batch(c: dict[str, Any]) -> str | None:
  rows, length = c.get("train.batch_size"), c.get("data.seq_len")
  if rows is None or length is None:
    return None
  return f"{rows:,} sequences of {length:,} tokens"

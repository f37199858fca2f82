"""The page of a report: report.html, one file with its pictures inside."""

import base64
import dataclasses
import html
import os
import pathlib
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsv3_jax import io
from dsv3_jax.report import pictures, plots, render, run_data
from dsv3_jax.trainer import event_log, terminal

TEMPLATE = pathlib.Path(__file__).with_name("page.html")
SAMPLES = 6  # most samples of text that are shown

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
    worst=None if worst is None else (worst, violation[worst][0]),
  )


def _summary(run: run_data.Record, r: Results) -> str:
  """Describes model, training, quality and expert balance in a paragraph."""
  sizes = run.summary.get("parameters")
  active = run.summary.get("active_parameters")
  text = "A DeepSeek-V3 model"
  if sizes is not None:
    text += f" with {plots.count(sizes)} parameters"
    if active is not None:
      text += f", {plots.count(active)} of them active for a token,"
  text += f" read {plots.count(r.tokens)} tokens of text in {r.steps:,} steps"
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
  else:
    text += " It has not been evaluated on held-out text."
  if r.worst:
    name, violation = r.worst
    text += " Over the last tenth of the steps, the busiest expert of the least"
    text += f" even layer ({name}) had on average {violation:.0%} more than its"
    text += " even share of the tokens."
  return text


def _tiles(run: run_data.Record, r: Results) -> Iterator[tuple[str, str]]:
  """Yields (figure, caption) of the most important results."""
  if r.heldout_bpb is not None:
    yield f"{r.heldout_bpb:.3f}", "bits per byte of held-out text"
  if r.loss is not None:
    yield f"{r.loss:.3f}", "training loss in nats per token, last tenth"
  if r.worst:
    yield f"{r.worst[1]:.2f}", "MaxVio of the least even layer, last tenth"
  if r.tokens_per_s is not None:
    yield f"{r.tokens_per_s:,.0f}", "training tokens per second (median)"


def _table(run: run_data.Record, r: Results) -> dict[str, dict[str, Any]]:
  """Returns {group: {name: value}}, without the values that the run lacks."""
  c, s, baselines = run.config, run.summary, run_data.baselines(run).items()

  def size(key: str) -> str | None:
    return f"{plots.count(s[key])} ({s[key]:,})" if s.get(key) else None

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
      "Tokens": f"{plots.count(r.tokens)} ({r.tokens:,})",
      "Batch": _batch(c),
      "Time, training": time("train_seconds"),
      "Time, compiling": time("compile_seconds"),
      "Tokens per second (median)": _digits(r.tokens_per_s, 0),
      "Seed": c.get("seed"),
    },
    "Time of all starts": _time(run),
    "Result": {
      "Training loss, last tenth (nats per token)": _digits(r.loss, 4),
      "Held-out loss (nats per token)": _digits(r.heldout_loss, 4),
      "Held-out bits per byte": _digits(r.heldout_bpb, 3),
      **{f"{name}, same bytes": _digits(b, 3) for name, b in baselines},
      "MaxVio of the least even layer, last tenth": (
        r.worst and f"{r.worst[1]:.3f} ({r.worst[0]})"
      ),
      "Steps skipped": run.steps[-1].get("skipped_steps"),
    },
    "Environment": {
      key.removeprefix("versions.").replace("_", " "): value
      for key, value in run.env.items()
    },
  }
  return {
    group: {k: v for k, v in values.items() if v is not None}
    for group, values in groups.items()
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


# --- HTML ---


def _rows(values: Mapping[str, Any]) -> str:
  return "".join(
    f"<tr><th scope=row>{html.escape(str(key))}</th>"
    f"<td>{html.escape(as_text(value))}</td></tr>\n"
    for key, value in values.items()
  )


def _table_html(run: run_data.Record, r: Results) -> str:
  return "".join(
    f"<tr><th class=group colspan=2>{group}</th></tr>\n{_rows(values)}"
    for group, values in _table(run, r).items()
    if values
  )


def _figure_html(picture: pictures.Picture, png: bytes) -> str:
  source = "data:image/png;base64," + base64.b64encode(png).decode()
  return (
    f"<h2>{picture.title}</h2>\n<figure><div class=scroll>"
    f'<img alt="{html.escape(picture.title)}" src="{source}"></div>\n'
    f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>\n"
  )


def _samples_html(run: run_data.Record) -> str:
  rows = [row for row in run.evals if row.get("sample")]
  if not rows:
    return ""
  chosen = [rows[i] for i in plots.evenly_spaced(len(rows), SAMPLES)]
  parts = []
  for row in chosen:
    bits = row.get("heldout_bpb")
    at = f"step {row['step']:,}"
    at += "" if bits is None else f" · {bits:.2f} bits per byte"
    text = html.escape(terminal.printable(row["sample"]))
    parts.append(f"<div class=sample><h3>{at}</h3><p>{text}</p></div>\n")
  some = len(chosen) < len(rows)
  note = f"{len(chosen)} of {len(rows)} samples. " if some else ""
  return (
    f"<h2>Samples</h2>\n<p class=note>{note}Text that the model wrote at"
    f" evaluations.</p>\n{''.join(parts)}"
  )


def _list_html(title: str, lines: Sequence[str]) -> str:
  if not lines:
    return ""
  items = "".join(f"<li>{html.escape(line)}</li>\n" for line in lines)
  return f"<h2>{title}</h2>\n<ul class=note>\n{items}</ul>\n"


def _details_html(title: str, values: Mapping[str, Any]) -> str:
  if not values:
    return ""
  return (
    f"<details><summary><h2>{title}</h2></summary>\n"
    f"<table>\n{_rows(values)}</table></details>\n"
  )


def to_html(
  run: run_data.Record,
  figures: Sequence[tuple[pictures.Picture, bytes]],
  missing: Sequence[str],
) -> str:
  """Fills the template.

  Args:
    run: read from its workdir.
    figures: pictures in order, and their PNG bytes.
    missing: sentences on what the run lacks.
  """
  r = results(run)
  missing = list(missing)
  if not any(row.get("sample") for row in run.evals):
    missing.append("Samples: no evaluation row has one.")
  violation = {
    name: f"mean {mean:.3f}, highest {top:.3f}"
    for name, (mean, top) in run_data.final_violation(run).items()
  }
  variant = str(run.config.get("variant", run.name))
  tiles = (
    f"<div class=tile><b>{html.escape(figure)}</b>"
    f"<span>{html.escape(caption)}</span></div>\n"
    for figure, caption in _tiles(run, r)
  )
  details = {
    "MaxVio of every layer, last tenth": violation,
    "All settings": run.config,
    "All of summary.json": run.summary,
  }
  return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
    title=html.escape(f"Training run: {variant}"),
    name=html.escape(run.name),
    summary=html.escape(_summary(run, r)),
    tiles="".join(tiles),
    figures="".join(_figure_html(*figure) for figure in figures),
    samples=_samples_html(run),
    table=_table_html(run, r),
    missing=_list_html("Not in this report", missing),
    details="".join(_details_html(*item) for item in details.items()),
  )


def write(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes report.html, and the pictures in report/, of a workdir.

  Returns:
    The path of the page.

  Raises:
    InputError: there is no training step in the workdir.
  """
  run, workdir = run_data.read(workdir), pathlib.Path(workdir)
  (workdir / "report").mkdir(exist_ok=True)
  figures, missing = [], list(run.missing)
  for picture in pictures.pictures(run):
    if isinstance(picture, str):
      missing.append(picture)
      continue
    png = render.png(picture.draw, picture.height_in)
    (workdir / "report" / f"{picture.name}.png").write_bytes(png)
    figures.append((picture, png))
  path = workdir / "report.html"
  # A model may write half a surrogate pair, which has no UTF-8.
  text = to_html(run, figures, missing)
  with io.atomic_write(path, errors="replace") as file:
    file.write(text)
  return path

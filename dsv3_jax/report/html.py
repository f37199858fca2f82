"""The HTML of a report: one page with its style and pictures inside."""

import base64
import dataclasses
import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dsv3_jax.report import plots, run_data
from dsv3_jax.trainer import event_log, metrics_writer

SAMPLES = 6  # most samples of text that are shown

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #2b3036;
  --soft: #667079; --line: #e3e6ea; --card: #f6f7f9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #1b1f24;
  --ink: #d5dae0; --soft: #98a2ad; --line: #333a43; --card: #242a31;
  --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 50rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; }
.sub { color: var(--soft); margin: .2rem 0 1.2rem; overflow-wrap: anywhere; }
.tiles { display: grid; gap: .75rem; margin: 1.6rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.tile { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.25;
  color: var(--accent); font-variant-numeric: tabular-nums; }
.tile span { font-size: .85rem; color: var(--soft); line-height: 1.35;
  display: block; }
table { width: 100%; border-collapse: collapse; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .32rem .5rem .32rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: normal; color: var(--soft); width: 40%; }
th.group { color: var(--ink); font-weight: 600; padding-top: 1.3rem; }
figure { margin: 0; }
.scroll { overflow-x: auto; }
img { display: block; width: 100%; min-width: 26rem; height: auto; }
figcaption, .note { font-size: .88rem; line-height: 1.5; color: var(--soft);
  margin-top: .5rem; }
.sample { margin: 0 0 1.2rem; }
.sample h3 { font-size: .88rem; font-weight: 600; color: var(--soft);
  margin: 0 0 .3rem; }
.sample p { margin: 0; padding: .8rem 1rem; background: var(--card);
  border-radius: .5rem; font-family: Georgia, "Times New Roman", serif;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 1.5rem; } summary { cursor: pointer; }
summary h2 { display: inline; font-size: 1rem; }
@media print { h2 { break-after: avoid; } figure, .sample {
  break-inside: avoid; } }
"""


@dataclasses.dataclass(frozen=True)
class Figure:
  """A picture with its words."""

  title: str
  caption: str
  light: bytes  # PNG
  dark: bytes  # PNG


# --- numbers as people read them ---


def seconds(s: float) -> str:
  """281 as 4 min 41 s."""
  if s < 60:
    return f"{s:.1f} s"
  minutes, rest = divmod(round(s), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shown(value: Any) -> str:
  """A setting or a figure, whatever its type."""
  if isinstance(value, bool) or value is None:
    return {True: "yes", False: "no", None: "none"}[value]
  if isinstance(value, int):
    return f"{value:,}"
  if isinstance(value, float):
    return f"{value:.6g}"
  if isinstance(value, list):
    unique = list(dict.fromkeys(map(shown, value)))
    times = f"{len(value)} x " if len(unique) == 1 < len(value) else ""
    return times + ", ".join(unique)
  return str(value)


# --- what is said ---


@dataclasses.dataclass(frozen=True)
class Results:
  """Figures of merit; None where a run doesn't have them."""

  steps: int
  budget: int | None  # steps in the token budget
  tokens: int
  tokens_per_s: float | None
  loss: float | None  # of the main model, mean of the last tenth
  heldout_loss: float | None
  heldout_bpb: float | None
  worst: tuple[str, float] | None  # layer with the highest mean MaxVio


def results(run: run_data.Record) -> Results:
  """The figures of merit of a run."""
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
  """One paragraph: what was trained, how good it is, how even its experts."""
  sizes = run.summary.get("parameters")
  active = run.summary.get("active_parameters")
  text = "A model of the DeepSeek-V3 kind"
  if sizes is not None:
    text += f" with {plots.count(sizes)} parameters"
    if active is not None:
      text += f", {plots.count(active)} of them active for a token,"
  text += f" read {plots.count(r.tokens)} tokens of text in {r.steps:,} steps"
  if "train_seconds" in run.summary:
    text += f" and {seconds(run.summary['train_seconds'])}"
  text += "."
  if r.budget and r.steps < r.budget:
    text += f" Its token budget is {r.budget:,} steps: it can go on."
  if r.heldout_bpb is not None:
    text += f" It needs {r.heldout_bpb:.2f} bits for a byte of text that it"
    text += " has never seen"
    for name, bits in run_data.rivals(run).items():
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
  """(figure, what it is) of the most important results."""
  if r.heldout_bpb is not None:
    yield f"{r.heldout_bpb:.3f}", "bits per byte of held-out text"
  if r.loss is not None:
    yield f"{r.loss:.3f}", "training loss in nats per token, last tenth"
  if r.worst:
    yield f"{r.worst[1]:.2f}", "MaxVio of the least even layer, last tenth"
  if r.tokens_per_s is not None:
    yield f"{r.tokens_per_s:,.0f}", "training tokens per second (median)"


def _table(run: run_data.Record, r: Results) -> dict[str, dict[str, Any]]:
  """{group: {what: value}}, without what the run doesn't have."""
  c, s, rivals = run.config, run.summary, run_data.rivals(run).items()

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
      **{f"{name}, same bytes": _digits(b, 3) for name, b in rivals},
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
    group: {k: v for k, v in facts.items() if v is not None}
    for group, facts in groups.items()
  }


def _time(run: run_data.Record) -> dict[str, Any]:
  """What the time of a run went into, from its first start on."""
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


def _rows(facts: dict[str, Any]) -> str:
  return "".join(
    f"<tr><th scope=row>{html.escape(str(key))}</th>"
    f"<td>{html.escape(shown(value))}</td></tr>\n"
    for key, value in facts.items()
  )


def _table_html(run: run_data.Record, r: Results) -> str:
  body = "".join(
    f"<tr><th class=group colspan=2>{group}</th></tr>\n{_rows(facts)}"
    for group, facts in _table(run, r).items()
    if facts
  )
  return f"<h2>The run</h2>\n<table>\n{body}</table>\n"


def _figure_html(figure: Figure) -> str:
  light, dark = (
    "data:image/png;base64," + base64.b64encode(png).decode()
    for png in (figure.light, figure.dark)
  )
  return (
    f"<h2>{figure.title}</h2>\n<figure><div class=scroll><picture>"
    f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    f'<img alt="{html.escape(figure.title)}" src="{light}"></picture></div>\n'
    f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>\n"
  )


def _samples_html(run: run_data.Record) -> str:
  rows = [row for row in run.evals if row.get("sample")]
  if not rows:
    return ""
  chosen = [rows[i] for i in plots.spread(len(rows), SAMPLES)]
  parts = []
  for row in chosen:
    bits = row.get("heldout_bpb")
    at = f"step {row['step']:,}"
    at += "" if bits is None else f" · {bits:.2f} bits per byte"
    text = html.escape(metrics_writer.printable(row["sample"]))
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


def _details_html(title: str, facts: dict[str, Any]) -> str:
  if not facts:
    return ""
  return (
    f"<details><summary><h2>{title}</h2></summary>\n"
    f"<table>\n{_rows(facts)}</table></details>\n"
  )


def html_of(
  run: run_data.Record, figures: Sequence[Figure], missing: Sequence[str]
) -> str:
  """The whole page.

  Args:
    run: what was written.
    figures: in order.
    missing: sentences that say what the run doesn't have.
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
  title = html.escape(f"Training run: {variant}")
  tiles = "".join(
    f"<div class=tile><b>{html.escape(figure)}</b>"
    f"<span>{html.escape(what)}</span></div>\n"
    for figure, what in _tiles(run, r)
  )
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    f"<h1>{title}</h1>\n"
    f"<p class=sub>workdir {html.escape(run.name)}</p>\n"
    f"<p>{html.escape(_summary(run, r))}</p>\n"
    f"<div class=tiles>\n{tiles}</div>\n"
    + "".join(map(_figure_html, figures))
    + _samples_html(run)
    + _table_html(run, r)
    + _list_html("Not in this report", missing)
    + _details_html("MaxVio of every layer, last tenth", violation)
    + _details_html("All settings", run.config)
    + _details_html("All of summary.json", run.summary)
    + "</body>\n</html>\n"
  )

"""The page of a report: report.html, one file with its pictures inside."""

import html
import os
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_jax import io
from dsv3_jax.report import pictures, plots, render, results, run_data
from dsv3_jax.trainer import terminal

TEMPLATE = pathlib.Path(__file__).with_name("page.html")
SAMPLES = 6  # most samples of text that are shown


def _breakable(path: str) -> str:
  """Escapes a name that a line may break after a dot of."""
  return html.escape(path).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _rows(values: Mapping[str, Any]) -> str:
  return "".join(
    f"<tr><th scope=row>{_breakable(str(key))}</th>"
    f"<td>{html.escape(results.as_text(value))}</td></tr>\n"
    for key, value in values.items()
  )


def _settings(run: run_data.Record) -> str:
  """Returns rows of all settings; changes to the preset stand out."""
  changes = run_data.changes(run) or {}
  rows = []
  for path, value in run.config.items():
    row = _rows({path: value})
    if path in changes:
      before = html.escape(results.as_text(changes[path]))
      row = row.replace("<tr>", "<tr class=changed>")
      row = row.replace("</td>", f" <i>preset: {before}</i></td>")
    rows.append(row)
  return "".join(rows)


def _table_html(run: run_data.Record, r: results.Results) -> str:
  return "".join(
    f"<tr><th class=group colspan=2>{html.escape(group)}</th></tr>\n"
    f"{_rows(values)}"
    for group, values in results.table(run, r).items()
    if values
  )


def _head_html(run: run_data.Record, r: results.Results) -> str:
  """Returns the command line, and the facts of the run."""
  facts = "".join(
    f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>\n"
    for name, value in results.head(run, r).items()
  )
  command = str(run.env.get("command", ""))
  # No line breaks within an argument, as after each of its hyphens.
  words = (f"<span>{html.escape(word)}</span>" for word in command.split(" "))
  code = f"<pre class=command><code>{' '.join(words)}</code></pre>\n"
  return f"{code if command else ''}<dl>\n{facts}</dl>\n"


def _figure_html(picture: pictures.Picture) -> str:
  title, height = html.escape(picture.title), picture.height_in
  sizes = {
    "wide": (height, render.WIDTH_IN),
    "narrow": (picture.narrow_height_in or height, render.NARROW_IN),
  }
  drawings = "".join(
    f'<div class={name} role=img aria-label="{title}">'
    f"{render.svg(picture.draw, *size, f'{picture.name}-{name}')}</div>\n"
    for name, size in sizes.items()
  )
  return (
    f"<h2>{title}</h2>\n<figure>{drawings}"
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
    prompt, text = (
      html.escape(terminal.printable(row.get(key) or ""))
      for key in ("sample_prompt", "sample")
    )
    prompt = f"<span class=prompt>{prompt}</span>" if prompt else ""
    text = f"<h3>{at}</h3><p>{prompt}{text}</p>"
    parts.append(f"<div class=sample>{text}</div>\n")
  note = f"{len(chosen)} of {len(rows)} samples. " * (len(chosen) < len(rows))
  note += "Text that the model wrote at evaluations, "
  if any(row.get("sample_prompt") for row in chosen):
    note += "always after the same prompt (grey), a start of held-out text."
  else:
    note += "without a prompt."
  return f"<h2>Samples</h2>\n<p class=note>{note}</p>\n{''.join(parts)}"


def _list_html(title: str, lines: Sequence[str]) -> str:
  if not lines:
    return ""
  items = "".join(f"<li>{html.escape(line)}</li>\n" for line in lines)
  return f"<h2>{title}</h2>\n<ul class=note>\n{items}</ul>\n"


def _details_html(title: str, rows: str) -> str:
  if not rows:
    return ""
  return (
    f"<details><summary><h2>{title}</h2></summary>\n"
    f"<table>\n{rows}</table></details>\n"
  )


def to_html(
  run: run_data.Record,
  shown: Sequence[pictures.Picture | str],
  *,
  live: str = "",
) -> str:
  """Fills the template.

  Args:
    run: read from its workdir.
    shown: its pictures, and sentences on what it lacks.
    live: more HTML for the head of a page that refreshes itself.
  """
  r, missing, figures = results.results(run), list(run.missing), []
  for picture in shown:
    if isinstance(picture, str):
      missing.append(picture)
    else:
      figures.append(_figure_html(picture))
  if not any(row.get("sample") for row in run.evals):
    missing.append("Samples: no evaluation row has one.")
  if run.config and run_data.changes(run) is None:
    missing.append(
      "Changes from the preset: none has the variant's name, or the settings"
      " are those of another version."
    )
  violation = {
    name: f"mean {mean:.3f}, highest {top:.3f}"
    for name, (mean, top) in run_data.final_violation(run).items()
  }
  tiles = (
    f"<div class=tile><b>{html.escape(figure)}</b>"
    f"<span>{html.escape(caption)}</span></div>\n"
    for figure, caption in results.tiles(run, r)
  )
  details = {
    "MaxVio of every layer, last tenth": _rows(violation),
    "All settings": _settings(run),
    "All of summary.json": _rows(run.summary),
  }
  variant = str(run.config.get("variant", run.name))
  return fill(
    f"Training run: {variant}",
    f"<p class=sub>workdir {html.escape(run.name)}</p>\n"
    f"<p>{html.escape(results.summary(run, r))}</p>\n"
    f"<div class=tiles>\n{''.join(tiles)}</div>\n{_head_html(run, r)}"
    f"{''.join(figures)}{_samples_html(run)}<h2>The run</h2>\n"
    f"<table>\n{_table_html(run, r)}</table>\n"
    f"{_list_html('Not in this report', missing)}"
    f"{''.join(_details_html(*item) for item in details.items())}",
    live,
  )


def fill(title: str, body: str, live: str) -> str:
  """Fills the template with a title, and with HTML for body and head."""
  template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
  return template.substitute(
    title=html.escape(title),
    body=body,
    live=live,
    light=render.colours_css(render.LIGHT),
    dark=render.colours_css(render.DARK),
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
  shown = pictures.pictures(run)
  for picture in shown:
    if isinstance(picture, pictures.Picture):
      png = render.png(picture.draw, picture.height_in)
      (workdir / "report" / f"{picture.name}.png").write_bytes(png)
  path = workdir / "report.html"
  # A model may write half a surrogate pair, which has no UTF-8.
  with io.atomic_write(path, errors="replace") as file:
    file.write(to_html(run, shown))
  return path

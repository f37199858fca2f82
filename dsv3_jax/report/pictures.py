"""Pictures of a run: title, caption and drawing of each."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.report import plots, render, run_data

SNAPSHOTS = 4  # heat maps of expert load
TREND = (
  "Every step faint, a running mean over 2% of the run solid. The biggest"
  " outlier has a ring, or a triangle if it is beyond the axis, whose values"
  " the mean leaves out."
)


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure of the report."""

  name: str  # of its file
  title: str
  caption: str
  draw: Callable[[Figure], None] = dataclasses.field(repr=False)
  height_in: float = 3.4
  narrow_height_in: float | None = None  # on a phone; None: the same

  def _repr_png_(self) -> bytes:
    """Returns the picture as notebooks show it."""
    return render.png(self.draw, self.height_in)


# Each function returns a Picture, or a sentence on what the run lacks.


def _curves(run: run_data.Record, keys: dict[str, str]) -> dict:
  """Returns the columns that the run has, by label."""
  columns = {k: run_data.column(run.steps, key) for k, key in keys.items()}
  return {label: y for label, y in columns.items() if y is not None}


def _numbers(rows: Sequence[dict]) -> np.ndarray:
  """[rows] numbers of the steps."""
  return np.array([row["step"] for row in rows])


def _losses(run: run_data.Record) -> Picture | str:
  curves = _curves(run, {"next token": "main_loss", "MTP": "mtp_loss"})
  if not (curves := curves or _curves(run, {"training": "loss"})):
    return "Loss: no step has a finite one."
  caption = TREND
  if "MTP" in curves:
    caption += (
      " MTP is the loss of the multi-token prediction modules: they predict"
      " one token further and are given one token more, so the two can be"
      " alike."
    )
  points = {}
  if (heldout := run_data.column(run.evals, "heldout_loss")) is not None:
    at = run_data.tokens_at(run, [row["step"] for row in run.evals])
    points["held-out text, next token"] = at, heldout
    caption += " Held-out text is never trained on."
    prompts = run_data.column(run.evals, "heldout_prompt_loss")
    if prompts is not None:
      points["held-out prompts, next token"] = at, prompts
      caption += " Only answers are trained on; prompts are shown beside them."
  return Picture(
    name="loss",
    title="Loss",
    caption=caption,
    draw=functools.partial(
      plots.losses,
      x=run_data.column(run.steps, "tokens"),
      curves=curves,
      points=points,
      steps=_numbers(run.steps),
    ),
  )


def _bits_per_byte(run: run_data.Record) -> Picture | str:
  bits = run_data.column(run.evals, "heldout_bpb")
  if bits is None:
    return "Bits per byte: no held-out evaluation was written."
  baselines = run_data.baselines(run)
  x = run_data.tokens_at(run, [row["step"] for row in run.evals])
  caption = (
    "How well the model would compress held-out text; lower is better, and"
    " the tokenizer has no influence on it."
  )
  if baselines:
    caption += (
      " Dashed: what these programs need for the same bytes after the same"
      " training text."
    )
  return Picture(
    name="bits_per_byte",
    title="Bits per byte",
    caption=caption,
    draw=functools.partial(
      plots.bits_per_byte, x=x, y=bits, baselines=baselines
    ),
  )


def _exact_match(run: run_data.Record) -> list[Picture]:
  """Returns the picture of right answers, of a run on conversations."""
  prefix = run_data.match_key(run)
  names = {key for row in run.evals for key in row if key.startswith(prefix)}
  curves = {
    key.removeprefix(prefix).removeprefix("/") or "all": 100 * right
    for key in sorted(names)
    if (right := run_data.column(run.evals, key)) is not None
  }
  if not curves:
    return []
  x = run_data.tokens_at(run, [row["step"] for row in run.evals])
  label = "answers that match, %"
  return [
    Picture(
      name="exact_match",
      title="Exact match",
      caption=(
        "Held-out questions that the model answers, greedily, with exactly the"
        " text expected, but for space around it."
      ),
      draw=functools.partial(plots.by_name, x=x, curves=curves, label=label),
    )
  ]


# Pictures of reinforcement learning: name, title, what the axis shows, curves
# by the first word of their keys, and what they mean.
_POLICY = (
  (
    "reward",
    "Reward",
    "mean reward",
    ("reward",),
    "Mean of the answers of an iteration, before penalties, of all and of each"
    " task. Their questions are those trained on, and answers are drawn, not"
    " greedy.",
  ),
  (
    "length",
    "Length",
    "tokens",
    ("length",),
    "Mean length of the answers of an iteration, end tokens included.",
  ),
  (
    "policy",
    "Policy",
    "nats per token",
    ("entropy", "kl"),
    "entropy is of the policy, under the sampling settings. kl estimates"
    " KL(policy || reference) by k3 = r - log r - 1 with r = reference / policy"
    " at the tokens that were sampled. Both are means over the tokens of"
    " answers.",
  ),
  (
    "ratio",
    "Policy and sampler",
    "share of tokens",
    ("clip_share", "ratio_outside", "masked_share", "routes_replaced"),
    "clip_share: tokens whose ratio was clipped. ratio_outside: tokens whose"
    " probability under the policy over that under the sampler is outside 0.99"
    " to 1.01. masked_share: tokens of answers that are too far from the"
    " policy. routes_replaced: experts of the sampler that the trainer's router"
    " would not have chosen.",
  ),
)


def _policy(run: run_data.Record) -> list[Picture]:
  """Returns the pictures of reinforcement learning."""
  found = []
  for name, title, label, begins, caption in _POLICY:
    keys = sorted(
      {k for row in run.steps for k in row if k.split("/")[0] in begins}
    )
    rows = [row for row in run.steps if any(key in row for key in keys)]
    curves = {
      key.partition("/")[2] or key: y
      for key in keys
      if (y := run_data.column(rows, key)) is not None
    }
    if curves and run.config.get("grpo.prompts"):
      x = run_data.tokens_at(run, [row["step"] for row in rows])
      draw = functools.partial(plots.by_name, x=x, curves=curves, label=label)
      found.append(Picture(name, title, caption, draw))
  return found


def _by_domain(run: run_data.Record) -> list[Picture]:
  """Returns the picture of bits per byte by domain, if there are several."""
  curves = {
    name: bits
    for name in run_data.domains(run)
    if (bits := run_data.column(run.evals, run_data.DOMAIN + name)) is not None
  }
  if not curves:
    return []
  return [
    Picture(
      name="bits_per_byte_by_domain",
      title="Bits per byte by domain",
      caption=(
        "The same for the held-out text of each domain alone. Domains differ in"
        " how well any program can compress them: compare each with itself."
      ),
      draw=functools.partial(
        plots.by_name,
        x=run_data.tokens_at(run, [row["step"] for row in run.evals]),
        curves=curves,
        label="bits per byte",
      ),
    )
  ]


def _max_violation(run: run_data.Record) -> Picture | str:
  at, vio = run_data.nested(run.steps, "max_vio_per_layer")
  if not vio.size:
    return "MaxVio: no row has it; without MoE layers there is none."
  return Picture(
    name="max_violation",
    title="Balance of the experts",
    caption=(
      "MaxVio: how far the busiest expert of a layer is above its even"
      " share of a step's tokens, as a part of that share; running mean"
      " over 2% of the run. At 0, all experts have the same load. A ring marks"
      " the single step that is furthest from its neighbours, if any is far."
    ),
    draw=functools.partial(
      plots.max_violation,
      x=run_data.column(run.steps, "tokens")[at],
      vio=vio,
      names=run_data.router_names(run, vio.shape[1]),
      steps=_numbers(run.steps)[at],
    ),
  )


def _load_maps(run: run_data.Record) -> Picture | str:
  at, shares = run_data.shares(run)
  if not shares.size:
    return "Expert load: no row has it; without MoE layers there is none."
  shown = plots.evenly_spaced(len(at), SNAPSHOTS)
  names = run_data.router_names(run, shares.shape[1])
  rows, panel_in = -(-len(shown) // 2), 0.6 + 0.16 * min(16, len(names))
  return Picture(
    name="expert_load",
    title="Load of every expert",
    caption=(
      "Share of a layer's tokens that each expert received in one step,"
      " relative to an even share. Blue experts were idle, orange ones"
      " busy; an evenly used layer fades into the page. Layers count from"
      " 0, dense ones have no experts."
    ),
    draw=functools.partial(
      plots.load_maps,
      shares=shares[shown],
      titles=[f"step {run.steps[at[i]]['step']:,}" for i in shown],
      names=names,
    ),
    height_in=1.2 + rows * panel_in,
    narrow_height_in=1.2 + len(shown) * panel_in,
  )


def _load_over_time(run: run_data.Record) -> Picture | str:
  at, shares = run_data.shares(run)
  if len(at) < 3:
    return "Expert load over time: fewer than three rows have the loads."
  n = shares.shape[1]
  shown = min(n, plots.PANELS)
  return Picture(
    name="expert_load_over_time",
    title="Load over time",
    caption="The same shares through the whole run, a panel a layer."
    + (f" {shown} of {n} layers are shown." if shown < n else ""),
    draw=functools.partial(
      plots.load_over_time,
      x=run_data.column(run.steps, "tokens")[at],
      shares=shares,
      names=run_data.router_names(run, n),
    ),
    height_in=1.2 + 1.35 * -(-shown // 2),
    narrow_height_in=1.2 + 1.2 * shown,
  )


def _placement(run: run_data.Record) -> Picture | str:
  if (found := run_data.expert_balance(run)) is None:
    return "Expert placement: no row has loads of experts that devices share."
  names = run_data.router_names(run, len(found.placed))
  n, each = found.n_devices, found.n_experts // found.n_devices
  means, worst = zip(
    *(
      (f"{y.mean():.3f}", f"{y.max():.3f} ({names[y.argmax()]})")
      for y in (found.in_order, found.placed)
    ),
    strict=True,
  )
  return Picture(
    name="expert_placement",
    title="Placement of the experts",
    caption=(
      f"Load of the busiest of {n} devices that share a layer's"
      f" {found.n_experts} experts when the model serves, relative to the"
      " mean of the devices; at 1, none waits for another. Loads are means"
      f" over the last quarter of the run. In order there are {each}"
      f" experts on each device. Placed by load there are {each + 1}:"
      f" busy experts have replicas, {n} in all. The mean over layers goes"
      f" from {means[0]} to {means[1]}, the highest from {worst[0]} to"
      f" {worst[1]}."
    ),
    draw=functools.partial(
      plots.expert_placement,
      in_order=found.in_order,
      placed=found.placed,
      names=names,
    ),
    height_in=1.2 + 0.22 * min(16, len(names)),
  )


def _schedules(run: run_data.Record) -> Picture | str:
  keys = {
    "learning rate": "lr",
    "step of the router bias": "bias_speed",
    "weight of the MTP loss": "mtp_weight",
  }
  if not (curves := _curves(run, keys)):
    return "Schedules: no row has a learning rate."
  x = run_data.column(run.steps, "tokens")
  return Picture(
    name="schedules",
    title="Schedules",
    caption="What was set from outside, by the number of tokens seen.",
    draw=functools.partial(plots.panels, x=x, curves=curves),
    height_in=0.6 + 1.35 * len(curves),
  )


def _throughput(run: run_data.Record) -> Picture | str:
  keys = {
    "training tokens per second": "tokens_per_s",
    "norm of the gradient before clipping": "grad_norm",
  }
  if not (curves := _curves(run, keys)):
    return "Throughput: no row has tokens_per_s."
  x = run_data.column(run.steps, "tokens")
  return Picture(
    name="throughput",
    title="Throughput and gradients",
    caption=TREND,
    draw=functools.partial(
      plots.panels, x=x, curves=curves, steps=_numbers(run.steps)
    ),
    height_in=0.6 + 1.35 * len(curves),
  )


def _needles(run: run_data.Record) -> list[Picture]:
  """Returns the picture of needles in a haystack, if the run has answers."""
  if not run.needles:
    return []
  keys = ("lengths", "depths", "right")
  answers = {key: run.needles[key] for key in keys}
  n_models = len(answers["right"])
  return [
    Picture(
      name="needles",
      title="Needles in a haystack",
      caption=(
        "Facts hidden at some depth of a context and asked for at its"
        " end: the share of right answers, by length of the context."
      ),
      draw=functools.partial(plots.needles, **answers),
      height_in=plots.needles_height_in(n_models),
      narrow_height_in=plots.needles_height_in(2 * n_models),
    )
  ]


def pictures(run: run_data.Record) -> list[Picture | str]:
  """Returns the pictures of a run in order; a sentence for each it lacks."""
  return [
    _losses(run),
    *(_exact_match(run) or [_bits_per_byte(run)]),
    *_policy(run),
    *_by_domain(run),
    _max_violation(run),
    _load_maps(run),
    _load_over_time(run),
    _placement(run),
    _schedules(run),
    _throughput(run),
    *_needles(run),
  ]


def read(workdir: str | os.PathLike) -> dict[str, Picture]:
  """Returns the pictures that a workdir has, by name; notebooks show them."""
  found = pictures(run_data.read(workdir))
  return {each.name: each for each in found if isinstance(each, Picture)}

"""GRPO (section 5.2.2): batches of answers that the policy itself generates.

An iteration draws questions, generates a group of answers to each, scores them
and trains on them in one or several optimizer steps, those of
`trainer.Trainer`. Its answers are written to a file before the first of these,
so that a run that is killed goes on with the same ones.
"""

import collections
import functools
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax import config, io, train
from dsv3_jax.data import chat, conversation_corpus, loader, tasks
from dsv3_jax.data.batch import Batch
from dsv3_jax.evals import hidden
from dsv3_jax.infer import engine, inference_params
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.parallel import device_mesh
from dsv3_jax.posttrain import (
  objectives,
  policy_batch,
  questions,
  reference,
  rollout,
)
from dsv3_jax.posttrain.rewards import by_name, reward
from dsv3_jax.trainer import distributed, heartbeat, loop, run_args

FOLDER = "rollouts"  # of the workdir


def engine_options(run: config.Run) -> EngineOptions:
  """Returns the options of the sampler."""
  return EngineOptions(
    max_batch=run.grpo.slots,
    max_len=run.data.seq_len + 1,
    n_drafts=run.grpo.n_drafts,
    trace=True,
  )


def _logprobs(params, out, labels, temperature, kept):
  """Returns log-probabilities of labels [B, T], see `evals.hidden.Score`."""
  rows = out.hidden.reshape(-1, out.hidden.shape[-1])
  if kept is not None:
    kept = kept.reshape(-1, kept.shape[-1])
  values, _ = objectives.token_logprobs(
    rows, params["head"], labels.reshape(-1), temperature[0], kept
  )
  return values.reshape(labels.shape)


class PolicyBatches(loop.Batches):
  """Batches of rollouts of the policy that is being trained."""

  def __init__(
    self,
    args: run_args.RunArgs,
    source: loader.BatchSource,
    state: train.TrainState,
    mesh: jax.sharding.Mesh,
    watchdog: heartbeat.Heartbeat,
  ):
    """Opens questions, rewards, reference and sampler.

    Raises:
      InputError: a reward is wrong or cannot work here, a question does not
        fit a row, or the reference is of another architecture.
    """
    questions.check_room(source)
    self._run, self._seed, self._mesh = args.run, args.seed, mesh
    self._settings, self._watchdog = args.run.grpo, watchdog
    self._folder = args.workdir / FOLDER
    data, tok = args.run.data, source.corpus.tokenizer
    problems = conversation_corpus.split_tasks(data).train
    template = chat.find(data.template)
    self._questions = questions.Questions(problems, tok, template, args.seed)
    self._tasks = tasks.parse(data.path)
    weights = by_name.parse(self._settings.rewards)
    self._weights = weights
    self._functions = by_name.make(weights, self._tasks, problems)
    self._served: engine.Engine | None = None
    self._objective = objectives.Policy(self._settings)
    self._iteration: rollout.Iteration | None = None
    self._parts: list[Batch] = []
    self._reference = None
    if self._settings.kl_weight:
      self._reference = reference.open_reference(args, state, mesh)

  def next(self, state: train.TrainState) -> tuple[Batch, dict[str, float]]:
    """Returns the next part of the iteration's rollouts; generates them first.

    The figures of the iteration are with its first part.
    """
    n, step = self._settings.updates, int(state.step)
    iteration, part = divmod(step, n)
    figures = {}
    if part == 0 or not self._parts:
      self._begin(state, iteration, first=part == 0)
      figures = self._figures(step)
    batch = self._parts[part]
    rows = self._run.train.micro_batch_size
    n_tokens = int(batch.valid.sum())
    batch = policy_batch.split(batch, rows)
    local = device_mesh.local_rows(rows, self._mesh)
    batch = jax.tree.map(lambda a: a[:, local], batch)
    batch = device_mesh.make_global_batch(batch, rows, self._mesh, dim=1)
    batch = batch.replace(objective=self._objective)
    return batch, figures | {"n_tokens": n_tokens}

  def _begin(
    self, state: train.TrainState, iteration: int, *, first: bool
  ) -> None:
    """Generates what is due at an iteration, and makes its batches."""
    ahead = iteration + self._settings.staleness
    if first:
      due = range(ahead + 1) if iteration == 0 else [ahead]
      for one in due:
        self._sample(state, one)
    self._iteration = rollout.load(self._path(iteration))
    for path in self._folder.glob("*.npz"):
      # A checkpoint may lie before: at most as many as are kept, and two more.
      if int(path.stem) < iteration - self._n_files():
        path.unlink(missing_ok=True)  # several processes do it
        shutil.rmtree(path.with_suffix(".old"), ignore_errors=True)
    self._parts = self._batches(state)

  def _n_files(self) -> int:
    cfg = self._run.checkpoint
    return -(-cfg.every * (cfg.keep + 2) // self._settings.updates)

  def _path(self, iteration: int) -> pathlib.Path:
    return self._folder / f"{iteration:06d}.npz"

  def _sample(self, state: train.TrainState, iteration: int) -> None:
    """Generates, scores and writes the rollouts of an iteration."""
    arrays = device_mesh.on_first_device(
      (state.params, state.router_bias), self._mesh
    )
    distributed.run_on_process_zero(
      lambda: rollout.save(
        self._path(iteration),
        self._generate(*arrays, int(state.step), iteration),
      )
    )
    self._watchdog.progress()

  def _generate(
    self, params: Any, bias: jax.Array, step: int, iteration: int
  ) -> rollout.Iteration:
    settings, n = self._settings, self._settings.group_size
    problems = self._questions.draw(iteration, settings.prompts)
    prompts = [self._questions.encode(problem) for problem in problems]
    served = self._engine(params, bias)
    rollouts = rollout.generate(
      served,
      self._questions.tok,
      [prompt for prompt in prompts for _ in range(n)],
      [
        rollout.seed_of(self._seed, iteration, question, answer)
        for question in range(len(problems))
        for answer in range(n)
      ],
      settings,
    )
    scores = reward.score_all(
      self._functions,
      [
        (problem.prompt, one.text, problem.answer)
        for problem, one in zip(
          [p for p in problems for _ in range(n)], rollouts, strict=True
        )
      ],
      self._weights,
    )
    # An answer without an end is wrong, whatever its text says.
    values = np.array(
      [
        r.value if one.ended or r.error else 0.0
        for r, one in zip(scores.rewards, rollouts, strict=True)
      ]
    )
    figures = {
      f"reward_failed/{name}": float(count)
      for name, count in scores.errors.items()
    }
    if settings.n_drafts:
      figures["draft_acceptance"] = served.stats.acceptance
    parts = collections.defaultdict(list)
    for r in scores.rewards:
      for name, value in r.parts.items():
        parts[name].append(value)
    figures |= {
      f"reward/{name}": float(np.nanmean(v))
      for name, v in parts.items()
      if np.isfinite(v).any() and len(self._functions) > 1
    }
    return rollout.Iteration(
      rollouts,
      values.reshape(-1, n),
      step,
      [problem.prompt for problem in problems],
      [problem.task for problem in problems],
      figures,
    )

  def _engine(self, params: Any, bias: jax.Array) -> engine.Engine:
    """Returns the sampler with the policy's parameters."""
    settings, model = self._settings, self._run.model
    if not settings.n_drafts:
      model = config.override(model, "mtp.depth=0")
      params = {k: v for k, v in params.items() if k != "mtp"}
      bias = bias[: model.n_routers]
    weights = _convert(params, bias, cfg=model)
    if self._served:
      self._served.update_params(weights)
      self._served.stats = engine.EngineStats()  # those of an iteration
      return self._served
    self._served = engine.Engine(weights, model, engine_options(self._run))
    return self._served

  def _batches(self, state: train.TrainState) -> list[Batch]:
    """Makes the batches of an iteration, a part of the groups each."""
    settings, one = self._settings, self._iteration
    step = int(state.step)
    oldest = (settings.staleness + 1) * settings.updates - 1
    if not 0 <= step - one.policy_step <= oldest:
      raise ValueError(
        f"answers of the policy of step {one.policy_step} are used at step"
        f" {step}, not at most {oldest} later"
      )
    raw = one.rewards
    lengths = np.array([len(r.answer) for r in one.rollouts]).reshape(raw.shape)
    shaped = raw + objectives.overlong_penalty(
      lengths, settings.answer_tokens, settings.overlong_tokens
    )
    counted = np.isfinite(raw)
    if settings.filter_groups:
      counted &= objectives.keep_groups(
        raw, settings.filter_low, settings.filter_high
      )[:, None]
    advantages = objectives.advantages(shaped, settings.advantage)
    batches, n = [], len(raw) // settings.updates
    for first in range(0, len(raw), n):
      groups = slice(first, first + n)
      members = slice(first * raw.shape[1], (first + n) * raw.shape[1])
      batch = policy_batch.make(
        one.rollouts[members],
        advantages[groups].reshape(-1),
        counted[groups].reshape(-1),
        self._run,
      )
      batches.append(self._score(batch, state, len(batches)))
    return batches

  def _score(self, batch: Batch, state: train.TrainState, part: int) -> Batch:
    """Adds the log-probabilities of the old policy and of the reference."""
    targets = dict(batch.targets)
    if self._settings.old_policy == config.TRAINER:
      targets["old_logprobs"] = self._old_logprobs(batch, state, part)
    if self._reference:
      targets["ref_logprobs"] = self._forward(*self._reference, batch, None)
    return batch.replace(targets=targets)

  def _old_logprobs(
    self, batch: Batch, state: train.TrainState, part: int
  ) -> np.ndarray:
    """Returns those of the policy that an iteration begins with.

    A run that goes on inside of an iteration has a later one: it reads them.
    """
    iteration, step = divmod(int(state.step), self._settings.updates)
    path = self._folder / f"{iteration:06d}.old" / f"{part}.npy"
    if step:
      return np.load(path)
    values = self._forward(state.params, state.router_bias, batch, batch.routes)

    def save():
      path.parent.mkdir(exist_ok=True)
      with io.atomic_write(path, "wb") as file:
        np.save(file, values)

    if self._settings.updates > 1:
      distributed.run_on_process_zero(save)
    return values

  def _forward(
    self, params: Any, bias: jax.Array, batch: Batch, routes: Any
  ) -> np.ndarray:
    """Returns log-probabilities of the labels [R, T] under parameters."""
    model = hidden.EvalModel(params, bias, self._run, self._mesh)
    temperature = np.full(
      len(batch.tokens), self._settings.temperature, np.float32
    )
    values = hidden.map_hidden(
      model,
      _logprobs,
      batch.tokens,
      batch.labels,
      temperature,
      batch.targets.get("kept"),
      batch_size=self._run.train.micro_batch_size,
      segments=batch.segments,
      routes=routes,
      per_row=True,
    )
    if jax.process_count() > 1:
      gather = functools.partial(multihost_utils.process_allgather, tiled=True)
      values = map(gather, values)
    values = np.concatenate([np.asarray(v) for v in values])
    return values[: len(batch.tokens)]

  def _figures(self, step: int) -> dict[str, float]:
    """Returns the figures of an iteration for the row of its first step."""
    one = self._iteration
    raw = one.rewards
    lengths = [len(r.answer) for r in one.rollouts]
    spread = np.array([len({*group[np.isfinite(group)]}) > 1 for group in raw])
    row = {
      "reward": _mean(raw),
      "length": float(np.mean(lengths)),
      "cut_share": 1 - float(np.mean([r.ended for r in one.rollouts])),
      "no_spread_share": float(1 - np.mean(spread)),
      "reward_failed": float(np.mean(~np.isfinite(raw))),
      "staleness": float(step - one.policy_step),
    }
    for name in sorted(set(one.tasks)):
      of_task = [task == name for task in one.tasks]
      row[f"reward/{name}"] = _mean(raw[of_task])
    return row | one.figures


def _mean(rewards: np.ndarray) -> float:
  """Returns the mean of rewards that did not fail; NaN if all did."""
  valid = rewards[np.isfinite(rewards)]
  return float(valid.mean()) if valid.size else float("nan")


@functools.partial(jax.jit, static_argnames="cfg")
def _convert(params: Any, bias: jax.Array, *, cfg: config.Model) -> Any:
  return inference_params.from_params(params, bias, cfg)

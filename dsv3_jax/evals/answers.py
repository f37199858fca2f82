"""Scores of held-out conversations: loss, exact match, scores of tasks."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsv3_jax import losses
from dsv3_jax.data import (
  packing,
  tasks,
  token_file,
  tokenized_corpus,
  tokenizer,
)
from dsv3_jax.data.batch import IGNORE, make_batch
from dsv3_jax.evals import hidden
from dsv3_jax.infer import engine
from dsv3_jax.infer.request import GenerationRequest


@dataclasses.dataclass(frozen=True)
class Question:
  """A context, and the answer that follows it in a held-out conversation."""

  prompt: list[int]
  answer: list[int]  # without its end token


def _nll(params, out, labels, masks):
  """Sums -log p over labels [B, T]; for each mask of masks [B, M, T]."""
  states = out.hidden.reshape(-1, out.hidden.shape[-1])
  labels = labels.reshape(-1)
  return [
    losses.cross_entropy(
      states, params["head"], labels, masks[:, i].reshape(-1)
    )
    for i in range(masks.shape[1])
  ]


def heldout_loss(
  model: hidden.EvalModel, rows: packing.PackedRows
) -> dict[str, float]:
  """Returns the mean loss of the tokens of answers, and of those of prompts.

  The names are `heldout_loss` and `heldout_prompt_loss`, in nats a token.
  """
  items = [rows[i] for i in range(len(rows))]
  tokens, segments, supervised = (
    np.stack([item[name] for item in items]) for name in packing.ARRAYS
  )
  batch = make_batch(tokens, segments, segment_mask=model.run.data.segment_mask)
  inside, answers = batch.labels != IGNORE, supervised[:, 1:]
  masks = np.stack([inside & answers, inside & ~answers], 1)
  sums = hidden.map_hidden(
    model,
    _nll,
    batch.tokens,
    batch.labels,
    masks.astype(np.float32),
    batch_size=model.run.evaluate.batch_size,
    segments=batch.segments,
  )
  totals = np.sum([np.array(s, np.float64) for s in sums], 0)
  counts = masks.sum((0, 2))
  answer, prompt = totals / np.maximum(counts, 1)
  return {"heldout_loss": float(answer), "heldout_prompt_loss": float(prompt)}


def questions(domain: tokenized_corpus.Domain, most: int) -> list[Question]:
  """Returns the first answers of held-out samples, each with its context."""
  ids, supervised = token_file.split_flags(
    domain.heldout.open(), domain.heldout
  )
  edges = np.flatnonzero(np.diff(supervised, prepend=False, append=False))
  begins = np.flatnonzero(ids == tokenizer.BOS_ID)
  found = []
  for start, end in edges.reshape(-1, 2)[:most]:
    begin = begins[begins <= start][-1]
    prompt, answer = ids[begin:start], ids[start : end - 1]
    found.append(Question(prompt.tolist(), answer.tolist()))
  return found


def answer(
  generator: engine.Engine, asked: Sequence[Question]
) -> list[list[int] | None]:
  """Generates answers greedily; None for one that does not end.

  An answer may be twice as long as the one expected, and 8 tokens more.
  """
  requests = [
    GenerationRequest(
      question.prompt,
      max_tokens=max_tokens(question),
      temperature=0,
      stop_token_ids=(tokenizer.EOS_ID,),
    )
    for question in asked
  ]
  answers: list[list[int] | None] = [[] for _ in asked]
  first = generator.submitted
  for event in generator.run(requests):
    i = event.index - first
    if event.finish_reason == engine.LENGTH:
      answers[i] = None
    elif not event.finish_reason:
      answers[i].append(event.token)
  return answers


def exact_match(
  expected: Sequence[str], generated: Sequence[str | None]
) -> dict[str, float]:
  """Returns `heldout_exact_match`, the share of answers that match.

  White space around them does not count; None never matches.
  """
  right = [
    text is not None and text.strip() == answer.strip()
    for answer, text in zip(expected, generated, strict=True)
  ]
  return {"heldout_exact_match": sum(right) / len(right)}


def score_tasks(
  named: Sequence[tasks.Task],
  problems: Sequence[tasks.Problem],
  generated: Sequence[str | None],
) -> dict[str, float]:
  """Returns the mean strict and lenient score of each task.

  The names are `heldout_exact_match/TASK` and `heldout_lenient/TASK`. An answer
  that does not end is None, and scores 0.
  """
  row = {}
  for task in named:
    pairs = [
      (problem, text)
      for problem, text in zip(problems, generated, strict=True)
      if problem.task == task.name
    ]
    for name, score in (
      ("exact_match", task.strict_score),
      ("lenient", task.lenient_score),
    ):
      values = [0 if t is None else score(problem, t) for problem, t in pairs]
      if values:
        row[f"heldout_{name}/{task.name}"] = sum(values) / len(values)
  return row


def max_tokens(question: Question) -> int:
  """Returns how many tokens an answer to a question may have."""
  return 2 * len(question.answer) + 8

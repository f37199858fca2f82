"""Rollouts: groups of answers that the policy generates, and their files."""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax import config, io
from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError
from dsv3_jax.infer import engine
from dsv3_jax.infer.request import GenerationRequest


@dataclasses.dataclass(frozen=True)
class Rollout:
  """An answer, and what the sampler knows about it.

  The prompt has P tokens, the answer N, an end token included.
  """

  prompt: np.ndarray  # [P] int32
  answer: np.ndarray  # [N] int32
  ended: bool  # by an end token; False: cut at the most tokens of an answer
  logprobs: np.ndarray  # [N] f32, under the sampling settings
  kept: np.ndarray | None  # [N, ceil(C / 8)] uint8, bits of tokens kept
  routes: np.ndarray  # [P + N - 1, n_routers, K] int32, see `infer.trace`
  route_tokens: np.ndarray  # [P + N - 1] int32, tokens that the routes are of
  text: str  # of the answer

  def __len__(self) -> int:
    return len(self.prompt) + len(self.answer)


@dataclasses.dataclass(frozen=True)
class Iteration:
  """The rollouts of an iteration, with their rewards."""

  rollouts: list[Rollout]  # of each question its group, one after the other
  rewards: np.ndarray  # [questions, group_size] f64, NaN: failed
  policy_step: int  # optimizer steps of the policy that generated them
  questions: list[str]
  tasks: list[str]  # of the questions
  # Means by name, of what the rewards say, and counts of their errors.
  figures: dict[str, float]


def seed_of(run_seed: int, iteration: int, question: int, answer: int) -> int:
  """Returns the seed of an answer, a function of its place in the run."""
  place = f"{run_seed} {iteration} {question} {answer}".encode()
  return int.from_bytes(hashlib.sha256(place).digest()[:4], "big")


def generate(
  served: engine.Engine,
  tok: Any,
  prompts: Sequence[Sequence[int]],
  seeds: Sequence[int],
  settings: config.Grpo,
) -> list[Rollout]:
  """Generates an answer to each prompt; the engine must trace."""
  requests = [
    GenerationRequest(
      prompt,
      max_tokens=settings.answer_tokens,
      temperature=settings.temperature,
      top_p=settings.top_p,
      top_k=settings.top_k,
      seed=seed,
      stop_token_ids=(tokenizer.EOS_ID,),
    )
    for prompt, seed in zip(prompts, seeds, strict=True)
  ]
  first = served.submitted
  answers: list[list[int]] = [[] for _ in requests]
  result: list[Rollout | None] = [None] * len(requests)
  for event in served.run(requests):
    i = event.index - first
    answers[i].append(event.token)
    if event.finish_reason:
      ended = event.finish_reason == engine.STOP
      text = tok.decode(answers[i][:-1] if ended else answers[i])
      trace = event.trace
      result[i] = Rollout(
        np.asarray(prompts[i], np.int32),
        np.asarray(answers[i], np.int32),
        ended,
        trace.logprobs,
        trace.kept,
        trace.routes,
        trace.tokens,
        text,
      )
  return result


# What reading a file that was cut or changed raises.
_DAMAGES = OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error
_PER_ROLLOUT = "prompt", "answer", "logprobs", "routes", "route_tokens"


def save(path: pathlib.Path, iteration: Iteration) -> None:
  """Writes an iteration, complete or not at all."""
  rollouts = iteration.rollouts
  arrays = {
    name: np.concatenate([getattr(one, name) for one in rollouts])
    for name in _PER_ROLLOUT
  }
  if rollouts[0].kept is not None:
    arrays["kept"] = np.concatenate([one.kept for one in rollouts])
  arrays["ended"] = np.array([one.ended for one in rollouts])
  arrays["lengths"] = np.array(
    [(len(one.prompt), len(one.answer)) for one in rollouts]
  )
  arrays["rewards"] = iteration.rewards
  facts = {
    "policy_step": iteration.policy_step,
    "questions": iteration.questions,
    "tasks": iteration.tasks,
    "figures": iteration.figures,
    "texts": [one.text for one in rollouts],
  }
  arrays["json"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
  path.parent.mkdir(exist_ok=True)
  with io.atomic_write(path, "wb") as file:
    np.savez_compressed(file, **arrays)


def load(path: pathlib.Path) -> Iteration:
  """Reads what `save` has written.

  Raises:
    InputError: the file is missing or damaged.
  """
  try:
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
      arrays = dict(file)
      facts = json.loads(arrays["json"].tobytes())
  except _DAMAGES as error:
    raise InputError(
      f"{path}: cannot be read: {error}; the answers of an iteration that a"
      " checkpoint lies in. Remove the newest checkpoint to go on from before"
    ) from error
  n_prompt, n_answer = arrays["lengths"].T
  sizes = {
    "prompt": n_prompt,
    "answer": n_answer,
    "logprobs": n_answer,
    "routes": n_prompt + n_answer - 1,
    "route_tokens": n_prompt + n_answer - 1,
    "kept": n_answer,
  }
  parts = {
    name: np.split(arrays[name], np.cumsum(n)[:-1])
    for name, n in sizes.items()
    if name in arrays
  }
  rollouts = [
    Rollout(
      **{name: parts[name][i] for name in _PER_ROLLOUT},
      kept=parts["kept"][i] if "kept" in parts else None,
      ended=bool(arrays["ended"][i]),
      text=text,
    )
    for i, text in enumerate(facts.pop("texts"))
  ]
  return Iteration(rollouts, arrays["rewards"], **facts)

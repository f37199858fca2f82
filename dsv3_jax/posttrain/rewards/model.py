"""Reward of a reward model: the score of its scalar head (section 5.2.1)."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers

from dsv3_jax import config
from dsv3_jax.data import chat, conversations, preferences, tokenizer
from dsv3_jax.errors import InputError
from dsv3_jax.evals import hidden
from dsv3_jax.evals import preferences as scoring
from dsv3_jax.interop import open_run
from dsv3_jax.parallel import device_mesh
from dsv3_jax.posttrain.rewards.reward import Reward, RewardFunction, failed


def score(
  model: hidden.EvalModel,
  tok: tokenizers.Tokenizer,
  conversation: Sequence[Mapping[str, str]],
) -> float:
  """Returns the score of a conversation's last answer, at its end token.

  Raises InputError if it is longer than a row of the model's training.
  """
  data = model.run.data
  template = chat.find(data.template)
  sample = preferences.end_sample(
    tok, conversations.Conversation(tuple(conversation)), template
  )
  conversations.check_length(n := len(sample.ids), data.seq_len)
  rows = np.zeros((3, 1, data.seq_len + 1), np.int32)
  rows[0] = tokenizer.PAD_ID
  rows[:, 0, :n] = sample.ids, np.ones(n), sample.supervised
  ids, segments, supervised = rows
  scores = scoring.segment_scores(model, ids, segments, supervised.astype(bool))
  return float(scores[0, 0])


def model(folder: str | pathlib.Path) -> RewardFunction:
  """Returns the reward of a run that `experiments.sft --reward_model` trained.

  It is the score itself, of any size: differences between answers to one prompt
  are what the model has learned.

  Raises:
    InputError: the folder holds no reward model.
    MissingError: it has no checkpoint.
  """
  folder = pathlib.Path(folder)
  run = open_run.run_from_config(open_run.read_config(folder))
  if not run.model.reward_head:
    raise InputError(
      f"{folder}: is no reward model; experiments.sft --reward_model trains one"
    )
  run = config.override(run, "evaluate.batch_size=1")
  mesh = device_mesh.make_mesh({})
  params, bias = open_run.load_newest_params(folder, run, mesh)
  tok = tokenizer.load(folder / "data" / "tokenizer.json")
  evaluated = hidden.EvalModel(params, bias, run, mesh)

  def reward(prompt: str, answer: str, reference: str) -> Reward:
    del reference
    conversation = [
      {"role": "user", "content": prompt},
      conversations.parse_answer(answer),
    ]
    try:
      return Reward(score(evaluated, tok, conversation))
    except InputError as error:  # of this answer alone
      return failed(f"not scored: {error}")

  return reward

"""Iterations: rewards and parts of the batches that are made of them."""

import dataclasses
import types
from unittest import mock

import numpy as np
import policy_batch_test
from absl.testing import absltest

from dsv3_jax import config
from dsv3_jax.data import chat, tasks, tokenizer
from dsv3_jax.errors import InputError
from dsv3_jax.infer import engine
from dsv3_jax.posttrain import grpo, questions, rollout
from dsv3_jax.posttrain.rewards.reward import Reward, failed

STATE = types.SimpleNamespace(step=0)
ROUTES = "grpo.replay_routes=false"


def batches(run):
  """Returns batches of a run without its sampler."""
  result = object.__new__(grpo.PolicyBatches)
  result._run, result._settings, result._seed = run, run.grpo, 0
  result._reference = None
  return result


def parts(rewards, *settings, lengths=None):
  """Returns the batches of an iteration of answers with these rewards."""
  rewards = np.array(rewards, float)
  made = batches(config.override(policy_batch_test.RUN, ROUTES, *settings))
  given = policy_batch_test.rollouts(rewards.size, kept=False)
  if lengths is not None:
    given = [
      dataclasses.replace(
        one, answer=np.full(n, 9, np.int32), logprobs=-np.ones(n, np.float32)
      )
      for one, n in zip(given, lengths, strict=True)
    ]
  made._iteration = rollout.Iteration(given, rewards, 0, [], [], {})
  return made._batches(STATE)


class PartsTest(absltest.TestCase):
  def test_groups_are_filtered_by_what_the_answers_are_worth(self):
    """A penalty of length gives no group of equal answers a part."""
    (batch,) = parts(
      [[1, 1], [0, 1]],
      *("grpo.filter_groups=true", "grpo.overlong_tokens=4"),
      "grpo.answer_tokens=4",
      lengths=[1, 4, 2, 2],
    )
    counted = batch.targets["weights"] != 0
    self.assertEqual(counted.sum(), 2 + 2)

  def test_the_penalty_of_length_counts_tokens(self):
    (batch,) = parts(
      [[1, 1]],
      *("grpo.overlong_tokens=4", "grpo.answer_tokens=4"),
      *("grpo.prompts=1", "grpo.advantage=mean"),
      lengths=[1, 4],
    )
    found = batch.targets["advantages"]
    self.assertEqual(sorted(found[found != 0]), [-0.375] * 4 + [0.375])

  def test_one_answer_is_no_group(self):
    with self.assertRaisesRegex(InputError, "group_size=1.*at least 2"):
      config.override(policy_batch_test.RUN, "grpo.group_size=1")

  def test_each_part_has_the_advantages_of_its_own_answers(self):
    rewards = [[1, 0], [2, 0], [4, 0], [8, 0]]
    settings = "grpo.updates=2", "grpo.prompts=4", "grpo.advantage=mean"
    first, second = parts(rewards, *settings)
    for batch, expected in (first, {0.5, 1.0}), (second, {2.0, 4.0}):
      found = batch.targets["advantages"]
      self.assertEqual({*np.abs(found[found != 0]).tolist()}, expected)


class RewardTest(absltest.TestCase):
  def test_failed_is_not_wrong_and_cut_is(self):
    made = batches(config.override(policy_batch_test.RUN, "grpo.group_size=4"))
    problem = tasks.Problem("t", 0, "1+1=", "2", {})
    made._questions = types.SimpleNamespace(
      tok=None, draw=lambda *_: [problem], encode=lambda _: [0, 9]
    )
    made._engine = lambda *_: None
    made._weights = {"exact": 1.0}
    given = policy_batch_test.rollouts(4)  # 1 and 3 have ended
    texts = iter([Reward(1.0), Reward(1.0), failed("x"), failed("x")])
    made._functions = {"exact": lambda *_: next(texts)}
    with mock.patch.object(rollout, "generate", return_value=given):
      one = made._generate(None, None, 0, 0)
    np.testing.assert_array_equal(one.rewards, [[0, 1, np.nan, np.nan]])
    self.assertEqual(one.figures["reward_failed/exact: x"], 2)


class QuestionTest(absltest.TestCase):
  def test_a_prompt_is_in_the_template(self):
    tok = tokenizer.train(["1+1= 2"], 264)
    asked = questions.Questions([], tok, chat.V3, 0)
    found = asked.encode(tasks.Problem("t", 0, "1+1=", "2", {}))
    self.assertEqual(found[0], tokenizer.BOS_ID)
    self.assertEqual(found.count(tokenizer.BOS_ID), 1)
    text = tok.decode(found, skip_special_tokens=False)
    self.assertTrue(text.endswith(f"{tokenizer.USER}1+1={tokenizer.ASSISTANT}"))


class Scripted:
  """An engine that has served 5 texts, and generates known ones."""

  submitted = 5

  def run(self, requests):
    self.requests = requests
    trace = types.SimpleNamespace(
      logprobs=None, kept=None, routes=None, tokens=None
    )
    for index, token, reason in (
      (6, 11, ""),
      (5, 12, ""),
      (6, 10, engine.LENGTH),
      (5, 3, engine.STOP),  # by another token than the tokenizer's
    ):
      yield engine.Event(index, token, 0.0, reason, trace if reason else None)


class GenerateTest(absltest.TestCase):
  def test_answers_are_the_ids_that_were_drawn(self):
    """A text may have other ids, here a single one."""
    tok = types.SimpleNamespace(
      decode=lambda ids: "-".join(map(str, ids)),
      encode=lambda text, **_: types.SimpleNamespace(ids=[7]),
    )
    settings = config.Grpo(answer_tokens=2)
    served = Scripted()
    first, second = rollout.generate(
      served, tok, [[0, 8], [0, 9]], [1, 2], settings
    )
    self.assertEqual(first.answer.tolist(), [12, 3])
    self.assertEqual(second.answer.tolist(), [11, 10])
    self.assertEqual((first.text, second.text), ("12", "11-10"))
    # At the most tokens both, and yet only the second was cut.
    self.assertEqual((first.ended, second.ended), (True, False))
    self.assertEqual([r.seed for r in served.requests], [1, 2])


if __name__ == "__main__":
  absltest.main()

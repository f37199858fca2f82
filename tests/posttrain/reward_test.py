"""Tests of rewards together: sums, counts of errors, and planted hacks."""

import math
import threading

from absl.testing import absltest, parameterized

from dsv3_jax.errors import InputError
from dsv3_jax.posttrain.rewards import REWARDS, reward
from dsv3_jax.posttrain.rewards.reward import Reward, score_all


def constant(value, **parts):
  return lambda prompt, answer, reference: Reward(value, parts)


def length(prompt, answer, reference):
  return Reward(float(len(answer)))


def fails_on(text, error):
  """A reward that raises on one answer."""

  def fail(prompt, answer, reference):
    if answer == text:
      raise error
    return Reward(1.0)

  return fail


class RewardTest(parameterized.TestCase):
  @parameterized.parameters(
    (math.nan, ""), (math.inf, ""), (0.0, "bad"), (1.0, "bad")
  )
  def test_is_finite_or_has_an_error(self, value, error):
    with self.assertRaisesRegex(ValueError, "finite"):
      Reward(value, {}, error)

  def test_an_error_has_a_kind_and_details(self):
    self.assertEqual(reward.failed("timeout: 3 s").kind, "timeout")


class ScoreAllTest(parameterized.TestCase):
  def score(self, functions, answers="abc", **options):
    return score_all(functions, [("q", a, "r") for a in answers], **options)

  def test_sums_by_weight_and_names_the_parts(self):
    functions = {"a": constant(1.0, x=3.0), "b": constant(0.5)}
    scores = self.score(functions, "a", weights={"b": 4.0})
    self.assertEqual(
      scores.rewards, [Reward(3.0, {"a": 1.0, "b": 0.5, "a/x": 3.0})]
    )
    self.assertEmpty(scores.errors)

  def test_one_failure_moves_no_other_and_is_never_zero(self):
    functions = {"len": length, "bad": fails_on("bb", KeyError("x"))}
    scores = self.score(functions, ["a", "bb", "ccc"])
    values = [r.value for r in scores.rewards]
    self.assertEqual([values[0], values[2]], [2, 4])
    self.assertTrue(math.isnan(values[1]))
    self.assertEqual(scores.rewards[1].error, "bad: KeyError: 'x'")
    self.assertEqual(scores.rewards[1].parts["len"], 2)
    self.assertEqual(scores.errors, {"bad: KeyError": 1})
    self.assertIn("not judged     1", repr(scores))

  @parameterized.parameters(
    (math.nan, "ValueError"), (math.inf, "ValueError"), (None, "TypeError")
  )
  def test_a_value_that_is_no_finite_number(self, value, kind):
    function = lambda prompt, answer, reference: Reward(value)
    scores = self.score({"f": function}, "a")
    self.assertTrue(math.isnan(scores.rewards[0].value))
    self.assertEqual(scores.errors, {f"f: {kind}": 1})

  def test_a_number_is_no_reward(self):
    scores = self.score({"f": lambda *triple: 1.0}, "a")
    self.assertEqual(scores.rewards[0].error, "f: no Reward: returned float")

  def test_one_that_hangs_is_left_behind(self):
    forever = threading.Event()
    self.addCleanup(forever.set)

    def hang(prompt, answer, reference):
      if answer == "b":
        forever.wait()
      return Reward(1.0)

    scores = self.score({"f": hang}, timeout=0.2)
    self.assertEqual([r.kind for r in scores.rewards], ["", "f", ""])
    self.assertEqual(scores.errors, {"f: timeout": 1})

  def test_a_weight_of_zero_only_watches(self):
    functions = {"a": constant(1.0), "b": fails_on("b", OSError())}
    scores = self.score(functions, weights={"b": 0.0})
    self.assertEqual([r.value for r in scores.rewards], [1, 1, 1])
    self.assertTrue(math.isnan(scores.rewards[1].parts["b"]))
    self.assertEqual(scores.errors, {"b: OSError": 1})

  def test_what_a_user_can_mend_is_not_counted(self):
    with self.assertRaisesRegex(InputError, "install"):
      self.score({"f": fails_on("a", InputError("install it"))})

  @parameterized.parameters(
    ({}, {}, "none is given"),
    ({"a": length}, {"b": 1.0}, "weights of b: must be of a"),
    ({"a": length}, {"a": math.nan}, "weights of a: must be finite"),
  )
  def test_refuses(self, functions, weights, message):
    with self.assertRaisesRegex(InputError, message):
      self.score(functions, weights=weights)

  def test_no_answers(self):
    self.assertEmpty(self.score({"a": length}, "").rewards)


class HackTest(parameterized.TestCase):
  """Hacks that are planted move the reward of correctness by nothing."""

  QUESTION = "Natalia has 17 bags of 23 marbles. What is 17 * 23?"

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.correctness = staticmethod(REWARDS["correctness"]())

  @parameterized.parameters("391", "390")
  def test_length_format_and_echo(self, number):
    plain = self.correctness(self.QUESTION, number, "391")
    long = "Let me check this again and again. " * 500
    for hack in (
      f"{long}\n{number}",
      f"<think>{long}</think>\n<answer>{number}</answer>",
      f"<think>It must be 391, no 390.</think>\n\\boxed{{{number}}}",
      f"{self.QUESTION}\n{number}",
    ):
      self.assertEqual(self.correctness(self.QUESTION, hack, "391"), plain)

  @parameterized.parameters(
    QUESTION,
    f"<think>{QUESTION}</think>{QUESTION}",
    f"<answer>{QUESTION}</answer>",
    "\\boxed{17 * 23}",
    "17*23",
    "17 \\times 23",
    "17 * 23 + 0",
    "The answer is 17*23.",
    "\\boxed{390 or 391}",
    "390, 391",
    "390 391",
    "\\boxed{391}\n\\boxed{390}",
    "<think>391</think>",
    "<think>391",
    "",
    "\\boxed{}",
  )
  def test_what_does_not_answer_is_wrong(self, hack):
    self.assertEqual(self.correctness(self.QUESTION, hack, "391").value, 0)


if __name__ == "__main__":
  absltest.main()

"""Tests of the final answer of a reply, and of what equals the reference."""

import threading
from unittest import mock

from absl.testing import absltest, parameterized

from dsv3_jax.errors import InputError
from dsv3_jax.posttrain.rewards import answer, expressions
from dsv3_jax.posttrain.rewards.reward import score_all


class FinalAnswerTest(parameterized.TestCase):
  @parameterized.parameters(
    (r"so \boxed{41}, no: \boxed{42}.", "42"),
    (r"\boxed{\frac{\sqrt{3}}{2}} is it", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\text{Friday}}", "Friday"),
    ("<answer>41</answer> <answer> 42 </answer> bye", "42"),
    (r"<answer>It is \boxed{42}</answer>", "42"),
    ("<think>\\boxed{1}</think>\nThe answer is **42**.", "42"),
    ("a line\n\n#### 42\n\n", "42"),
    ("Therefore, the final answer is: $42$.", "42"),
    ("Answer: $$x = 3$$", "x = 3"),
    ("$1$ and $2$", "$1$ and $2$"),
    ("42", "42"),
    ("3.5", "3.5"),
  )
  def test_is_what_a_reader_takes_for_it(self, reply, expected):
    self.assertEqual(answer.final_answer(reply), expected)

  @parameterized.parameters(
    "", "  \n", r"\boxed{}", r"\boxed{4", "<think>42", "<think>42</think>", "."
  )
  def test_or_there_is_none(self, reply):
    self.assertIsNone(answer.final_answer(reply))

  def test_takes_no_time_over_tags_without_end(self):
    self.assertIsNotNone(answer.final_answer("<answer>" * 100_000))


class CorrectnessTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.correctness = staticmethod(answer.correctness())

  def value(self, reply, reference, prompt=""):
    reward = self.correctness(prompt, reply, reference)
    self.assertEqual(reward.error, "")
    return reward.value

  @parameterized.parameters(
    ("1,234", "1234"),
    ("+7.", "7"),
    ("007", "7"),
    ("391.0", "391"),
    ("-\\frac{1}{2}", "-1/2"),
    ("0.5", "\\frac12"),
    ("2/4", "1/2"),
    ("0.333333", "1/3"),
    ("50\\%", "0.5"),
    ("1 \\times 10^{3}", "1000"),
    ("x = 42", "42"),
    ("12 + 30 = 42", "42"),
    ("TRUE", "true"),
    ("(x+1)^2", "x^2 + 2x + 1"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("(1, 1/2)", "(1,0.5)"),
    ("1, 2,3", "1,2,3"),
    ("\\{2, 1\\}", "\\{1, 2\\}"),
    ("1 2 3", "1  2 3"),
    ("42", "so 6 * 7 = 42\n#### 42"),
  )
  def test_equal(self, reply, reference):
    self.assertEqual(self.value(reply, reference), 1)

  @parameterized.parameters(
    ("43", "42"),
    ("3,2,1", "1,2,3"),  # math-verify: sets
    ("3 2 1", "1 2 3"),  # math-verify: products
    ("1 2 3", "123"),
    ("act", "cat"),
    ("on", "no"),
    ("(1, 2]", "[1, 2]"),
    ("6/2", "3"),
    ("1 + 2", "3"),
    ("42 = 40 + 2", "42"),
    ("x", "y"),
    ("9^{9^{9^{9}}}", "3"),
    ("1" * 5000, "1"),
    ("1/0", "2"),
    ("\\frac{", "4"),
    ("1,2,3", "1,,3"),
  )
  def test_unequal(self, reply, reference):
    self.assertEqual(self.value(reply, reference), 0)

  def test_an_expression_of_the_question_is_no_answer(self):
    asked = "Simplify $\\sqrt{8}$ and $4/8$."
    self.assertEqual(self.value("\\sqrt{8}", "2\\sqrt{2}", asked), 0)
    self.assertEqual(self.value("4/8", "1/2", asked), 0)
    self.assertEqual(self.value("2\\sqrt{2}", "\\sqrt{8}", asked), 1)

  def test_but_a_number_of_it_can_be(self):
    asked = "Which is larger, 0.5 or 1/3?"
    self.assertEqual(self.value("0.5", "1/2", asked), 1)

  def test_says_whether_there_is_an_answer(self):
    parts = [self.correctness("", a, "4").parts for a in ("5", "")]
    self.assertEqual(parts, [{"answered": 1.0}, {"answered": 0.0}])

  def test_no_reference_is_an_error(self):
    self.assertEqual(self.correctness("", "4", " ").error, "no reference")

  def test_in_a_thread_as_in_the_main_one(self):
    # math-verify's own time limits fail there: every reward would be 0.
    results = []
    work = lambda: results.append(self.value("(x+1)^2", "x^2+2x+1"))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    self.assertEqual(results, [1])


class LimitTest(absltest.TestCase):
  """A comparison without end is an error with a name, and the next one runs."""

  def test_a_timeout_is_counted_and_the_next_one_is_right(self):
    correctness = answer.correctness(timeout=1.0)
    triples = [
      ("", "(x+y)^{3000}", "x+y"),
      ("", "(x+1)^2", "x^2+2x+1"),
      ("", "4", "4"),
    ]
    scores = score_all({"correctness": correctness}, triples)
    self.assertEqual([r.value for r in scores.rewards[1:]], [1, 1])
    self.assertRegex(scores.rewards[0].error, "correctness: timeout: .* 1 s")
    self.assertEqual(scores.errors, {"correctness: timeout": 1})

  def test_a_dead_worker_too(self):
    comparer = expressions.ExpressionComparer(60.0)
    comparer._process.kill()
    comparer._process.wait()
    self.assertStartsWith(comparer.equal("x", "y")[1], "worker ended")
    self.assertEqual(comparer.equal("x", "y"), (False, ""))
    comparer.close()

  def test_without_the_package(self):
    ready = {"missing": "No module named 'math_verify'"}
    with (
      mock.patch.object(
        expressions.ExpressionComparer, "_read", return_value=ready
      ),
      self.assertRaisesRegex(
        InputError, r"pip install 'dsv3_jax\[posttrain\]'"
      ),
    ):
      answer.correctness()


if __name__ == "__main__":
  absltest.main()

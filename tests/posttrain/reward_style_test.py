"""Tests of the rewards of format and of language consistency."""

from absl.testing import absltest, parameterized

from dsv3_jax.errors import InputError
from dsv3_jax.posttrain.rewards import REWARDS


class FormatTest(parameterized.TestCase):
  def value(self, reply, **options):
    return REWARDS["format"](**options)("q", reply, "r").value

  @parameterized.parameters(
    ("<think>because</think>42", {}),
    (" <think>\nbecause\n</think>\n\n42\n", {}),
    ("because</think>42", {"opened": True}),
    ("42", {"thinking": False}),
    ("<think>a</think> <answer>42</answer> ", {"tagged": True}),
    ("<answer>42</answer>", {"thinking": False, "tagged": True}),
  )
  def test_right(self, reply, options):
    self.assertEqual(self.value(reply, **options), 1)

  @parameterized.parameters(
    ("42", {}),
    ("", {}),
    ("<think>because 42", {}),
    ("<think>because</think>", {}),
    ("<think> </think>42", {}),
    ("because</think>42", {}),
    ("</think>because<think>42", {}),
    ("so <think>because</think>42", {}),
    ("<think>a</think>42<think>b</think>", {}),
    ("<think>a<think>b</think>42", {}),
    ("<think>a</think></think>42", {}),
    ("<think>because</think>42", {"opened": True}),
    ("<think>because</think>42", {"thinking": False}),
    ("42</think>", {"thinking": False}),
    (" ", {"thinking": False}),
    ("<think>a</think>42", {"tagged": True}),
    ("<think>a</think><answer></answer>", {"tagged": True}),
    ("<think>a</think><answer>42</answer> yes", {"tagged": True}),
    ("<think>a</think><answer>", {"tagged": True}),
    ("<think>a</think><answer>1</answer><answer>2</answer>", {"tagged": True}),
  )
  def test_wrong(self, reply, options):
    self.assertEqual(self.value(reply, **options), 0)

  def test_parts_say_which_rule_is_broken(self):
    reward = REWARDS["format"]()("q", "<think>a</think>", "r")
    self.assertEqual(reward.parts, {"thinking": 1.0, "answer": 0.0})


class LanguageTest(parameterized.TestCase):
  def reward(self, target, text):
    return REWARDS["language"](target)("q", text, "r")

  @parameterized.parameters(
    ("en", "We add the two numbers: 17 + 23 = 40."),
    ("zh", "我们把两个数相加。"),
    ("ja", "コーヒーをのむ、東京で。"),
    ("ko", "두 수를 더합니다"),
    ("ru", "Сложим два числа"),
    ("zh", "所以 $x = \\frac{\\pi}{2}$，n 是 3。"),
    ("zh", "程序：\n```python\nprint('hello world')\n```\n结束"),
    ("zh", "<think>所以</think>答案"),
    ("en", "ｆｕｌｌ ｗｉｄｔｈ"),
    ("en", "the angle α is small"),
    ("en", "42"),
    ("en", ""),
  )
  def test_one_language(self, target, text):
    self.assertEqual(self.reward(target, text).value, 1)

  def test_is_the_share_of_words(self):
    mixed = "first we add 我们相加 then stop"
    self.assertEqual(self.reward("en", mixed).value, 5 / 9)
    self.assertEqual(self.reward("zh", mixed).value, 4 / 9)
    self.assertEqual(self.reward("en", mixed).parts, {"words": 9})

  def test_falls_with_each_word_of_another_language(self):
    values = [
      self.reward("en", "one two three four" + " число" * n).value
      for n in range(5)
    ]
    self.assertSequenceEqual(values, sorted(set(values), reverse=True))

  def test_a_word_of_two_scripts_counts_for_both(self):
    self.assertEqual(self.reward("en", "helлo").value, 0.5)

  def test_refuses_a_language_it_does_not_know(self):
    with self.assertRaisesRegex(InputError, "'xx': must be one of ar, de"):
      REWARDS["language"]("xx")


if __name__ == "__main__":
  absltest.main()

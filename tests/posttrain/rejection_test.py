"""Answers that are kept, and the rules that refuse the others."""

import types

import numpy as np
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.data import chat, conversations, token_file
from dsv3_jax.errors import InputError
from dsv3_jax.evals import answers
from dsv3_jax.infer import engine, generate
from dsv3_jax.posttrain import rejection
from dsv3_jax.posttrain.rewards import by_name, reward
from experiments import reject


def text(content, finish_reason=engine.STOP):
  result = generate.GeneratedText()
  result.add(generate.Chunk(0, content, 9, 0.0, finish_reason))
  return result


QUESTION = rejection.Question([{"role": "user", "content": "3+4="}], "7")


def broken(prompt, answer, reference):
  raise RuntimeError("is broken")


class SelectTest(parameterized.TestCase):
  def select(self, texts, keep=1, **functions):
    functions = functions or {"exact": by_name.exact}
    rules = rejection.Rules(dict.fromkeys(functions, 1.0), keep)
    return rejection.select([QUESTION], [texts], functions, rules)

  def test_each_rule_is_counted(self):
    texts = [
      text("7"),
      text(" 7"),
      text("7"),
      text("8"),
      text("  "),
      text("7", engine.LENGTH),
    ]
    kept = self.select(texts)
    expected = {"kept": 1, "enough": 1, "duplicate": 1, "below exact": 1}
    self.assertEqual(kept.counts, expected | {"empty": 1, "unended": 1})
    self.assertEqual(kept.solved, 1)
    (row,) = kept.rows
    self.assertEmpty(conversations.validate(row))
    self.assertEqual(row["messages"][-1]["content"], "7")
    self.assertEqual(row["rewards"], {"exact": 1.0})

  def test_a_reward_that_fails_is_no_bad_answer(self):
    kept = self.select([text("7")], broken=broken)
    self.assertEqual(kept.counts, {"broken: error": 1})
    self.assertEmpty(kept.rows)

  def test_most_answers_to_a_question(self):
    self.assertEqual(self.select([text("7"), text("7 ")], 2).counts["kept"], 2)

  def test_wrong_rules(self):
    functions = {"exact": by_name.exact}
    with self.assertRaisesRegex(InputError, "x: must be of exact"):
      rejection.validate(functions, rejection.Rules({"x": 1.0}))
    with self.assertRaisesRegex(InputError, "keep=0"):
      rejection.validate(functions, rejection.Rules({}, 0))

  @parameterized.parameters(("7", 1), (" 7\n", 1), ("7.", 0), ("17", 0))
  def test_exact(self, answer, value):
    self.assertEqual(by_name.exact("3+4=", answer, "7"), reward.Reward(value))


class ExcludeTest(absltest.TestCase):
  QUESTIONS = (
    QUESTION,
    rejection.Question([{"role": "user", "content": "1+1="}], "2"),
  )

  def excluded(self, *rows):
    path = testing.folder(self) / "heldout.jsonl"
    conversations.write(path, rows)
    return reject.exclude(list(self.QUESTIONS), str(path))

  def test_questions_of_the_file_are_not_asked(self):
    left = self.excluded({"prompt": "3+4=", "response": "7"})
    self.assertEqual([one.prompt for one in left], ["1+1="])
    same = reject.exclude(list(self.QUESTIONS), "")
    self.assertEqual(same, list(self.QUESTIONS))

  def test_none_left(self):
    rows = [{"prompt": one.prompt, "response": "?"} for one in self.QUESTIONS]
    with self.assertRaisesRegex(InputError, "all of the 2 questions"):
      self.excluded(*rows)

  def test_question_with_a_system_prompt_of_its_own(self):
    path = testing.folder(self) / "asked.jsonl"
    row = {"system": "Be brief.", "prompt": "3+4=", "response": "7"}
    conversations.write(path, [row])
    args = types.SimpleNamespace(
      reject=str(path), rewards="exact=1", exclude="", system_prompt="Reflect."
    )
    with self.assertRaisesRegex(InputError, "already, 'Be brief.'"):
      reject.write(None, args, {})


class FlagTest(parameterized.TestCase):
  @parameterized.parameters(
    ("exact=1", {"exact": 1.0}),
    ("correctness,language=0.9", {"correctness": 1.0, "language": 0.9}),
  )
  def test_rewards(self, given, minimums):
    self.assertEqual(by_name.parse(given), minimums)

  def test_wrong_rewards_are_named(self):
    with self.assertRaises(InputError) as caught:
      by_name.parse("exact=x,exct=1")
    self.assertLen(str(caught.exception).splitlines(), 2)

  @parameterized.parameters(
    ("plain", False, False),
    ("v3", False, False),
    ("v3.1", False, False),
    ("v3.1-thinking", True, True),
    ("r1", True, True),
  )
  def test_format_is_that_of_the_template(self, name, thinking, opened):
    """R1's template writes <think>, which a reply therefore has not."""
    defaults = types.SimpleNamespace(template=chat.TEMPLATES[name])
    generator = types.SimpleNamespace(defaults=defaults)
    options = {"thinking": False, "opened": False}
    options |= reject.format_options(None, generator)
    self.assertEqual(options, {"thinking": thinking, "opened": opened})


class QuestionsTest(absltest.TestCase):
  def test_contexts_and_answers_of_samples(self):
    ids = np.array([0, 9, 6, 7, 1, 9, 8, 1, 0, 5, 4, 1], np.uint32)
    flags = np.array([0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1], np.uint32)
    file = types.SimpleNamespace(
      supervised=True, open=lambda: ids | flags * token_file.FLAG
    )
    domain = types.SimpleNamespace(heldout=file)
    found = answers.questions(domain, 9)
    expected = [([0, 9, 6], [7]), ([0, 9, 6, 7, 1, 9], [8]), ([0, 5], [4])]
    self.assertEqual([(q.prompt, q.answer) for q in found], expected)
    self.assertLen(answers.questions(domain, 2), 2)

  def test_exact_match(self):
    row = answers.exact_match(["7", "8", "9"], [" 7", "88", None])
    self.assertEqual(row, {"heldout_exact_match": 1 / 3})


if __name__ == "__main__":
  absltest.main()

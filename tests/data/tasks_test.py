"""Tasks: what text asks for, splits without a common prompt, scores."""

import importlib.util
from unittest import mock

import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import errors
from dsv3_jax.data import conversations, tasks

needs_package = pytest.mark.skipif(
  importlib.util.find_spec("reasoning_gym") is None,
  reason=f"not installed: pip install {tasks.PACKAGE} (needs a C compiler)",
)
SUMS = "chain_sum:max_terms=2:min_digits=2:max_digits=2:prompt=short"


@needs_package
class ParseTest(parameterized.TestCase):
  def test_names_and_settings(self):
    first, second = tasks.parse(
      "number_sorting:max_value=9.5, chain_sum:allow_negation=true:prompt=short"
    )
    self.assertEqual(
      first, tasks.Task("number_sorting", (("max_value", 9.5),), "full")
    )
    self.assertEqual(
      second, tasks.Task("chain_sum", (("allow_negation", True),), "short")
    )

  @parameterized.parameters(
    ("chain_sums", "is no task of reasoning-gym==.*mean 'chain_sum'"),
    ("", "is no task of .*; there are 1"),
    ("chain_sum,", "is no task"),
    ("chain_sum,chain_sum", "chain_sum: is there twice"),
    ("chain_sum:max_digit=2", "mean 'max_digits'"),
    ("chain_sum:seed=2", "setting='seed': must be one of prompt, n, min_terms"),
    ("chain_sum:max_digits", "'max_digits': must be setting=value"),
    ("chain_sum:max_digits=2.5", "max_digits='2.5': must be int"),
    ("chain_sum:allow_negation=yes", "'yes': must be bool"),
    ("chain_sum:max_digits=0", "max_digits=0: max_digits must be >= min_dig"),
    ("chain_sum:prompt=brief", "prompt='brief': must be one of full, short"),
    ("chain_sum:n=0", "n='0': must be 1 to 1,048,576"),
    ("chain_sum:n=x:max_digits=1:m", "n='x': must be 1 to.*\n.*'m': must be"),
    ("lcm:prompt=short", "prompt='short': must be one of full"),
    ("acre", "acre: makes all of its problems"),
    ("ransom_note", "ransom_note: .* differ between processes"),
    ("graph_color", "graph_color: has problems with several right answers"),
    ("word_ladder", "word_ladder: its settings: Dataset size too large"),
    ("word_sorting:transformation=lower", "transformation: cannot be set"),
  )
  def test_refuses(self, text, message):
    with self.assertRaisesRegex(errors.InputError, message):
      tasks.parse(text)

  def test_lists_all_problems(self):
    with self.assertRaises(errors.InputError) as caught:
      tasks.parse("chain_sum:a=1:b=2,nothing")
    self.assertLen(str(caught.exception).splitlines(), 3)


@needs_package
class ProblemsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("chain_sum", r"^\d+([+-]\d+)+=$"),
    ("number_sorting", r"^(a|de)scending: -?[\d.]+(, -?[\d.]+)*$"),
    ("base_conversion", r"^[0-9a-f]+, \d+ to \d+$"),
    ("number_filtering", r"^(keep|remove) (larg|small)er -?[\d.]+: -?\d"),
    ("gcd", r"^gcd \d+(, \d+)+$"),
  )
  def test_short_prompts(self, name, pattern):
    (task,) = tasks.parse(f"{name}:prompt=short")
    (full,) = tasks.parse(name)
    for i in range(20):
      problem = task.problem(0, "train", i)
      self.assertRegex(problem.prompt, pattern)
      self.assertEqual(problem.answer, full.problem(0, "train", i).answer)

  def test_a_problem_is_a_function_of_seed_split_and_index(self):
    (task,) = tasks.parse("chain_sum:min_terms=5:min_digits=4")
    keys = [
      (s, split, i)
      for s in (0, 1)
      for split in tasks.SPLITS
      for i in (0, 1, 2, tasks.MAX_PROBLEMS - 1)
    ]
    first = {key: task.problem(*key) for key in keys}
    again = {key: task.problem(*key) for key in reversed(keys)}
    self.assertEqual(first, again)
    # Neighbouring seeds, splits and indices have no problem in common.
    self.assertLen({problem.prompt for problem in first.values()}, len(keys))

  def test_refuses_numbers_out_of_range(self):
    (task,) = tasks.parse("chain_sum")
    for seed, index in ((-1, 0), (tasks.MAX_SEED, 0), (0, tasks.MAX_PROBLEMS)):
      with self.assertRaisesRegex(errors.InputError, "must be in"):
        task.problem(seed, "train", index)

  def test_splits_have_no_prompt_in_common_and_count_what_they_leave_out(self):
    # There are 200 such sums.
    several = tasks.parse(
      "chain_sum:max_terms=2:max_digits=1,number_sorting:max_numbers=3"
    )
    split = tasks.split(several, 7, 300, 50)
    prompts = [
      [p.prompt for p in part] for part in (split.train, split.heldout)
    ]
    self.assertEmpty(set(prompts[0]) & set(prompts[1]))
    self.assertLen(set(prompts[1]), len(prompts[1]))
    counts = split.counts["chain_sum"]
    self.assertGreater(counts["train_held_out"], 30)
    self.assertGreater(counts["train_repeated"], 30)
    self.assertGreater(counts["heldout_repeated"], 0)
    sums = [p.prompt for p in split.train if p.task == "chain_sum"]
    self.assertEqual(counts["train_repeated"], len(sums) - len(set(sums)))
    self.assertEqual(counts["train"] + counts["train_held_out"], 300)
    self.assertEqual(counts["heldout"] + counts["heldout_repeated"], 50)
    for part, name in ((split.train, "train"), (split.heldout, "heldout")):
      for task in several:
        self.assertEqual(
          sum(p.task == task.name for p in part), split.counts[task.name][name]
        )
    # Tasks take turns.
    self.assertEqual(
      [p.task for p in split.train[:4]], ["chain_sum", "number_sorting"] * 2
    )

  def test_a_task_may_say_how_many_problems_it_has(self):
    several = tasks.parse("chain_sum:n=3,number_sorting")
    split = tasks.split(several, 0, 2, 1)
    self.assertEqual(
      [p.task for p in split.train],
      ["chain_sum", "number_sorting"] * 2 + ["chain_sum"],
    )

  def test_refuses_a_task_that_is_held_out_as_a_whole(self):
    (task,) = tasks.parse("chain_sum:min_terms=1:max_terms=1:max_digits=1")
    with self.assertRaisesRegex(errors.InputError, "all of its 9 problems are"):
      tasks.split([task], 0, 9, 400)

  def test_rows_are_conversations(self):
    split = tasks.split(tasks.parse(SUMS), 0, 5, 3)
    path = testing.folder(self) / "train.jsonl"
    conversations.write(path, tasks.rows(split.train))
    for found, problem in zip(
      conversations.read(path), split.train, strict=True
    ):
      question, answer = found.messages
      self.assertEqual(question["content"], problem.prompt)
      self.assertEqual(answer["content"], problem.answer)
      self.assertEqual(found.extra["task"], "chain_sum")


@needs_package
class ScoresTest(parameterized.TestCase):
  @parameterized.parameters(
    ("{}", 1, 1),
    (" {}\n", 1, 1),
    ("+{}.0", 0, 1),
    ("so <answer>1</answer> or <answer> {}.0 </answer>", 0, 1),
    ("<think>7 <answer>7</answer></think>{}", 0, 1),
    ("1{}", 0, 2 / 3),  # the task's own: half right
    ("", 0, 0),
    ("?", 0, 0),
  )
  def test_strict_and_lenient(self, text, strict, lenient):
    (task,) = tasks.parse(
      "chain_sum:min_terms=1:max_terms=1:min_digits=2:max_digits=2"
    )
    problem = task.problem(0, "heldout", 3)
    text = text.format(problem.answer)
    self.assertEqual(task.strict_score(problem, text), strict)
    self.assertAlmostEqual(task.lenient_score(problem, text), lenient)

  @parameterized.parameters("number_sorting", "base_conversion", SUMS)
  def test_answers_are_right(self, text):
    (task,) = tasks.parse(text)
    for i in range(10):
      problem = task.problem(3, "train", i)
      for score in task.strict_score, task.lenient_score:
        self.assertEqual(score(problem, problem.answer), 1)


class WithoutThePackageTest(absltest.TestCase):
  def test_says_what_to_install(self):
    tasks._package.cache_clear()
    self.addCleanup(tasks._package.cache_clear)
    with mock.patch.dict("sys.modules", {"reasoning_gym": None}):
      with self.assertRaisesRegex(
        errors.InputError, "pip install reasoning-gym==0.1.25.*C compiler"
      ):
        tasks.parse("chain_sum")


if __name__ == "__main__":
  absltest.main()

"""The two types of samples: what is asked, what is kept, what is left out."""

from types import SimpleNamespace

import testing
from absl.testing import absltest

from dsv3_jax.data import chat, conversations
from dsv3_jax.infer.generate import Chunk
from dsv3_jax.posttrain import sample_types


class Scripted:
  """A generator of known texts, which come a word at a time and interleaved."""

  def __init__(self, *texts, template=chat.V3):
    self.texts, self.requests = texts, []
    self.defaults = SimpleNamespace(template=template)

  def stream(self, requests):
    self.requests += requests
    for i, (text, _) in enumerate(self.texts):
      if text:
        yield Chunk(i, text, 5, 0.0, "")
    for i, (_, end) in enumerate(self.texts):
      yield Chunk(i, "", 1, 0.0, end)


PROBLEMS = [(f"{i}+{i}?", str(2 * i)) for i in range(4)]


class BuildTest(absltest.TestCase):
  def test_rows_of_both_types(self):
    generator = Scripted(
      ("so 0", "stop"),
      ("so", "length"),
      (" \n", "stop"),
      ("r</think>6", "stop"),
    )
    rows, counts = sample_types.build(
      generator, PROBLEMS, {"seed": 2**32 - 1, "max_tokens": 9}, "Reflect."
    )
    self.assertEqual(
      counts, {"original": 4, "reflective": 2, "unended": 1, "empty": 1}
    )
    self.assertEqual([r["type"][0] for r in rows], list("orooor"))
    user = {"role": "user", "content": "3+3?"}
    system = {"role": "system", "content": "Reflect."}
    answer = {"role": "assistant", "content": "6"}
    self.assertEqual(rows[-2]["messages"], [user, answer])
    long_answer = {**answer, "reasoning_content": "r"}
    self.assertEqual(rows[-1]["messages"], [system, user, long_answer])
    # The context that is trained on is that of the engine.
    self.assertEqual(generator.requests[3].prompt, [system, user])
    seeds = [request.seed for request in generator.requests]
    self.assertEqual(seeds, [2**32 - 1, 0, 1, 2])
    path = testing.folder(self) / "rows.jsonl"
    conversations.write(path, rows)
    self.assertLen(conversations.read(path), 6)

  def test_reasoning_without_an_end_is_no_answer(self):
    generator = Scripted(("so 0", "stop"), template=chat.find("r1"))
    _, counts = sample_types.build(generator, PROBLEMS[:1], {})
    self.assertEqual(counts, {"original": 1, "unended": 1})

  def test_good_answers_make_rows_of_both_types(self):
    user = {"role": "user", "content": "3+3?"}
    other = {"role": "user", "content": "4+4?"}
    kept = [
      {"messages": [asked, answer(text)], "reference": right, "rewards": {}}
      for asked, text, right in (
        (user, "six", "6"),
        (user, "it is 6", "6"),
        (other, "8", "8"),
      )
    ]
    rows = sample_types.of_answers(kept, "Reflect.")
    system = {"role": "system", "content": "Reflect."}
    self.assertEqual(
      [(row["type"][0], row["messages"]) for row in rows],
      [
        ("o", [user, answer("6")]),
        ("r", [system, user, answer("six")]),
        ("r", [system, user, answer("it is 6")]),
        ("o", [other, answer("8")]),
        ("r", [system, other, answer("8")]),
      ],
    )
    conversations.write(testing.folder(self) / "rows.jsonl", rows)


def answer(text):
  return {"role": "assistant", "content": text}


if __name__ == "__main__":
  absltest.main()

"""Samples of conversations are what the engine sees; files are refused."""

import functools
import itertools
import json
import random

import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import errors
from dsv3_jax.data import chat, conversations, tokenizer

_PIECES = (
  *("a", "b ", " the", "7", "12", "\n", "\n\n", " ", "你好", "é", "🙂", "\r\n"),
  *("<think>", "{{ x }}", "{% if %}", "\\n", "\U000f0000"),
  *tokenizer.SPECIAL,
)


@functools.cache
def small():
  return tokenizer.train(["the cat <think> ab 12 \n\n" * 9], 300)


def random_text(rng, least=0):
  return "".join(rng.choices(_PIECES, k=rng.randint(least, 6)))


def random_conversation(rng, template):
  """A conversation of 1 to 6 turns; answers reason if the template can."""
  messages = []
  if rng.random() < 0.5:
    messages.append({"role": "system", "content": random_text(rng)})
  for _ in range(rng.randint(1, 6)):
    messages.append({"role": "user", "content": random_text(rng)})
    answer = {"role": "assistant", "content": "x" + random_text(rng)}
    if template.reasoning and rng.random() < 0.5:
      answer["reasoning_content"] = random_text(rng, 1)
      if rng.random() < 0.2:  # in an answer after reasoning it may stand
        answer["content"] += "</think>y"
    messages.append(answer)
  return conversations.Conversation(tuple(messages))


def expected_turns(tok, conversation, template):
  """(context as the engine sees it, answer with its end) of each answer."""
  for i, message in enumerate(conversation.messages):
    if message["role"] == "assistant":
      reasoning = message.get("reasoning_content", "")
      name = next(n for n, t in chat.TEMPLATES.items() if t is template)
      if name.startswith("v3.1"):
        name = "v3.1-thinking" if reasoning else "v3.1"
      text = {
        "plain": f"<think>{reasoning}</think>" if reasoning else "",
        "v3": "",
        "v3.1": "",
        "v3.1-thinking": f"{reasoning}</think>",
        "r1": f"{reasoning}\n</think>\n\n",
      }[name] + message["content"]
      context = chat.encode(
        tok, conversation.messages[:i], template=chat.TEMPLATES[name]
      )
      answer = tok.encode(text, add_special_tokens=False).ids
      yield context, [*answer, tokenizer.EOS_ID]


def spans(sample):
  """[start, end) of the supervised answers of a sample, split at their ends."""
  start = None
  for i, (token, on) in enumerate(
    zip(sample.ids, sample.supervised, strict=True)
  ):
    if not on:
      continue
    start = i if start is None else start
    if token == tokenizer.EOS_ID:
      yield start, i + 1
      start = None
  assert start is None, "an answer without an end"


class InvariantTest(parameterized.TestCase):
  """Tests samples of random conversations against contexts of the engine."""

  def check(self, tok, name, n):
    rng, template = random.Random(name), chat.TEMPLATES[name]
    for _ in range(n):
      conversation = random_conversation(rng, template)
      found = conversations.samples(tok, conversation, template)
      turns = list(expected_turns(tok, conversation, template))
      supervised = [(s, span) for s in found for span in spans(s)]
      self.assertLen(supervised, len(turns))
      for (sample, (start, end)), (context, answer) in zip(
        supervised, turns, strict=True
      ):
        self.assertEqual(sample.ids[:start].tolist(), context)
        self.assertEqual(sample.ids[start:end].tolist(), answer)
      self.assertEqual(
        sum(s.supervised.sum() for s in found),
        sum(len(answer) for _, answer in turns),
      )
      for sample in found:
        self.assertEqual(sample.ids.dtype, np.int32)
        self.assertEqual(sample.ids[0], tokenizer.BOS_ID)
        self.assertEqual((sample.ids == tokenizer.BOS_ID).sum(), 1)
        self.assertEqual(sample.supervised[-1], True)

  @parameterized.parameters(*chat.TEMPLATES)
  def test_trained_ids_are_those_that_the_engine_sees(self, name):
    self.check(small(), name, 200)

  @parameterized.parameters(*chat.TEMPLATES)
  @pytest.mark.slow
  def test_with_the_released_tokenizer(self, name):
    self.check(tokenizer.deepseek(), name, 1000)


class SamplesTest(parameterized.TestCase):
  def samples(self, name, *turns, tok=None):
    """Samples of turns: a question, perhaps reasoning, an answer."""
    messages = []
    for question, *reasoning, answer in turns:
      messages.append({"role": "user", "content": question})
      messages.append({"role": "assistant", "content": answer})
      if reasoning:
        messages[-1]["reasoning_content"] = reasoning[0]
    return conversations.samples(
      tok or small(),
      conversations.Conversation(tuple(messages)),
      chat.find(name),
    )

  @parameterized.parameters(
    # Turns share a sample until reasoning that was dropped divides them.
    ("plain", ("q", "a"), ("q", "r", "b"), ("q", "c"), [3]),
    ("v3", ("q", "a"), ("q", "b"), ("q", "c"), [3]),
    ("v3.1", ("q", "a"), ("q", "b"), ("q", "c"), [3]),
    ("v3.1", ("q", "a"), ("q", "r", "b"), ("q", "c"), [2, 1]),
    ("v3.1", ("q", "r", "a"), ("q", "r", "b"), ("q", "c"), [1, 1, 1]),
    ("v3.1-thinking", ("q", "a"), ("q", "b"), ("q", "r", "c"), [3]),
    ("r1", ("q", "a"), ("q", "r", "b"), ("q", "c"), [1, 1, 1]),
  )
  def test_answers_of_each_sample(self, name, *turns_and_counts):
    *turns, counts = turns_and_counts
    found = self.samples(name, *turns)
    self.assertEqual([len(list(spans(s))) for s in found], counts)

  def test_first_answer_token_and_end_are_supervised_and_headers_are_not(self):
    (sample,) = self.samples("plain", ("q", "a"), ("r", "b"))
    tok = small()
    user, assistant, end, q, a, r, b = map(
      tok.token_to_id,
      (tokenizer.USER, tokenizer.ASSISTANT, tokenizer.EOS, *"qarb"),
    )
    self.assertEqual(
      sample.ids.tolist(),
      [0, user, q, assistant, a, end, user, r, assistant, b, end],
    )
    self.assertEqual(
      sample.supervised.tolist(),
      [False] * 4 + [True] * 2 + [False] * 3 + [True] * 2,
    )

  def test_an_end_token_that_is_padding_is_refused(self):
    template = chat.ChatTemplate(
      tokens=(("bos_token", tokenizer.BOS), ("eos_token", tokenizer.PAD))
    )
    with self.assertRaisesRegex(errors.InputError, "has the id of padding, 2"):
      conversations.all_samples(small(), [], template)

  def test_a_tokenizer_without_the_templates_tokens_is_refused(self):
    template = chat.ChatTemplate(
      tokens=(("bos_token", "<s>"), ("eos_token", tokenizer.EOS))
    )
    with self.assertRaisesRegex(errors.InputError, "no special token <s>"):
      conversations.all_samples(small(), [], template)

  @parameterized.parameters(
    ("{{ messages[0].content }}", "begins with id"),
    ("{{ bos_token + bos_token }}", "it has 2 of them"),
  )
  def test_bos_must_stand_at_the_beginning_alone(self, source, message):
    conversation = conversations.Conversation(
      ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    )
    with self.assertRaisesRegex(errors.InputError, message):
      conversations.samples(small(), conversation, chat.ChatTemplate(source))

  def test_problems_of_all_conversations_have_their_lines(self):
    messages = (
      {"role": "user", "content": "q"},
      {"role": "assistant", "content": "a", "reasoning_content": "r"},
    )
    several = [conversations.Conversation(messages, f"F:{n}") for n in (3, 5)]
    with self.assertRaisesRegex(errors.InputError, "F:3: .*\nF:5: reasoning"):
      conversations.all_samples(small(), several, chat.V3)
    self.assertLen(
      conversations.all_samples(small(), several, chat.find("r1")), 2
    )


_Q, _A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
_S = {"role": "system", "content": "s"}


class FilesTest(parameterized.TestCase):
  def path(self, *lines):
    path = testing.folder(self) / "x.jsonl"
    path.write_bytes(
      b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
        for line in lines
      )
    )
    return path

  def test_both_forms(self):
    reasons = {**_A, "reasoning_content": "r"}
    path = self.path(
      {"messages": [_S, _Q, _A, _Q, reasons], "id": 7},
      b"",
      {"prompt": "q", "response": "a", "system": "s", "reasoning_content": "r"},
      {"prompt": "q", "response": "a", "system": None, "answer": "5"},
      {"messages": [_Q, {**_A, "reasoning_content": None}]},
    )
    first, second, third, last = conversations.read(path)
    self.assertEqual(first.messages, (_S, _Q, _A, _Q, reasons))
    self.assertEqual((first.extra, first.where), ({"id": 7}, f"{path}:1"))
    self.assertEqual(second.messages, (_S, _Q, reasons))
    self.assertEqual((second.where, second.extra), (f"{path}:3", {}))
    self.assertEqual((third.messages, third.extra), ((_Q, _A), {"answer": "5"}))
    self.assertEqual(last.messages, (_Q, _A))

  @parameterized.parameters(
    (b"{", "is not JSON"),
    (b"\xff\xfe{}", "is not JSON"),
    (b"[" * 100_000, "is not JSON"),
    ([], "must be an object, not list"),
    ({}, "neither messages nor prompt and response"),
    ({"prompt": "q"}, "neither messages nor response"),
    ({"messages": [], "prompt": "q"}, "has messages and prompt"),
    ({"messages": "q"}, "messages: must be a list"),
    ({"messages": [_Q, _A], "tools": [1]}, "tools: is not known"),
    ({"messages": []}, "has no answer"),
    ({"messages": [_S, _Q]}, "has no answer"),
    ({"messages": [_Q, _A, _Q]}, "must end with an answer"),
    ({"messages": [_Q, _S, _A]}, "message 2: role='system': must be 'assis"),
    ({"messages": [_S, _A]}, "message 2: role='assistant': must be 'user'"),
    ({"messages": [_Q, _A, _A]}, "message 3: role='assistant': must be 'us"),
    ({"messages": [_S, _S, _Q, _A]}, "message 2: role='system': must be"),
    ({"messages": [_Q, {**_A, "content": " \n"}]}, "message 2: an empty answ"),
    ({"messages": [_Q, {**_A, "content": None}]}, "content=None: must be text"),
    ({"messages": [_Q, {**_A, "content": [1]}]}, "content=.1.: must be text"),
    ({"messages": [7, _A]}, "message 1: must be an object, not int"),
    ({"messages": [{**_Q, "role": "tool"}, _A]}, "role='tool': must be one"),
    ({"messages": [{"content": ""}, _A]}, "role=None: must be one of system"),
    ({"messages": [{**_Q, "weight": 0}, _A]}, "message 1: weight: unknown"),
    (
      {"messages": [{**_Q, "reasoning_content": "r"}, _A]},
      "message 1: reasoning_content: role='user' has none",
    ),
    (
      {"messages": [_Q, {**_A, "reasoning_content": "a</think>"}]},
      "has '</think>', its end",
    ),
    ({"prompt": "q", "response": 7}, "message 2: content=7: must be text"),
    ({"prompt": "\ud800", "response": "a"}, "message 1: content: is not Unico"),
    ({"prompt": "q", "response": "a", "system": 7}, "content=7: must be text"),
    (
      {"prompt": "q", "response": "a", "reasoning_content": 7},
      "reasoning_content=7: must be text",
    ),
  )
  def test_a_line_that_is_no_conversation_is_refused(self, line, message):
    path = self.path({"messages": [_Q, _A]}, line)
    with self.assertRaisesRegex(errors.InputError, f"x.jsonl:2: .*{message}"):
      conversations.read(path)

  def test_shows_all_problems_but_not_thousands(self):
    lines = [{"messages": [_Q]}, b"7", *[{"messages": []}] * 98]
    with self.assertRaises(errors.InputError) as caught:
      conversations.read(self.path(*lines))
    shown = str(caught.exception).splitlines()
    self.assertLen(shown, 21)
    for n, line in itertools.islice(enumerate(shown, 1), 20):
      self.assertIn(f"x.jsonl:{n}: ", line)
    self.assertEqual(shown[-1], "and 80 more")

  def test_files_that_hold_nothing_are_refused(self):
    with self.assertRaisesRegex(errors.InputError, "has no conversation"):
      conversations.read(self.path(b"", b"  "))
    folder = testing.folder(self)
    for path in (folder, folder / "none.jsonl"):
      with self.assertRaisesRegex(errors.InputError, "cannot be read"):
        conversations.read(path)

  def test_writes_what_it_reads(self):
    path = testing.folder(self) / "y.jsonl"
    rows = [{"messages": [_S, _Q, {**_A, "content": "你\n"}], "type": "t"}]
    conversations.write(path, rows)
    (found,) = conversations.read(path)
    self.assertEqual(list(found.messages), rows[0]["messages"])
    self.assertEqual(found.extra, {"type": "t"})
    with self.assertRaisesRegex(errors.InputError, "y.jsonl:2: has no answer"):
      conversations.write(path, [*rows, {"messages": [_Q]}])
    self.assertLen(conversations.read(path), 1)

  @parameterized.parameters(
    ("a", "a", None),
    ("r</think>a", "a", "r"),
    ("<think>\nr\n</think>\n\na</think>", "a</think>", "r"),
    ("</think>a\n", "a\n", ""),
  )
  def test_an_answer_is_parsed_at_the_end_of_its_reasoning(
    self, text, content, reasoning
  ):
    found = conversations.parse_answer(text)
    self.assertEqual(found["content"], content)
    self.assertEqual(found.get("reasoning_content"), reasoning)


if __name__ == "__main__":
  absltest.main()

"""Tests of prompts from a file: what a line may hold, and going on."""

import json
import os
import pathlib
import random
from unittest import mock

import micro
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.data import tokenizer
from dsv3_jax.infer import engine, generate
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from experiments import batch_generate

MODEL = testing.run("mtp.depth=0").model
TOK = tokenizer.train(micro.TEXTS, 280)
SETTINGS = {
  "max_tokens": 3,
  "temperature": 0.5,
  "top_p": 1.0,
  "top_k": 0,
  "seed": 7,
  "stop": (),
}


class Author(engine.Engine):
  """An engine without a model: a request alone decides what is written."""

  patience = 10**9  # tokens until it is interrupted

  def run(self, requests):
    requests, texts = iter(requests), {}
    while True:
      while len(texts) < self.options.max_batch and (
        request := next(requests, None)
      ):
        texts[self.submitted] = self.tokens(request)
        self.submitted += 1
      if not texts:
        return
      for number, tokens in list(texts.items()):
        token, ended = tokens.pop(0)
        if ended:
          del texts[number]
        self.patience -= 1
        if self.patience < 0:
          raise KeyboardInterrupt
        yield engine.Event(number, token, -token / 7, ended)

  @staticmethod
  def tokens(request):
    """Tokens, and whether the text ends with each."""
    rng = random.Random(repr(request))
    n = rng.randrange(1, request.max_tokens + 1)
    tokens = [(rng.randrange(8, 280), "") for _ in range(n)]
    if n < request.max_tokens:
      return [*tokens, (tokenizer.EOS_ID, engine.STOP)]
    return [*tokens[:-1], (tokens[-1][0], engine.LENGTH)]


class BatchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    self.prompts = self.folder / "prompts.jsonl"
    self.out = self.folder / "texts.jsonl"
    # They take most of the time.
    self.enter_context(
      mock.patch.object(batch_generate, "_bar", mock.MagicMock())
    )
    self.enter_context(mock.patch.object(os, "fsync"))
    self.err = self.enter_context(mock.patch.object(batch_generate, "_log"))

  def put(self, *lines):
    lines = [
      line if isinstance(line, bytes) else json.dumps(line).encode()
      for line in lines
    ]
    self.prompts.write_bytes(b"".join(line + b"\n" for line in lines))

  def write(self, *, n_slots=3, patience=10**9, **settings):
    """Runs the command; returns the asks that were written."""
    author = Author({}, MODEL, EngineOptions(max_batch=n_slots, max_len=64))
    author.patience = patience
    writer = generate.Generator(author, TOK)
    asked, stream = [], writer.stream

    def watched(asks):
      return stream(asked.append(ask) or ask for ask in asks)

    with mock.patch.object(writer, "stream", watched):
      batch_generate.generate_all(
        writer,
        self.prompts,
        self.out,
        GenerationRequest("", **SETTINGS | settings),
      )
    return asked

  def rows(self, path=None):
    content = (path or self.out).read_bytes()
    return list(map(json.loads, content.removesuffix(b"\n").split(b"\n")))


class LineTest(BatchTest):
  def test_every_form_and_every_setting(self):
    messages = [
      {"role": "system", "content": "Be brief."},
      {"role": "user", "content": "你好?"},
    ]
    own = {
      "max_tokens": 20,
      "temperature": 0,
      "top_p": 0.5,
      "top_k": 4,
      "seed": 1,
      "stop": ["e", "q"],
    }
    self.put(
      {"prompt": "It was"},
      {"ids": [0, 70, 5]},
      {"messages": messages},
      {"prompt": ""} | own,
      {"prompt": "It was"},
    )
    asked = self.write(stop=("zz",))
    given = SETTINGS | {"stop": ("zz",)}
    self.assertEqual(
      asked,
      [
        GenerationRequest("It was", **given),
        GenerationRequest([0, 70, 5], **given | {"seed": 8}),
        GenerationRequest(messages, **given | {"seed": 9}),
        GenerationRequest("", **own | {"stop": ("e", "q")}),
        GenerationRequest("It was", **given | {"seed": 11}),
      ],
    )
    forms = [("prompt", "It was"), ("ids", [0, 70, 5]), ("messages", messages)]
    rows = self.rows()
    self.assertLen(rows, 5)
    for index, (form, value) in enumerate(forms):
      row = rows[index]
      head = {"index": index, form: value} | given
      head |= {"seed": 7 + index, "stop": ["zz"]}
      self.assertEqual(
        list(row), [*head, "text", "ended", "tokens", "logprobs"]
      )
      self.assertEqual({name: row[name] for name in head}, head)
    self.assertEqual({k: rows[3][k] for k in own}, own)

  def test_rows_hold_what_was_written(self):
    self.put(*({"prompt": "a" * n, "max_tokens": 5} for n in range(20)))
    asked = self.write()
    writer = generate.Generator(
      Author({}, MODEL, EngineOptions(max_len=64)), TOK
    )
    for ask, row in zip(asked, self.rows(), strict=True):
      pieces = list(writer.stream([ask]))
      tokens = [piece.token for piece in pieces]
      self.assertEqual(row["tokens"], tokens)
      self.assertEqual(row["text"], TOK.decode(tokens))
      self.assertEqual(row["ended"], pieces[-1].finish_reason)
      self.assertEqual(
        row["logprobs"], [round(piece.logprob, 6) for piece in pieces]
      )
    ends = {row["ended"] for row in self.rows()}
    self.assertEqual(ends, {engine.STOP, engine.LENGTH})

  def test_texts_do_not_depend_on_how_many_there_are_at_a_time(self):
    self.put(*({"prompt": "a" * n, "max_tokens": 9} for n in range(20)))
    found = []
    for n_slots in (1, 4):
      self.write(n_slots=n_slots)
      found.append(self.out.read_bytes())
      self.out.unlink()
    self.assertEqual(*found)

  def test_seeds_begin_again_behind_the_last(self):
    self.put(*[{"prompt": ""}] * 3)
    asked = self.write(seed=2**32 - 2)
    self.assertEqual([ask.seed for ask in asked], [2**32 - 2, 2**32 - 1, 0])

  BAD = (
    (b"{", "Expecting"),
    (b"prompt", "Expecting value"),
    (b'{"prompt": "a"} {}', "Extra data"),
    (b'{"prompt": "", "top_k": 1099511627776}', "top_k=1099511627776: must"),
    (b'{"prompt": "\xff"}', "can't decode byte 0xff"),
    (b'{"prompt": "\xed\xa0\x80"}', "surrogates not allowed"),
    (b'{"prompt": "\\ud800"}', "surrogates not allowed"),
    (b'{"prompt": "", "stop": ["\\udfff"]}', "surrogates not allowed"),
    (b"[" * 100_000, "recursion depth"),
    (b'{"prompt": ' + b"[" * 800 + b"]" * 800 + b"}", "prompt=[[[["),
    (b'{"ids": [1], "seed": 1' + b"0" * 9999 + b"}", "4300 digits"),
    ("cold", "must be a JSON object, is 'cold'"),
    ([{"prompt": "a"}], "must be a JSON object, is [{"),
    (None, "must be a JSON object, is None"),
    ({}, "must have one of prompt, ids, messages, has 0"),
    ({"max_tokens": 3}, "must have one of prompt, ids, messages, has 0"),
    ({"prompt": "", "ids": [1]}, "must have one of prompt, ids, messages"),
    ({"prompt": "", "tmperature": 1}, "did you mean 'temperature'?"),
    ({"prompt": 1}, "prompt=1: must be a string"),
    ({"prompt": None}, "prompt=None: must be a string"),
    ({"prompt": ["a"]}, "prompt=['a']: must be a string"),
    ({"ids": "1"}, "ids='1': must be a list of integers"),
    ({"ids": [1, True]}, "ids=[1, True]: must be a list of integers"),
    ({"ids": [1.0]}, "ids=[1.0]: must be a list of integers"),
    ({"ids": []}, "prompt: is empty"),
    ({"ids": [1, 300]}, "token id 300 must be in [0, 300)"),
    ({"ids": [-1]}, "token id -1 must be in [0, 300)"),
    ({"ids": [10**30]}, ""),
    ({"ids": [1] * 62}, "needs 65 positions"),
    ({"prompt": "x" * 62}, "needs 66 positions"),
    ({"messages": []}, "prompt: is empty"),
    ({"messages": {"role": "user", "content": ""}}, "must be a list of {"),
    ({"messages": [{"role": "user"}]}, 'must be a list of {"role"'),
    ({"messages": [{"role": "user", "content": 1}]}, "must be a list of {"),
    ({"messages": [{"role": "tool", "content": ""}]}, "role='tool': must"),
    ({"prompt": "", "max_tokens": 0}, "max_tokens=0: must be at least 1"),
    ({"prompt": "", "max_tokens": True}, "max_tokens=True: must be an int"),
    ({"prompt": "", "max_tokens": 2.0}, "max_tokens=2.0: must be an int"),
    ({"prompt": "", "max_tokens": None}, "max_tokens=None: must be an int"),
    ({"prompt": "", "max_tokens": 10**99}, "positions of the cache"),
    ({"prompt": "", "temperature": -1}, "temperature=-1.0: must be at least"),
    ({"prompt": "", "temperature": float("nan")}, "temperature=nan: must be"),
    ({"prompt": "", "temperature": float("inf")}, "temperature=inf: must be"),
    ({"prompt": "", "temperature": 10**400}, "too large"),
    ({"prompt": "", "temperature": "1"}, "temperature='1': must be a number"),
    ({"prompt": "", "top_p": 0}, "top_p=0.0: must be above 0"),
    ({"prompt": "", "top_p": 1.5}, "top_p=1.5: must be above 0 and at most"),
    ({"prompt": "", "top_p": False}, "top_p=False: must be a number"),
    ({"prompt": "", "top_k": -1}, "top_k=-1: must be in"),
    ({"prompt": "", "top_k": 0.5}, "top_k=0.5: must be an integer"),
    ({"prompt": "", "seed": -1}, "seed=-1: must be in [0, 2^32)"),
    ({"prompt": "", "seed": 2**32}, "seed=4294967296: must be in"),
    ({"prompt": "", "stop": "a"}, "stop='a': must be a list of strings"),
    ({"prompt": "", "stop": [1]}, "stop=[1]: must be a list of strings"),
    ({"prompt": "", "stop": ["a", ""]}, "stop string must not be empty"),
  )

  def test_bad_lines_are_told_and_the_rest_goes_on(self):
    lines = [line for bad, _ in self.BAD for line in (bad, {"prompt": "a"})]
    self.put(*lines)
    self.assertLen(self.write(), len(self.BAD))
    rows = self.rows()
    self.assertEqual([row["index"] for row in rows], list(range(len(lines))))
    for (line, message), row, good in zip(
      self.BAD, rows[::2], rows[1::2], strict=True
    ):
      with self.subTest(str(line)[:60]):
        self.assertEqual(row.keys(), {"index", "error"})
        self.assertStartsWith(row["error"], f"line {row['index'] + 1}: ")
        self.assertIn(message, row["error"])
        self.assertLess(len(row["error"]), 400)
        self.assertIn("text", good)
    self.err.assert_called_with(
      f"{len(self.BAD)} lines had an error, see their rows"
    )

  def test_all_that_is_wrong_with_a_line(self):
    self.put({"prompt": 1, "ids": [1], "seed": "a", "sead": 1})
    self.write()
    self.assertLen(self.rows()[0]["error"].splitlines(), 4)

  def test_a_line_ends_with_a_line_feed_and_with_nothing_else(self):
    odd = "a\u2028b\u2029c\x85d"
    self.prompts.write_bytes(
      b"\xef\xbb\xbf"
      + json.dumps({"prompt": odd}, ensure_ascii=False).encode()
      + b'\r\n\n \t\r\n{"prompt":\r"e"}\n{"prompt": "\x0b"}\n'
      + b'{"prompt": "\\u000b"}'
    )
    asked = self.write()
    self.assertEqual([ask.prompt for ask in asked], [odd, "e", "\x0b"])
    rows = self.rows()
    self.assertEqual([row["index"] for row in rows], [0, 3, 4, 5])
    self.assertIn("line 5: Invalid control character", rows[2]["error"])
    # What was written is read again as it is.
    self.assertEmpty(self.write())

  @parameterized.parameters(b"", b"\n", b" \r\n\n\t")
  def test_a_file_of_nothing_is_refused(self, content):
    self.prompts.write_bytes(content)
    with self.assertRaisesRegex(ValueError, "prompts.jsonl: holds no line"):
      self.write()
    self.assertFalse(self.out.exists())

  def test_what_is_wrong_with_settings_of_all_lines(self):
    self.assertEmpty(GenerationRequest("", **SETTINGS).validate())
    wrong = {
      "max_tokens": 0,
      "temperature": float("nan"),
      "top_p": 2,
      "top_k": -1,
      "seed": -1,
      "stop": ("a", ""),
    }
    found = GenerationRequest("", **wrong).validate()
    names = [line.partition("=")[0] for line in found]
    self.assertCountEqual(names, wrong)


class ResumeTest(BatchTest):
  def setUp(self):
    super().setUp()
    self.lines = [{"prompt": c} for c in "abcd"]
    self.lines.insert(2, {"prompt": 5})
    self.put(*self.lines)

  def finished(self):
    self.write()
    content = self.out.read_bytes()
    self.out.unlink()
    return content

  def test_every_prefix_becomes_the_same_file(self):
    whole = self.finished()
    for n in range(len(whole) + 1):
      self.out.write_bytes(whole[:n])
      there = [json.loads(line) for line in whole[:n].split(b"\n")[:-1]]
      n_texts = sum("text" in row for row in there)
      self.assertLen(self.write(), 4 - n_texts)
      self.assertEqual(self.out.read_bytes(), whole, n)
    self.assertCountEqual(self.folder.iterdir(), [self.prompts, self.out])

  def test_goes_on_wherever_it_was_interrupted(self):
    whole = self.finished()
    rows = map(json.loads, whole.splitlines())
    n_tokens = sum(len(row.get("tokens", ())) for row in rows)
    kept = set()
    for patience in range(n_tokens):
      with self.assertRaises(KeyboardInterrupt):
        self.write(patience=patience, n_slots=2)
      n_texts = sum("text" in row for row in self.rows())
      kept.add(n_texts)
      self.assertLen(self.write(), 4 - n_texts)
      self.assertEqual(self.out.read_bytes(), whole)
      self.out.unlink()
    # A text was kept as soon as it was there.
    self.assertEqual(kept, {0, 1, 2, 3})

  def test_a_row_is_in_the_file_as_soon_as_it_is_there(self):
    append, seen = batch_generate._append, []

    def watched(file, row):
      append(file, row)
      seen.append(self.rows(pathlib.Path(file.name))[-1] == row)

    with mock.patch.object(batch_generate, "_append", watched):
      self.write()
    self.assertEqual(seen, [True] * 10)  # and once more, in order

  def test_several_tries(self):
    whole = self.finished()
    n_tries = 1
    while True:
      try:
        self.write(patience=4, n_slots=1)
        break
      except KeyboardInterrupt:
        n_tries += 1
        with self.out.open("ab") as file:  # as if it was writing
          file.write(b'{"index": 1, "pro')
    self.assertGreater(n_tries, 2)
    self.assertEqual(self.out.read_bytes(), whole)

  def test_what_a_killed_try_left_beside_is_no_part_of_it(self):
    whole = self.finished()
    (self.folder / ".texts.jsonl.partial").write_bytes(b"{}\n")
    with self.assertRaises(KeyboardInterrupt):
      self.write(patience=1)
    self.write()
    self.assertEqual(self.out.read_bytes(), whole)
    self.assertCountEqual(self.folder.iterdir(), [self.prompts, self.out])

  def test_lines_that_had_an_error_are_tried_again(self):
    self.write()
    self.assertIn("error", self.rows()[2])
    self.lines[2] = {"prompt": "e"}
    self.put(*self.lines)
    (ask,) = self.write()
    self.assertEqual((ask.prompt, ask.seed), ("e", 9))
    self.assertEqual([row["index"] for row in self.rows()], list(range(5)))
    self.assertIn("text", self.rows()[2])

  def test_lines_may_be_added(self):
    self.write()
    before = self.out.read_bytes()
    self.put(*self.lines, {"prompt": "e"})
    self.assertLen(self.write(), 1)
    self.assertStartsWith(self.out.read_bytes(), before)

  def assert_refused(self, message, **settings):
    before = self.out.read_bytes()
    with self.assertRaisesRegex(ValueError, message):
      self.write(**settings)
    self.assertEqual(self.out.read_bytes(), before)

  @parameterized.parameters(
    (0, {"prompt": "b"}),
    (0, {"ids": [1]}),
    (0, {"prompt": "a", "max_tokens": 4}),
    (0, {"prompt": 7}),
    (4, b""),
  )
  def test_other_prompts_are_refused(self, index, line):
    self.write()
    self.lines[index] = line
    self.put(*self.lines)
    self.assert_refused(f"holds a text of line {index + 1} with another")

  @parameterized.parameters(
    {"max_tokens": 4},
    {"temperature": 0.25},
    {"top_p": 0.5},
    {"top_k": 1},
    {"seed": 6},
    {"stop": ("a",)},
  )
  def test_other_settings_are_refused(self, **settings):
    self.write()
    self.assert_refused("texts.jsonl: holds a text of line 1 ", **settings)

  def test_a_row_without_its_text_is_none(self):
    self.write()
    rows = self.rows()
    del rows[1]["text"]
    self.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    self.assert_refused("texts.jsonl: line 2 is no row of texts")

  @parameterized.parameters(
    b"precious",
    b'{"index' + b"es",
    b'[{"index": 0, "text": "a"}]',
    b"precious\n",
    b"\xff\n",
    b"\n",
    b"[]\n",
    b"[" * 100_000 + b"\n",
    b'{"text": "a"}\n',
    b'{"index": 0}\n',
    b'{"index": "0", "text": "a"}\n',
    b'{"index": true, "text": "a"}\n',
    b'{"index": [0], "text": "a"}\n',
    b'{"index": 2, "text": "a"}\n',
    b'{"index": 9, "text": "a"}\n',
  )
  def test_what_is_no_file_of_texts_is_left_alone(self, content):
    self.out.write_bytes(content)
    self.assert_refused("texts.jsonl: ")


class FileTest(BatchTest):
  def problems(self):
    return batch_generate.validate_files(self.prompts, self.out)

  def setUp(self):
    super().setUp()
    self.put({"prompt": "a"})

  def test_good_ones(self):
    self.assertEmpty(self.problems())
    self.write()
    self.assertEmpty(self.problems())

  def test_all_that_is_wrong_is_told(self):
    self.prompts = self.folder / "none.jsonl"
    self.out = self.folder / "none" / "texts.jsonl"
    prompts, out = self.problems()
    self.assertEndsWith(prompts, "none.jsonl: there is no such file")
    self.assertEndsWith(out, "texts.jsonl: there is no such folder")
    for refused in (f"--prompts={self.prompts}: ", f"--out={self.out}: "):
      with self.assertRaisesRegex(ValueError, refused):
        self.write()
      self.put({"prompt": "a"})

  def test_the_prompts_are_not_written_over(self):
    for name, link in (("same", os.link), ("link", os.symlink)):
      self.out = self.folder / name
      link(self.prompts, self.out)
      (problem,) = self.problems()
      self.assertIn("is the file of prompts", problem)
    self.out = self.prompts
    self.assertLen(self.problems(), 1)

  def test_what_is_not_a_file(self):
    self.out.mkdir()
    (problem,) = self.problems()
    self.assertIn("texts.jsonl: is not a file", problem)
    with self.assertRaisesRegex(ValueError, "--out=.*texts.jsonl"):
      self.write()
    self.out.rmdir()
    os.mkfifo(self.out)
    self.assertLen(self.problems(), 1)
    self.prompts = self.folder
    self.out = self.folder / "other"
    self.assertLen(self.problems(), 1)

  def test_a_disk_that_is_full(self):
    full = OSError(28, "No space left on device")
    self.write()
    before = self.out.read_bytes()
    with mock.patch.object(os, "fsync", side_effect=full):
      with self.assertRaisesRegex(ValueError, "--out=.*No space left"):
        self.write()
    self.assertEqual(self.out.read_bytes(), before)

  def test_a_name_that_is_too_long(self):
    self.out = self.folder / ("a" * 300)
    with self.assertRaisesRegex(ValueError, "--out=.*too long"):
      self.write()

  def test_a_link_stays_one(self):
    target = self.folder / "target.jsonl"
    self.out.symlink_to(target)
    self.write()
    self.assertTrue(self.out.is_symlink())
    self.assertLen(self.rows(), 1)
    self.assertEmpty(self.write())
    self.assertTrue(self.out.is_symlink())


if __name__ == "__main__":
  absltest.main()

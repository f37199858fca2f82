"""Tests of writing texts: what is shown and when, and models of folders."""

import dataclasses
import functools
import itertools
import json
import random
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.checkpoint import manifest
from dsv3_jax.data import chat, tokenizer
from dsv3_jax.infer import engine, generate, load, serving_mesh, serving_params
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.interop import load_sharded, open_run, tokenizer_files
from dsv3_jax.plan import memory
from experiments import cli, sample
from scripts import convert

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
CHINESE = "人工智能的未来。你好，世界！"
EMOJI = "👩‍👩‍👧‍👦 🏳️‍🌈 😀"
BYTES = tokenizer.train(["x"], 264)  # nothing but single bytes


def learned():
  """A tokenizer that knows some characters whole and others in bytes."""
  texts = [(CHINESE + "It was a bright cold day. abab baba ") * 20]
  return tokenizer.train(texts, 330)


def ids_of(tok, written):
  return tok.encode(written, add_special_tokens=False).ids


class Scripted:
  """An engine of which every token is known before."""

  busy = False

  def __init__(self, *scripts):
    """Serves scripts of (tokens, ended) in order, a token of each in turn."""
    self.scripts, self.submitted, self.cancelled = scripts, 0, []

  def validate_request(self, request):
    return request.validate()

  def cancel(self, number):
    self.cancelled.append(number)

  def run(self, requests):
    events = []
    for _ in requests:
      tokens, ended = self.scripts[self.submitted]
      ends = [""] * (len(tokens) - 1) + [ended]
      number = self.submitted
      self.submitted += 1
      events.append(
        [
          engine.Event(number, token, -token / 8, end)
          for token, end in zip(tokens, ends, strict=True)
        ]
      )
    for turn in itertools.zip_longest(*events):
      yield from filter(None, turn)


def pieces(tok, ids, *stops, ended=engine.LENGTH):
  """The pieces of one text with these tokens."""
  writer = generate.Generator(Scripted((ids, ended)), tok)
  return list(writer.stream([GenerationRequest("", stop=stops)]))


def shown(tok, ids, *stops, ended=engine.LENGTH):
  return [piece.text for piece in pieces(tok, ids, *stops, ended=ended)]


class CharactersTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = learned()

  def ids(self, written):
    return ids_of(self.tok, written)

  @parameterized.parameters(
    CHINESE,
    EMOJI,
    "naïve — “quotes”… 한국어",
    "a\ufffdb\ufffd\ufffd",
    "\n \u2028\u0000",
    CHINESE + EMOJI,
  )
  def test_a_text_comes_in_whole_characters(self, written):
    ids = self.ids(written)
    found = shown(self.tok, ids)
    self.assertLen(found, len(ids))
    self.assertEqual("".join(found), written)
    for so_far in itertools.accumulate(found):
      self.assertStartsWith(written, so_far)

  def test_a_character_is_held_until_its_last_byte(self):
    ids = self.ids("😀")
    self.assertLen(ids, 4)
    found = shown(self.tok, [*self.ids("a"), *ids, *self.ids("b")])
    self.assertEqual(found, ["a", "", "", "", "😀", "b"])

  def test_a_token_may_end_one_character_and_begin_another(self):
    # Two characters of three bytes each, in tokens of two.
    facts = json.loads(tokenizer.train(["x"], 264).to_str())
    letters = [letter for c in "人工" for letter in BYTES.encode(c).tokens]
    vocabulary, merges = (facts["model"][key] for key in ("vocab", "merges"))
    for pair in zip(letters[::2], letters[1::2], strict=True):
      vocabulary["".join(pair)] = len(vocabulary)
      merges.append(pair)
    path = testing.folder(self) / "tokenizer.json"
    path.write_text(json.dumps(facts))
    tok = tokenizer.load(path)
    self.assertEqual(shown(tok, [264, 265, 266]), ["", "人", "工"])

  def test_bytes_that_are_no_text_hold_nothing_up(self):
    rng = random.Random(0)
    alphabet = range(8, 264)  # a byte each
    for _ in range(50):
      ids = rng.choices(alphabet, k=rng.randrange(1, 20))
      found = shown(self.tok, ids)
      self.assertEqual("".join(found), self.tok.decode(ids))
      for i, so_far in enumerate(itertools.accumulate(found[:-1]), 1):
        whole = self.tok.decode(ids[:i])
        self.assertEqual(so_far, whole.removesuffix(UNFINISHED))

  def test_what_stays_incomplete_is_shown_at_the_end(self):
    ids = self.ids("a😀")[:-1]
    self.assertEqual(shown(self.tok, ids), ["a", "", "", UNFINISHED])
    found = shown(self.tok, [*ids, tokenizer.EOS_ID], ended=engine.STOP)
    self.assertEqual(found, ["a", "", "", "", UNFINISHED])

  def test_eos_is_not_shown(self):
    ids = [*self.ids("cold"), tokenizer.EOS_ID]
    found = pieces(self.tok, ids, ended=engine.STOP)
    self.assertEqual("".join(piece.text for piece in found), "cold")
    self.assertEqual([piece.token for piece in found], ids)
    self.assertEqual([p.logprob for p in found], [-i / 8 for i in ids])
    ends = [""] * (len(ids) - 1) + [engine.STOP]
    self.assertEqual([piece.finish_reason for piece in found], ends)

  def test_ids_that_the_tokenizer_has_not_add_nothing(self):
    ids = [*self.ids("cold"), 1_000_000, tokenizer.PAD_ID, *self.ids(" day")]
    self.assertEqual("".join(shown(self.tok, ids)), "cold day")


class StopTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = learned()

  @parameterized.parameters(
    # In the middle, and across tokens.
    ("one END two", ["END"], "one ", engine.STOP),
    ("one END", ["END"], "one ", engine.STOP),
    ("END", ["END"], "", engine.STOP),
    # Begins again within itself.
    ("aab", ["ab"], "a", engine.STOP),
    ("xababac", ["abac"], "xab", engine.STOP),
    ("aaaab", ["aab"], "aa", engine.STOP),
    # What is complete first.
    ("abcd", ["bc", "abcd"], "a", engine.STOP),
    ("abcd", ["bcd", "abcd"], "", engine.STOP),
    ("abce", ["abcd", "ce"], "ab", engine.STOP),
    # Never complete: all is shown.
    ("one EN", ["END"], "one EN", engine.LENGTH),
    ("one ENd two", ["END"], "one ENd two", engine.LENGTH),
    ("abab", ["ababa", "bb"], "abab", engine.LENGTH),
    ("abc", [], "abc", engine.LENGTH),
  )
  def test_ends_before_a_stop_string(self, written, stops, expected, ended):
    found = pieces(BYTES, ids_of(BYTES, written), *stops)
    self.assertEqual("".join(piece.text for piece in found), expected)
    self.assertEqual(found[-1].finish_reason, ended)

  def test_inside_one_token(self):
    (token,) = ids_of(self.tok, " bright")
    for stop, expected in (("rig", " b"), (" ", ""), ("t", " brigh")):
      (piece,) = pieces(self.tok, [token], stop)
      self.assertEqual(
        (piece.text, piece.finish_reason), (expected, engine.STOP)
      )

  def test_of_the_character_that_ends_the_text(self):
    ids = [*ids_of(BYTES, "ab"), tokenizer.EOS_ID]
    (*_, last) = pieces(BYTES, ids, "bc", ended=engine.STOP)
    self.assertEqual((last.text, last.finish_reason), ("b", engine.STOP))
    (*_, last) = pieces(BYTES, ids[:2], "b", ended=engine.LENGTH)
    self.assertEqual((last.text, last.finish_reason), ("", engine.STOP))

  def test_of_characters_in_several_tokens(self):
    ids = ids_of(self.tok, "好😀😀!")
    found = pieces(self.tok, ids, "😀!")
    self.assertEqual("".join(piece.text for piece in found), "好😀")

  def test_holds_no_more_than_it_must(self):
    rng = random.Random(0)
    for _ in range(200):
      written = "".join(rng.choices("ab", k=12))
      stops = [
        "".join(rng.choices("ab", k=rng.randrange(1, 6)))
        for _ in range(rng.randrange(1, 4))
      ]
      found = shown(BYTES, ids_of(BYTES, written), *stops)
      begins = {stop[:n] for stop in stops for n in range(len(stop))}
      for i, so_far in enumerate(itertools.accumulate(found), 1):
        read = written[:i]
        ends = [read.find(stop) for stop in stops if stop in read]
        if ends:
          self.assertEqual(so_far, read[: min(ends)])
          self.assertLen(found, i)
          break
        held = max(len(s) for s in begins if read.endswith(s))
        held *= i < len(written)
        self.assertEqual(so_far, read[: i - held])
      else:
        self.assertLen(found, len(written))


class StreamTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = learned()

  def test_several_texts_are_told_apart_and_counted_from_0(self):
    written = ["cold day", CHINESE, EMOJI] * 2
    scripts = [(ids_of(self.tok, s), engine.LENGTH) for s in written]
    writer = generate.Generator(Scripted(*scripts), self.tok)
    for start in (0, 3):  # a second stream with the same engine
      found = {}
      for piece in writer.stream([GenerationRequest("")] * 3):
        found[piece.index] = found.get(piece.index, "") + piece.text
      self.assertEqual(found, dict(enumerate(written[start : start + 3])))

  def test_nothing_comes_behind_a_stop_string(self):
    texts = (ids_of(BYTES, written) for written in ("a.b.c.d", "cold day"))
    scripted = Scripted(*((ids, engine.LENGTH) for ids in texts))
    asks = [GenerationRequest("", stop=(".",)), GenerationRequest("")]
    found = list(generate.Generator(scripted, BYTES).stream(asks))
    first = [piece for piece in found if not piece.index]
    self.assertEqual("".join(piece.text for piece in first), "a")
    self.assertEqual(first[-1].finish_reason, engine.STOP)
    self.assertNotEmpty([p for p in found[found.index(first[-1]) :] if p.index])
    self.assertEqual(scripted.cancelled[0], 0)

  def test_an_engine_that_serves_others_is_refused(self):
    scripted = Scripted()
    scripted.busy = True
    with self.assertRaisesRegex(RuntimeError, "other requests"):
      next(generate.Generator(scripted, self.tok).generate("a"))

  def test_an_empty_stop_string_is_refused(self):
    writer = generate.Generator(Scripted(), self.tok)
    with self.assertRaisesRegex(ValueError, "must not be empty"):
      writer.tokenize(GenerationRequest("a", stop=("b", "")))

  def test_a_request_is_what_was_asked(self):
    made = generate.Generator(Scripted(), self.tok).tokenize(
      GenerationRequest("cold", 3, 0.5, 0.25, 7, 9, ("a",))
    )
    ids = generate.encode(self.tok, "cold")
    ends = (tokenizer.EOS_ID,)
    self.assertEqual(
      made, GenerationRequest(ids, 3, 0.5, 0.25, 7, 9, ("a",), ends)
    )


class GeneratedTextTest(absltest.TestCase):
  def test_shows_itself_and_generates_no_more_than_asked(self):
    ids = [*ids_of(BYTES, "a<é"), tokenizer.EOS_ID]
    writer = generate.Generator(Scripted((ids, engine.STOP)), BYTES)
    text = writer.generate("p")
    self.assertEqual((next(text), text.text, text.tokens), ("a", "a", ids[:1]))
    self.assertRegex(repr(text), r"GeneratedText\n  text   a\n.*1 tokens in")
    self.assertIn("not yet", repr(text))
    self.assertEqual(str(text), "a<é")
    self.assertEqual((text.tokens, text.finish_reason), (ids, engine.STOP))
    self.assertEqual(text.logprobs, [-i / 8 for i in ids])
    self.assertIn("<td>a&lt;é</td>", text._repr_html_())
    self.assertGreater(text.tokens_per_s, 0)
    self.assertIsNone(generate.GeneratedText().tokens_per_s)
    self.assertIn("0 tokens", repr(generate.GeneratedText()))


class EncodeTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = learned()

  def test_a_text_begins_with_bos(self):
    self.assertEqual(generate.encode(self.tok, ""), [tokenizer.BOS_ID])
    first, *rest = generate.encode(self.tok, CHINESE)
    self.assertEqual(first, tokenizer.BOS_ID)
    self.assertEqual(self.tok.decode(rest), CHINESE)

  def test_a_folder_may_want_no_bos(self):
    defaults = dataclasses.replace(tokenizer_files.DEFAULTS, add_bos=False)
    ids = generate.encode(self.tok, CHINESE, defaults)
    self.assertEqual(self.tok.decode(ids), CHINESE)
    self.assertNotIn(tokenizer.BOS_ID, ids)
    self.assertEmpty(generate.encode(self.tok, "", defaults))

  def test_ids_are_taken_as_they_are(self):
    self.assertEqual(generate.encode(self.tok, [5, 6]), [5, 6])
    self.assertEqual(generate.encode(self.tok, np.array([5, 6])), [5, 6])
    self.assertEqual(generate.encode(self.tok, ()), [])

  def test_a_conversation_is_encoded_as_one(self):
    messages = [{"role": "user", "content": "cold?"}]
    expected = chat.encode(self.tok, messages)
    self.assertEqual(generate.encode(self.tok, messages), expected)
    with self.assertRaisesRegex(ValueError, "role='tool'"):
      generate.encode(self.tok, [{"role": "tool", "content": ""}])

  def test_half_of_a_character_is_refused(self):
    with self.assertRaisesRegex(ValueError, "prompt: is not Unicode text"):
      generate.encode(self.tok, "cold \ud800")


ASKS = tuple(
  GenerationRequest(
    prompt, max_tokens=n, temperature=1 + n / 20, top_p=0.9, seed=n, stop=stop
  )
  for prompt, n, stop in (
    ("It was", 20, ()),
    ([0, 70, 71], 7, ()),
    ([{"role": "user", "content": "cold"}], 12, ()),
    ("", 1, ()),
    ("a", 19, ("e", "a")),
    ("a", 18, ()),
  )
)


def written(stream):
  """Texts, tokens, log-probabilities and ends of the asks of a stream."""
  found = {}
  for piece in stream:
    found.setdefault(piece.index, []).append(piece)
  return [
    (
      "".join(p.text for p in found[ask]),
      [p.token for p in found[ask]],
      [p.logprob for p in found[ask]],
      found[ask][-1].finish_reason,
    )
    for ask in sorted(found)
  ]


def generator(folder, *, average=False, **options):
  model = load.open_model(folder, average=average)
  return model.generator(EngineOptions(**options))


class FolderTest(parameterized.TestCase):
  """A run with an average, and the same model released."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = testing.folder(cls)
    cls.run_dir, cls.released = folder / "run", folder / "released"
    _, cls.state, cls.tok = micro.make(cls.run_dir, "optim.ema_decay=0.9")
    arguments = f"--mode=export --workdir={cls.run_dir} --hf={cls.released}"
    program = functools.partial(cli.run_main, convert.execute)
    code, _, err = testing.command_line(program, *arguments.split())
    assert not code, err


class WriterTest(FolderTest):
  def load(self, folder):
    options = EngineOptions(max_batch=2, max_len=32, chunk=16)
    return load.open_model(folder).generator(options)

  def test_many_at_once_are_what_each_is_alone(self):
    writer = self.load(self.run_dir)
    together = written(writer.stream(ASKS))
    alone = [written(writer.stream([ask]))[0] for ask in ASKS]
    self.assertEqual(together, alone)
    self.assertLen({tuple(tokens) for _, tokens, *_ in together}, len(ASKS))
    self.assertEqual([ended for *_, ended in together].count(engine.STOP), 1)
    whole = "".join(writer.generate(ASKS[0]))
    self.assertEqual(whole, together[0][0])
    with self.subTest("abandoned half-way"):
      stream = writer.stream(ASKS)
      next(piece for piece in stream if piece.index == 1)
      with self.assertRaisesRegex(RuntimeError, "other requests"):
        next(writer.stream(ASKS))
      stream.close()
      self.assertFalse(writer.engine.busy)
    with self.subTest("one that cannot be served"):
      bad = GenerationRequest("a", max_tokens=31)
      with self.assertRaisesRegex(ValueError, "max_tokens=31: needs 33 pos"):
        list(writer.stream([*ASKS[:3], bad]))
      self.assertFalse(writer.engine.busy)
    self.assertEqual(written(writer.stream(ASKS)), together)
    with self.subTest("released"):
      writer = self.load(self.released)
      self.assertEqual(written(writer.stream(ASKS)), together)


class LoadTest(FolderTest):
  def served(self, folder, **options):
    """Returns the arguments that the engine of a folder is made with."""
    with mock.patch.object(engine, "Engine") as made:
      generator(folder, **options)
    (params, cfg, options), _ = made.call_args
    return jax.device_get(params), cfg, options

  def test_shows_itself(self):
    shown = repr(load.open_model(self.run_dir))
    self.assertRegex(shown, f"folder +{self.run_dir}\n  variant +test\n")
    self.assertRegex(shown, r"parameters +[\d,]+\n(.*\n)+  tokenizer +\d+ ids")
    self.assertIn("deepseek_v3", repr(load.open_model(self.released)))

  def test_a_released_folder_larger_than_memory_is_refused(self):
    released = load.open_model(self.released)
    host = mock.patch.object(memory, "host_bytes", lambda: 1 << 10)
    for read in (released.generator, lambda: released.read_params(None, True)):
      with host, self.assertRaisesRegex(ValueError, "need 0.00 GiB of this"):
        read()

  @parameterized.product(folder=("run_dir", "released"), n_drafts=(0, 2))
  def test_serves_mtp_modules_only_to_draft(self, folder, n_drafts):
    seen = mock.patch.object(load_sharded, "load", wraps=load_sharded.load)
    with seen as reads:
      params, cfg, options = self.served(
        getattr(self, folder), n_drafts=n_drafts
      )
    self.assertEqual(options.n_drafts, n_drafts)
    self.assertEqual(cfg.mtp.depth, bool(n_drafts))
    self.assertLen(params["mtp"], cfg.mtp.depth)
    # Nor is it read for nothing.
    for call in reads.call_args_list:
      self.assertEqual(call.args[0].model.mtp.depth, bool(n_drafts))
    blocks = [*params["layers"], *(m["block"] for m in params["mtp"])]
    biases = [block["bias"] for block in blocks if "bias" in block]
    wanted = self.state.router_bias[: 1 + bool(n_drafts)]
    np.testing.assert_array_equal(np.stack(biases), wanted)
    np.testing.assert_array_equal(params["norm"], self.state.params["norm"])

  def test_the_average(self):
    params, *_ = self.served(self.run_dir, average=True)
    wanted = self.state.params["norm"] + 1
    np.testing.assert_array_equal(params["norm"], wanted)

  def test_bfloat16(self):
    params, *_ = self.served(self.run_dir, dtype="bfloat16")
    wanted = self.state.params["embed"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(params["embed"], wanted)
    self.assertEqual(params["embed"].dtype, jnp.bfloat16)
    self.assertEqual(params["norm"].dtype, jnp.float32)
    self.assertEqual(params["layers"][-1]["bias"].dtype, jnp.float32)

  def test_a_text_is_as_long_as_the_model_reads(self):
    found = load.open_model(self.run_dir)
    for factor, expected in ((1, 4096), (8, 128), (1000, 4096)):
      yarn = f"attention.yarn.factor={factor}", "attention.yarn.original_len=16"
      model = config.override(found.model, *yarn)
      other = dataclasses.replace(found, model=model)
      self.assertEqual(EngineOptions().resolve(model).max_len, expected)
      self.assertEmpty(other.validate(EngineOptions()))
      longer = EngineOptions(max_len=129)
      self.assertLen(other.validate(longer), int(factor == 8))

  def test_options_reach_the_engine(self):
    sizes = {"max_batch": 3, "max_len": 40, "chunk": 32}
    *_, options = self.served(self.run_dir, **sizes)
    self.assertEqual(options, EngineOptions(**sizes))

  def test_lists_all_problems_without_reading_parameters(self):
    wrong = {"dtype": "float16", "max_batch": 0, "max_len": 0, "chunk": 3}
    unread = mock.patch.object(
      open_run, "load_newest_params", side_effect=AssertionError
    )
    with unread, self.assertRaises(ValueError) as caught:
      generator(self.run_dir, n_drafts=-1, **wrong)
    lines = str(caught.exception).splitlines()
    self.assertLen(lines, 5)
    for name, value in (wrong | {"n_drafts": -1}).items():
      self.assertIn(f"{name}={value}: must be ", str(caught.exception))
    self.assertIn("float32, bfloat16", lines[0])

  def test_lists_what_is_wrong_with_asks(self):
    found, options = (load.open_model(self.run_dir), EngineOptions(max_len=32))
    good, bad = (
      GenerationRequest("", max_tokens=31),
      GenerationRequest("", max_tokens=32),
    )
    self.assertEmpty(found.validate(options, good, good))
    (problem,) = found.validate(options, good, bad)
    self.assertIn("max_tokens=32: needs 33 positions", problem)

  def test_a_released_checkpoint_has_no_average(self):
    with self.assertRaisesRegex(ValueError, "released .* has no average"):
      generator(self.released, average=True)

  def test_released_folders_are_trusted_as_far_as_is_said(self):
    folder = testing.folder(self) / "copy"
    shutil.copytree(self.released, folder)
    path = folder / "config.json"
    facts = json.loads(path.read_text()) | {"auto_map": {"AutoModel": "x.Y"}}
    path.write_text(json.dumps(facts))
    shards = list(folder.glob("*.safetensors"))
    for shard in shards:
      shard.unlink()
      shard.symlink_to(self.released / shard.name)
    with self.assertRaisesRegex(ValueError, "auto_map names code"):
      load.open_model(folder, follow_links=True)
    with self.assertRaisesRegex(ValueError, "is a link to"):
      load.open_model(folder, ignore_auto_map=True)
    load.open_model(folder, ignore_auto_map=True, follow_links=True)

  def test_a_released_checkpoint_without_a_tokenizer(self):
    folder = testing.folder(self) / "copy"
    shutil.copytree(self.released, folder)
    (folder / "tokenizer.json").unlink()
    with self.assertRaisesRegex(ValueError, "not a readable tokenizer"):
      generator(folder)


class DefaultsTest(FolderTest):
  """Tests that what a folder says about generation is obeyed."""

  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self) / "hf"
    shutil.copytree(self.released, self.folder)

  def write(self, template=None, **generation):
    (self.folder / "generation_config.json").write_text(json.dumps(generation))
    path = self.folder / "tokenizer_config.json"
    about = json.loads(path.read_text())
    about["chat_template"] = template
    path.write_text(json.dumps(about))

  def workdir(self):
    """The folder, imported."""
    workdir = testing.folder(self) / "imported"
    arguments = f"--mode=import --hf={self.folder} --workdir={workdir}"
    program = functools.partial(cli.run_main, convert.execute)
    code, out, err = testing.command_line(program, *arguments.split())
    assert not code, err
    self.out = out
    return workdir

  def test_of_a_released_folder_and_of_its_import(self):
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    self.write(template, eos_token_id=[1, 70], top_k=1, repetition_penalty=2)
    messages = [{"role": "user", "content": "cold"}]
    cold = self.tok.encode("cold", add_special_tokens=False).ids
    for folder in (self.folder, self.workdir()):
      model = load.open_model(folder)
      self.assertRegex("\n".join(model.notes), "repetition_penalty=2 is not")
      self.assertEqual(model.defaults.settings, {"top_k": 1})
      written = model.generator(EngineOptions(max_len=32))
      made = written.tokenize(GenerationRequest(messages, max_tokens=3))
      self.assertEqual(made.prompt, [0, *cold, 1])
      self.assertEqual(made.stop_token_ids, (1, 70))
    self.assertIn("repetition_penalty=2 is not", self.out)

  def test_flags_replace_it(self):
    self.write(temperature=0, max_new_tokens=2)
    model = load.open_model(self.folder)
    args = sample.Args(prompt="a", workdir="x", temperature=0.5)
    request = args.request(model.defaults.settings)
    self.assertEqual((request.temperature, request.max_tokens), (0.5, 2))
    self.assertEqual(request.top_p, 0.95)
    request = sample.Args(prompt="a").request(model.defaults.settings)
    self.assertEqual(request.temperature, 0)

  def test_without_a_template_conversations_are_refused(self):
    self.write()
    model = load.open_model(self.folder)
    ask = GenerationRequest([{"role": "user", "content": "a"}], max_tokens=1)
    (problem,) = model.validate(EngineOptions(), ask)
    self.assertIn("has no chat template; add chat_template.jinja", problem)

  def test_a_setting_out_of_range(self):
    self.write(top_p=7)
    with self.assertRaisesRegex(ValueError, "generation_config.json: top_p=7"):
      load.open_model(self.folder)


class ServingMeshTest(FolderTest):
  @parameterized.product(
    folder=("run_dir", "released"),
    sizes=({"expert": 2, "model": 2}, {"expert": 3}),
  )
  def test_devices_read_their_parts_alone(self, folder, sizes):
    model = load.open_model(getattr(self, folder))
    sharded = EngineOptions(
      max_batch=6, n_drafts=1, serving=serving_mesh.ServingConfig(sizes)
    )
    with mock.patch.object(load, "_convert", wraps=load._convert) as convert:
      made = model.generator(sharded).engine
    (params, _), _ = convert.call_args
    if "model" in sizes:
      # 3 devices divide none of their dims evenly.
      for p in params["moe"]["ffn"]["experts"].values():
        self.assertEqual(4 * p.addressable_shards[0].data.size, p.size)
      up = params["moe"]["mla"]["kv_up"]
      self.assertEqual(2 * up.addressable_shards[0].data.size, up.size)
    alone = model.generator(EngineOptions(n_drafts=1)).engine
    placement = serving_params.uniform_placement(made.mesh, made.cfg)
    expected = serving_params.shard_params(
      alone._params, placement, made.mesh, made.cfg
    )
    testing.assert_same(jax.device_get(made._params), jax.device_get(expected))


class BadRunTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.good = testing.folder(cls) / "run"
    micro.make(cls.good, "mtp.depth=0")

  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self) / "run"
    shutil.copytree(self.good, self.folder)

  def assert_refused(self, message, **options):
    with self.assertRaisesRegex(ValueError, message) as caught:
      generator(self.folder, **options)
    self.assertNotIsInstance(caught.exception, manifest.MissingError)

  def configure(self, **settings):
    path = self.folder / "config.json"
    facts = json.loads(path.read_text())
    facts["settings"] |= {
      name.replace("__", "."): value for name, value in settings.items()
    }
    path.write_text(json.dumps(facts))

  def test_drafts_of_a_model_without_mtp(self):
    self.assert_refused("n_drafts=1: the model has no MTP", n_drafts=1)

  def test_the_average_of_a_run_without_one(self):
    self.assert_refused("has no average", average=True)

  def test_no_folder(self):
    shutil.rmtree(self.folder)
    self.assert_refused("holds no run")

  def test_no_run(self):
    (self.folder / "config.json").unlink()
    self.assert_refused("holds no run")

  def test_no_tokenizer(self):
    (self.folder / "data" / "tokenizer.json").unlink()
    self.assert_refused("tokenizer.json: not a readable tokenizer")

  def test_a_tokenizer_of_more_ids_than_the_model(self):
    self.configure(model__vocab_size=290)
    self.assert_refused("vocab_size=290: must be at least")

  @parameterized.parameters("checkpoints", "checkpoints/0")
  def test_no_checkpoint(self, lost):
    shutil.rmtree(self.folder / lost)
    with self.assertRaises(manifest.MissingError):
      generator(self.folder)

  def test_a_damaged_checkpoint(self):
    shutil.rmtree(self.folder / "checkpoints" / "0" / "d")
    with self.assertRaisesRegex(
      manifest.MissingError, "(?s)no checkpoint can be used:.*/0/d/.* no bytes"
    ):
      generator(self.folder)

  @parameterized.parameters(
    ({"model__attention__q_rank": 0}, "another architecture.*moe/mla/q_down"),
    ({"model__mtp__depth": 1}, "another architecture.*mtp"),
    (
      {"model__attention__n_hands": 2},
      "attention.n_hands: .*did you mean.*n_heads",
    ),
    ({"model__d_model": "wide"}, "model.d_model='wide': expected int"),
  )
  @pytest.mark.fault("F18")
  def test_another_configuration_than_the_checkpoint(self, changes, message):
    self.configure(**changes)
    self.assert_refused("(?s)" + message)


if __name__ == "__main__":
  absltest.main()

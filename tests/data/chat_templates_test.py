"""Named chat templates: their texts, tokens, and what a model answers."""

from absl.testing import absltest, parameterized

from dsv3_jax import errors
from dsv3_jax.data import chat, tokenizer

_B, _E = tokenizer.BOS, tokenizer.EOS
_U, _A = tokenizer.USER, tokenizer.ASSISTANT
_TALK = (
  {"role": "system", "content": "Be brief.\n"},
  {"role": "user", "content": " 1+1?\n"},
  {"role": "assistant", "content": "a</think>\nb</think>2", "x": "y"},
  {"role": "user", "content": "{{ why }}"},
)
_START = f"{_B}Be brief.\n{_U} 1+1?\n{_A}"
_NEXT = f"{_E}{_U}{{{{ why }}}}{_A}"


class TemplatesTest(parameterized.TestCase):
  @parameterized.parameters(
    ("plain", "a</think>\nb</think>2", ""),
    ("v3", "a</think>\nb</think>2", ""),
    ("v3.1", "</think>\nb</think>2", "</think>"),
    ("v3.1-thinking", "</think>\nb</think>2", "<think>"),
    ("r1", "2", "<think>\n"),
  )
  def test_texts(self, name, answer, opening):
    template = chat.find(name)
    self.assertEqual(
      template.render(_TALK, True), f"{_START}{answer}{_NEXT}{opening}"
    )
    self.assertEqual(template.render(_TALK[:3], False), f"{_START}{answer}{_E}")

  def test_only_the_plain_one_keeps_reasoning(self):
    talk = [
      *({"role": "user", "content": "q"},),
      {"role": "assistant", "content": "a", "reasoning_content": "r"},
      {"role": "user", "content": "q"},
    ]
    found = {
      name: template.render(talk, False).split(_A)[1].split(_E)[0]
      for name, template in chat.TEMPLATES.items()
    }
    self.assertEqual(
      found,
      {
        "plain": "<think>r</think>a",
        "v3": "a",
        "v3.1": "</think>a",
        "v3.1-thinking": "</think>a",
        "r1": "a",
      },
    )

  @parameterized.parameters(
    ("plain", "<think>r</think>a", "a"),
    ("v3.1", "r</think>a", "a"),
    ("v3.1-thinking", "r</think>a", "a"),
    ("r1", "r\n</think>\n\na", "\n</think>\n\na"),
  )
  def test_what_a_model_answers(self, name, with_reasoning, without):
    template, message = chat.find(name), {"role": "assistant", "content": "a"}
    self.assertEqual(template.write_answer(message), without)
    message["reasoning_content"] = "r"
    self.assertEqual(template.write_answer(message), with_reasoning)

  def test_an_answer_without_a_place_is_refused(self):
    with self.assertRaisesRegex(errors.InputError, "no place for"):
      chat.V3.write_answer({"content": "a", "reasoning_content": "r"})
    for name in ("v3.1", "r1"):
      with self.assertRaisesRegex(errors.InputError, "ends the reasoning"):
        chat.find(name).write_answer({"content": "<think>r</think>a"})

  def test_an_unknown_name_is_refused(self):
    with self.assertRaisesRegex(
      errors.InputError, "'v4': must be one of plain"
    ):
      chat.find("v4")

  def test_names_tokens_that_a_tokenizer_lacks(self):
    tok = tokenizer.train(["x"], 264)
    for template in chat.TEMPLATES.values():
      self.assertEmpty(chat.validate(tok, template))
    other = chat.ChatTemplate(tokens=(("bos_token", "<s>"), ("eos_token", _E)))
    (problem,) = chat.validate(tok, other)
    self.assertIn("no special token <s>", problem)

  def test_thinking_is_told_to_templates_only_if_it_is_set(self):
    template = chat.ChatTemplate("{{ thinking is defined }}")
    self.assertEqual(template.render([], True), "False")


if __name__ == "__main__":
  absltest.main()

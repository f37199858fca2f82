"""Tests of needles in haystacks."""

import re

import jax
import numpy as np
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.data import tokenizer
from dsv3_jax.evals import hidden, needles
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, layouts

NEEDLE = re.compile(r"Remember the (\w+) (\w+)\.")
ANSWER = re.compile(r"Recall the (\w+) (\w+)\.")
RUN = testing.run("vocab_size=600")


def rng(seed=0):
  return np.random.default_rng(seed)


class TextsTest(parameterized.TestCase):
  def test_kinds_and_secrets_differ(self):
    secrets = [word for words in needles.SECRETS.values() for word in words]
    self.assertLen(set(secrets) | set(needles.SECRETS), len(secrets) + 8)
    self.assertLen(set(map(len, needles.SECRETS.values())), 1)

  def test_hay_says_no_secret(self):
    self.assertLen(needles.filler_text(), needles.N_FILLER)
    words = {w for words in needles.SECRETS.values() for w in words}
    for straw in needles.filler_text():
      self.assertFalse(words & set(re.findall(r"\w+", straw)), straw)

  @parameterized.parameters(40, 255, 1000)
  def test_a_training_text_answers_what_it_told_before(self, length):
    text = needles.training_text(rng(), length)
    self.assertLessEqual(needles.size(text), length)
    self.assertGreater(needles.size(text), length - 13)
    told = {}
    for part in re.split(r"(?<=\.) ", text):
      if found := NEEDLE.fullmatch(part):
        kind, secret = found.groups()
        self.assertNotIn(kind, told)
        self.assertIn(secret, needles.SECRETS[kind])
        told[kind] = secret
      elif found := ANSWER.fullmatch(part):
        kind, secret = found.groups()
        self.assertEqual(told[kind], secret)
      else:
        self.assertIn(part, needles.filler_text())

  @parameterized.product(length=(60, 200, 1000), depth=(0.0, 0.3, 1.0))
  def test_a_prompt_has_its_needle_at_the_depth(self, length, depth):
    made = needles.prompt(rng(), length, depth)
    n = needles.size(made.text) + 1
    self.assertBetween(n, length - 12, length)
    *sentences, asked = re.split(r"(?<=[.]) ", made.text)
    kind = re.fullmatch(r"Recall the (\w+)", asked)[1]
    needle = f"Remember the {kind}{made.answer}."
    self.assertEqual(sentences.count(needle), 1)
    at = sentences.index(needle) / (len(sentences) - 1)
    self.assertAlmostEqual(at, depth, delta=1 / (len(sentences) - 1))
    told = [s for s in sentences if NEEDLE.fullmatch(s)]
    self.assertLen(told, needles.N_DISTRACTORS + 1)

  def test_prompts_are_those_of_the_seed(self):
    self.assertEqual(
      needles.prompt(rng(1), 90, 0.5), needles.prompt(rng(1), 90, 0.5)
    )
    self.assertNotEqual(
      needles.prompt(rng(1), 90, 0.5), needles.prompt(rng(2), 90, 0.5)
    )


class FoundTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.tok = tokenizer.train(
      [needles.training_text(rng(i), 200) for i in range(4)], 600
    )
    self.params = testing.draw(transformer.specs(RUN.model))
    self.bias = testing.normal(RUN.model.n_routers, 8, seed=1, scale=0.1)

  def model(self, n_devices=1, **changed):
    mesh = device_mesh.make_mesh({"data": n_devices})
    places = layouts.make_layout(RUN, mesh.shape).specs
    put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
    params = jax.tree.map(put, self.params | changed, places)
    return hidden.EvalModel(params, put(self.bias, jax.P()), RUN, mesh)

  def guesses(self, text, n):
    """Decodes the tokens after a text with the reference."""
    args = reference.f64((self.params, self.bias))
    ids = self.tok.encode(text).ids
    for _ in range(n):
      tokens = np.array([[tokenizer.BOS_ID, *ids]])
      states, *_ = reference.forward(*args, tokens, RUN.model)
      ids.append(int((states[0, -1] @ args[0]["head"]).argmax()))
    return ids[-n:]

  def test_an_answer_is_right_where_greedy_decoding_gives_it(self):
    texts = [needles.prompt(rng(i), 40, 0.5).text for i in range(3)]
    prompts = []
    for i, text in enumerate(texts):
      n = i + 1  # tokens of the answer
      answer = self.tok.decode(self.guesses(text, n), skip_special_tokens=False)
      prompts += [needles.Prompt(text, answer), needles.Prompt(text, " Rome")]
    # Decoded text may be encoded otherwise: then it is another answer.
    right = [
      self.tok.encode(p.answer).ids
      == self.guesses(p.text, len(self.tok.encode(p.answer).ids))
      for p in prompts
    ]
    self.assertIn(True, right)
    self.assertIn(False, right)
    for n_devices in (1, 2):
      found = needles.answers_right(
        self.model(n_devices), self.tok, prompts, 128, batch_size=4
      )
      np.testing.assert_array_equal(found, right)

  def test_refuses_prompts_that_are_too_long(self):
    long = needles.Prompt("Recall the city. " * 50, " Rome")
    with self.assertRaisesRegex(ValueError, "at most 64 fit"):
      needles.answers_right(self.model(), self.tok, [long], 64, 1)

  def test_a_grid_has_lengths_and_depths(self):
    made = needles.grid(self.model(), self.tok, (128, 160), (0, 0.5, 1), 2, 256)
    self.assertEqual(made.shape, (2, 3))
    self.assertTrue(np.all((made >= 0) & (made <= 1)))


if __name__ == "__main__":
  absltest.main()

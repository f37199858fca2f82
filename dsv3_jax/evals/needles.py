"""Needle in a haystack: retrieval of sentences hidden in a long text.

A needle is a sentence such as "Remember the metal cobalt."; the filler text is
sentences of the novels; a question is "Recall the metal". A training text has
needles anywhere, and questions about those before. A prompt has the needle of
its question at some depth, a few needles of other categories, and the question
at its end.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from dsv3_jax.data import text_files, tokenizer
from dsv3_jax.errors import InputError
from dsv3_jax.evals import hidden as hidden_lib
from dsv3_jax.model import transformer

SECRETS = {
  category: tuple(words.split())
  for category, words in {
    "colour": "amber azure beige black brown cream green grey ivory lilac"
    " ochre olive pink purple teal white",
    "metal": "brass bronze chrome cobalt copper gold iron lead mercury"
    " nickel pewter silver steel tin titanium zinc",
    "fruit": "apple apricot banana cherry fig grape guava kiwi lemon lime"
    " mango melon orange papaya peach plum",
    "bird": "crane crow dove duck eagle falcon finch goose heron owl parrot"
    " pigeon raven robin stork swan",
    "tree": "alder ash aspen beech birch cedar cypress elm fir hazel larch"
    " maple oak pine poplar willow",
    "river": "Amazon Amur Congo Danube Ebro Elbe Ganges Indus Loire Mekong"
    " Niger Nile Rhine Seine Thames Volga",
    "city": "Athens Berlin Cairo Delhi Dublin Geneva Lima Lisbon London"
    " Madrid Oslo Paris Prague Rome Tokyo Vienna",
    "animal": "badger bear camel deer donkey fox goat hare horse lion mouse"
    " otter rabbit sheep tiger wolf",
  }.items()
}
N_FILLER = 32  # different sentences of the filler text
N_DISTRACTORS = 3  # needles of a prompt without a question
# Tokens of a text beyond its words and punctuation: BOS and EOS, and more than
# one of its first word, which no space precedes.
SPARE = 12
NEEDLE, QUESTION = 0.06, 0.5  # fractions of the sentences of a training text
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")


def size(text: str) -> int:
  """Counts words and punctuation: tokens, if the vocabulary has all words."""
  return len(_WORD_OR_SIGN.findall(text))


@functools.cache
def filler_text() -> tuple[str, ...]:
  """Returns short sentences of the novels."""
  text = " ".join(d.text for d in text_files.read_documents("", "error"))
  sentences = re.findall(r"(?<=[.!?] )[A-Z][a-z]*(?: [a-z]+){4,8}\.", text)
  return tuple(dict.fromkeys(sentences))[:N_FILLER]


def _needle(category: str, secret: str) -> str:
  return f"Remember the {category} {secret}."


def _question(category: str) -> str:
  return f"Recall the {category}"


def training_text(rng: np.random.Generator, length: int) -> str:
  """Draws a training text of at most `length` words, with its answers."""
  filler, categories = filler_text(), list(rng.permutation(list(SECRETS)))
  known: dict[str, str] = {}
  sentences, left = [], length
  while True:
    drawn = rng.random()
    if categories and (not known or drawn < NEEDLE):
      category = categories.pop()
      known[category] = str(rng.choice(SECRETS[category]))
      sentence = _needle(category, known[category])
    elif drawn < NEEDLE + QUESTION:
      category = str(rng.choice(list(known)))
      sentence = f"{_question(category)} {known[category]}."
    else:
      sentence = filler[rng.integers(len(filler))]
    if (left := left - size(sentence)) < 0:
      return " ".join(sentences)
    sentences.append(sentence)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A text that ends with a question."""

  text: str
  answer: str


def prompt(
  rng: np.random.Generator,
  length: int,
  depth: float,
  size: Callable[[str], int] = size,
) -> Prompt:
  """Draws a prompt of about `length`, answer included, never longer.

  Its needle is at a depth from 0, the beginning, to 1, the end. The function
  `size` counts the length of a sentence.
  """
  categories = rng.permutation(list(SECRETS))[: N_DISTRACTORS + 1]
  secrets = [str(rng.choice(SECRETS[category])) for category in categories]
  needle, *others = map(_needle, categories, secrets)
  asked, answer = _question(categories[0]), f" {secrets[0]}"
  left = length - sum(map(size, (needle, *others, asked, answer)))
  filler, sentences = filler_text(), []
  while (left := left - size(new := filler[rng.integers(len(filler))])) >= 0:
    sentences.append(new)
  for other in others:
    sentences.insert(rng.integers(len(sentences) + 1), other)
  sentences.insert(round(depth * len(sentences)), needle)
  return Prompt(" ".join((*sentences, asked)), answer)


def _answered(params, out, start, answer):
  """Returns whether each answer [b, A] is the most likely; PAD matches any."""
  positions = start[:, None] + jnp.arange(answer.shape[1])[None]
  states = jnp.take_along_axis(out.hidden, positions[..., None], axis=1)
  guess = jnp.argmax(transformer.logits(params, states), axis=-1)
  right = (guess == answer) | (answer == tokenizer.PAD_ID)
  return right.all(-1).astype(jnp.float32)


def answers_right(
  model: hidden_lib.EvalModel,
  tok: tokenizers.Tokenizer,
  prompts: Sequence[Prompt],
  length: int,
  batch_size: int,
) -> np.ndarray:
  """Returns whether greedy decoding answers each prompt correctly, [R] bool.

  All prompts are padded to `length` tokens, BOS and answer included.

  Raises:
    InputError: a prompt is longer.
  """

  def encode(text):
    return tok.encode(text, add_special_tokens=False).ids

  rows = [
    ([tokenizer.BOS_ID, *encode(p.text)], encode(p.answer)) for p in prompts
  ]
  longest = max(len(text) + len(answer) for text, answer in rows)
  if longest > length:
    raise InputError(f"a prompt has {longest} tokens; at most {length} fit")
  most = max(len(answer) for _, answer in rows)
  tokens = np.full((len(rows), length), tokenizer.PAD_ID, np.int32)
  answers = np.full((len(rows), most), tokenizer.PAD_ID, np.int32)
  starts = np.array([len(text) - 1 for text, _ in rows], np.int32)
  for i, (text, answer) in enumerate(rows):
    tokens[i, : len(text) + len(answer)] = text + answer
    answers[i, : len(answer)] = answer
  data = tokens, starts, answers
  right = hidden_lib.map_hidden(
    model, _answered, *data, batch_size=batch_size, per_row=True
  )
  return np.concatenate(jax.device_get(list(right)))[: len(rows)] > 0


def grid(
  model: hidden_lib.EvalModel,
  tok: tokenizers.Tokenizer,
  lengths: Sequence[int],
  depths: Sequence[float],
  n_prompts: int,
  tokens_at_once: int,
) -> np.ndarray:
  """Returns the fraction of correct answers, [lengths, depths]."""

  @functools.cache
  def n_tokens(text):
    return len(tok.encode(f" {text.strip()}", add_special_tokens=False).ids)

  fractions = []
  for length in lengths:
    prompts = [
      prompt(
        np.random.default_rng([length, i, j]), length - SPARE, depth, n_tokens
      )
      for i, depth in enumerate(depths)
      for j in range(n_prompts)
    ]
    rows = max(tokens_at_once // length, 1)
    right = answers_right(model, tok, prompts, length, rows)
    fractions.append(right.reshape(len(depths), n_prompts).mean(1))
  return np.stack(fractions)

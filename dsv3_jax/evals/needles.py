"""Needles in a haystack: facts hidden in text, and whether a model finds them.

A needle is a sentence such as "Remember the metal cobalt.", hay is sentences of
the novels, and a question is "Recall the metal". A text to train on has needles
and questions about those before, everywhere; a prompt has one that is asked
for, at some depth, a few of other kinds, and the question at its end.
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

SECRETS = {
  kind: tuple(words.split())
  for kind, words in {
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
HAY = 32  # different sentences
OTHERS = 3  # needles of a prompt that are not asked for
# Tokens of a text beyond its words and signs: BOS and EOS, and more than one of
# its first word, which no space goes before.
SPARE = 12
NEEDLE, QUESTION = 0.06, 0.5  # shares of the sentences of a text to train on
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")


def size(text: str) -> int:
  """Words and signs: tokens of a vocabulary that has all these words."""
  return len(_WORD_OR_SIGN.findall(text))


@functools.cache
def filler_text() -> tuple[str, ...]:
  """Short sentences of the novels."""
  text = " ".join(d.text for d in text_files.read_documents("", "error"))
  sentences = re.findall(r"(?<=[.!?] )[A-Z][a-z]*(?: [a-z]+){4,8}\.", text)
  return tuple(dict.fromkeys(sentences))[:HAY]


def _needle(kind: str, secret: str) -> str:
  return f"Remember the {kind} {secret}."


def _question(kind: str) -> str:
  return f"Recall the {kind}"


def training_text(rng: np.random.Generator, length: int) -> str:
  """A text of at most `length` words and signs, with questions answered."""
  straw, kinds = filler_text(), list(rng.permutation(list(SECRETS)))
  told: dict[str, str] = {}
  sentences, left = [], length
  while True:
    drawn = rng.random()
    if kinds and (not told or drawn < NEEDLE):
      kind = kinds.pop()
      told[kind] = str(rng.choice(SECRETS[kind]))
      sentence = _needle(kind, told[kind])
    elif drawn < NEEDLE + QUESTION:
      kind = str(rng.choice(list(told)))
      sentence = f"{_question(kind)} {told[kind]}."
    else:
      sentence = straw[rng.integers(len(straw))]
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
  """A prompt of about some length, answer included, never more.

  Args:
    rng: draws what is asked for, and the hay.
    length: of the prompt, as `size` counts.
    depth: of the needle, from 0, at the beginning, to 1.
    size: of a sentence.
  """
  kinds = rng.permutation(list(SECRETS))[: OTHERS + 1]
  secrets = [str(rng.choice(SECRETS[kind])) for kind in kinds]
  needle, *others = map(_needle, kinds, secrets)
  asked = _question(kinds[0])
  answer = f" {secrets[0]}"
  left = length - sum(map(size, (needle, *others, asked, answer)))
  straw, sentences = filler_text(), []
  while (left := left - size(new := straw[rng.integers(len(straw))])) >= 0:
    sentences.append(new)
  for other in others:
    sentences.insert(rng.integers(len(sentences) + 1), other)
  sentences.insert(round(depth * len(sentences)), needle)
  return Prompt(" ".join((*sentences, asked)), answer)


def _all_right(hidden, head, start, answer):
  """Whether each row's answer [b, A] is the likeliest; PAD is any."""
  where = start[:, None] + jnp.arange(answer.shape[1])[None]
  states = jnp.take_along_axis(hidden, where[..., None], axis=1)
  guess = jnp.argmax(states @ head, axis=-1)
  right = (guess == answer) | (answer == tokenizer.PAD_ID)
  return right.all(-1).astype(jnp.float32)


def answers_right(
  model: hidden_lib.EvalModel,
  tok: tokenizers.Tokenizer,
  prompts: Sequence[Prompt],
  length: int,
  batch_size: int,
) -> np.ndarray:
  """Whether greedy decoding answers each of the prompts right [R] bool.

  Args:
    model: whose answers.
    tok: its tokenizer.
    prompts: of at most `length` tokens, BOS and answer included.
    length: T, that all are padded to.
    batch_size: rows at a time.

  Raises:
    InputError: a prompt is longer.
  """
  encode = lambda text: tok.encode(text, add_special_tokens=False).ids
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
  right = hidden_lib.map_hidden(
    model, _all_right, True, tokens, starts, answers, batch_size=batch_size
  )
  return np.concatenate(jax.device_get(right))[: len(rows)] > 0


def grid(
  model: hidden_lib.EvalModel,
  tok: tokenizers.Tokenizer,
  lengths: Sequence[int],
  depths: Sequence[float],
  n_prompts: int,
  tokens_at_once: int,
) -> np.ndarray:
  """Shares of prompts answered right [lengths, depths]."""

  @functools.cache
  def n_tokens(text):
    return len(tok.encode(f" {text.strip()}", add_special_tokens=False).ids)

  shares = []
  for length in lengths:
    prompts = [
      prompt(
        np.random.default_rng([length, i, j]),
        length - SPARE,
        depth,
        n_tokens,
      )
      for i, depth in enumerate(depths)
      for j in range(n_prompts)
    ]
    rows = max(tokens_at_once // length, 1)
    right = answers_right(model, tok, prompts, length, rows)
    shares.append(right.reshape(len(depths), n_prompts).mean(1))
  return np.stack(shares)

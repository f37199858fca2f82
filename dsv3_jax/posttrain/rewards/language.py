"""Language consistency: the share of words in the script of a language.

R1 rewards the share of words of the target language in the reasoning, against
mixed languages. Scripts tell English from Chinese and Russian, but not from
German: a language here is a set of scripts.
"""

import functools
import re
import unicodedata

from dsv3_jax.errors import InputError
from dsv3_jax.posttrain.rewards.reward import Reward, RewardFunction

# Scripts by language, as the names of Unicode characters begin.
LANGUAGES = {
  "ar": {"ARABIC"},
  "de": {"LATIN"},
  "el": {"GREEK"},
  "en": {"LATIN"},
  "es": {"LATIN"},
  "fr": {"LATIN"},
  "he": {"HEBREW"},
  "hi": {"DEVANAGARI"},
  "ja": {"CJK", "HIRAGANA", "KATAKANA"},
  "ko": {"HANGUL"},
  "ru": {"CYRILLIC"},
  "th": {"THAI"},
  "zh": {"CJK"},
}
# Scripts without spaces between words: each character counts as one.
UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI"}
# No language: programs, commands of LaTeX, tags.
NOT_WORDS = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\\[A-Za-z]+|</?\w+>", re.S)
LETTERS = re.compile(r"[^\W\d_]+")


@functools.lru_cache(maxsize=100_000)
def _script(letter: str) -> str:
  """Returns the script of a letter: the first word of its name."""
  name = unicodedata.name(letter, "UNKNOWN")
  return re.split("[ -]", name, maxsplit=1)[0]


def scripts_of_words(text: str) -> list[str]:
  """Returns the script of each word.

  A letter alone, as in mathematics, is a symbol and no word; a word of two
  scripts is one word of each.
  """
  text = unicodedata.normalize("NFKC", NOT_WORDS.sub(" ", text))
  scripts = []
  for run in LETTERS.findall(text):
    own = [_script(letter) for letter in run]
    scripts += [script for script in own if script in UNSPACED]
    spaced = [script for script in own if script not in UNSPACED]
    if len(spaced) > 1:
      scripts += dict.fromkeys(spaced)
  return scripts


def language(target: str) -> RewardFunction:
  """Returns the reward of a reply: the share of its words in a language.

  The reasoning counts too. A reply without words, such as a number, has the
  value 1; the part "words" says how many there are.

  Args:
    target: a key of LANGUAGES.

  Raises:
    InputError: the language is not known.
  """
  if target not in LANGUAGES:
    raise InputError(
      f"language={target!r}: must be one of {', '.join(LANGUAGES)}"
    )

  def reward(prompt: str, answer: str, reference: str) -> Reward:
    scripts = scripts_of_words(answer)
    right = sum(script in LANGUAGES[target] for script in scripts)
    share = right / len(scripts) if scripts else 1.0
    return Reward(share, {"words": float(len(scripts))})

  return reward

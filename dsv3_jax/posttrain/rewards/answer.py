r"""Final answer of a reply, and whether it equals the reference.

The final answer is what a reader would take for it: after the reasoning, the
last \boxed{...}, or what the last <answer> encloses, or else the last line.
Nothing is searched for inside it: neither a reply that repeats the question nor
one that lists several answers is right because the reference occurs in it.
"""

import re
from fractions import Fraction

from dsv3_jax.posttrain.rewards.expressions import ExpressionComparer
from dsv3_jax.posttrain.rewards.reward import Reward, RewardFunction, failed

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
# What stands before an answer on its line.
LEAD = re.compile(
  r"(?:(?:so|thus|hence|therefore),?\s+)?"
  r"(?:(?:the\s+)?(?:final\s+)?(?:answer|result)(?:\s+is\s*:?|\s*[:=])|####)\s*",
  re.IGNORECASE,
)
DELIMITERS = (
  *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")),
  (r"\text{", "}"),
)
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NUMBER = re.compile(
  r"[+-]?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<part>\.\d+)?(?:/\d+)?"
)
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
# A number that is written another way: fractions, percent, powers of ten.
COMMANDS = re.compile(r"\\(?:[dt]?frac|[!,;%$])")
SCIENTIFIC = re.compile(
  r"(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{-?\d+\}|-?\d+)"
)
NUMERAL = re.compile(r"(?:[\d.,{}/%$\s]|(?<![\d}\s+-])[+-])+")
# Words and rows of numbers, which as expressions would be products.
COMMAND = re.compile(r"\\[A-Za-z]+")
FUNCTIONS = re.compile(r"(?<![A-Za-z])(?:sqrt|sin|cos|tan|log|exp|pi)(?![a-z])")
WORDS = re.compile(r"[^\W\d_]{3}|\d\s+\d|^[^\W\d_]{2,}$")
MOST_CHARACTERS = 1000  # of an answer that is compared as an expression


def without_reasoning(reply: str) -> str:
  """Returns the text after the reasoning, "" if that has no end."""
  head, end, tail = reply.rpartition(END_THINK)
  return "" if not end and THINK in reply else tail


def final_answer(reply: str) -> str | None:
  r"""Returns the final answer of a reply; None if it has none.

  A \boxed{...} counts also inside <answer>; one that has no end is no answer.
  """
  text = without_reasoning(reply)
  _, begin, tagged = text.rpartition(END_ANSWER)[0].rpartition(ANSWER)
  if begin:
    text = tagged
  if boxes := list(BOXED.finditer(text)):
    return _braced(text[boxes[-1].end() :])
  lines = text.strip().splitlines()
  return _bare(LEAD.sub("", lines[-1].strip(), count=1)) if lines else None


def _braced(text: str) -> str | None:
  """Returns the text before the brace that ends it; None if there is none."""
  depth = 1
  for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
    depth += {"{": 1, "}": -1}.get(match[0], 0)
    if not depth:
      return _bare(text[: match.start()])
  return None


def _bare(text: str) -> str | None:
  """Returns an answer without its full stop and delimiters; None for ""."""
  text = text.strip().removesuffix(".").strip()
  for begin, end in DELIMITERS:
    inside = text[len(begin) : -len(end)]
    if text == begin + inside + end and begin not in inside:
      text = inside.strip()
  return text or None


def correctness(timeout: float = 10.0) -> RewardFunction:
  """Returns the reward 1 for a final answer that equals the reference, else 0.

  Equal are texts that differ in case and spaces at most, numbers of the same
  value, lists of equal items in the same order, and expressions that
  `math-verify` finds equal. Arithmetic that is left to do is no number, and an
  expression of the question is no answer. The part "answered" is 1 where the
  reply has an answer at all. The reference may be a text with a boxed answer.

  Args:
    timeout: seconds for a comparison of expressions, which runs in a process.

  Raises:
    InputError: `math-verify` is not installed.
  """
  comparer = ExpressionComparer(timeout)

  def reward(prompt: str, answer: str, reference: str) -> Reward:
    expected, given = final_answer(reference), final_answer(answer)
    if expected is None:
      return failed("no reference")
    if given is None:
      return Reward(0.0, {"answered": 0.0})
    equal, error = _equal(comparer, prompt, expected, given)
    parts = {"answered": 1.0}
    return failed(error, **parts) if error else Reward(float(equal), parts)

  return reward


def _equal(
  comparer: ExpressionComparer, prompt: str, expected: str, given: str
) -> tuple[bool, str]:
  """Returns whether two answers are equal, and an error or ""."""
  if _plain(expected) == _plain(given):
    return True, ""
  if "=" not in expected:  # 12 + 30 = 42, x = 42
    given = given.rpartition("=")[2].strip()
  if not expected or not given or len(given) > MOST_CHARACTERS:
    return False, ""
  brackets, items = _items(expected)
  if len(items) > 1:
    given_brackets, given_items = _items(given)
    if (brackets, len(items)) != (given_brackets, len(given_items)):
      return False, ""
    pairs = zip(items, given_items, strict=True)
    results = (_equal(comparer, prompt, *pair) for pair in pairs)
    return next((r for r in results if r != (True, "")), (True, ""))
  numbers = [_number(text) for text in (expected, given)]
  exact = None not in numbers and "." not in expected + given
  if exact or (numbers[0] is not None and numbers[0] == numbers[1]):
    return numbers[0] == numbers[1], ""
  if numbers[0] is not None and not _is_numeral(given, numbers[0]):
    return False, ""
  if WORDS.search(_symbols(expected)) or WORDS.search(_symbols(given)):
    return False, ""
  if numbers[1] is None and _occurs(given, prompt):
    return False, ""
  return comparer.equal(expected, given)


def _plain(text: str) -> str:
  return " ".join(text.split()).casefold()


def _number(text: str) -> Fraction | None:
  """Returns the value of a decimal or of a fraction in lowest terms."""
  text = FRACTION.sub(r"\1/\2", text.strip())
  match = NUMBER.fullmatch(text)
  if not match or not (match["whole"] or match["part"]):
    return None
  above, _, below = text.replace(",", "").partition("/")
  value = Fraction(above) / Fraction(below or "1") if below != "0" else None
  return value if not below or str(value) == text.lstrip("+") else None


def _is_numeral(text: str, value: Fraction) -> bool:
  """Returns whether a text writes a number and leaves no arithmetic to do."""
  divides = "/" in text or "frac" in text
  text = SCIENTIFIC.sub("", COMMANDS.sub("", text))
  return bool(NUMERAL.fullmatch(text)) and not (
    divides and value.denominator == 1
  )


def _symbols(text: str) -> str:
  """Returns a text without the commands of LaTeX and the names of functions."""
  return FUNCTIONS.sub(" ", COMMAND.sub("@", text))


def _items(text: str) -> tuple[str, list[str]]:
  """Returns the brackets around a list, "" if none, and its items."""
  brackets = ""
  if text[0] + text[-1] in ("()", "[]", "(]", "[)"):
    brackets, text = text[0] + text[-1], text[1:-1]
  items, depth = [""], 0
  for token in re.findall(r"\\?.|\n", THOUSANDS.sub("", text)):
    depth += {"(": 1, "[": 1, "{": 1, r"\{": 1}.get(token, 0)
    depth -= {")": 1, "]": 1, "}": 1, r"\}": 1}.get(token, 0)
    if token == "," and not depth:
      items.append("")
    else:
      items[-1] += token
  return brackets, [item.strip() for item in items]


def _occurs(text: str, prompt: str) -> bool:
  """Returns whether an expression stands in the prompt, spaces aside."""
  characters = map(re.escape, "".join(text.split()))
  pattern = r"(?<!\w)" + r"\s*".join(characters) + r"(?!\w)"
  return re.search(pattern, prompt, re.IGNORECASE) is not None

"""Tests of a program that a reply contains, run in a sandbox.

The reference is JSON. Its "tests" are pairs of what is typed and what has to be
printed, `[{"stdin": "2 3", "stdout": "5"}]`; its "asserts" are lines of Python
that follow the program, `"assert add(2, 3) == 5"`.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent import futures

from dsv3_jax.errors import InputError
from dsv3_jax.posttrain.rewards import sandbox
from dsv3_jax.posttrain.rewards.answer import without_reasoning
from dsv3_jax.posttrain.rewards.reward import Reward, RewardFunction, failed

BLOCK = re.compile(r"^```(\w*)[ \t]*\n(.*?)^```[ \t]*$", re.S | re.M)
PYTHON = "", "python", "python3", "py"
VERDICTS = "passed wrong crashed timeout output".split()

Test = Callable[[], str]  # returns a verdict


def last_program(reply: str) -> str | None:
  """Returns the last block of Python after the reasoning, if there is one."""
  blocks = BLOCK.findall(without_reasoning(reply))
  programs = [text for name, text in blocks if name.lower() in PYTHON]
  return programs[-1] if programs else None


def code(
  allow_code: bool = False,
  limits: sandbox.Limits = sandbox.LIMITS,
  parallel: int = 1,
) -> RewardFunction:
  """Returns the reward 1 for a reply whose program passes all tests, else 0.

  Parts are "answered" (there is a program), "tests" (their number) and the
  share of tests by verdict: "passed", "wrong", "crashed", "timeout" (ended
  after `limits.seconds`), "output" (too much was written).

  A program that is tested by asserts runs together with them. It does not pass
  by ending early, but one that is written to cheat can: by an object that
  equals everything, or by reading its own file. What has to be printed, in
  contrast, is never inside the sandbox.

  Args:
    allow_code: whether programs of a model may run, in the sandbox.
    limits: of each run, which is one per test.
    parallel: runs at the same time.

  Raises:
    InputError: it is not allowed, or this machine cannot make a sandbox.
  """
  if not allow_code:
    raise InputError(
      "the reward `code` runs code that a model has written, in a sandbox"
      " (SECURITY.md); allow it by allow_code=True (--allow_code)"
    )
  sandbox.check()

  def reward(prompt: str, answer: str, reference: str) -> Reward:
    try:
      cases = json.loads(reference)
      check_reference(cases)
    except (json.JSONDecodeError, InputError) as error:
      return failed(f"reference: {error}")
    if (source := last_program(answer)) is None:
      return Reward(0.0, {"answered": 0.0})
    tests = list(_tests(source, cases, limits))
    try:
      with futures.ThreadPoolExecutor(parallel) as pool:
        verdicts = list(pool.map(lambda test: test(), tests))
    except sandbox.SandboxError as error:
      return failed(f"sandbox: {error}")
    shares = {v: verdicts.count(v) / len(verdicts) for v in VERDICTS}
    parts = {"answered": 1.0, "tests": float(len(verdicts)), **shares}
    return Reward(float(shares["passed"] == 1), parts)

  return reward


def check_reference(cases: object) -> None:
  """Raises InputError if a reference, read from JSON, has no tests."""
  asserts = cases.get("asserts", "") if isinstance(cases, dict) else None
  pairs = cases.get("tests", []) if isinstance(cases, dict) else None
  good = isinstance(asserts, str) and isinstance(pairs, list)
  for pair in pairs if good else ():
    good &= isinstance(pair, dict) and all(
      isinstance(pair.get(name), str) for name in ("stdin", "stdout")
    )
  if not good or not (asserts.strip() or pairs):
    raise InputError(
      'must be {"tests": [{"stdin": "...", "stdout": "..."}, ...]} or'
      ' {"asserts": "assert ..."}, or both'
    )


def _tests(source: str, cases: dict, limits: sandbox.Limits) -> Iterator[Test]:
  """Yields the tests of a program, each of which runs it."""

  def run(source: str, stdin: str, passes: Callable[[str], bool]) -> str:
    result = sandbox.run(source, stdin, limits)
    if result.timed_out:
      return "timeout"
    if result.output_full:
      return "output"
    if result.exit_code:
      return "crashed"
    return "passed" if passes(result.stdout) else "wrong"

  for pair in cases.get("tests", []):
    expected = _lines(pair["stdout"])
    yield lambda pair=pair, expected=expected: run(
      source, pair["stdin"], lambda text: _lines(text) == expected
    )
  if asserts := cases.get("asserts", "").strip():
    # Printed after the asserts: a program that ends before has not passed.
    word = secrets.token_hex(16)
    whole = f"{source}\n\n{asserts}\n\nprint({word!r})\n"
    yield lambda: run(whole, "", lambda text: text.rstrip().endswith(word))


def _lines(text: str) -> list[str]:
  """Returns the lines of an output, without spaces and empty lines at ends."""
  return [line.rstrip() for line in text.strip().splitlines()]

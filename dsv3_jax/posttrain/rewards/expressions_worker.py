"""Worker of `expressions.py`: compares expressions, a line of JSON each."""

import json
import resource
import sys

MEMORY = 2 * 2**30  # bytes of address space; sympy itself needs 0.3


def main():
  """Answers each line of stdin, first of all whether it can."""
  try:
    import math_verify
  except ImportError as error:
    print(json.dumps({"missing": str(error)}), flush=True)
    return
  if sys.platform == "linux":  # macOS knows no such limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  latex = [math_verify.LatexExtractionConfig()]

  def parse(text):
    # The whole text is one expression: none is searched for inside it.
    return math_verify.parse(
      f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=None
    )

  def compare(expected, given):
    try:
      equal = math_verify.verify(
        *(parse(expected), parse(given)),
        timeout_seconds=None,
        raise_on_error=True,
      )
    except (MemoryError, RecursionError) as error:
      return {"error": f"{type(error).__name__}: expressions compared"}
    except Exception:  # sympy has no way to compare them: not known to be equal
      equal = False
    return {"equal": equal}

  print(json.dumps({}), flush=True)
  for line in sys.stdin:
    print(json.dumps(compare(**json.loads(line))), flush=True)


if __name__ == "__main__":
  main()

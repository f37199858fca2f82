"""All mutants by class of fault; run, it writes docs/museum.md."""

import ast
import functools

import grpo_mutants as grpo
import model_mutants as model
import replay_mutants as replay
import sft_mutants as sft
from mutant import ROOT, Mutant

PAGE = ROOT / "docs" / "museum.md"
CLASSES: dict[str, tuple[Mutant, ...]] = {
  "Normalisation": grpo.NORMALISATION,
  "KL divergence": grpo.KL,
  "Advantages and filters": grpo.ADVANTAGES,
  "Sampler is not trainer": grpo.SAMPLER,
  "Replay of experts": replay.REPLAY,
  "Off-policy mask": grpo.MASK,
  "Answers and rewards": grpo.ANSWERS,
  "MTP in reinforcement learning": replay.MTP,
  "Samples": sft.SAMPLES,
  "Packing": sft.PACKING,
  "Reward models": sft.REWARD_MODELS,
  "Router": model.ROUTER,
  "Model": model.MODEL,
  "Data": model.DATA,
}
MUTANTS = tuple(m for mutants in CLASSES.values() for m in mutants)

# Faults that need what this program has not.
CANNOT = {
  "verl#5635": """`math_verify` ends its comparisons by an alarm, which only
  the main thread gets: in another thread each fails. Here they run in the main
  thread of a process of their own
  (`dsv3_jax/posttrain/rewards/expressions_worker.py`).""",
  "tinker-cookbook#822, miles#1829, slime#1800": """A queue that drops what has
  become too old keeps short and easy answers. Here an iteration is generated
  and used as a whole, a fixed number of iterations later (`grpo.staleness`);
  an older one is an error.""",
  "marin#7237": """Chat templates without `{% generation %}` mark no answer.
  Supervision does not come from marks: an answer is what
  `ChatTemplate.write_answer` writes, behind what the engine sees.""",
  "Megatron#5916, Automodel#3816, DeepSpeed#8475": """Each group of devices
  clips by the norm of its own part. Here the norm is of whole arrays, outside
  of all that is written per device (`train.update`).""",
}

HEAD = """# Museum of faults

Other code bases had these faults, mostly in silence. Each is one changed line
of ours here, a mutant, and a test that fails with it: `python -m pytest -m ""
tests/museum` changes the lines in a copy, one at a time, and runs the tests.
`python tests/museum/mutants.py` writes this page from the table beside it.
A number is that of an issue or pull request of the project.
"""


def has_test(test: str) -> bool:
  """Returns whether a test is in its file, read and not imported.

  Cases of a parameterized test have names that begin with its own.
  """
  file, group, name = test.split("::")
  return any(name.startswith(method) for method in _methods(file, group))


@functools.cache
def _methods(file: str, group: str) -> list[str]:
  """Returns the names of the tests of a class."""
  path = ROOT / file
  tree = ast.parse(path.read_text("utf-8") if path.is_file() else "")
  return [
    method.name
    for node in tree.body
    if isinstance(node, ast.ClassDef) and node.name == group
    for method in node.body
    if isinstance(method, ast.FunctionDef) and method.name.startswith("test_")
  ]


def _code(line: str) -> str:
  text = " ".join(line.split())
  for character in "<|*(":  # which Markdown reads
    text = text.replace(character, f"&#{ord(character)};")
  return f"<code>{text}</code>"


def _row(mutant: Mutant) -> str:
  file, *test = mutant.test.split("::")
  return (
    f"| {mutant.fault}: {mutant.what} | `{mutant.file}`<br>"
    f"{_code(mutant.before)}<br>→ {_code(mutant.after)} |"
    f" `{file.removeprefix('tests/')}` {'.'.join(test)} |"
  )


def page() -> str:
  """Returns the text of docs/museum.md."""
  parts = [HEAD]
  for name, mutants in CLASSES.items():
    rows = "\n".join(map(_row, mutants))
    parts.append(
      f"## {name}\n\n| fault | mutant | test |\n| --- | --- | --- |\n{rows}\n"
    )
  parts.append("## What cannot happen here\n")
  parts.append("\n".join(f"- {k}. {v}" for k, v in CANNOT.items()) + "\n")
  return "\n".join(parts)


if __name__ == "__main__":
  PAGE.write_text(page(), "utf-8")

"""Reads collectives and loops from the text of a compiled program."""

import dataclasses
import functools
import re

_KIND = (
  r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all"
  r"|collective-permute)(-start)?\("
)
_CALLED = (
  r"(?:body|condition|to_apply|calls|true_computation|false_computation)"
  r"=%?([\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Op:
  """An instruction."""

  name: str
  text: str  # all after the equals sign

  @property
  def groups(self) -> set[str]:
    """Groups of devices that it speaks in, if it is a collective."""
    if not re.search(_KIND, self.text):
      return set()
    return set(
      re.findall(r"(?:replica_groups|source_target_pairs)=\S+", self.text)
    )

  @property
  def called(self) -> list[str]:
    """Names of computations."""
    branches = re.findall(r"branch_computations=\{([^}]*)\}", self.text)
    names = [n.strip(" %") for each in branches for n in each.split(",")]
    return re.findall(_CALLED, self.text) + names


def computations(text: str) -> dict[str, list[Op]]:
  """Computations of a module by name, instructions as scheduled."""
  found, ops = {}, None
  for line in text.splitlines():
    if line and not line[0].isspace():
      head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
      ops = found.setdefault(head[1], []) if head else None
    elif ops is not None and (
      op := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)
    ):
      ops.append(Op(op[1], op[2]))
  return found


def meetings(text: str) -> list[tuple[str, str]]:
  """Loops that communicate, and what else may while they run.

  XLA's runtime on CPU starts collectives in the order of the schedule, but goes
  on while a loop still runs. What then speaks in the same group of devices, and
  does not need the loop's result, is taken for the loop's own.
  """
  all_ops = computations(text)

  @functools.cache
  def spoken(name):
    return set().union(*map(groups, all_ops.get(name, ())))

  def groups(op):
    return op.groups.union(*map(spoken, op.called))

  found = []
  for ops in all_ops.values():
    speaking = [(i, op, groups(op)) for i, op in enumerate(ops) if groups(op)]
    for i, loop, in_loop in speaking:
      if not loop.called or loop.groups:
        continue
      needing = {loop.name}
      for op in ops[i + 1 :]:
        inputs = op.text.partition(", metadata=")[0]
        if needing & set(re.findall(r"[\w.\-]+", inputs)):
          needing.add(op.name)
      found += [
        (loop.name, op.name)
        for j, op, also in speaking
        if j > i and op.name not in needing and also & in_loop
      ]
  return found

"""Tests of the collectives in a compiled step, inside and outside of loops."""

import collections
import dataclasses
import functools
import re

import hlo
import jax
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import train
from dsv3_jax.parallel import device_mesh, layouts

# Two micro-batches and two layers of a kind: loops, in which what is done for
# each of them is there once.
SETTINGS = (
  "n_layers=4",
  "n_dense_layers=2",
  "train.micro_batches=2",
  "train.scan_layers=true",
)
LAYERS = "dense", "moe", "mtp"

COLLECTIVE = re.compile(
  r" = (?P<type>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
  r"|ragged-all-to-all|collective-permute|collective-broadcast)(-start)?\("
  r'.*?(op_name="(?P<op>[^"]*)"|$)'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """An operation of the compiled step that sends something."""

  kind: str
  shapes: tuple[str, ...]  # such as f32[2,8], of its results
  op: str  # where in the source, as a path of scopes
  looped: bool  # inside a loop: over micro-batches, layers, rounds

  @property
  def scopes(self) -> set[str]:
    """Returns the named scopes of an instruction, outermost first."""
    return set(re.findall(r"\w+", self.op))


def collectives(text):
  """The collectives of an HLO module, from its text."""
  ops, entry = [], False
  for line in text.splitlines():
    if line and not line[0].isspace():  # a computation begins or ends
      entry = line.startswith("ENTRY")
    elif match := COLLECTIVE.search(line):
      shapes = tuple(re.findall(r"\w+\[[\d,]*\]", match["type"]))
      ops.append(
        Collective(match["kind"], shapes, match["op"] or "", not entry)
      )
  return ops


@functools.cache
def module(mesh, *settings):
  """The text of a compiled step."""
  run = testing.run(*SETTINGS, *settings)
  step = (
    train.trace_step(run, device_mesh.make_mesh(dict(mesh))).lower().compile()
  )
  return step.as_text()


def compiled(mesh, *settings):
  """The collectives of a step, and the run's layout."""
  run = testing.run(*SETTINGS, *settings)
  text = module(mesh, *settings)
  return collectives(text), layouts.make_layout(run, dict(mesh))


def slices(layout, kinds):
  """Counts the (leaf, dim) that are stored in shards."""
  shardings = {k: v for k, v in layout.shardings.items() if k in kinds}
  return sum(len(of.fsdp_dims) for of in jax.tree.leaves(shardings))


def of_step(ops):
  """Selects collectives of a step, not of a micro-batch or a layer."""
  # XLA takes the first gathers of the MTP module, which no loop over layers
  # holds, out of the loop over micro-batches.
  return [c for c in ops if not (c.looped or "mtp_1" in c.scopes)]


ZERO1 = ("parallel.layout=zero1",)
FSDP = "parallel.layout=fsdp", "train.remat=block"
WAYS = (((("data", 2), ("expert", 2)), FSDP),)
MORE_WAYS = (
  ((("node", 2), ("expert", 2)), ZERO1),
  ((("data", 2), ("expert", 2)), ZERO1),
  ((("expert", 2),), (*ZERO1, "parallel.rounds=many")),
)


class StepTest(parameterized.TestCase):
  @parameterized.parameters(*WAYS)
  def test_speaks_when_it_must(self, mesh, settings):
    self.check(mesh, settings)

  @parameterized.parameters(*MORE_WAYS)
  @pytest.mark.slow
  def test_speaks_when_it_must_in_other_ways(self, mesh, settings):
    self.check(mesh, settings)

  def check(self, mesh, settings):
    """All there is to say of a compiled step, which takes long to compile."""
    with self.subTest("only the experts speak while tokens pass"):
      self.check_experts(mesh, settings)
    with self.subTest("a slice is gathered and scattered once a step"):
      self.check_slices(mesh, settings)
    with self.subTest("none speaks while a loop does"):
      self.assertEmpty(hlo.meetings(module(mesh, *settings)))
    with self.subTest("what is summed is numbers and counts"):
      self.check_sums(mesh, settings)

  def check_experts(self, mesh, settings):
    ops, layout = compiled(mesh, *settings)
    silent = {"embed", "router", "mla", "shared", "loss"}
    for each in ops:
      self.assertFalse(each.scopes & silent, each)
    in_step = of_step(ops)
    inside = [c for c in ops if c not in in_step]
    dispatch = [c for c in inside if "experts" in c.scopes]
    # Tokens, choices and gates, there and back; how many rounds there are.
    kinds = {c.kind for c in dispatch}
    many = "parallel.rounds=many" in settings
    self.assertEqual(kinds, {"all-to-all", *["all-reduce"] * many})
    for each in dispatch:
      if each.kind == "all-reduce":
        self.assertIn("pmax", each.op)
        self.assertEqual(set(each.shapes), {"s32[]"}, each)
    others = collections.Counter(c.kind for c in inside if c not in dispatch)
    expected = {}
    if layout.rules.gather_by_layer:
      # Each layer's slices become whole to go forward, and again to go back;
      # the gradients of what is whole become slices.
      n = slices(layout, LAYERS)
      expected = {"all-gather": 2 * n, "reduce-scatter": n}
    self.assertEqual(others, expected)

  def check_slices(self, mesh, settings):
    ops, layout = compiled(mesh, *settings)
    of_layers = LAYERS if layout.rules.gather_by_layer else ()
    n = slices(layout, layout.shardings.keys() - set(of_layers))
    counts = collections.Counter(c.kind for c in of_step(ops))
    del counts["all-reduce"]
    self.assertEqual(counts, {"all-gather": n, "reduce-scatter": n})

  def check_sums(self, mesh, settings):
    ops, _ = compiled(mesh, *settings)
    sums = [c for c in of_step(ops) if c.kind == "all-reduce"]
    # Labels, losses and norms; expert counts and copies sent, of three routers;
    # whether the new state is finite.
    # No gradient: all of them are stored in slices here.
    shapes = {shape for each in sums for shape in each.shapes}
    counts = {"s32[]", "s32[3,8]", "s32[3,2]"}
    self.assertEqual(shapes, {"f32[]", "pred[]"} | counts)
    self.assertLess(len([c for c in sums if "pred[]" not in c.shapes]), 10)


class TextTest(absltest.TestCase):
  def test_reads_collectives_and_where_they_are(self):
    text = """\
HloModule step

%body (p: f32[2]) -> f32[2] {
  %a = (f32[1,8]{1,0}, s32[]) all-to-all(%x), op_name="jvp(mtp_1)/experts/a2a"
}

ENTRY %main (p: f32[2]) -> f32[4] {
  %all-gather.1 = f32[4]{0} all-gather-start(%p), dimensions={0}
  ROOT %z = f32[4]{0} add(%all-gather.1, %all-gather.1)
}
"""
    first, second = collectives(text)
    self.assertEqual(first.kind, "all-to-all")
    self.assertEqual(first.shapes, ("f32[1,8]", "s32[]"))
    self.assertLessEqual({"mtp_1", "experts"}, first.scopes)
    self.assertTrue(first.looped)
    self.assertEqual((second.kind, second.op), ("all-gather", ""))
    self.assertFalse(second.looped)


if __name__ == "__main__":
  absltest.main()

"""Tests of parameter shardings, and that layouts change no result."""

import contextlib
import io
import itertools

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dsv3_jax import param_spec, train
from dsv3_jax.config import presets
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, layout_check, layouts, sharding
from dsv3_jax.parallel.pipeline import schedules
from scripts import layout_matrix

SLOW = [case for case in layout_matrix.CASES if case not in layout_matrix.QUICK]


def named(cases):
  return [("_".join(layout_matrix.names(c)).replace("=", ""), c) for c in cases]


# A sum of n = 128 tokens in another order is off by sqrt(n) * eps of its terms
# or so; through some ten such sums, no leaf may be off by 1e-5.
BOUNDS = {
  "loss": 1e-6,
  "gradients": 1e-5,
  "norm": 1e-6,
  "update": 1e-5,
  "params": 1e-5,
}


def check(case):
  result = layout_matrix.measure(case)
  assert result.counts_equal, result
  assert not result.diverged, result
  for name, bound in BOUNDS.items():
    assert getattr(result, name) < bound, (name, result)


@pytest.mark.slow
class AllCasesTest(parameterized.TestCase):
  @parameterized.named_parameters(*named(SLOW))
  def test_no_layout_changes_the_maths(self, case):
    check(case)


class InvarianceTest(parameterized.TestCase):
  @parameterized.named_parameters(*named(layout_matrix.QUICK))
  def test_no_layout_changes_the_maths(self, case):
    check(case)

  def test_the_cases_cover_every_axis_pair_layout_and_dispatch(self):
    cases = layout_matrix.CASES
    axes = [frozenset(a for a, n in c.sizes.items() if n > 1) for c in cases]
    for a in ("data", "node", "expert", "model"):
      for b in ("data", "node", "expert", "model"):
        self.assertIn(frozenset({a, b}), axes)
    self.assertEqual({c.layout for c in cases}, set(sharding.LAYOUTS))
    self.assertLessEqual(
      {"allgather", "all_to_all", "hierarchical_all_to_all"},
      {c.dispatch for c in cases},
    )
    sizes = {int(np.prod(list(c.sizes.values()))) for c in cases}
    self.assertEqual(sizes, {1, 2, 4, 8, 16})

  def test_every_case_is_one_that_the_command_line_takes(self):
    for case in layout_matrix.CASES:
      self.assertEmpty(layout_check.validate(case.run, case.sizes), case)

  def test_the_cases_cover_every_schedule_and_number_of_stages(self):
    result = {}
    for case in layout_matrix.CASES:
      if case.run.parallel.schedule != "none":
        stages = layouts.make_layout(case.run, case.sizes).stages
        sizes = stages.schedule.n_stages, case.sizes.get("expert", 1)
        result.setdefault(case.run.parallel.schedule, set()).add(sizes)
    self.assertEqual(set(result), set(schedules.SCHEDULES))
    for sizes in result.values():
      self.assertLessEqual(set(itertools.product((2, 4, 8), (1, 2))), sizes)


class TableTest(parameterized.TestCase):
  def test_the_page_holds_every_case_in_order_and_within_bounds(self):
    text = layout_matrix.PAGE.read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [
      tuple(cell.strip() for cell in line.strip("|").split("|"))
      for line in lines
    ]
    self.assertEqual(head, layout_matrix.HEAD)
    cases = layout_matrix.CASES
    self.assertEqual(
      [row[:3] for row in rows], [layout_matrix.names(c) for c in cases]
    )
    for row in rows:
      *values, counts, copies = row[3:]
      for value, bound in zip(values, BOUNDS.values(), strict=True):
        self.assertLess(float(value), bound, row)
      self.assertEqual((counts, copies), ("equal", "equal"), row)

  def test_a_row_says_what_was_found(self):
    case = layout_matrix.Case("data=2", "fsdp", settings=("train.remat=block",))
    result = layout_matrix.Differences(
      0.0, 3.4e-7, 1e-10, 2e-6, 1.0, False, "x"
    )
    self.assertEqual(
      layout_matrix.row(case, result),
      "| data=2 | fsdp, train.remat=block | auto | 0 | 3e-7 | 1e-10 | 2e-6"
      " | 1e0 | DIFFER | DIFFER |",
    )

  @parameterized.parameters("--wright", "stray", "--write=x")
  def test_refuses_what_it_does_not_know(self, argument):
    with contextlib.redirect_stderr(io.StringIO()) as err:
      code = layout_matrix.main(["program", argument])
    self.assertEqual(code, 2)
    self.assertStartsWith(err.getvalue(), "error: ")


class PlacementTest(parameterized.TestCase):
  @parameterized.product(
    variant=("tiny", "v2_lite_16b", "v3_671b"), layout=tuple(sharding.LAYOUTS)
  )
  def test_every_array_divides_and_uses_an_axis_once(self, variant, layout):
    rules = sharding.LAYOUTS[layout]
    sizes = {"data": 2, "node": 2, "expert": 4}
    specs = transformer.specs(presets.PRESETS[variant].model)
    for name, spec in param_spec.flatten_with_paths(specs).items():
      param = sharding.param_sharding(spec, rules, sizes)
      axes = [axis for dim in param.dims for axis in dim]
      self.assertLen(set(axes), len(axes), name)
      for size, dim in zip(spec.shape, param.dims, strict=True):
        self.assertEqual(size % device_mesh.axis_size(sizes, dim), 0, name)
      if "experts" in name:
        self.assertLessEqual({"node", "expert"}, set(axes))
      elif layout == "replicated":
        self.assertEmpty(axes, name)
      if layout != "replicated":
        self.assertEqual(set(axes), {"data", "node", "expert"}, name)

  def test_the_optimizer_is_where_its_parameters_are(self):
    run = layout_matrix.Case("data=2,expert=2", "zero1").run
    mesh = device_mesh.make_mesh({"data": 2, "expert": 2})
    state = train.make_state(run, mesh, seed=0)
    adam = state.opt_state[1]
    for moments in (adam.mu, adam.nu):
      types = lambda tree: jax.tree.map(jax.typeof, tree)
      self.assertEqual(types(moments), types(state.params))
    held = lambda tree: sum(
      a.addressable_shards[0].data.size for a in jax.tree.leaves(tree)
    )
    total = param_spec.count(transformer.specs(run.model))
    self.assertEqual(held(state.params), total // 4)
    self.assertEqual(held(adam.mu), total // 4)

  def test_a_layout_does_not_change_the_first_state(self):
    case = layout_matrix.Case("data=2,expert=2", "fsdp")
    state = train.make_state(
      case.run, device_mesh.make_mesh(case.sizes), seed=3
    )
    init = jax.jit(train.init_state, static_argnums=0)
    plain = init(case.run, jax.random.key(3))
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.device_get(state.params),
      jax.device_get(plain.params),
    )

  def test_problems_name_the_sizes_and_what_fits(self):
    run = layout_matrix.RUN
    sizes = {"data": 3, "node": 3, "model": 5}
    result = "\n".join(layout_check.validate(run, sizes))
    self.assertIn("data=3 x node=3 does not divide 8", result)
    self.assertIn("16 routed experts; use 1, 2, 4, 8 or 16", result)
    self.assertIn("model=5 does not divide 4 heads", result)
    self.assertEmpty(layout_check.validate(run, {"data": 2, "expert": 4}))


if __name__ == "__main__":
  absltest.main()

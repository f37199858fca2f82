"""Tests of the profile of a training step."""

from absl.testing import absltest, parameterized

from scripts.bench import profile_step

PROGRAM = """\
%body.1 (a: f32[4,8], b: f32[8,16]) -> f32[4,16] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(f)/jvp(mla)/dot_general"}
}

ENTRY %main (x: f32[4,8], w: f32[8,16]) -> f32[4,16] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = f32[8,16]{1,0} parameter(1)
  %copy.1 = f32[4,8]{0,1} copy(%x), \
metadata={op_name="jit(f)/transpose(jvp(experts))/while/body/copy"}
  ROOT %fusion.1 = f32[4,16]{1,0} fusion(%x, %w), kind=kCustom, \
calls=%body.1, metadata={op_name="jit(f)/jvp(mla)/dot_general"}
}
"""


class ProfileStepTest(parameterized.TestCase):
  def test_time_inside_of_another_event_is_not_counted_twice(self):
    events = [(0, 10, "while"), (1, 4, "dot"), (4, 6, "dot"), (12, 13, "add")]
    times = profile_step.self_times(events)
    self.assertEqual(times, {"while": 5, "dot": 5, "add": 1})

  def test_products_and_all_else_are_told_apart(self):
    program = profile_step.Program(PROGRAM)
    self.assertEqual(program.flops("fusion.1"), 2 * 4 * 8 * 16)
    self.assertEqual(program.flops("copy.1"), 0)
    times = {"fusion.1": 6e6, "copy.1": 2e6, "ThunkExecutor": 9e6}
    counts = {"fusion.1": 2, "copy.1": 2}
    scopes = "experts", "mla"
    lines = profile_step.table(program, times, counts, scopes)
    found = [(x.scope, x.backward, x.product_ms, x.other_ms) for x in lines]
    self.assertEqual(
      found, [("mla", False, 3.0, 0.0), ("experts", True, 0.0, 1.0)]
    )
    self.assertEqual(lines[0].flops, 2 * 4 * 8 * 16)

  @parameterized.parameters(
    ("jit(train_step)/shard_map/jvp(mla)/mul", ("mla", False)),
    ("jit(f)/transpose(jvp(experts))/while/body/dot", ("experts", True)),
    ("jit(f)/optimizer/sqrt", ("optimizer", False)),
    ("jit(f)/shard_map/psum_invariant", ("other", False)),
    ("", ("other", False)),
  )
  def test_scope(self, op_name, expected):
    scopes = *profile_step.SCOPES, "mla"
    self.assertEqual(profile_step.scope_of(op_name, scopes), expected)


if __name__ == "__main__":
  absltest.main()

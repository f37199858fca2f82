"""Tests of the compiled executor; `sharding_test` tests its results."""

import functools
import re

import hlo
import jax
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized
from jax.extend import core

from dsv3_jax import config, train
from dsv3_jax.data.batch import Batch
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh, layout_check, layouts
from dsv3_jax.parallel.pipeline import (
  executor,
  schedules,
  split_backward,
  tick_table,
)
from scripts import layout_matrix

SIZES = {"pipe": 4}
RUN = config.override(
  layout_matrix.DEEP,
  "n_dense_layers=2",
  "train.micro_batches=8",
  "parallel.schedule=dualpipe",
)


def traced(run, sizes=None):
  """A run that traces its gradients on a mesh."""
  mesh = device_mesh.make_mesh(sizes or SIZES)
  state = train.abstract_state(run, mesh)
  spec = jax.NamedSharding(mesh, device_mesh.batch_spec(mesh.shape, 1))
  shape = run.train.micro_batches, run.train.micro_batch_size, run.data.seq_len
  ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=spec)
  gradients = functools.partial(train.gradients, run=run, mesh=mesh)
  return jax.jit(gradients).trace(state, Batch(ids, ids))


def equations(jaxpr):
  """All of a program, inner ones included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from equations(inner)


def products(jaxpr):
  names = [eqn.primitive.name for eqn in equations(jaxpr)]
  return sum(name.endswith("dot_general") for name in names)


def compiled(program):
  return program.lower().compile().as_text()


def dots(text):
  """Matrix products in a compiled program; a loop's are there once."""
  return len(re.findall(r"= \S+ dot\(", text))


@functools.cache
def dualpipe():
  """The compiled text of `RUN`."""
  return compiled(traced(RUN))


@functools.cache
def plain():
  """`RUN` without a pipeline, traced."""
  run = config.override(RUN, "parallel.schedule=none")
  return traced(run, {"data": 1})


def side_by_side(run):
  """A mixture layer's pass forward, and its pass back for the input, traced."""
  specs = transformer.specs(run.model)["moe"]
  p = jax.tree.map(lambda a: a[0], testing.draw(specs))
  x = testing.normal(2, run.data.seq_len, run.model.d_model)
  bias = testing.normal(1, run.model.router.n_experts)
  constants = bias, None, None  # neither segments nor padding
  layer = functools.partial(
    executor._moe,
    cfg=run.model,
    experts=layouts.make_layout(run, SIZES).experts,
  )
  put_off = [leaf.ndim > 1 for leaf in jax.tree.leaves(p)]
  passes = split_backward.split(layer, p, constants, x, put_off)
  d_outputs = x, jax.ShapeDtypeStruct((), np.float32)
  return (
    jax.jit(passes.forward).trace(p, constants, x),
    jax.jit(passes.input_gradient).trace(
      p, constants, passes.residual_types, d_outputs
    ),
  )


class TableTest(parameterized.TestCase):
  @parameterized.product(name=tuple(schedules.SCHEDULES), n_ranks=(2, 4, 8))
  def test_is_the_lockstep_form(self, name, n_ranks):
    schedule = schedules.SCHEDULES[name](n_ranks, 2 * n_ranks + 2)
    table = tick_table.build_tick_table(schedule)
    for tick, cells in enumerate(tick_table.to_ticks(schedule)):
      for rank, cell in enumerate(cells):
        ops = jax.tree.map(lambda a, at=(tick, rank): int(a[at]), table.ops)
        kinds = [op.kind for op in cell or ()]
        self.assertEqual(ops.forward.active, int("F" in kinds))
        self.assertEqual(ops.backward.active, int("B" in kinds or "I" in kinds))
        self.assertEqual(ops.weight.active, int("B" in kinds or "W" in kinds))
        self.assertEqual(ops.overlapped, int(len(kinds) == 2))
        for op in cell or ():
          encoded = {"F": ops.forward, "W": ops.weight}.get(
            op.kind, ops.backward
          )
          self.assertEqual(encoded.stage, schedule.stages[rank][op.direction])
          stream = schedule.streams[op.direction]
          first = stream * schedule.n_per_stream
          self.assertEqual(encoded.micro_batch, first + op.micro_batch)

  @parameterized.parameters(2, 4, 8, 16)
  def test_keeps_one_micro_batch_more_than_there_are_stages(self, n):
    self.assertEqual(
      tick_table.build_tick_table(
        schedules.dualpipe(n, 2 * n)
      ).n_residual_slots,
      n + 1,
    )
    half = schedules.dualpipev(n // 2, n)
    self.assertEqual(tick_table.build_tick_table(half).n_residual_slots, n + 1)
    self.assertEqual(
      tick_table.build_tick_table(
        schedules.one_f_one_b(n, 2 * n)
      ).n_residual_slots,
      n,
    )


class ProgramTest(parameterized.TestCase):
  @parameterized.parameters(*schedules.SCHEDULES)
  def test_makes_no_product_more_than_without_a_pipeline(self, name):
    # A loop over layers is there once, however often it runs. A forward and a
    # backward pass of mixture layers are there once more, to run side by side.
    run = config.override(RUN, f"parallel.schedule={name}")
    found = products(traced(run, {"pipe": 2}).jaxpr)
    expected = products(plain().jaxpr)
    pair = sum(products(one.jaxpr) for one in side_by_side(run))
    self.assertEqual(found, expected + pair)

  def test_nor_when_compiled(self):
    expected = dots(compiled(plain()))
    expected += sum(dots(compiled(one)) for one in side_by_side(RUN))
    self.assertEqual(dots(dualpipe()), expected)

  def test_all_products_are_in_loops_that_may_not_run(self):
    # XLA takes out of a loop what does not change in it, such as the head.
    text = dualpipe()
    (tick,) = [
      ops
      for ops in hlo.computations(text).values()
      if any(" collective-permute(" in op.text for op in ops)
    ]
    self.assertGreater(sum(" while(" in op.text for op in tick), 4)
    self.assertFalse([op for op in tick if re.search(r" dot\(", op.text)])

  @pytest.mark.slow
  def test_exchanges_do_not_meet(self):
    sizes = {"pipe": 2, "node": 2, "expert": 2}
    run = config.override(RUN, "train.batch_size=32", "n_dense_layers=1")
    self.assertEmpty(hlo.meetings(compiled(traced(run, sizes))))

  def test_ranks_differ_without_branches(self):
    self.assertNotIn(" conditional(", dualpipe())

  def test_rounds_of_exchanges_are_cut_into_passes_too(self):
    # On CPU there is one, unless it is asked for.
    run = config.override(RUN, "train.batch_size=32")
    many = config.override(run, "parallel.rounds=many")
    sizes = {"pipe": 2, "expert": 4}
    one, more = (products(traced(r, sizes).jaxpr) for r in (run, many))
    self.assertGreater(more, one)

  def test_repeating_forward_is_the_only_other_work(self):
    run = config.override(RUN, "train.remat=block")
    plain = config.override(run, "parallel.schedule=none")
    more = products(traced(run).jaxpr) - products(traced(RUN).jaxpr)
    plain_more = products(traced(plain, {"data": 1}).jaxpr)
    plain_more -= products(
      traced(config.override(plain, "train.remat=none"), {"data": 1}).jaxpr
    )
    # Twice for mixture layers: side by side with a forward pass, and alone.
    self.assertGreater(more, plain_more)
    self.assertLess(more, 2 * plain_more)

  def test_its_size_does_not_grow_with_micro_batches(self):
    sizes = set()
    for n in (8, 16, 32):
      run = config.override(
        RUN, f"train.batch_size={2 * n}", f"train.micro_batches={n}"
      )
      sizes.add(len(list(equations(traced(run).jaxpr))))
    self.assertLen(sizes, 1)

  def test_no_buffer_is_copied_from_tick_to_tick(self):
    # Buffers of two layers a stage: kept of P + 1 = 5 slots, deferred of 3.
    table = tick_table.build_tick_table(schedules.dualpipe(4, 8))
    leading = {2 * table.n_residual_slots, 2 * table.n_wgrad_slots}
    self.assertEqual(leading, {10, 6})
    text = dualpipe()
    in_loops, entry = [], False
    for line in text.splitlines():
      if line and not line[0].isspace():
        entry = line.startswith("ENTRY")
      elif not entry and (match := re.search(r"= \w+\[(\d+),.* copy\(", line)):
        in_loops.append(int(match[1]))
    self.assertIn(" while(", text)
    self.assertEmpty(leading & set(in_loops))


class ProblemsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"pipe": 3}, (), "3 ranks: must be even"),
    ({"pipe": 4}, ("train.micro_batches=4",), "4 micro-batches.*at least 8"),
    ({"pipe": 4}, ("parallel.schedule=none",), "pipe=4 needs a .*schedule"),
    ({"pipe": 8}, ("n_layers=6",), "6 layers are too few for 8 stages"),
    ({"pipe": 4, "model": 2}, (), "model=2 with parallel.schedule=dualpipe"),
    ({"pipe": 4}, ("parallel.layout=fsdp",), "fsdp with parallel.schedule"),
    ({}, (), "1 ranks: must be even and at least 2; use 2"),
  )
  def test_says_what_is_wrong_and_what_would_do(self, sizes, settings, message):
    run = config.override(RUN, *settings)
    self.assertRegex("\n".join(layout_check.validate(run, sizes)), message)

  def test_odd_micro_batches(self):
    run = config.override(RUN, "train.batch_size=22", "train.micro_batches=11")
    found = "\n".join(layout_check.validate(run, SIZES))
    self.assertIn("11 micro-batches: must be even and at least 8", found)
    self.assertIn("use 10 or 12", found)

  def test_too_few_while_the_batch_grows(self):
    run = config.override(
      RUN,
      "train.batch_size=32",
      "train.micro_batches=16",
      "train.first_batch_size=8",
      "train.ramp_sizes=2",
      "schedule.ramp_until=0.5",
    )
    (line,) = layout_check.validate(run, SIZES)
    self.assertIn("4 micro-batches: must be even and at least 8", line)
    self.assertIn("8 sequences, 2 a micro-batch, of steps while", line)
    run = config.override(run, "train.first_batch_size=16")
    self.assertEmpty(layout_check.validate(run, SIZES))

  def test_nothing_is_wrong(self):
    self.assertEmpty(layout_check.validate(RUN, SIZES))


if __name__ == "__main__":
  absltest.main()

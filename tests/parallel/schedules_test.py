"""Tests of pipeline schedules: their order, validity and lock-step form."""

import dataclasses
import itertools
import re

from absl.testing import absltest, parameterized

from dsv3_jax.parallel.pipeline import schedule_check, schedules, tick_table

# Written down by hand from the step table; `x*n` is n times x.
GOLDEN = {
  (4, 8): """
        F0*3 F1 I1 W F1 F0&B1 F1&B0 B1 F1&B0 B1 I0 W I0 W
        F0 F1 F0 F1 F0 B1 F1&B0 F0&B1 F1&B0 B1 B0 I1 I0 W W
        F1 F0 F1 F0 F1 B0 F0&B1 F1&B0 F0&B1 B0 B1 I0 I1 W W
        F1 F1 F1 F0 I0 W F0 F1&B0 F0&B1 B0 F0&B1 B0 I1 W I1 W
    """,
  (8, 20): """
        F0*7 F1 I1 W F1 I1 W F1 I1 W F1 F0&B1 F1&B0 F0&B1 F1&B0 F0&B1 F1&B0
            B1 F1&B0 B1 F1&B0 B1 F1&B0 B1 I0 W I0 W I0 W I0 W
        F0*5 F1 F0 F1 I1 W F1 I1 W F1 F0&B1 F1&B0 F0&B1 F1&B0 F0&B1 F1&B0
            F0&B1 F1&B0 B1 F1&B0 B1 F1&B0 B1 B0 I1 I0 W I0 W I0 W*2
        F0*3 F1 F0 F1 F0 F1 I1 W F1 F0&B1 F1&B0 F0&B1 F1&B0 F0&B1 F1&B0 F0&B1
            F1&B0 F0&B1 F1&B0 B1 F1&B0 B1 B0 B1 I0 I1 I0 W I0 W*3
        F0 F1 F0 F1 F0 F1 F0 F1 F0 B1 F1&B0 F0&B1 F1&B0 F0&B1 F1&B0 F0&B1
            F1&B0 F0&B1 F1&B0 F0&B1 F1&B0 B1 B0 B1 B0 I1 I0 I1 I0 W*4
        F1 F0 F1 F0 F1 F0 F1 F0 F1 B0 F0&B1 F1&B0 F0&B1 F1&B0 F0&B1 F1&B0
            F0&B1 F1&B0 F0&B1 F1&B0 F0&B1 B0 B1 B0 B1 I0 I1 I0 I1 W*4
        F1*3 F0 F1 F0 F1 F0 I0 W F0 F1&B0 F0&B1 F1&B0 F0&B1 F1&B0 F0&B1 F1&B0
            F0&B1 F1&B0 F0&B1 B0 F0&B1 B0 B1 B0 I1 I0 I1 W I1 W*3
        F1*5 F0 F1 F0 I0 W F0 I0 W F0 F1&B0 F0&B1 F1&B0 F0&B1 F1&B0 F0&B1
            F1&B0 F0&B1 B0 F0&B1 B0 F0&B1 B0 B1 I0 I1 W I1 W I1 W*2
        F1*7 F0 I0 W F0 I0 W F0 I0 W F0 F1&B0 F0&B1 F1&B0 F0&B1 F1&B0 F0&B1
            B0 F0&B1 B0 F0&B1 B0 F0&B1 B0 I1 W I1 W I1 W I1 W
    """,
}
SIZES = {
  "1f1b": [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (4, 9), (7, 20)],
  "zb1p": [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (4, 9), (7, 20)],
  "dualpipe": [(2, 4), (2, 6), (4, 8), (4, 14), (6, 12), (8, 22), (10, 30)],
  "dualpipev": [(1, 2), (1, 3), (2, 4), (2, 7), (3, 6), (4, 11), (5, 15)],
}
CASES = [(name, *size) for name, sizes in SIZES.items() for size in sizes]


def golden(n_ranks, n_micro):
  text = re.sub(
    r"(\S+)\*(\d)", lambda m: f"{m[1]} " * int(m[2]), GOLDEN[n_ranks, n_micro]
  )
  lines = re.sub(r"\n {12}", " ", text).strip().splitlines()
  return [line.split() for line in lines]


def make(name, n_ranks, n_micro):
  return schedules.SCHEDULES[name](n_ranks, n_micro)


def with_cells(schedule, rank, cells):
  changed = list(schedule.cells)
  changed[rank] = tuple(cells)
  return dataclasses.replace(schedule, cells=tuple(changed))


class OrderTest(parameterized.TestCase):
  @parameterized.parameters(*GOLDEN)
  def test_dualpipe_is_the_golden_one_on_every_rank(self, n_ranks, n_micro):
    expected = golden(n_ranks, n_micro)
    self.assertLen(expected, n_ranks)
    self.assertEqual(schedules.dualpipe(n_ranks, n_micro).names(), expected)

  @parameterized.parameters((1, 2), (2, 4), (2, 7), (4, 10), (5, 16))
  def test_dualpipev_is_the_first_half_of_dualpipe(self, n_ranks, n_micro):
    v = schedules.dualpipev(n_ranks, n_micro)
    both = schedules.dualpipe(2 * n_ranks, 2 * n_micro)
    self.assertEqual(v.cells, both.cells[:n_ranks])

  def test_dualpipev_is_the_golden_one(self):
    for n_ranks, n_micro in GOLDEN:
      v = schedules.dualpipev(n_ranks // 2, n_micro // 2)
      expected = golden(n_ranks, n_micro)[: n_ranks // 2]
      self.assertEqual(v.names(), expected)

  def test_one_way_schedules(self):
    self.assertEqual(
      [" ".join(rank) for rank in schedules.one_f_one_b(3, 4).names()],
      [
        "F0 F0 F0 B0 F0 B0 B0 B0",
        "F0 F0 B0 F0 B0 F0 B0 B0",
        "F0 B0 F0 B0 F0 B0 F0 B0",
      ],
    )
    self.assertEqual(
      [" ".join(rank) for rank in schedules.zb1p(3, 4).names()],
      [
        "F0 F0 F0 I0 W F0 I0 W I0 W I0 W",
        "F0 F0 I0 F0 I0 W F0 I0 W I0 W W",
        "F0 I0 F0 I0 F0 I0 W F0 I0 W W W",
      ],
    )

  def test_stages(self):
    self.assertEqual(
      schedules.dualpipe(4, 8).stages, ((0, 3), (1, 2), (2, 1), (3, 0))
    )
    self.assertEqual(schedules.dualpipev(2, 4).stages, ((0, 3), (1, 2)))
    self.assertEqual(schedules.zb1p(2, 4).stages, ((0,), (1,)))

  def test_results_travel_along_the_stages(self):
    v = schedules.dualpipev(2, 4)
    there, back = schedules.Op("F", 0, 3), schedules.Op("F", 1, 3)
    self.assertEqual(v.receiver(0, there), (1, 0))
    self.assertEqual(v.receiver(1, there), (1, 1))
    self.assertEqual(v.receiver(1, back), (0, 1))
    self.assertIsNone(v.receiver(0, back))
    both = schedules.dualpipe(4, 8)
    self.assertEqual(both.receiver(3, back), (2, 1))
    self.assertIsNone(both.receiver(3, there))
    for kind in ("B", "I"):
      op = schedules.Op(kind, 1, 3)
      self.assertEqual(v.receiver(1, op), (1, 0))
      self.assertEqual(both.receiver(1, op), (2, 1))
      self.assertEqual(both.received(1, op), ("B", 1, 3, 3))
    self.assertIsNone(both.receiver(1, schedules.Op("W", 1, 3)))


class CheckTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_every_schedule_is_valid(self, name, n_ranks, n_micro):
    schedule = make(name, n_ranks, n_micro)
    schedule_check.check(schedule)
    self.assertEqual(schedule.name, name)
    self.assertEqual(schedule.n_micro, n_micro)
    self.assertEqual(schedule.n_ranks, n_ranks)
    stages = 2 * n_ranks if name == "dualpipev" else n_ranks
    self.assertEqual(schedule.n_stages, stages)

  @parameterized.parameters("zb1p", "dualpipe", "dualpipev")
  def test_a_missing_w(self, name):
    schedule = make(name, 4, 8)
    bad = with_cells(schedule, 2, schedule.cells[2][:-1])
    with self.assertRaisesRegex(
      ValueError, "rank 2: W number . is missing, where I number . is micro"
    ):
      schedule_check.check(bad)

  @parameterized.parameters(*SIZES)
  def test_an_f_too_many(self, name):
    schedule = make(name, 4, 8)
    cells = schedule.cells[1]
    first = next(cell for cell in cells if cell[0].kind == "F")
    with self.assertRaisesRegex(
      ValueError, "rank 1: F of micro-batch 0 in direction 0 is there 2 times"
    ):
      schedule_check.check(with_cells(schedule, 1, (*cells, first)))

  @parameterized.parameters(*SIZES)
  def test_a_b_missing_and_one_that_is_not_due(self, name):
    schedule = make(name, 4, 8)
    cells = list(schedule.cells[0])
    at = next(i for i, cell in enumerate(cells) if cell[0].kind in "BI")
    op = cells[at][0]
    cells[at] = (op._replace(micro_batch=99),)
    with self.assertRaises(ValueError) as caught:
      schedule_check.check(with_cells(schedule, 0, cells))
    way = f"in direction {op.direction} is there"
    self.assertIn(f"B or I of micro-batch 0 {way} 0", str(caught.exception))
    self.assertIn(f"B or I of micro-batch 99 {way} 1", str(caught.exception))

  @parameterized.parameters(*SIZES)
  def test_a_b_before_its_f(self, name):
    schedule = make(name, 4, 8)
    cells = list(schedule.cells[3])
    at = next(i for i, cell in enumerate(cells) if cell[0].kind in "BI")
    op = cells[at][0]
    cells.insert(0, cells.pop(at))
    with self.assertRaisesRegex(
      ValueError,
      f"rank 3: {op.kind} of micro-batch 0 in direction {op.direction} waits"
      " forever for F on stage",
    ):
      schedule_check.check(with_cells(schedule, 3, cells))

  def test_ws_out_of_order(self):
    schedule = schedules.zb1p(4, 8)
    *cells, a, b = schedule.cells[3]
    with self.assertRaisesRegex(ValueError, "W number 6 is micro-batch 7"):
      schedule_check.check(with_cells(schedule, 3, [*cells, b, a]))

  def test_ranks_that_wait_for_each_other(self):
    schedule = schedules.dualpipe(2, 4)
    # Both want the other's micro-batch before they send their own.
    swapped = [(cells[1], cells[0], *cells[2:]) for cells in schedule.cells]
    bad = dataclasses.replace(schedule, cells=tuple(swapped))
    with self.assertRaises(ValueError) as caught:
      schedule_check.check(bad)
    self.assertEqual(
      str(caught.exception),
      "dualpipe, rank 0: F of micro-batch 0 in direction 1 waits forever for"
      " F on stage 0\n"
      "dualpipe, rank 1: F of micro-batch 0 in direction 0 waits forever for"
      " F on stage 0",
    )

  def test_what_is_no_cell(self):
    schedule = schedules.one_f_one_b(2, 2)
    cells = schedule.cells[0]
    bad = with_cells(schedule, 0, (cells[0] + cells[1], *cells[2:]))
    with self.assertRaisesRegex(ValueError, "cell 0 must be one operation"):
      schedule_check.check(bad)

  def test_a_stage_that_is_nowhere(self):
    schedule = schedules.one_f_one_b(3, 2)
    bad = dataclasses.replace(schedule, stages=((0,), (2,), (2,)))
    with self.assertRaises(ValueError) as caught:
      schedule_check.check(bad)
    self.assertIn("stage 1 of stream 0 is on 0 ranks", str(caught.exception))
    self.assertIn("stage 2 of stream 0 is on 2 ranks", str(caught.exception))


class ProblemsTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_none(self, name, n_ranks, n_micro):
    self.assertEmpty(schedules.validate(name, n_ranks, n_micro))
    self.assertEmpty(schedules.validate(name, n_ranks, n_micro, 2 * n_ranks))

  @parameterized.parameters(
    (
      "1f1b",
      0,
      0,
      None,
      [
        "1f1b: 0 ranks: must be at least 1; use 1",
        "1f1b on 0 ranks: 0 micro-batches: must be at least 1; use 1",
      ],
    ),
    (
      "dualpipe",
      5,
      14,
      None,
      ["dualpipe: 5 ranks: must be even and at least 2; use 4 or 6"],
    ),
    (
      "dualpipe",
      -3,
      4,
      None,
      ["dualpipe: -3 ranks: must be even and at least 2; use 2"],
    ),
    (
      "dualpipe",
      4,
      9,
      None,
      [
        "dualpipe on 4 ranks: 9 micro-batches: must be even and at least 8;"
        " use 8 or 10"
      ],
    ),
    (
      "dualpipe",
      4,
      7,
      3,
      [
        "dualpipe on 4 ranks: 7 micro-batches: must be even and at least 8;"
        " use 8",
        "dualpipe on 4 ranks: 3 layers are too few for 4 stages; use at least"
        " 4 layers, or at most 2 ranks",
      ],
    ),
    (
      "dualpipev",
      4,
      7,
      7,
      [
        "dualpipev on 4 ranks: 7 micro-batches: must be at least 8; use 8",
        "dualpipev on 4 ranks: 7 layers are too few for 8 stages; use at"
        " least 8 layers, or at most 3 ranks",
      ],
    ),
    (
      "dualpipev",
      1,
      2,
      1,
      [
        "dualpipev on 1 ranks: 1 layers are too few for 2 stages; use at"
        " least 2 layers"
      ],
    ),
    (
      "dualpipes",
      4,
      8,
      None,
      [
        "schedule 'dualpipes': one of 1f1b, zb1p, dualpipe, dualpipev; did"
        " you mean 'dualpipe'?"
      ],
    ),
  )
  def test_names_what_is_wrong_and_what_is_right(
    self, name, n_ranks, n_micro, n_layers, expected
  ):
    found = schedules.validate(name, n_ranks, n_micro, n_layers)
    self.assertEqual(found, expected)

  @parameterized.parameters(*SIZES)
  def test_a_schedule_is_refused_or_valid(self, name):
    for n_ranks, n_micro in itertools.product(range(6), range(14)):
      found = schedules.validate(name, n_ranks, n_micro)
      if not found:
        schedule_check.check(make(name, n_ranks, n_micro))
        continue
      with self.assertRaises(ValueError) as caught:
        make(name, n_ranks, n_micro)
      self.assertEqual(str(caught.exception), "\n".join(found))


class TicksTest(parameterized.TestCase):
  @parameterized.parameters((2, 4, 8), (4, 8, 16), (8, 20, 38), (16, 64, 102))
  def test_how_many(self, n_ranks, n_micro, expected):
    both = schedules.dualpipe(n_ranks, n_micro)
    self.assertLen(tick_table.to_ticks(both), expected)
    v = schedules.dualpipev(n_ranks // 2, n_micro // 2)
    self.assertLen(tick_table.to_ticks(v), expected)

  def test_idle_ticks(self):
    idle = [
      sum(cell is None for cell in column)
      for column in zip(
        *tick_table.to_ticks(schedules.dualpipe(8, 20)), strict=True
      )
    ]
    self.assertEqual(idle, [0, 2, 4, 5, 5, 4, 2, 0])

  @parameterized.parameters(*CASES)
  def test_in_order_and_after_what_is_needed(self, name, n_ranks, n_micro):
    schedule = make(name, n_ranks, n_micro)
    table = tick_table.to_ticks(schedule)
    columns = zip(*table, strict=True)
    in_order = tuple(tuple(filter(None, column)) for column in columns)
    self.assertEqual(in_order, schedule.cells)
    made = set()
    for row in table:
      now = [(r, op) for r, cell in enumerate(row) for op in cell or ()]
      self.assertNotEmpty(now)
      for rank, op in now:
        self.assertContainsSubset(schedule.needs(rank, op), made)
      made |= {schedule.result(rank, op) for rank, op in now}


class SlotsTest(parameterized.TestCase):
  @parameterized.parameters((2, 4), (4, 8), (8, 20), (16, 64))
  def test_dualpipe_keeps_one_more_than_it_has_stages(self, n_ranks, n_micro):
    for schedule in (
      schedules.dualpipe(n_ranks, n_micro),
      schedules.dualpipev(n_ranks // 2, n_micro // 2),
    ):
      sizes = tick_table.n_slots(tick_table.assign_slots(schedule).residuals)
      self.assertEqual(sizes, (n_ranks + 1,) * schedule.n_ranks)

  def test_one_way_schedules_keep_one_a_stage_that_follows(self):
    for name in ("1f1b", "zb1p"):
      slots = tick_table.assign_slots(make(name, 4, 9))
      self.assertEqual(tick_table.n_slots(slots.residuals), (4, 3, 2, 1))
    self.assertEqual(tick_table.n_slots(slots.wgrad), (1, 2, 3, 4))
    self.assertEqual(tick_table.n_slots(slots.inputs), (0, 1, 1, 1))
    # The last rank keeps what its own loss makes.
    self.assertEqual(tick_table.n_slots(slots.gradients), (1, 1, 1, 1))

  @parameterized.parameters(*CASES)
  def test_what_is_written_is_still_there_when_read(
    self, name, n_ranks, n_micro
  ):
    schedule = make(name, n_ranks, n_micro)
    slots = tick_table.assign_slots(schedule)
    held = {
      field: [{} for _ in range(n_ranks)]
      for field in ("inputs", "residuals", "gradients", "wgrad")
    }

    def write(field, rank, which):
      held[field][rank][getattr(slots, field)[rank][which]] = which

    def read(field, rank, which):
      slot = getattr(slots, field)[rank][which]
      self.assertEqual(held[field][rank].get(slot), which)

    arriving = []
    for row in tick_table.to_ticks(schedule):
      for arrival in arriving:
        write(*arrival)
      now = [(r, op) for r, cell in enumerate(row) for op in cell or ()]
      arriving = []
      # First all is written, then all is read: the order that asks for most.
      for rank, op in now:
        if to := schedule.receiver(rank, op):
          field = "inputs" if op.kind == "F" else "gradients"
          arriving.append((field, to[0], (to[1], op.micro_batch)))
        if op.kind == "F":
          write("residuals", rank, op[1:])
        elif op.kind == "I":
          write("wgrad", rank, op[1:])
      for rank, op in now:
        if schedule.received(rank, op):
          field = "inputs" if op.kind == "F" else "gradients"
          read(field, rank, op[1:])
        if op.kind in "BI":
          read("residuals", rank, op[1:])
        elif op.kind == "W":
          read("wgrad", rank, op[1:])
    self.assertEmpty(arriving)

  @parameterized.parameters(*CASES)
  def test_slots_are_dense(self, name, n_ranks, n_micro):
    slots = tick_table.assign_slots(make(name, n_ranks, n_micro))
    for field in dataclasses.fields(slots):
      for slot_of, n in zip(
        (buffer := getattr(slots, field.name)),
        tick_table.n_slots(buffer),
        strict=True,
      ):
        self.assertEqual(set(slot_of.values()), set(range(n)))
    due = set(itertools.chain(*(r for r in slots.residuals)))
    self.assertLen(due, n_micro if name != "dualpipev" else 2 * n_micro)


if __name__ == "__main__":
  absltest.main()

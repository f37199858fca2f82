"""Tests of simulated schedules: the published figures and the formulas."""

from absl.testing import absltest, parameterized

from dsv3_jax.parallel.pipeline import schedules, simulate


def make(name, n_stages, n_micro):
  """Makes a schedule of n_stages; n_micro in both directions."""
  if name == "dualpipev":
    return schedules.dualpipev(n_stages // 2, n_micro // 2)
  return schedules.SCHEDULES[name](n_stages, n_micro)


class SimulatorTest(parameterized.TestCase):
  @parameterized.parameters((4, 8, 26, 2), (8, 20, 66, 6), (16, 64, 206, 14))
  def test_dualpipe(self, n_ranks, n_micro, makespan, idle):
    timeline = simulate.simulate(schedules.dualpipe(n_ranks, n_micro))
    self.assertEqual(timeline.makespan, makespan)
    self.assertEqual(timeline.idle, (idle,) * n_ranks)
    self.assertEqual(timeline.peak_activations, (n_ranks + 1,) * n_ranks)

  @parameterized.parameters((2, 4, 26), (4, 8, 54), (4, 10, 66), (4, 20, 126))
  def test_dualpipev(self, n_ranks, n_micro, makespan):
    timeline = simulate.simulate(schedules.dualpipev(n_ranks, n_micro))
    self.assertEqual(timeline.makespan, makespan)
    self.assertEqual(timeline.peak_activations, (2 * n_ranks + 1,) * n_ranks)

  @parameterized.parameters("1f1b", "zb1p")
  def test_one_way_peak_activations(self, name):
    timeline = simulate.simulate(make(name, 8, 20))
    self.assertEqual(timeline.peak_activations, (8, 7, 6, 5, 4, 3, 2, 1))

  @parameterized.product(
    name=tuple(schedules.SCHEDULES),
    n_stages=(2, 4, 8, 16),
    n_micro=(32, 34, 64),
    pair=(3.0, 2.4),
  )
  def test_idle_time_is_that_of_the_formula(
    self, name, n_stages, n_micro, pair
  ):
    times = simulate.Times(FB=pair)
    n_micro = 2 * n_micro if name == "dualpipev" else n_micro
    schedule = make(name, n_stages, n_micro)
    timeline = simulate.simulate(schedule, times)
    formula = simulate.bubble(name, schedule.n_ranks, times)
    self.assertAlmostEqual(max(timeline.idle), formula)

  def test_formulas(self):
    times = simulate.Times(F=1.5, B=4, W=1.2, FB=5)
    for name, n_ranks, expected in (
      ("1f1b", 8, 7 * 5.5),
      ("zb1p", 8, 7 * 3.1),
      ("dualpipe", 8, 3 * 5.4),
      ("dualpipev", 4, 3 * 5.4),
    ):
      self.assertAlmostEqual(simulate.bubble(name, n_ranks, times), expected)
    with self.assertRaisesRegex(ValueError, "'gpipe': one of 1f1b, zb1p"):
      simulate.bubble("gpipe", 8)
    with self.assertRaisesRegex(ValueError, "dualpipe: 7 ranks: must be even"):
      simulate.bubble("dualpipe", 7)

  @parameterized.parameters(
    ("1f1b", {"F": 1.5, "B": 4, "W": 3, "FB": 5}),
    ("zb1p", {"F": 1.5, "B": 4, "W": 1.2, "FB": 5}),
    ("zb1p", {"F": 1, "B": 2.2, "W": 0.9, "FB": 3}),
    ("dualpipe", {"F": 0.7, "B": 1.4, "W": 0.7, "FB": 1.4}),
    ("dualpipev", {"F": 0.7, "B": 1.4, "W": 0.7, "FB": 2.1}),
  )
  def test_formulas_hold_at_the_times_that_they_suppose(self, name, times):
    times = simulate.Times(**times)
    for n_stages in (4, 8, 16):
      schedule = make(name, n_stages, 64)
      timeline = simulate.simulate(schedule, times)
      formula = simulate.bubble(name, schedule.n_ranks, times)
      self.assertAlmostEqual(max(timeline.idle), formula)

  def test_cells_do_not_overlap_and_fill_the_time(self):
    schedule = schedules.dualpipe(6, 16)
    timeline = simulate.simulate(schedule, simulate.Times(F=1.1, FB=2.7))
    for starts, ends, idle in zip(
      timeline.starts, timeline.ends, timeline.idle, strict=True
    ):
      gaps = [b - a for a, b in zip((0, *ends), starts, strict=False)]
      self.assertGreaterEqual(min(gaps), 0)
      tail = timeline.makespan - ends[-1]
      self.assertAlmostEqual(sum(gaps) + tail, idle)

  @parameterized.parameters((4, 8, 26), (8, 20, 72), (16, 64, 224))
  def test_lockstep_makespan_of_dualpipe(self, n_ranks, n_micro, makespan):
    schedule = schedules.dualpipe(n_ranks, n_micro)
    self.assertEqual(simulate.lockstep_makespan(schedule), makespan)

  def test_lockstep_makespan_by_hand(self):
    # Ticks by rank, for one micro-batch: F. .F .B B.; for two of them:
    # F. FF .B BF .B B.
    for n_micro, makespan in ((1, 6), (2, 10)):
      schedule = schedules.one_f_one_b(2, n_micro)
      self.assertEqual(simulate.lockstep_makespan(schedule), makespan)
    times = simulate.Times(F=5, B=4, W=3, comm=1)
    schedule = schedules.one_f_one_b(2, 1)
    self.assertEqual(simulate.lockstep_makespan(schedule, times), 18 + 3)

  @parameterized.product(
    name=tuple(schedules.SCHEDULES), n_stages=(2, 4, 8), n_micro=(16, 34)
  )
  def test_lockstep_is_never_faster(self, name, n_stages, n_micro):
    schedule = make(name, n_stages, n_micro)
    for times in (
      simulate.Times(FB=2.4),
      simulate.Times(F=3, B=4, W=2.5, FB=7),
    ):
      free = simulate.simulate(schedule, times).makespan
      held = simulate.lockstep_makespan(schedule, times)
      self.assertGreaterEqual(held, free - 1e-9)

  def test_lockstep_costs_nothing_where_all_cells_are_alike(self):
    times = simulate.Times(F=1, B=1 + 1e-9, W=1e-9, FB=1)
    schedule = schedules.one_f_one_b(8, 20)
    free = simulate.simulate(schedule, times).makespan
    held = simulate.lockstep_makespan(schedule, times)
    self.assertAlmostEqual(held, free, places=5)

  def test_a_result_travels_and_no_rank_is_busy_with_it(self):
    times = simulate.Times(comm=5)
    timeline = simulate.simulate(schedules.one_f_one_b(2, 1), times)
    self.assertEqual(timeline.starts, ((0, 14), (6, 7)))
    self.assertEqual(timeline.idle, (13, 13))
    timeline = simulate.simulate(schedules.one_f_one_b(2, 3), times)
    self.assertEqual(timeline.starts[1][:3], (6, 7, 9))

  def test_a_rank_sends_itself_nothing(self):
    schedule = schedules.dualpipev(1, 2)
    self.assertEqual(
      simulate.simulate(schedule, simulate.Times(comm=5)),
      simulate.simulate(schedule),
    )

  def test_times_that_cannot_be(self):
    for times, message in (
      ({"F": 0}, "Times.F=0: must be above 0"),
      ({"comm": -1}, "Times.comm=-1: must be at least 0"),
      ({"FB": float("nan")}, "Times.FB=nan: must be finite"),
      ({"W": 2}, r"Times.W=2: must be below B=2.0"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        simulate.Times(**times)


if __name__ == "__main__":
  absltest.main()

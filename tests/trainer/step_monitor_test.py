"""Tests of what is said about steps, and of what ends a run."""

import types
from unittest import mock

import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.data import loader
from dsv3_jax.trainer import event_log, exit_codes, metrics_writer, step_monitor


class Book(metrics_writer.NullWriter):
  def __init__(self):
    self.rows, self.notes = [], []

  def write(self, row):
    self.rows.append(row)

  def note(self, text):
    self.notes.append(text)


class Order:
  """Rows of which the n-th is number 1000 + n."""

  def shuffled(self, seed):
    del seed
    return self

  def __getitem__(self, n):
    return {"tokens": np.zeros(9, np.int32), "row": np.int64(1000 + n)}


@pytest.mark.fault(
  "F31",
  "loss or gradient norm jumps",
  "reported; optionally rolls back to a checkpoint and skips the data",
)
class ReporterTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.book, self.events = Book(), []

  def make(self, *settings, left_out=0, before=()):
    run = testing.run(*settings)
    source = loader.BatchSource(Order(), run, 0, left_out)
    record = lambda event, **facts: self.events.append((event, facts))
    self.run_ = run
    return step_monitor.StepMonitor(
      self.book, source, 99, record, event_log.GoodputTimer(), before
    )

  def metrics(self, loss=1.0, grad_norm=1.0):
    n, experts = 2, self.run_.model.router.n_experts
    return {
      "loss": np.float32(loss),
      "grad_norm": np.float32(grad_norm),
      "finite": np.isfinite(loss) & np.isfinite(grad_norm),
      "load": np.ones((n, experts), np.int32),
      "max_vio_per_layer": np.zeros(n, np.float32),
      "sent": {},
    }

  def setting(self, *settings, **how):
    report = self.make(*settings, **how)
    nothing = types.SimpleNamespace(bytes_sent=lambda *_: {})
    self.enter_context(mock.patch.object(step_monitor, "comm_volume", nothing))
    return report

  @pytest.mark.fault("F29")
  def test_a_bad_step_is_told_with_what_it_read(self):
    report = self.setting(left_out=7)
    report.report(1, self.metrics())
    self.assertEqual((self.book.notes, self.events), ([], []))
    report.report(2, self.metrics(loss=np.nan))
    size = self.run_.batch_phase(1).batch_size
    first = self.run_.rows_before(1) + 7
    (line,), ((event, facts),) = self.book.notes, self.events
    self.assertStartsWith(
      line,
      "step 2 was skipped: loss or gradient not finite; it read sequences"
      f" {first} to {first + size - 1} of the run, rows {1000 + first}, ",
    )
    self.assertEqual(event, "bad")
    self.assertEqual(facts["rows"], [1000 + first + i for i in range(size)])
    self.assertEqual((facts["step"], facts["loss"]), (2, None))

  @pytest.mark.fault("F30")
  @parameterized.parameters(1, 2, 20)
  def test_too_many_of_the_recent_steps_end_the_run(self, every):
    report = self.setting("train.max_bad_steps=3")
    bad = self.metrics(grad_norm=np.inf)
    for step in range(1, 4 * every):
      report.report(step, self.metrics() if step % every else bad)
    with self.assertRaisesRegex(
      FloatingPointError,
      f"4 of the last {4 * every} steps up to step {4 * every} were not finite",
    ):
      report.report(4 * every, bad)
    self.assertLen(self.events, 4)

  @pytest.mark.fault("F30")
  def test_bad_steps_far_apart_do_not(self):
    report = self.setting("train.max_bad_steps=3")
    bad, every = self.metrics(loss=np.nan), step_monitor.RECENT // 3 + 1
    for step in range(1, 10 * every):
      report.report(step, self.metrics() if step % every else bad)
    self.assertLen(self.events, 9)

  @pytest.mark.fault("F30")
  def test_bad_steps_before_a_restart_count(self):
    row = {"loss": 1.0, "grad_norm": 1.0}
    before = [row | {"step": i, "skipped_steps": i // 2} for i in range(1, 9)]
    report = self.setting("train.max_bad_steps=4", before=before)
    with self.assertRaisesRegex(FloatingPointError, "5 of the last 8 steps"):
      report.report(9, self.metrics(loss=np.nan))

  def test_an_update_that_is_not_finite_is_told(self):
    self.setting().report(1, self.metrics() | {"finite": np.False_})
    (line,) = self.book.notes
    self.assertStartsWith(line, "step 1 was skipped: the update is not finite")

  def rise(self, report, n, key, value):
    rng = np.random.default_rng(0)
    for step in range(1, n + 1):
      report.report(step, self.metrics(*rng.uniform(0.9, 1.1, 2)))
    report.report(n + 1, self.metrics(**{key: value}))

  @parameterized.parameters(("loss", 3.0), ("grad_norm", 50.0))
  def test_a_jump_is_told(self, key, value):
    self.rise(self.setting("train.spike_factor=2"), 30, key, value)
    (line,) = self.book.notes
    self.assertRegex(line, rf"step 31 jumped: {key} {value:g} is .* times the")
    self.assertLen(self.events, 1)

  @parameterized.parameters(
    ((), 30, 99.0),  # nobody asked
    (("train.spike_factor=2",), 30, 1.9),
    (("train.spike_factor=2",), step_monitor.ENOUGH - 1, 99.0),  # too early
    (("train.spike_factor=2",), 30, 0.0),
  )
  def test_what_is_no_jump(self, settings, n, value):
    self.rise(self.setting(*settings), n, "loss", value)
    self.assertEqual((self.book.notes, self.events), ([], []))

  def test_a_jump_does_not_make_the_next_one_small(self):
    report = self.setting("train.spike_factor=2")
    self.rise(report, 30, "loss", 3.0)
    report.report(32, self.metrics(loss=3.0))
    self.assertLen(self.events, 2)

  def test_steps_before_a_restart_count(self):
    before = [{"step": i, "loss": 1.0, "grad_norm": 1.0} for i in range(1, 31)]
    settings = "train.spike_factor=2", "train.spike_skip=4"
    report = self.setting(*settings, before=before)
    with self.assertRaisesRegex(
      exit_codes.SpikeError, "step 31 jumped"
    ) as caught:
      report.report(31, self.metrics(loss=3.0))
    self.assertEqual(caught.exception.step, 31)

  def test_a_window_needs_a_factor(self):
    with self.assertRaisesRegex(ValueError, "spike_skip=4: needs a spike_fac"):
      config.override(testing.run(), "train.spike_skip=4")


if __name__ == "__main__":
  absltest.main()

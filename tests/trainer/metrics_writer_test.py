"""Rows survive kills and resumes."""

import io
import json
import pathlib
import struct
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from tensorboardX.proto import event_pb2

from dsv3_jax.trainer import metrics_writer, terminal


def row(step: int, **more) -> dict:
  """The row of a step."""
  return {
    "step": step,
    "tokens": 8 * step,
    "loss": 5.0 - step,
    "tokens_per_s": 12_345.6,
    "max_vio": 0.21,
    "skipped_steps": 1,
  } | more


def events(workdir: pathlib.Path) -> list[event_pb2.Event]:
  """Tensorboard events in the order of their files."""
  found = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:  # length, its checksum, event, its checksum
      (length,) = struct.unpack("<Q", data[:8])
      found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return found


class MetricsWriterTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    parent = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(parent) / "run"  # the writer makes it
    self.metrics = self.workdir / "metrics.jsonl"

  def writer(self, done=0, stream=None) -> metrics_writer.MetricsWriter:
    self.workdir.mkdir(exist_ok=True)
    lines = terminal.Terminal(self.workdir, stream or io.StringIO())
    self.addCleanup(lines.close)
    return metrics_writer.MetricsWriter(self.workdir, 10, done, lines)

  def write(self, first: int, last: int) -> None:
    with self.writer(done=first - 1) as log:
      for step in range(first, last + 1):
        log.write(row(step))

  def steps(self) -> list[int]:
    return [r["step"] for r in metrics_writer.read(self.metrics)]

  def test_rows_round_trip(self):
    load = np.arange(6, dtype=np.int32).reshape(2, 3)
    evaluation = {"step": 1, "heldout_bpb": 1.5, "sample": "“a”\n\ud800"}
    with self.writer() as log:
      log.write(row(1, load=load, lr=np.float32(0.5)))
      log.write(evaluation)
    expected = row(1, load=load.tolist(), lr=0.5)
    self.assertEqual(metrics_writer.read(self.metrics), [expected, evaluation])

  def test_a_row_is_on_disk_when_the_call_returns(self):
    log = self.writer()
    log.write(row(1))
    self.assertEqual(self.steps(), [1])
    log.close()

  def test_not_finite_is_null_in_strict_json(self):
    def refuse(name):
      raise ValueError(f"{name} is no JSON")

    bad = [float("inf"), np.float32("nan"), 1.0]
    stream = io.StringIO()
    with self.writer(stream=stream) as log:
      log.write(row(1, loss=float("nan"), max_vio_per_layer=bad))
    text = self.metrics.read_text()
    parsed = json.loads(text, parse_constant=refuse)
    self.assertIsNone(parsed["loss"])
    self.assertEqual(parsed["max_vio_per_layer"], [None, None, 1.0])
    self.assertIn("loss nan", stream.getvalue())

  @parameterized.parameters(3, 5)
  def test_resume_leaves_one_row_a_step(self, done):
    self.write(1, 5)
    with self.writer(done=5) as log:
      log.write({"step": 5, "heldout_loss": 1.0})
    self.write(done + 1, 6)
    steps = [
      r["step"] for r in metrics_writer.read(self.metrics) if "loss" in r
    ]
    self.assertEqual(steps, [1, 2, 3, 4, 5, 6])
    self.assertLen(self.steps(), 7 if done == 5 else 6)
    left = {p.name for p in self.workdir.iterdir()}
    self.assertEqual(left, {"metrics.jsonl", "log.txt", "tensorboard"})

  def test_resume_drops_a_torn_line(self):
    self.write(1, 3)
    text = self.metrics.read_text()
    self.metrics.write_text(text[:-20])
    self.write(3, 4)
    self.assertEqual(self.steps(), [1, 2, 3, 4])
    for line in self.metrics.read_text().splitlines():
      json.loads(line)

  def test_new_run_starts_an_empty_file(self):
    self.write(1, 3)
    self.write(1, 1)
    self.assertEqual(self.steps(), [1])

  def test_events_hold_the_scalars_and_purge_on_resume(self):
    with self.writer() as log:
      log.write(row(1, max_vio_per_layer=[0.5, None], load=[[1, 2]]))
      log.write({"step": 1, "heldout_bpb": 1.5, "sample": "text"})
    written = {
      value.tag: value.simple_value
      for event in events(self.workdir)
      for value in event.summary.value
    }
    self.assertEqual(written["train/loss"], 4.0)
    self.assertEqual(written["heldout/bpb"], 1.5)
    self.assertEqual(written["max_vio/router_0"], 0.5)
    self.assertNoCommonElements(
      written, ["train/load", "max_vio/router_1", "train/step"]
    )
    self.write(2, 2)
    starts = [e.step for e in events(self.workdir) if e.HasField("session_log")]
    self.assertIn(2, starts)
    self.assertLen(list((self.workdir / "tensorboard").iterdir()), 2)


if __name__ == "__main__":
  absltest.main()

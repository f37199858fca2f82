"""The page of a running run is served, and nothing else."""

import contextlib
import http.client
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
from unittest import mock

import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.report import page, watch
from dsv3_jax.trainer import metrics_writer
from scripts import report

ROW = {"step": 1, "tokens": 8, "loss": 1.0}


def drawing(run, shown, *, live):
  """A page that costs nothing to draw."""
  return f"{live}{len(run.steps)} steps"


class WatchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self) / "run"
    self.drawn = self.enter_context(
      mock.patch.object(page, "to_html", side_effect=drawing)
    )
    self.enter_context(mock.patch.object(watch, "LEAST_S", 0.0))
    self.enter_context(mock.patch.object(watch, "BUSY", 1e9))
    self.server = self.enter_context(watch.make_server(self.folder, 0))
    self.port = self.server.server_port
    threading.Thread(
      target=self.server.serve_forever, args=(0.01,), daemon=True
    ).start()
    self.addCleanup(self.server.shutdown)

  def write(self, *lines: str) -> None:
    self.folder.mkdir(exist_ok=True)
    (self.folder / metrics_writer.METRICS).write_text("\n".join(lines))

  def ask(self, path: str, method: str = "GET", **headers: str):
    with contextlib.closing(
      http.client.HTTPConnection(watch.HOST, self.port)
    ) as connection:
      connection.putrequest(method, path, skip_host="Host" in headers)
      for name, value in headers.items():
        connection.putheader(name, value)
      connection.endheaders()
      answer = connection.getresponse()
      return answer.status, answer.read().decode(), answer.headers

  def test_is_for_this_machine_alone(self):
    self.assertEqual(self.server.server_address[0], "127.0.0.1")

  @parameterized.parameters(
    "/../env.json",
    "/%2e%2e/env.json",
    "/..%2fenv.json",
    "/etc/passwd",
    "//etc/passwd",
    "/run/metrics.jsonl",
    "/metrics.jsonl",
    "/.",
    "/%00",
    "/report.html",
    "env.json",
    "*",
    "/?",
    "http://other/",
  )
  def test_other_paths_are_not_found(self, path):
    self.write(json.dumps(ROW))
    status, text, _ = self.ask(path)
    self.assertEqual((status, text[:4]), (404, "only"))

  @parameterized.parameters("example.org", "example.org:80", "")
  def test_other_names_of_the_machine_are_not_answered(self, host):
    self.assertEqual(self.ask("/", Host=host)[0], 404)

  def test_head_is_the_answer_without_its_text(self):
    self.write(json.dumps(ROW))
    status, text, head = self.ask("/", "HEAD")
    self.assertEqual((status, text), (200, ""))
    whole = self.ask("/")[1]
    self.assertEqual(int(head["Content-Length"]), len(whole.encode()))
    self.assertEqual(head["Content-Type"], "text/html; charset=utf-8")

  def test_other_methods_are_refused(self):
    self.assertEqual(self.ask("/", "POST")[0], 501)

  def test_is_drawn_again_only_if_files_have_changed(self):
    self.write(json.dumps(ROW))
    for _ in range(3):
      self.assertEndsWith(self.ask("/")[1], "1 steps")
    self.assertEqual(self.drawn.call_count, 1)
    version = self.ask("/version")[1]
    self.assertIn(f'name="version" content="{version}"', self.ask("/")[1])
    self.write(json.dumps(ROW), json.dumps(ROW | {"step": 2}), '{"step": 3, "l')
    self.assertNotEqual(self.ask("/version")[1], version)
    self.assertEqual(self.drawn.call_count, 1)
    self.assertEndsWith(self.ask("/")[1], "2 steps")

  def test_leaves_the_processor_to_the_run(self):
    self.write(json.dumps(ROW))
    with mock.patch.object(watch, "LEAST_S", 1e6):
      version = self.ask("/")[1]
      self.write(json.dumps(ROW), json.dumps(ROW | {"step": 2}))
      self.assertEqual(self.ask("/")[1], version)
    self.assertEqual(self.drawn.call_count, 1)

  def test_waits_for_workdir_and_first_step(self):
    said = []
    for change in (
      lambda: None,
      lambda: self.write(),
      lambda: self.write('{"'),
    ):
      change()
      status, text, _ = self.ask("/")
      self.assertEqual(status, 200)
      self.assertIn("Waiting for the first step", text)
      said.append(text)
    self.assertIn("has no metrics.jsonl", said[0])
    self.assertIn("has no training step yet", said[1])
    self.write(json.dumps(ROW))
    self.assertEndsWith(self.ask("/")[1], "1 steps")

  def test_a_file_that_vanishes_is_waited_for(self):
    self.write(json.dumps(ROW))
    gone = FileNotFoundError(2, "gone")
    with mock.patch.object(metrics_writer, "read", side_effect=gone):
      self.assertIn("cannot be read", self.ask("/")[1])
    os.utime(self.folder / metrics_writer.METRICS, (0, 0))
    self.assertEndsWith(self.ask("/")[1], "1 steps")

  def test_a_used_port_names_a_free_one(self):
    folder = "--workdir=/tmp/my run"
    code, out, err = testing.command_line(
      report.main, folder, "--watch", f"--port={self.port}"
    )
    self.assertEqual((code, out), (2, ""))
    self.assertIn(f"--port={self.port}: cannot be served on: Address", err)
    command = shlex.split(err.rpartition("free: ")[2])
    self.assertEqual(
      command[:5], ["python", "-m", "scripts.report", folder, "--watch"]
    )
    self.assertNotEqual(command[5], f"--port={self.port}")

  @parameterized.parameters(-1, 65536, "x")
  def test_a_port_is_a_number_of_16_bits(self, port):
    code, _, err = testing.command_line(
      report.main, "--workdir=a", "--watch", f"--port={port}"
    )
    self.assertEqual(code, 2)
    self.assertIn(f"--port={port}: ", err)


class ProcessTest(absltest.TestCase):
  @pytest.mark.slow
  def test_ctrl_c_ends_it_in_a_line(self):
    command = [sys.executable, "-m", "scripts.report", "--watch", "--port=0"]
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
      [*command, f"--workdir={testing.folder(self)}"],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=root,
    )
    self.assertRegex(process.stdout.readline(), r"^http://localhost:\d+/ shows")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    self.assertEqual(process.returncode, 0)
    self.assertEqual(out.strip().count("\n"), 0)
    self.assertEmpty(err)


if __name__ == "__main__":
  absltest.main()

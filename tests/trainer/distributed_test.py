"""Tests of how several processes find each other."""

import concurrent.futures
import os
import socket
from unittest import mock

import jax
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.trainer import distributed


def call(port, *members, timeout_s=20):
  """Returns what each of (count, index) hears in a roll call."""

  def hear(member):
    who = distributed.Processes(f"127.0.0.1:{port}", *member, timeout_s)
    return distributed._roll_call(who)

  with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
    return list(pool.map(hear, members))


@pytest.mark.fault("F09")
class RollCallTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 4)
  def test_all_come(self, n):
    members = [(n, i) for i in range(n)]
    self.assertEqual(call(testing.free_port(), *members), [""] * n)

  def test_names_those_that_do_not_come(self):
    heard = call(testing.free_port(), (4, 0), (4, 2), timeout_s=2)
    for problem in heard:
      self.assertIn("1, 3 did not join within 2 s", problem)

  def test_process_0_does_not_come(self):
    (problem,) = call(testing.free_port(), (2, 1), timeout_s=1)
    self.assertIn("process 0 did not answer within 1 s", problem)

  def test_one_was_started_twice(self):
    for problem in call(testing.free_port(), (3, 0), (3, 1), (3, 1)):
      self.assertIn("--process=1: was started twice", problem)

  def test_they_disagree_on_how_many_they_are(self):
    for problem in call(testing.free_port(), (2, 0), (3, 1)):
      self.assertIn("--processes: 2 here, 3 at 1", problem)

  def test_strangers_are_ignored(self):
    port = testing.free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      who = distributed.Processes(f"127.0.0.1:{port}", 2, 0, 20)
      leader = pool.submit(distributed._roll_call, who)
      while True:
        try:
          with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.sendall(b"GET / HTTP/1.1\r\n")
          break
        except OSError:
          continue
      self.assertEqual(call(port, (2, 1)), [""])
      self.assertEqual(leader.result(), "")

  def test_the_port_is_taken(self):
    with socket.create_server(("", 0)) as server:
      port = server.getsockname()[1]
      (problem,) = call(port, (2, 0), timeout_s=1)
    self.assertIn("cannot listen there", problem)


class ProblemsTest(parameterized.TestCase):
  @parameterized.parameters(
    (("", 2, 0), "--coordinator is missing"),
    (("somewhere", 2, 0), "--coordinator=somewhere: expected HOST:PORT"),
    (("host:1", 0, 0), "--processes=0: must be at least 1"),
    (("host:1", 2, 2), "--process=2: must be in 0 to 1"),
    (("host:1", 2, 1, 0), "--join_timeout=0"),
  )
  def test_says_what_is_wrong(self, fields, message):
    self.assertIn(message, "\n".join(distributed.Processes(*fields).validate()))

  def test_good_ones(self):
    for fields in ((), ("host:80", 2, 1), ("auto", 1, 0)):
      self.assertEmpty(distributed.Processes(*fields).validate())


class MeshTest(absltest.TestCase):
  def test_must_multiply_to_the_devices(self):
    with self.assertRaisesRegex(ValueError, "to 6, and there are 16 .*data=16"):
      distributed.mesh({"data": 2, "expert": 3})
    with self.assertRaisesRegex(ValueError, "to 4, .*data=8 and the other"):
      distributed.mesh({"data": 2, "expert": 2})

  def test_all_devices_share_the_data_unless_told(self):
    self.assertEqual(distributed.mesh({}).shape["data"], jax.device_count())


class OrderTest(parameterized.TestCase):
  @parameterized.parameters(
    ("", "--xla_gpu_deterministic_ops=true"),
    ("--xla_a=1", "--xla_a=1 --xla_gpu_deterministic_ops=true"),
    # What somebody has chosen stays.
    ("--xla_gpu_deterministic_ops=false",) * 2,
  )
  def test_is_asked_for_once(self, given, expected):
    with mock.patch.dict(os.environ, {"XLA_FLAGS": given}):
      for _ in range(2):
        distributed.fix_order_of_sums()
      self.assertEqual(os.environ["XLA_FLAGS"], expected)


class FirstDoesTest(absltest.TestCase):
  def test_works_and_raises_what_the_work_raised(self):
    done = []
    distributed.run_on_process_zero(lambda: done.append(1))
    self.assertEqual(done, [1])

    def fail():
      raise ValueError("no")

    with self.assertRaisesRegex(ValueError, "no"):
      distributed.run_on_process_zero(fail)


if __name__ == "__main__":
  absltest.main()

"""Tests of programs in the sandbox: ten attacks, verdicts, what is left."""

import json
import os
import pathlib
import secrets
import socket
import textwrap
import threading
import time
from unittest import mock

import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.errors import InputError
from dsv3_jax.posttrain.rewards import REWARDS, sandbox
from dsv3_jax.posttrain.rewards.reward import score_all

SHORT = sandbox.Limits(seconds=1.0)


def reply(source):
  return f"<think>hm</think>\n```python\n{textwrap.dedent(source)}\n```\nThere."


def printed(text):
  """A reference: nothing is typed and this is printed."""
  return json.dumps({"tests": [{"stdin": "", "stdout": text}]})


def sandbox_processes():
  """Processes of sandboxes on this machine, and zombies, with start times."""
  found = set()
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      arguments = (folder / "cmdline").read_bytes()
      fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
      continue  # it has just ended
    ours = b"sandbox_init.py" in arguments or b"/tmp/program.py" in arguments
    if ours or fields[0] == "Z":
      found.add((folder.name, fields[19]))
  return found


class SandboxTest(parameterized.TestCase):
  """Base: skips where no sandbox can be made."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    try:
      cls.reward = staticmethod(REWARDS["code"](allow_code=True, limits=SHORT))
    except InputError as error:
      raise absltest.unittest.SkipTest(str(error)) from error

  def assert_nothing_is_left(self, before):
    """Fails if a process that was not there before stays."""
    left = sandbox_processes() - before
    until = time.monotonic() + 20
    while left and time.monotonic() < until:
      time.sleep(0.02)
      left &= sandbox_processes()  # those of other tests end, too
    self.assertEmpty(left)


@pytest.mark.fault(
  "F48",
  "programs of a model: endless loop, fork bomb, memory, network, files and"
  " environment of the parent, writing outside, killing the parent, huge"
  " output, a shell, ignored signals; 1,000 runs",
  "the verdict that fits; the limits hold; no process and no file is left",
)
class AttackTest(SandboxTest):
  """Attacks end with their verdicts, and change nothing outside."""

  def verdict(self, source, stdout="survived"):
    """The verdict of a program that should print a text, and its output."""
    before = sandbox_processes()
    outputs, run = [], sandbox.run
    keep = lambda *a: outputs.append(run(*a)) or outputs[-1]
    with mock.patch.object(sandbox, "run", keep):
      reward = self.reward("q", reply(source), printed(stdout))
    self.assertEqual(reward.error, "")
    self.assert_nothing_is_left(before)
    (verdict,) = [
      name
      for name in ("passed", "wrong", "crashed", "timeout", "output")
      if reward.parts[name]
    ]
    self.assertEqual(reward.value, float(verdict == "passed"))
    return verdict, outputs[0].stdout + outputs[0].stderr

  def test_an_endless_loop(self):
    start = time.monotonic()
    self.assertEqual(self.verdict("while True: pass")[0], "timeout")
    self.assertLess(time.monotonic() - start, 30)

  @parameterized.parameters(
    ("while True: os.fork()", "crashed"),
    ("while True:\n  try: os.fork()\n  except OSError: pass", "timeout"),
  )
  def test_a_fork_bomb(self, bomb, expected):
    self.assertEqual(self.verdict(f"import os\n{bomb}")[0], expected)

  def test_processes_are_counted_together(self):
    source = """
      import os, time
      n = 0
      try:
        while n < 100:
          if not os.fork():
            time.sleep(60)
          n += 1
      except OSError:
        print(n)
    """
    most = str(SHORT.processes - 1)
    self.assertEqual(self.verdict(source, most)[0], "passed")

  @parameterized.parameters(
    "x = bytearray(10**11)",
    "x = []\nwhile True: x.append(bytearray(10**7))",
    """
    import ctypes
    shm = ctypes.CDLL(None).shmget(0, ctypes.c_size_t(2**20), 0o1600)
    assert shm >= 0, "refused"
    """,
    """
    with open("/tmp/big", "wb") as f:
      f.write(b"x" * 2**24)
    """,
    """
    for i in range(100):
      with open(f"/tmp/{i}", "wb") as f:
        f.write(b"x" * 2**19)
    """,
  )
  def test_memory(self, source):
    verdict, output = self.verdict(textwrap.dedent(source))
    self.assertEqual(verdict, "crashed")
    self.assertRegex(output, "MemoryError|refused|too large|No space")

  def test_the_network(self):
    with socket.create_server(("127.0.0.1", 0)) as server:
      source = f"""
        import socket
        socket.create_connection(("127.0.0.1", {server.getsockname()[1]}))
      """
      verdict, output = self.verdict(source)
      self.assertEqual(verdict, "crashed")
      self.assertIn("Network is unreachable", output)
      server.settimeout(0)
      with self.assertRaises(BlockingIOError):
        server.accept()

  def test_reading_files_and_environment_of_the_parent(self):
    secret = secrets.token_hex(16)
    path = testing.folder(self) / "secret"
    path.write_text(secret)
    source = f"""
      import os, pathlib
      print(dict(os.environ))
      for path in ({str(path)!r}, {str(pathlib.Path.home())!r}, "/etc/passwd",
                   "/proc/self/environ", "/proc/{os.getpid()}/environ",
                   "/proc/1/root/etc/passwd", "/dev/sda", "/dev/mem", __file__,
                   "../../../../../../etc/passwd"):
        path = pathlib.Path(path)
        try:
          print(path.read_text() if path.is_file() else list(path.iterdir()))
        except OSError as error:
          print(error)
      for fd in range(3, 64):
        try:
          print("inherited", os.fstat(fd), os.read(fd, 1000))
        except OSError:
          pass
    """
    with mock.patch.dict(os.environ, {"SECRET": secret}):
      verdict, output = self.verdict(source)
    self.assertEqual(verdict, "wrong")
    self.assertNotRegex(output, f"{secret}|root:|SECRET|inherited \\(|os.stat")
    self.assertIn("No such file", output)

  def test_writing_outside(self):
    folder = testing.folder(self)
    name = secrets.token_hex(16)
    python = os.path.dirname(os.__file__)
    source = f"""
      import os
      for folder in ({str(folder)!r}, "/", "/usr/lib", "/lib", "/dev", "/etc",
                     {python!r}):
        try:
          open(os.path.join(folder, {name!r}), "w").write("x")
          print("written")
        except OSError as error:
          print(error)
      try:
        os.remove(os.__file__)
      except OSError as error:
        print(error)
      open("/tmp/{name}", "w").write("x")
    """
    verdict, output = self.verdict(source)
    self.assertEqual(verdict, "wrong")
    self.assertNotIn("written", output)
    self.assertEqual(output.count("Read-only file system"), 7)
    self.assertTrue(pathlib.Path(os.__file__).exists())
    for place in (folder, "/", "/usr/lib", "/tmp", python):
      self.assertFalse((pathlib.Path(place) / name).exists())

  @parameterized.parameters(
    "os.getppid()", "1", f"{os.getpid()}", "-1", f"-{os.getpgid(0)}"
  )
  def test_killing_the_parent(self, number):
    source = f"""
      import os, signal
      for way in signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP:
        try:
          os.kill({number}, way)
        except OSError as error:
          print(error)
    """
    verdict, output = self.verdict(source)
    self.assertEqual(verdict, "wrong")
    self.assertNotEqual(output, "") if number != "1" else None

  @parameterized.parameters(
    ("while True: print('x' * 10**6)", "output"),
    ("import sys\nwhile True: sys.stderr.write('x' * 10**6)", "output"),
    (
      "import os\nwhile True:\n  try: os.write(1, b'x' * 10**6)\n"
      "  except OSError: pass",
      "timeout",
    ),
  )
  def test_huge_output(self, source, expected):
    verdict, output = self.verdict(source)
    self.assertEqual(verdict, expected)
    self.assertLessEqual(len(output), 2 * SHORT.output_bytes)

  @parameterized.parameters(
    "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo survived'])",
    "import subprocess\nsubprocess.run(['sh', '-c', 'echo survived'])",
    "import subprocess as s\ns.run('echo survived', shell=True, check=True)",
  )
  def test_a_shell(self, source):
    self.assertEqual(self.verdict(source)[0], "crashed")

  def test_ignored_signals(self):
    source = """
      import os, signal, resource
      for number in range(1, 65):
        try:
          signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
          pass
      while True:
        pass
    """
    self.assertEqual(self.verdict(source)[0], "timeout")

  def test_a_process_that_outlives_its_program(self):
    source = """
      import os, time
      if not os.fork():
        os.setsid()
        if not os.fork():
          time.sleep(1000)
        os._exit(0)
      print("survived")
    """
    self.assertEqual(self.verdict(source)[0], "passed")

  def test_more_rights(self):
    source = """
      import ctypes, os
      libc = ctypes.CDLL(None)
      print(libc.unshare(0x10000000), libc.unshare(0x20000),
            libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None),
            libc.mount(None, b"/", None, 4096 | 32, None),
            libc.ptrace(16, 1, 0, 0), libc.chroot(b"/tmp"))
    """
    self.assertEqual(self.verdict(source, "-1 -1 -1 -1 -1 -1")[0], "passed")

  @pytest.mark.slow
  def test_a_thousand_runs_leave_nothing(self):
    kinds = [
      "print('survived')",
      "import os, time\nif not os.fork(): time.sleep(1000)\nprint('survived')",
      "open('/tmp/left', 'w').write('x' * 10**5)\nprint('survived')",
      "raise SystemExit('no')",
      "import os\nos.kill(os.getpid(), 9)",
    ]
    name = secrets.token_hex(16)
    mounts = pathlib.Path("/proc/self/mountinfo").read_text()
    files = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    before = sandbox_processes()
    start = time.monotonic()
    for i in range(1000):
      source = kinds[i % 5].replace("left", name)
      result = sandbox.run(source, "", SHORT)
      self.assertEqual(result.stdout, "survived\n" * (i % 5 < 3), i)
    print(f"{1000 / (time.monotonic() - start):.1f} runs/s")
    self.assert_nothing_is_left(before)
    self.assertEmpty(list(pathlib.Path("/tmp").glob(f"*{name}*")))
    self.assertEqual(pathlib.Path("/proc/self/mountinfo").read_text(), mounts)
    self.assertLen(os.listdir("/proc/self/fd"), files)
    self.assertEqual(threading.active_count(), threads)


class ProgramTest(SandboxTest):
  def test_pairs_of_input_and_output(self):
    source = "a, b = map(int, input().split())\nprint(a + b)"
    pairs = [("2 3", "5"), ("20 30\n", "50\n"), ("1 1", "3"), ("x", "1")]
    tests = [{"stdin": i, "stdout": o} for i, o in pairs]
    every = self.reward("q", reply(source), json.dumps({"tests": tests}))
    self.assertEqual(every.value, 0)
    self.assertEqual(
      every.parts,
      {
        **{"answered": 1, "tests": 4, "passed": 0.5, "wrong": 0.25},
        **{"crashed": 0.25, "timeout": 0, "output": 0},
      },
    )
    good = self.reward("q", reply(source), json.dumps({"tests": tests[:2]}))
    self.assertEqual(good.value, 1)

  @parameterized.parameters(
    ("def add(a, b): return a + b", 1),
    ("def add(a, b): return a - b", 0),
    ("def add(a, b): return 5\nraise SystemExit", 0),
    ("import os\nos._exit(0)", 0),
    ("def add(a, b): return 5\nprint('''", 0),
    ("def add(a, b): return 5\nimport sys\nsys.exit(0)", 0),
  )
  def test_asserts(self, source, value):
    reference = json.dumps({"asserts": "assert add(2, 3) == 5\nassert True"})
    self.assertEqual(self.reward("q", reply(source), reference).value, value)

  @parameterized.parameters(
    "", "print(1)", "```js\nprint(1)\n```", "<think>```python\nprint(1)\n```"
  )
  def test_a_reply_without_a_program(self, text):
    reward = self.reward("q", text, printed("1"))
    self.assertEqual((reward.value, reward.parts), (0, {"answered": 0}))

  def test_the_last_program_counts(self):
    other = "```js\n3\n```\nor\n"
    both = reply("print(2)") + other + reply("print('é', '\\ud800' and 1)")
    self.assertEqual(self.reward("q", both, printed("é 1")).value, 1)

  @parameterized.parameters(
    "",
    "5",
    "[]",
    "{}",
    '{"tests": []}',
    '{"tests": [{"stdin": "1"}]}',
    '{"tests": 3}',
    '{"asserts": " "}',
  )
  def test_a_reference_without_tests_is_an_error(self, reference):
    self.assertEqual(
      self.reward("q", reply("print(1)"), reference).kind, "reference"
    )

  def test_several_at_once_keep_their_order(self):
    several = REWARDS["code"](allow_code=True, parallel=4)
    tests = [{"stdin": str(i), "stdout": str(i)} for i in range(8)]
    reward = several("q", reply("print(input())"), json.dumps({"tests": tests}))
    self.assertEqual(reward.parts["passed"], 1)

  def test_a_sandbox_that_fails_later_is_counted(self):
    broken = sandbox.SandboxError("no memory")
    with mock.patch.object(sandbox, "run", side_effect=broken):
      scores = score_all(
        {"code": self.reward}, [("q", reply("print(1)"), printed("1"))]
      )
    self.assertEqual(scores.errors, {"code: sandbox": 1})


class RefusedTest(absltest.TestCase):
  """No program runs unless it is allowed, and can be contained."""

  def refused(self, message, **options):
    with self.assertRaisesRegex(InputError, message):
      REWARDS["code"](**options)

  def test_unless_it_is_allowed(self):
    self.refused("allow_code=True", allow_code=False)
    self.refused("allow_code=True")

  def test_on_another_system(self):
    with mock.patch.object(sandbox.sys, "platform", "darwin"):
      self.refused("darwin: programs of a model run in a", allow_code=True)

  def test_without_unshare(self):
    with mock.patch.object(sandbox.shutil, "which", return_value=None):
      self.refused("unshare is not on the PATH", allow_code=True)

  def test_without_leave_to_make_namespaces(self):
    folder = testing.folder(self)
    fake = folder / "unshare"
    fake.write_text("#!/bin/sh\necho 'unshare: not permitted' >&2\nexit 1\n")
    fake.chmod(0o755)
    with mock.patch.object(sandbox.shutil, "which", return_value=str(fake)):
      self.refused("unshare: not permitted: .*Linux 5.12", allow_code=True)

  def test_without_namespaces_nothing_runs(self):
    # An unshare that only starts the program: it must fail, not run it bare.
    folder = testing.folder(self)
    fake = folder / "unshare"
    fake.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\n')
    with fake.open("a") as file:
      file.write('exec "$@"\n')
    fake.chmod(0o755)
    with mock.patch.object(sandbox.shutil, "which", return_value=str(fake)):
      self.refused("not in namespaces of its own", allow_code=True)


if __name__ == "__main__":
  absltest.main()

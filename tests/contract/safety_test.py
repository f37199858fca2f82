"""Tests that files are data and never code; the source is read, not run."""

import ast
import pathlib

import pytest
from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).parents[2]
# Formats that hold code, what runs programs, and what opens connections.
MODULES = frozenset(
  "cloudpickle code codeop ctypes dill ftplib http httpx huggingface_hub"
  " imaplib importlib joblib marshal multiprocessing paramiko pickle"
  " poplib pty requests runpy shelve shutil.unpack_archive smtplib socket"
  " socketserver ssl subprocess tarfile telnetlib urllib xmlrpc yaml"
  " zipfile".split()
)
NAMES = frozenset(
  "__import__ compile eval exec breakpoint os.execl os.execv os.execve"
  " os.execvp os.fork os.forkpty os.popen os.posix_spawn os.spawnl os.spawnv"
  " os.startfile os.system shutil.unpack_archive torch.load".split()
)
# Arguments that let data be code, unless they are False.
ARGUMENTS = frozenset({"allow_pickle", "shell", "trust_remote_code"})
# What a file is about, and why that is no way in.
ALLOWED = {
  # Whether the vocabulary's package is there; it is read as data.
  "dsv3_jax/data/tokenizer.py": {"importlib"},
  # The program starts itself again, with the same arguments.
  "experiments/allocator.py": {"importlib", "os.execve"},
  # Processes of a run find and hear each other.
  "dsv3_jax/trainer/distributed.py": {"socket"},
  "dsv3_jax/trainer/heartbeat.py": {"socket"},
  "dsv3_jax/trainer/peers.py": {"socket"},
  # The name of the machine; `git describe` of this repository.
  "dsv3_jax/trainer/crash_loop.py": {"socket"},
  "dsv3_jax/trainer/workdir.py": {"socket", "subprocess"},
  # The page of a run, to this machine alone; no path leads to a file.
  "dsv3_jax/report/watch.py": {"http", "socketserver"},
  # The system's compiler and its library, from sources of the package, under
  # a name with a hash of the library itself; the version of jaxlib.
  "dsv3_jax/infer/native/build.py": {"ctypes", "importlib", "subprocess"},
  # sympy in a worker, which reads expressions as data; a time limit ends it.
  "dsv3_jax/posttrain/rewards/expressions.py": {"subprocess"},
  # Programs of a model, where the user allows it: Python in namespaces, with
  # the system calls that make them.
  "dsv3_jax/posttrain/rewards/sandbox.py": {"subprocess"},
  "dsv3_jax/posttrain/rewards/sandbox_init.py": {
    *("ctypes", "os.execve", "os.fork")
  },
  # The error of a damaged archive of NumPy, which holds arrays alone.
  "dsv3_jax/posttrain/rollout.py": {"zipfile"},
  # Stages of post-training: experiments of this package, as a user types them.
  "experiments/posttrain.py": {"subprocess"},
  # Other programs that the user asks for, with fixed arguments.
  "scripts/bench/main.py": {"subprocess"},
  "scripts/bench/convert.py": {"subprocess"},
  "scripts/bench/worker.py": {"subprocess"},
  "scripts/convert.py": {"subprocess"},
  # apt-get and npm fetch what the user lists, read as archives.
  "scripts/prepare_data.py": {"subprocess", "tarfile"},
}


def unsafe(tree):
  """Returns the modules and names in a source that run code."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
    elif isinstance(node, ast.ImportFrom):
      found |= {(node.module or "").split(".")[0]} & MODULES
    elif isinstance(node, (ast.Name, ast.Attribute)):
      found |= {ast.unparse(node).removeprefix("builtins.")} & NAMES
    elif isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
      constant = isinstance(node.value, ast.Constant)
      if not (constant and node.value.value is False):
        found.add(node.arg)
  return found


@pytest.mark.fault("F22")
@pytest.mark.fault("F46")
class SafetyTest(parameterized.TestCase):
  def test_has_only_what_it_is_about(self):
    for folder in ("dsv3_jax", "experiments", "scripts"):
      for path in sorted((ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_text())
        self.assertEqual(unsafe(tree), ALLOWED.get(name, set()), name)

  @parameterized.parameters(
    ("import pickle", "pickle"),
    ("from pickle import loads as f", "pickle"),
    ("import urllib.request", "urllib"),
    ("def f():\n  import subprocess as s", "subprocess"),
    ("f = eval", "eval"),
    ("exec('1')", "exec"),
    ("import builtins\nbuiltins.exec('1')", "exec"),
    ("import os\nos.system('ls')", "os.system"),
    ("np.load(f, allow_pickle=True)", "allow_pickle"),
    ("np.load(f, allow_pickle=flag)", "allow_pickle"),
    ("run(f, shell=True)", "shell"),
    ("load(f, trust_remote_code=True)", "trust_remote_code"),
  )
  def test_would_be_found(self, source, what):
    self.assertEqual(unsafe(ast.parse(source)), {what})

  @parameterized.parameters("np.load(f, allow_pickle=False)", "re.compile('a')")
  def test_would_not(self, source):
    self.assertEqual(unsafe(ast.parse(source)), set())


if __name__ == "__main__":
  absltest.main()

"""Process 1 of a sandbox: makes its file system, and runs one program in it.

`sandbox.py` starts this file with `unshare`, in namespaces of its own. It reads
a task in JSON and writes the result in JSON, or {"error": ...} if a protection
cannot be had; then it ends, and the kernel ends everything in its namespace.
"""

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys

NEW_ROOT = "/proc"  # a folder of every Linux; processes are not to be seen
JAIL = "/jail"  # the program's root, a folder of the new root
LIBRARIES = "/lib /lib64 /usr/lib /usr/lib64 /etc/ld.so.cache".split()
DEVICES = "/dev/null /dev/zero /dev/random /dev/urandom".split()
# Memory of System V belongs to no process, so that no limit counts it.
SYSTEM_V = "/proc/sys/kernel/shmmni /proc/sys/kernel/msgmni".split()
NOBODY = 65534

# Numbers of Linux's headers.
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC = 4096, 16384
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE, SYS_MOUNT_SETATTR = -100, 0x8000, 442
CLONE_NEWUSER = 0x10000000
PR_SET_NO_NEW_PRIVS = 38

_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(what, function, *arguments):
  """Calls a function of libc; raises OSError that says what failed."""
  encoded = [os.fsencode(a) if isinstance(a, str) else a for a in arguments]
  if getattr(_LIBC, function)(*encoded):
    code = ctypes.get_errno()
    raise OSError(code, f"{what}: {os.strerror(code)}")


def _encode(text):
  """Returns UTF-8; of half a surrogate pair, which Python then refuses, too."""
  return text.encode(errors="surrogatepass")


def _mount(source, target, filesystem=None, flags=0, options=None):
  _call(
    f"mount of {target}",
    *("mount", source, target, filesystem, ctypes.c_ulong(flags), options),
  )


def _set_attributes(target, flags, at):
  """Sets flags of a mount, with AT_RECURSIVE of all below it too."""
  # struct mount_attr: what is set and cleared, propagation, user namespace.
  attributes = struct.pack("4Q", flags, 0, 0, 0)
  _call(
    "a read-only file system (Linux 5.12)",
    *("syscall", ctypes.c_long(SYS_MOUNT_SETATTR), AT_FDCWD, target, at),
    *(attributes, ctypes.c_size_t(len(attributes))),
  )


def _bind(path):
  """Shows a file or folder of the system in the jail, at the same path."""
  target = NEW_ROOT + JAIL + path
  if os.path.isdir(path):
    os.makedirs(target, exist_ok=True)
  else:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.lexists(target):
      open(target, "x").close()
  _mount(path, target, flags=MS_BIND | MS_REC)
  return target


def make_root(task):
  """Replaces the file system by libraries, Python, devices and a /tmp."""
  if os.getpid() != 1:  # what follows would change the machine
    raise OSError("not in namespaces of its own")
  for path in SYSTEM_V:
    with open(path, "w") as file:
      file.write("0")
  _mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID, "size=1m,mode=755")
  os.umask(0o022)
  work = NEW_ROOT + JAIL + "/tmp"
  os.makedirs(work)
  options = f"size={task['disk_bytes']},nr_inodes=1000,mode=1777"
  _mount("tmpfs", work, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
  for path in filter(os.path.exists, [*LIBRARIES, *task["python"]]):
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV
    _set_attributes(_bind(path), flags, AT_RECURSIVE)
  for path in DEVICES:
    _bind(path)
  _set_attributes(NEW_ROOT, MS_RDONLY | MS_NOSUID | MS_NODEV, 0)
  os.chdir(NEW_ROOT)
  _call("pivot_root", "pivot_root", ".", ".")
  _call("umount of the old root", "umount2", ".", MNT_DETACH)
  os.chdir("/")


def enter_jail(task, files):
  """Drops all privileges of this process, and limits what it can use."""
  if task["as_root"]:  # no limit of processes holds for root
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
  os.setsid()
  # A user of its own namespace has no right over mounts and processes of this
  # one, and whose root was changed can have no other namespace.
  _call("user namespace", "unshare", CLONE_NEWUSER)
  os.chroot(JAIL)
  os.chdir("/tmp")
  zero = ctypes.c_ulong(0)
  one = ctypes.c_ulong(1)
  _call("no_new_privs", "prctl", PR_SET_NO_NEW_PRIVS, one, zero, zero, zero)
  for number, file in enumerate(files):
    os.dup2(file, number)
  for name, limit in task["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))


def start(task, files):
  """Starts the program; returns its process id.

  Raises:
    OSError: a protection cannot be had; the program has not run.
  """
  problem, report = os.pipe()  # closed by the program's start
  if not (pid := os.fork()):
    try:
      enter_jail(task, files)
      os.execve(task["command"][0], task["command"], {})
    except BaseException as error:
      os.write(report, str(error).encode())
    os._exit(1)
  os.close(report)
  with os.fdopen(problem) as file:
    if text := file.read():
      raise OSError(text)
  return pid


def run(task):
  """Runs the program; returns how it ended and what it wrote."""
  make_root(task)
  with open(JAIL + "/tmp/program.py", "wb") as file:
    file.write(_encode(task["source"]))
  files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
  text = memoryview(_encode(task["stdin"]))
  while text:
    text = text[os.write(files[0], text) :]
  os.lseek(files[0], 0, os.SEEK_SET)
  pid = start(task, files)
  poll = select.poll()
  poll.register(os.pidfd_open(pid), select.POLLIN)
  timed_out = not poll.poll(1000 * task["seconds"])
  os.kill(-1, signal.SIGKILL)  # everything here but this process
  _, status = os.waitpid(pid, 0)
  texts = [
    os.pread(file, task["output_bytes"], 0).decode(errors="replace")
    for file in files[1:]
  ]
  full = max(map(os.path.getsize, files[1:])) >= task["output_bytes"]
  code = os.waitstatus_to_exitcode(status)
  return {
    "timed_out": timed_out,
    "output_full": full,
    "exit_code": code,
    "stdout": texts[0],
    "stderr": texts[1],
  }


if __name__ == "__main__":
  try:
    result = run(json.load(sys.stdin))
  except Exception as error:
    result = {"error": str(error) or repr(error)}
  json.dump(result, sys.stdout)

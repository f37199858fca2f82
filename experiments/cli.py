"""The command line that all experiments share.

  python -m experiments.NAME --variant=V --workdir=DIR [--steps=N] [--seed=S]
      [--mesh=data=2,expert=4] [--init_from=DIR] [--set=a.b=1 ...]

The same command again goes on where the last one stopped. All problems of a
command line are listed at once, before JAX starts.
"""

import functools
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import flags

from dsv3_jax import config, io
from dsv3_jax.config import fields
from dsv3_jax.errors import InputError, raise_problems
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import (
  compilation,
  distributed,
  exit_codes,
  heartbeat,
  metrics_writer,
  run_args,
)
from experiments import flag_parser, help_page

OK, BAD_INPUT = exit_codes.OK, exit_codes.BAD_INPUT
NOT_FINITE, INTERNAL = exit_codes.NOT_FINITE, exit_codes.INTERNAL
NO_CHECKPOINT = exit_codes.NO_CHECKPOINT
CLOSED = 128 + signal.SIGPIPE  # as if the signal had not been ignored

flags.DEFINE_string("workdir", None, "folder of the run")
flags.DEFINE_string("variant", None, "one of those above; default: the first")
flags.DEFINE_integer("seed", 0, "random seed (initialization and data order)")
flags.DEFINE_integer("steps", None, "last step; default: the token budget")
flags.DEFINE_string(
  "mesh",
  "",
  "devices by axis, such as data=2,expert=4; default: all devices on data",
)
flags.DEFINE_string(
  "init_from", None, "workdir of a run whose parameters a new run starts with"
)
flags.DEFINE_multi_string(
  "set", [], "a setting, such as train.tokens=1e6; see --list_settings"
)
flags.DEFINE_bool(
  "list_settings",
  False,
  "print all settings, with their values, what is allowed and what they mean",
)
flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of process 0 of several, or auto"
)
flags.DEFINE_integer("processes", 1, "number of processes of the run")
flags.DEFINE_integer("process", 0, "index of this process")
flags.DEFINE_integer("join_timeout", 300, "time for all processes to start (s)")
flags.DEFINE_float(
  "heartbeat", 10, "exit all processes if one is silent this long (s)"
)
flags.DEFINE_float(
  "watchdog_timeout",
  1800,
  "exit all processes if none finishes a step for this long (s); 0: never",
)
flags.DEFINE_float(
  "grace_period", 25, "time to save after SIGTERM or SIGINT (s)"
)
flags.DEFINE_bool(
  "deterministic",
  True,
  "GPUs add in a fixed order, so that a resumed run is bitwise identical; a"
  " little slower",
)
flags.DEFINE_bool(
  "ignore_crash_loop", False, "start even if a crash loop was detected"
)
flags.DEFINE_list(
  "writers",
  list(metrics_writer.DEFAULT),
  f"writers of metrics, of {', '.join(metrics_writer.WRITERS)}",
)

flags.DEFINE_string(
  "compile_cache", compilation.default_cache(), compilation.HELP
)

# Old name -> new name of flags; old names are read for one release.
_RENAMED = {
  "stuck_after": "watchdog_timeout",
  "grace": "grace_period",
  "retry": "ignore_crash_loop",
}


def parse_flags(
  argv: Sequence[str], renamed: Mapping[str, str] = _RENAMED
) -> list[str]:
  """Reads the flags, also by old names; returns the problems, one a line."""
  known = flags.FLAGS
  try:
    argv = flag_parser.with_current_names(argv, renamed)
    _, *rest = known(argv, known_only=True)
  except (flags.Error, ValueError) as error:  # absl's own flags raise either
    return [flag_parser.problem(error)]
  return list(flag_parser.unread(rest, known))


def parse_mesh(text: str) -> tuple[dict[str, int], list[str]]:
  """The sizes of a mesh such as `data=2`, and what is wrong with it."""
  sizes, problems = {}, []
  for part in filter(None, text.split(",")):
    axis, _, size = part.partition("=")
    if axis not in device_mesh.AXES:
      hint = fields.nearest(axis, device_mesh.AXES)
      if other := flag_parser.AXIS_SYNONYMS.get(axis.lower()):
        hint = f"; write {other}={size or 'N'}"
      elif axis.isdecimal():
        hint = f"; write data={axis} to divide the batch"
      problems.append(
        f"--mesh={part}: axes are {', '.join(device_mesh.AXES)}{hint}"
      )
    elif not re.fullmatch("0*[1-9][0-9]{0,8}", size, re.ASCII):
      problems.append(
        f"--mesh={part}: expected {axis}=N, N from 1 to a billion"
      )
    else:
      sizes[axis] = int(size)
  return sizes, problems


def end_values(run: config.Run) -> list[str]:
  """Settings that begin with the lambda and gamma that a run ends with."""
  return [
    f"schedule.{name}={int(getattr(run.schedule, name) >= 1)}"
    for name in ("mtp_until", "bias_update_until")
  ]


def override(run: config.Run, settings: Sequence[str]) -> config.Run:
  """Applies the settings of --set; raises InputError with a line for each."""
  try:
    return config.override(run, *settings)
  except InputError as error:
    lines = (f"--set: {line}" for line in str(error).splitlines())
    raise InputError("\n".join(lines)) from error


# (variant, its run, settings of --set) -> the run of a command; InputError.
Configure = Callable[[str, config.Run, Sequence[str]], config.Run]


def configure(
  variant: str, run: config.Run, settings: Sequence[str]
) -> config.Run:
  """Returns a variant's run with other settings."""
  del variant
  given = override(run, settings)
  if flags.FLAGS.init_from and given.extends_context:  # as in section 4.3
    return config.override(run, *end_values(given), *settings)
  return given


def _command(
  variants: Mapping[str, config.Run], configure: Configure = configure
) -> tuple[run_args.RunArgs, list[str]]:
  """Returns the arguments that the flags give, and their problems."""
  args = flags.FLAGS
  mesh, problems = parse_mesh(args.mesh)
  name = args.variant or next(iter(variants))
  stop = args.steps
  if name in variants:
    run = variants[name]
    try:
      run = configure(name, run, args.set)
    except InputError as error:
      problems += str(error).splitlines()
  else:
    hint = fields.nearest(name, variants)
    problems.append(f"--variant={name}: one of {', '.join(variants)}{hint}")
    # What does not depend on the variant is still checked.
    run, mesh, stop = next(iter(variants.values())), {}, None
  command = run_args.RunArgs(
    run,
    args.workdir,
    variant=name,
    seed=args.seed,
    stop=stop,
    mesh=mesh,
    init_from=args.init_from,
    writers=tuple(args.writers),
    processes=distributed.Processes(
      args.coordinator, args.processes, args.process, args.join_timeout
    ),
    timeouts=heartbeat.Timeouts(
      args.heartbeat, args.watchdog_timeout, args.grace_period
    ),
    ignore_crash_loop=args.ignore_crash_loop,
    deterministic=args.deterministic,
    own_process=True,
  )
  return command, problems + command.validate()


def _help(
  module: str = "__main__", variants: Mapping[str, config.Run] | None = None
) -> str:
  """Docstring of an experiment's module, its variants, and all flags."""
  return help_page.experiment(module, __name__, variants or {})


def _execute(
  main: Callable[[], int | None], describe: Callable[[], str]
) -> int:
  """Calls main, or prints help; returns the exit code, of its error too."""
  try:
    if {"--help", "-h"} & set(sys.argv[1:]):
      print(describe())
      code = OK
    else:
      code = main() or OK
    if sys.stdout:  # None: was closed before
      sys.stdout.flush()
  except KeyboardInterrupt:
    code = 128 + signal.SIGINT  # as if the signal had not been caught
    print("error: interrupted", file=sys.stderr)
  except Exception as error:
    if isinstance(error, BrokenPipeError) and io.discard_closed_output():
      return CLOSED
    code = exit_codes.code_of(error)
    if code is None:
      traceback.print_exc()
      code = INTERNAL
    lead = "" if code == exit_codes.PREEMPTED else "error: "
    for line in str(error).splitlines():
      print(f"{lead}{line}", file=sys.stderr)
  return code


def run_main(
  main: Callable[[], int | None], describe: Callable[[], str] = _help
) -> NoReturn:
  """Calls main and exits with the code that the error it raises stands for.

  A reader that closes the output early, such as `head`, ends it in silence.
  """
  if hasattr(sys.stdout, "reconfigure"):
    # A text may have letters that the encoding of the output has not.
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    code = _execute(main, describe)
  except BrokenPipeError:  # while an error was printed
    io.discard_closed_output()
    code = CLOSED
  compilation.exit_at_once(code)
  if (
    code not in (OK, exit_codes.PREEMPTED) and jax.distributed.is_initialized()
  ):
    # JAX would wait here for the others, which wait for this process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def run_script(
  execute: Callable[[Any], int | None], args_class: type
) -> NoReturn:
  """Reads flags into `args_class`, see `flag_parser`; calls `execute`, exits.

  `execute` returns None for success, or an exit code.
  """
  run_main(
    lambda: execute(flag_parser.parse(args_class, sys.argv)),
    lambda: flag_parser.help_text(args_class),
  )


def start_jax(command: run_args.RunArgs) -> None:
  """Joins the other processes, and makes the mesh's devices on a processor.

  Call it once, before anything else starts JAX.
  """
  compilation.use_cache(flags.FLAGS.compile_cache)
  n = max(math.prod(command.mesh.values()) // command.processes.count, 1)
  only_sums = command.run.parallel.layout == "replicated" and not any(
    size > 1 for axis, size in command.mesh.items() if axis != "data"
  )
  distributed.use_virtual_devices(n, spare_threads=n > 1 and not only_sums)
  if command.deterministic:
    distributed.fix_order_of_sums()
  command.processes.join()


def main(
  variants: Mapping[str, config.Run],
  execute: Callable[[run_args.RunArgs], int | None],
  configure: Configure = configure,
) -> None:
  """Runs an experiment from the command line; the first variant is default.

  `configure` makes the run of variant and settings.
  """

  def checked():
    problems = parse_flags(sys.argv)
    if not flags.FLAGS.is_parsed():  # a value of the wrong type
      raise InputError("\n".join(problems))
    command, more = _command(variants, configure)
    raise_problems(problems + more)
    if flags.FLAGS.list_settings:
      name = command.variant
      print(help_page.settings(command.run, variants[name], name))
      return OK
    return execute(command)

  run_main(checked, functools.partial(_help, execute.__module__, variants))

"""The chain of post-training: its commands, and how it resumes."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import micro
import programs
import pytest
import testing
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from dsv3_jax import config, io
from dsv3_jax.data import conversation_corpus, conversations
from dsv3_jax.errors import InputError
from dsv3_jax.trainer import exit_codes, workdir
from experiments import cli, flag_parser, posttrain, reject, sample

needs_package = pytest.mark.skipif(
  not importlib.util.find_spec("reasoning_gym"), reason="needs reasoning-gym"
)
SORTING = (
  "number_sorting:min_numbers=2:max_numbers=2:max_decimals=0:min_value=0"
  ":max_value=9:prompt=short:n=40"
)
GCD = "gcd:min_numbers=2:max_numbers=2:min_value=1:max_value=9:prompt=short"
SUMS = "chain_sum:max_terms=2:min_digits=1:max_digits=1:prompt=short:n=150"


class Faked:
  """Commands that write what the real ones would, at once."""

  def __init__(self, fails=(), code=75):
    """Fails at the commands of these numbers."""
    self.commands, self.fails, self.code = [], fails, code

  def __call__(self, command):
    self.commands.append(command)
    if len(self.commands) in self.fails:
      return self.code
    given = dict(flag[2:].split("=", 1) for flag in command if "=" in flag)
    if command[1] != "experiments.sample":
      folder = pathlib.Path(given["workdir"])
      folder.mkdir(exist_ok=True)
      (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 512}\n')
    elif "prompts" in given:
      n = len(io.read_jsonl(pathlib.Path(given["prompts"])))
      rows = [{"index": i, "text": "7", "ended": "stop"} for i in range(n)]
      texts = "".join(json.dumps(row) + "\n" for row in reversed(rows))
      pathlib.Path(given["out"]).write_text(texts)
    else:
      out = pathlib.Path(given["out"])
      assert not out.exists()
      row = {"prompt": "3+4=", "response": "7", "system": "Reflect."}
      row = {"messages": conversations.parse(row).messages}
      conversations.write(out, [row])
      io.write_json(out.with_suffix(".counts.json"), {"questions": 1})
    return 0


@needs_package
class ChainTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    self.source = self.folder / "source"
    self.source.mkdir()
    identity = workdir.run_identity("test", 0, testing.run())
    workdir.write_config(self.source, identity)

  def args(self, *more):
    return posttrain.read(
      [
        "posttrain",
        f"--init_from={self.source}",
        f"--workdir={self.folder / 'chain'}",
        f"--tasks={SUMS},{SORTING}",
        "--set_sft=data.problems=2000",
        *more,
      ]
    )

  def chain(self, *more):
    one = self.args(*more).chain
    one.workdir.mkdir(exist_ok=True)
    return one

  def test_stages_are_in_the_order_of_the_report(self):
    names = [stage.name for stage in self.chain().stages()]
    self.assertEqual(
      names,
      [
        "expert_chain_sum_sft",
        "answers/expert_chain_sum_sft",
        "expert_chain_sum_rl",
        "answers/expert_chain_sum_rl",
        "samples/chain_sum",
        "expert_number_sorting_sft",
        "answers/expert_number_sorting_sft",
        "expert_number_sorting_rl",
        "answers/expert_number_sorting_rl",
        "samples/number_sorting",
        "student",
        "answers/student",
        "final",
        "answers/final",
      ],
    )

  @parameterized.parameters((), ("--quick",), ("--variant=report",))
  def test_programs_read_all_flags_of_the_commands(self, *more):
    one = self.chain(*more)
    one.write_questions()
    for stage in one.stages():
      dash_m, module, *given = stage.command
      self.assertEqual(dash_m, "-m")
      if module == "experiments.sample":
        flag_parser.parse(sample.Args, ["sample", *given])
        continue
      importlib.import_module(module)  # defines its flags
      with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        self.assertEmpty(cli.parse_flags([module, *given]))
        config.override(testing.run(), *flags.FLAGS.set)

  def test_no_held_out_question_is_trained_on(self):
    """Training leaves out the problems that all models answer."""
    one = self.chain()
    one.write_questions()
    heldout = {problem.prompt for problem in one.heldout()}
    self.assertGreater(len(heldout), 10)
    for kind in ("sft", "grpo"):
      for path in (SUMS, SORTING, f"{SUMS},{SORTING}"):
        data = dataclasses.replace(one.runs[kind].data, path=path)
        split = conversation_corpus.split_tasks(data)
        self.assertLessEqual({p.prompt for p in split.heldout}, heldout)
        self.assertEmpty({p.prompt for p in split.train} & heldout)
    for stage in one.stages():
      if stage.name.startswith("samples"):
        args = flag_parser.parse(sample.Args, ["sample", *stage.command[2:]])
        drawn, _ = reject._questions(args)
        asked = reject.exclude(drawn, args.exclude)
        self.assertTrue({q.prompt for q in drawn} & heldout)
        self.assertEmpty({q.prompt for q in asked} & heldout)

  def test_held_out_sample_is_refused(self):
    one = self.chain()
    one.write_questions()
    problem = one.heldout()[0]
    row = {"prompt": problem.prompt, "response": "7", "system": "Reflect."}
    row = {"messages": conversations.parse(row).messages}
    for name in ("chain_sum", "number_sorting"):
      conversations.write(one.workdir / "samples" / f"{name}.jsonl", [row])
    with self.assertRaisesRegex(ValueError, "held-out question"):
      one.write_samples()

  def test_a_chain_writes_results_and_is_done_once(self):
    one, run = self.chain(), Faked()
    self.assertEqual(posttrain.run_chain(one, run), cli.OK)
    self.assertLen(run.commands, 14)
    results = io.read_json_object(one.workdir / posttrain.RESULTS)
    names = ["chain_sum", "number_sorting"]
    for part in ("experts", "student", "final"):
      self.assertSameElements(results[part], names)
    problems = [p for p in one.heldout() if p.task == "chain_sum"]
    right = sum(p.answer == "7" for p in problems) / len(problems)
    self.assertBetween(right, 0.01, 0.5)
    for part in ("experts", "student", "final"):
      self.assertEqual(results[part], {"chain_sum": right, "number_sorting": 0})
    self.assertLen(results["rows"], 8)
    self.assertEqual(results["samples"]["chain_sum"], {"questions": 1})
    train = conversations.read(one.workdir / "samples" / "train.jsonl")
    self.assertLen(train, 2)
    run = Faked()
    self.assertEqual(posttrain.run_chain(one, run), cli.OK)
    self.assertEmpty(run.commands)
    (one.workdir / "answers" / "student.jsonl").unlink()
    self.assertEqual(posttrain.run_chain(one, run), cli.OK)
    self.assertLen(run.commands, 1)

  @parameterized.parameters((2, 2), (3, 3), (75, 75), (-signal.SIGKILL, 70))
  def test_exit_code_is_that_of_the_stage_which_is_resumed(self, code, result):
    one, run = self.chain(), Faked(fails=(5,), code=code)
    self.assertEqual(posttrain.run_chain(one, run), result)
    self.assertFalse((one.workdir / posttrain.RESULTS).exists())
    # What a stage left that was not known to be done.
    (one.workdir / "samples" / "chain_sum.jsonl").write_text("half")
    again = Faked()
    self.assertEqual(posttrain.run_chain(one, again), cli.OK)
    self.assertEqual(again.commands[0], run.commands[-1])
    self.assertLen(again.commands, 10)

  @parameterized.parameters(
    ("--tasks=chain_sum,chain_sum", "chain_sum: is there twice"),
    ("--tasks=no_such_task", "is no task"),
    ("--init_from=", "--init_from is missing"),
    ("--init_from=/nowhere", "--init_from: /nowhere: holds no run"),
    ("--workdir=", "--workdir is missing"),
    ("--variant=huge", "--variant=huge: must be one of tiny, report"),
    ("--seed=-1", "--seed=-1: must be at least 0"),
    ("--epochs=0", "--epochs=0: must be above 0"),
    ("--student_epochs=nan", "--student_epochs=nan: must be above 0"),
    ("--iterations=0", "--iterations=0: must be at least 1"),
    ("--set_sft=optim.lr=1", "--set_sft: .*optim.lr"),
    ("--set_grpo=grpo.kl=k9", "--set_grpo: Grpo.kl=.k9"),
    ("--set_grpo=data.heldout_fraction=0.1", "0.1.*, must be .*0.015"),
  )
  def test_wrong_flags(self, more, problem):
    with self.assertRaisesRegex(InputError, problem):
      self.args(more)

  def test_a_task_of_held_out_problems_alone(self):
    few = "number_sorting:min_numbers=2:max_numbers=2:max_decimals=0"
    few += ":min_value=0:max_value=1:prompt=short:n=9"
    with self.assertRaisesRegex(InputError, "all of its 9 problems are held"):
      self.args(f"--tasks={few}", "--set_sft=data.heldout_fraction=0.5")

  def test_sizes_reach_the_commands(self):
    more = "--epochs=3", "--student_epochs=1.5", "--iterations=7", "--answers=5"
    by_name = {one.name: one.command for one in self.chain(*more).stages()}
    self.assertIn("--epochs=3", by_name["expert_chain_sum_sft"])
    self.assertIn("--epochs=1.5", by_name["student"])
    for name in ("expert_chain_sum_rl", "final"):
      self.assertIn("--iterations=7", by_name[name])
    self.assertIn("--answers=5", by_name["samples/chain_sum"])
    with self.assertRaisesRegex(InputError, "--epochs=3: not with --quick"):
      self.args("--epochs=3", "--quick")

  def test_problems_are_listed_together(self):
    with self.assertRaises(InputError) as caught:
      self.args("--tasks=x,chain_sum,chain_sum", "--workdir=", "--init_from=")
    self.assertLen(str(caught.exception).splitlines(), 4)

  def test_workdir_of_another_chain(self):
    args = self.args()
    args.chain.workdir.mkdir()
    path = args.chain.workdir / posttrain.CHAIN
    io.write_json(path, posttrain._identity(args))
    self.args()  # the same one
    for more in ("--seed=1", f"--tasks={SUMS}", "--quick"):
      with self.assertRaisesRegex(InputError, "belongs to another chain"):
        self.args(more)

  def test_workdir_of_a_start_that_ended_early(self):
    (self.folder / "chain").mkdir()
    for name in (workdir.LOCK, "out.log", f".{posttrain.CHAIN}.partial"):
      (self.folder / "chain" / name).touch()
    self.args()

  def test_workdir_of_other_things(self):
    with self.assertRaisesRegex(InputError, "no chain but other things"):
      self.args(f"--workdir={self.source}")
    with self.assertRaisesRegex(InputError, "is a file"):
      self.args(f"--workdir={self.source / 'config.json'}")


class ProcessesTest(parameterized.TestCase):
  def test_exit_code(self):
    with posttrain.Processes() as processes:
      self.assertEqual(processes.run(["-c", "raise SystemExit(3)"]), 3)

  def test_command_has_its_own_group_and_the_lock(self):
    """A terminal's Ctrl-C is passed on once, and the lock outlives a kill."""
    program = (
      "import os, sys\n"
      "os.fstat(int(sys.argv[1]))\n"
      "raise SystemExit(os.getpgrp() != os.getpid())\n"
    )
    with (
      workdir.lock(testing.folder(self)) as lock,
      posttrain.Processes([lock]) as processes,
    ):
      self.assertEqual(processes.run(["-c", program, str(lock)]), 0)

  @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
  def test_signal_reaches_the_command_and_ends_the_chain(self, number):
    started = testing.folder(self) / "started"
    program = (
      "import pathlib, signal, sys, time\n"
      "path = pathlib.Path(sys.argv[1])\n"
      "stop = lambda *_: sys.exit(path.write_text('got'))\n"
      f"signal.signal({int(number)}, stop)\n"
      "path.write_text('started')\n"
      "time.sleep(60)\n"
    )

    def send():
      while not started.exists() or started.read_text() != "started":
        time.sleep(0.01)
      os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    with posttrain.Processes() as processes:
      sender.start()
      with self.assertRaisesRegex(exit_codes.PreemptedError, "resume"):
        processes.run(["-c", program, str(started)])
      self.assertEqual(started.read_text(), "got")
      with self.assertRaises(exit_codes.PreemptedError):
        processes.run(["-c", "raise SystemExit(3)"])
    sender.join()

  def test_lock_lasts_as_long_as_a_command(self):
    folder = testing.folder(self)
    command = [sys.executable, "-c", "input()"]
    with workdir.lock(folder) as lock:
      process = subprocess.Popen(
        command, stdin=subprocess.PIPE, pass_fds=[lock]
      )
    with self.assertRaisesRegex(InputError, "is locked by"):
      with workdir.lock(folder):
        pass
    process.communicate(b"\n")
    with workdir.lock(folder):
      pass


@needs_package
class ProgramTest(absltest.TestCase):
  @pytest.mark.slow
  def test_quick_chain_is_stopped_and_resumed(self):
    root = testing.folder(self)
    micro.make(root / "source", "data.seq_len=32")
    folder = root / "chain"
    command = [
      "-m",
      "experiments.posttrain",
      "--quick",
      f"--tasks={SUMS},{GCD}",
      f"--init_from={root / 'source'}",
      f"--workdir={folder}",
    ]
    with programs.Started(command, deadline_s=240) as started:
      started.until((folder / "expert_chain_sum_sft/metrics.jsonl").exists)
      started.processes[0].terminate()
      (ended,) = started.ended()
    self.assertEqual(ended.code, exit_codes.PREEMPTED, ended)
    (ended,) = programs.together(command, timeout_s=580)
    self.assertEqual(ended.code, cli.OK, ended)
    results = io.read_json_object(folder / posttrain.RESULTS)
    for part in ("experts", "student", "final"):
      self.assertSameElements(results[part], ["chain_sum", "gcd"])
    self.assertIn("expert_chain_sum_rl", ended.out)
    self.assertNotIn("\033", ended.out)
    (ended,) = programs.together(command)
    self.assertEqual(ended.out.count("done before"), 14)


if __name__ == "__main__":
  absltest.main()

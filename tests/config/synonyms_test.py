"""Tests of hints for settings, and of what --list_settings shows of them."""

from absl import flags
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets, synonyms
from dsv3_jax.errors import InputError
from experiments import cli

SETTINGS = {s.path: s for s in config.describe(presets.TINY)}


class SynonymTest(parameterized.TestCase):
  def test_every_target_exists(self):
    for name, target in synonyms.SYNONYMS.items():
      if target.startswith("--"):
        of_cli = flags.FLAGS.flags_by_module_dict()[cli.__name__]
        self.assertIn(target[2:], [flag.name for flag in of_cli], name)
      else:
        self.assertIn(target, SETTINGS, name)

  def test_none_is_hidden_by_a_setting(self):
    words = {path.rpartition(".")[2] for path in SETTINGS}
    hidden = words & synonyms.SYNONYMS.keys()
    self.assertEqual(hidden, {"vocab_size"})  # means itself

  @parameterized.parameters(
    ("optim.lr", "did you mean 'optim.peak_lr'? (> 0: learning rate"),
    ("lr", "'optim.peak_lr'"),
    ("model.hidden_size", "'d_model'"),
    ("num_experts_per_tok", "'router.top_k'"),
    ("max_grad_norm", "'optim.clip_norm'"),
    ("Learning-Rate", "'optim.peak_lr'"),
    # Without its group, or with a wrong one.
    ("peak_lr", "'optim.peak_lr'"),
    ("moe.top_k", "'router.top_k'"),
    ("batch_size", "'train.batch_size' or 'evaluate.batch_size'?"),
    # Misspelt.
    ("evaluate.evry", "mean 'evaluate.every'?"),
    ("train.lerning_rate", "'optim.peak_lr'"),
    ("max_steps", "use the flag --steps"),
    ("qqqq", "--list_settings shows all"),
    ("tp", "--list_settings shows all"),  # not attention.type
    ("", "--list_settings shows all"),
  )
  def test_hints(self, name, expected):
    with self.assertRaisesRegex(InputError, "no such setting") as raised:
      config.override(presets.TINY, f"{name}=1")
    self.assertIn(expected, str(raised.exception))


class DescribeTest(absltest.TestCase):
  def test_every_setting_is_there_with_its_meaning(self):
    paths = (path.removeprefix("model.") for path in config.flatten(presets.M))
    self.assertEqual(list(SETTINGS), list(paths))
    for setting in SETTINGS.values():
      self.assertNotIn("\n", setting.doc)
      self.assertGreater(len(setting.doc), 7, setting.path)

  def test_allowed_values(self):
    expected = {
      "optim.peak_lr": "> 0",
      "optim.beta1": ">= 0, < 1",
      "mtp.depth": "0 to 100",
      "data.heldout_fraction": "> 0, <= 0.5",
      "router.score": "sigmoid, softmax",
      "train.scan_layers": "true, false",
      "data.path": "text",
    }
    allowed = {path: SETTINGS[path].allowed for path in expected}
    self.assertEqual(allowed, expected)
    self.assertIn("mla", SETTINGS["attention.type"].allowed.split(", "))


if __name__ == "__main__":
  absltest.main()

"""Tests of the program that looks at checkpoints."""

import shutil

import micro
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.trainer import exit_codes
from scripts import checkpoint as script


class ScriptTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.saved = testing.folder(cls) / "run"
    cls.run_, state, _ = micro.make(cls.saved)
    store = cls.open(cls.saved)
    params = state.params | {"head": state.params["head"] * 2}
    store.save(state.replace(params=params, step=state.step + 3), {"rows": 6})
    store.wait()
    store.close()

  @staticmethod
  def open(folder):
    return checkpointer.Checkpointer(
      folder / "checkpoints", config.Checkpoint(keep=9)
    )

  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self) / "run"
    shutil.copytree(self.saved, self.folder)
    self.store = self.open(self.folder)
    self.addCleanup(self.store.close)

  def call(self, *flags):
    folder = f"--workdir={self.folder}"
    return testing.command_line(script.main, folder, *flags)

  def damage(self, step):
    files = self.store.folder(step).rglob("d/*")
    path = max(files, key=lambda path: path.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)

  def test_lists_what_is_there(self):
    (self.store.folder(3) / manifest.NAME).unlink()
    shutil.copytree(self.store.folder(0), self.store.directory / "9.corrupt")
    code, out, err = self.call("--mode=list")
    self.assertEqual((code, err), (exit_codes.OK, ""))
    self.assertRegex(out, r"\n +0 +\S+ +\d+ +whole")
    self.assertRegex(out, "(?s)3 .*has no")
    self.assertRegex(out, r"9\.corrupt +quarantined")

  def test_verifies_all_or_one(self):
    code, out, err = self.call("--mode=verify")
    self.assertEqual((code, err), (exit_codes.OK, ""))
    self.assertEqual(out.count("as it was saved"), 2)
    self.damage(3)
    code, out, err = self.call("--mode=verify")
    self.assertEqual(code, exit_codes.NO_CHECKPOINT)
    self.assertRegex(out, "checkpoints/0: as it was saved")
    self.assertRegex(err, "error: .*checkpoints/3 ")
    code, out, _ = self.call("--mode=verify", "--step=0")
    self.assertEqual((code, out.count("as it was saved")), (exit_codes.OK, 1))

  def test_says_what_differs(self):
    code, out, err = self.call("--mode=diff", "--step=0", "--other_step=3")
    self.assertEqual((code, err), (exit_codes.OK, ""))
    first, *lines = out.splitlines()
    self.assertRegex(first, "checkpoints/0 -> .*checkpoints/3$")
    self.assertEqual(lines[0], "rows: '(not there)' -> 6")
    self.assertRegex(lines[1], "^state/params/head: .*% of the values differ")
    self.assertEqual(
      lines[2],
      "state/step: 100.0% of the values differ, by 3 at most; the largest is 0",
    )
    self.assertRegex(lines[3], r"^\d+ arrays are the same, bit for bit$")

  def test_two_runs(self):
    other = self.folder.with_name("other")
    micro.make(other, "router.n_experts=16")
    code, out, _ = self.call("--mode=diff", "--step=0", f"--other={other}")
    self.assertEqual(code, exit_codes.OK)
    self.assertRegex(out, r"state/router_bias: 'float32\[\d,8\]' -> .*,16\]'")

  @parameterized.parameters(
    (["--mode=verify", "--step=7"], "--step=7: .* has 0, 3"),
    (["--mode=diff"], "--step is missing"),
    (["--mode=diff", "--step=0", "--other=/nowhere"], "/nowhere: has no fol"),
    (["--mode=mend"], "mode"),
    (["--step=x"], "step"),
    (["more"], "stray argument 'more'"),
  )
  def test_refuses(self, flags, message):
    code, _, err = self.call(*flags)
    self.assertEqual(code, exit_codes.BAD_INPUT)
    self.assertRegex(err, message)

  def test_reads_only(self):
    self.damage(3)
    files = lambda: {
      p: p.is_file() and p.read_bytes() for p in self.folder.rglob("*")
    }
    before = files()
    self.call("--mode=list")
    self.call("--mode=verify")
    self.call("--mode=diff", "--step=0", "--other_step=3")
    self.assertEqual(files(), before)


if __name__ == "__main__":
  absltest.main()

"""The head and the tables of a page are those of the run."""

import json

import testing
import written_run
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.plan import flops
from dsv3_jax.report import pictures, results, run_data

ROW = {"step": 1, "tokens": 2048, "loss": 1.0, "tokens_per_s": 1e6}
BEGAN = 1_796_000_000.0


class ResultsTest(parameterized.TestCase):
  def run_of(self, *rows, **files) -> run_data.Record:
    """A run with rows of metrics and files of JSON."""
    folder = testing.folder(self)
    lines = "".join(json.dumps(row) + "\n" for row in rows or [ROW])
    (folder / "metrics.jsonl").write_text(lines)
    for name, tree in files.items():
      lines = [tree] if isinstance(tree, dict) else tree
      path = folder / f"{name}.json{'' if lines[0] is tree else 'l'}"
      path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_data.read(folder)

  def identity(self, *changes: str) -> dict:
    run = config.override(presets.TINY, *changes)
    return {"variant": "tiny", "seed": 0, "settings": config.flatten(run)}

  def head(self, run) -> dict[str, str]:
    return results.head(run, results.results(run))

  def test_head_of_a_run_that_has_everything(self):
    folder = testing.folder(self)
    written_run.write(folder, 20)
    head = self.head(run_data.read(folder))
    self.assertEqual(head["Host"], "node-17")
    self.assertEqual(head["Devices"], "1 x cpu:0")
    self.assertEqual(head["JAX"], "0.10.2")
    self.assertEqual(head["Peak memory"], "70 GiB device, 3 GiB host")

  def test_head_of_an_older_run_has_what_there_is(self):
    self.assertEqual(
      self.head(self.run_of()), {"Tokens per second": "1,000,000"}
    )
    start = {"event": "start", "time": BEGAN + 1, "step": 0, "began": BEGAN}
    start |= {"host": "old", "seen_at": 0.0}
    head = self.head(self.run_of(events=[start]))
    self.assertEqual(head["Host"], "old")
    self.assertEqual(head["Started"], "2026-11-30 00:53 UTC")

  def test_mfu_is_of_all_devices(self):
    env = {"devices": 2 * ["NVIDIA H100 80GB HBM3"]}
    head = self.head(self.run_of(config=self.identity(), env=env))
    per_token = flops.train_flops(presets.TINY.model, 256) / 256
    share = 1e6 * per_token / (2 * 989e12)
    rate = f"{per_token / 1e6:,.1f} TFLOP/s"
    self.assertEqual(head["MFU"], f"{share:.1%} of the BF16 peak, {rate}")
    self.assertNotIn("Model FLOP/s", head)
    self.assertEqual(head["Devices"], "2 x NVIDIA H100 80GB HBM3")

  def test_no_mfu_where_the_peak_is_unknown(self):
    row = ROW | {"tokens_per_s": 1e4}
    run = self.run_of(row, config=self.identity(), env={"devices": ["cpu"]})
    head = self.head(run)
    self.assertNotIn("MFU", head)
    per_token = flops.train_flops(presets.TINY.model, 256) / 256
    self.assertEqual(head["Model FLOP/s"], f"{per_token / 1e5:,.1f} GFLOP/s")

  def test_peak_memory_is_of_the_newest_start(self):
    events = [
      {"event": "end", "time": 1.0, "code": 0, "peak_bytes": {"host": 9 << 30}},
      {"event": "start", "time": 2.0, "step": 1, "began": 1.5, "seen_at": 0.0},
      {"event": "end", "time": 3.0, "code": 0, "peak_bytes": {"host": 2 << 30}},
    ]
    head = self.head(self.run_of(events=events))
    self.assertEqual(head["Peak memory"], "2 GiB host")

  def test_changes_to_the_preset(self):
    run = self.run_of(config=self.identity("optim.peak_lr=3e-3", "d_model=96"))
    self.assertEqual(
      run_data.changes(run), {"optim.peak_lr": 2e-3, "model.d_model": 192}
    )
    table = results.table(run, results.results(run))
    group = table["Changed from the preset tiny"]
    self.assertEqual(group["optim.peak_lr"], "0.003 (preset: 0.002)")
    run = self.run_of(config=self.identity())
    self.assertEmpty(run_data.changes(run))
    other = self.identity() | {"variant": "mine"}
    self.assertIsNone(run_data.changes(self.run_of(config=other)))

  def test_domains_have_names_and_curves(self):
    scores = {"prose": 2.0, "code": 1.0, "code_ema": 0.9, "nan": None}
    row = {"step": 1, "heldout_loss": 1.0, "heldout_bpb": 1.5}
    row |= {f"heldout_bpb/{name}": value for name, value in scores.items()}
    run = self.run_of(ROW, row)
    self.assertEqual(run_data.domains(run), ["code", "nan", "prose"])
    (picture,) = (
      p
      for p in pictures.pictures(run)
      if isinstance(p, pictures.Picture) and p.name == "bits_per_byte_by_domain"
    )
    self.assertEqual(list(picture.draw.keywords["curves"]), ["code", "prose"])
    table = results.table(run, results.results(run))
    self.assertEqual(table["Result"]["Held-out bits per byte, prose"], "2.000")
    self.assertEmpty(run_data.domains(self.run_of()))


if __name__ == "__main__":
  absltest.main()

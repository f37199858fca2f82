"""Tests of the benchmark: its arithmetic, its flags and its workers."""

import math
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.plan import flops
from scripts.bench import against_jax, main
from scripts.bench import worker as worker_lib

# A worker whose step sleeps and prints, and whose waiting can be watched.
FAKE_WORKER = """
import time
from scripts.bench import worker

def prepare(job):
  def step():
    print("noise on stdout")
    time.sleep(job["step_s"])
    return 1.5
  return worker.Task(step=step, matmul=lambda: time.sleep(1e-3),
                     version="fake")

worker.serve(prepare)
"""


def norm_gains(model: config.Model) -> int:
  ranks = model.attention.q_rank + model.attention.kv_rank
  return model.n_layers * (2 * model.d_model + ranks) + model.d_model


class CostTest(parameterized.TestCase):
  @parameterized.parameters(
    ("v3_671b", 36_625_603_584),
    ("v2_236b", 20_851_512_320),
    ("v2_lite_16b", 2_451_435_008),
  )
  def test_active_weights_are_the_published_ones(self, name, active):
    model = presets.PRESETS[name].model
    self.assertEqual(flops.active_weights(model) + norm_gains(model), active)

  @parameterized.parameters("tiny", "v3_671b")
  def test_an_mtp_module_costs_a_layer_a_projection_and_the_head(self, name):
    model, n = presets.PRESETS[name].model, 9

    def forward(n_layers):
      longer = config.override(model, f"n_layers={n_layers}")
      return flops.forward_flops(longer, n, n)

    layer = forward(model.n_layers + 1) - forward(model.n_layers)
    d, vocab = model.d_model, model.vocab_size
    module = layer + 2 * n * (2 * d * d + d * vocab)
    expected = 3 * (forward(model.n_layers) + model.mtp.depth * module)
    self.assertEqual(flops.train_flops(model, n), expected)

  def test_training_without_mtp_costs_three_forward_passes(self):
    model = presets.V2_LITE_16B.model
    forward = flops.forward_flops(model, 9, 9)
    self.assertEqual(flops.train_flops(model, 9), 3 * forward)

  def test_the_peak_of_a_device_is_by_its_name(self):
    for kind, peak in (
      ("NVIDIA H100 80GB HBM3", 989e12),
      ("NVIDIA H100 PCIe", 756e12),
      ("TPU v5 lite", 197e12),
      ("TPU v5p", 459e12),
      ("cpu", None),
    ):
      self.assertEqual(flops.peak_flops(kind), peak)

  def test_attention_cost_counts_the_causal_pairs(self):
    model, seq_len = presets.S.model, 7
    pairs = sum(range(1, seq_len + 1))
    mla = model.attention
    per_pair = 2 * model.n_layers * mla.n_heads * (mla.qk_dim + mla.v_dim)
    linear = 6 * flops.active_weights(model) * seq_len
    self.assertEqual(
      main.Load("train", 2, seq_len).flops(model),
      2 * (linear + 3 * per_pair * pairs),
    )

  @parameterized.parameters(
    # Tokens that pass through the layers, and pairs of them; logits.
    (main.Load("prefill", 1, prompt=5), 5, 15, 1),
    (main.Load("decode", 1, prompt=5, new=1), 5, 15, 1),
    (main.Load("decode", 1, prompt=5, new=3), 5 + 1 + 1, 15 + 6 + 7, 3),
    (main.Load("decode", 4, prompt=1, new=2), 4 * 2, 4 * 3, 4 * 2),
  )
  def test_inference_costs_what_is_counted_by_hand(
    self, load, n_tokens, pairs, n_logits
  ):
    # Of S, its attention: the products of q, of kv with its rotated key, of
    # keys and values, and of the output.
    attention = 128 * (256 + 384) + 256 * 80 + 64 * 512 + 256 * 256
    dense = 3 * 256 * 1024
    moe = 256 * 32 + (4 + 1) * 3 * 256 * 128
    layers = 8 * attention + dense + 7 * moe
    pair = 8 * 8 * (48 + 32)  # layers, heads
    head = 256 * 8192
    self.assertEqual(
      load.flops(presets.S.model),
      2 * (n_tokens * layers + pairs * pair + n_logits * head),
    )

  def test_what_is_measured_and_what_counts_of_it(self):
    self.assertEqual(
      [
        (load.what, load.batch, load.seq, load.tokens)
        for what in main.WHAT
        for load in main.loads(what, presets.S)
      ],
      [
        ("train", 8, 512, presets.S.tokens_per_step),
        ("prefill", 1, 2048, 2048),
        ("decode", 1, 256, 128),
        ("decode", 16, 256, 16 * 128),
      ],
    )


class FlagsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("--what=train,finetune", "finetune"),
    ("--what=", "--what"),
    ("--shape=XL", "XL"),
    ("--rounds=0", "rounds"),
    ("--against=vllm", "vllm"),
    ("--baseline_python=python3", "--against"),
    ("--roundz=3", "roundz"),
    ("train", "stray"),
  )
  def test_bad_flags_exit_2_and_are_named(self, argument, named):
    self.assert_refused([argument], named)

  def test_all_problems_are_told_at_once(self):
    arguments = [
      "now",
      "--against=transformers",
      "--baseline_python=/no/python",
    ]
    self.assert_refused(arguments, "'now'", "/no/python")

  def test_only_training_is_in_other_precisions(self):
    arguments = ["--what=train,decode,prefill", "--precision=bf16"]
    self.assert_refused(arguments, "--precision=bf16: prefill and decode")
    arguments = ["--what=decode", "--against=fp8"]
    self.assert_refused(arguments, "--against=fp8: decode: in float32")

  def test_rival_without_its_libraries_is_refused(self):
    arguments = ["--against=transformers", "--baseline_python=false"]
    self.assert_refused(arguments, "cannot import torch and transformers")

  def test_the_program_exits_2(self):
    command = [sys.executable, "-m", "scripts.bench", "--roundz=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
    self.assertIn("roundz", done.stderr)

  def assert_refused(self, arguments, *named):
    code, out, err = testing.command_line(main.run, *arguments)
    self.assertEqual((code, out), (2, ""), err)
    for text in named:
      self.assertIn(text, err)


class WorkerTest(parameterized.TestCase):
  def start(self, *code):
    worker = worker_lib.start([sys.executable, *code], {}, ".")
    return self.enter_context(worker)

  def test_workers_take_turns_and_sleep_in_between(self):
    round_s, step_s = 0.5, 0.1
    self.enter_context(mock.patch.object(main, "ROUND_S", round_s))
    workers = {name: self.start("-c", FAKE_WORKER) for name in "ab"}
    jobs = {name: {"step_s": step_s} for name in workers}
    results = main.take_turns(workers, jobs, n_rounds=2)
    for result in results.values():
      self.assertLen(result["rounds"], 2)
      for answer in result["rounds"]:
        self.assertBetween(answer["steps"], 1, round(round_s / step_s))
        self.assertGreaterEqual(answer["seconds"], answer["steps"] * step_s)
        self.assertEqual(answer["value"], 1.5)
    (a_0, a_1), (b_0, b_1) = (results[name]["rounds"] for name in "ab")
    for waited, other in ((b_0, a_0), (a_1, b_0), (b_1, a_1)):
      self.assertGreater(waited["idle_s"], other["seconds"])
      self.assertLess(waited["idle_cpu_s"], 0.05 * waited["idle_s"])

  def test_a_worker_that_ends_is_an_error(self):
    worker = self.start("-c", "raise SystemExit(3)")
    with self.assertRaisesRegex(RuntimeError, "exit code 3"):
      worker_lib.ask(worker, {})

  def test_our_worker_trains_the_shape_that_it_is_given(self):
    small = ("n_layers=2", "d_model=32", "vocab_size=64", "train.batch_size=2")
    job = {"shape": "S", "set": [*main.OVERRIDES, *small, "data.seq_len=16"]}
    task = against_jax.prepare(job)
    # Untrained, every one of the 64 tokens is about equally likely; the
    # balance loss and the spread of the initial logits are far below 0.2.
    self.assertAlmostEqual(task.step(), math.log(64), delta=0.2)
    self.assertEqual(task.matmul().shape, 2 * (worker_lib.PEAK_SIZE,))

  def test_our_worker_reads_and_writes_behind_prompts(self):
    self.check_decode(new=5)

  @pytest.mark.slow
  def test_our_worker_reads_prompts_alone(self):
    self.check_decode(new=0)

  def check_decode(self, new):
    small = ("n_layers=2", "d_model=32", "vocab_size=64")
    # It chooses how many devices there are, as only a new process can.
    worker = self.start("-m", "scripts.bench.decode")
    ready = worker_lib.ask(
      worker,
      {
        "shape": "S",
        "set": [*main.OVERRIDES, *small],
        "prompts": [[1, 2, 3], [4, 5, 6]],
        "new": new,
      },
    )
    self.assertEqual(ready["version"], f"jax {jax.__version__}")
    values = [worker_lib.ask(worker, {"steps": 1})["value"] for _ in "ab"]
    self.assertBetween(values[0], 1, 2 * max(1, new) * 63)
    self.assertEqual(*values)

  def test_prompts_are_the_same_for_all_sides(self):
    load = main.Load("decode", 2, prompt=3, new=4)
    job, other = (
      main.job("tiny", load, [f"precision.recipe={precision}"])
      for precision in ("fp32", "bf16")
    )
    self.assertEqual(np.shape(job["prompts"]), (2, 3))
    self.assertEqual(job["prompts"], other["prompts"])
    self.assertEqual((job["what"], job["new"]), ("decode", 4))
    self.assertNotEqual(job["settings"], other["settings"])


class ReportTest(absltest.TestCase):
  def test_speed_mfu_and_pairwise_ratios(self):
    cfg = presets.S
    (load,) = main.loads("train", cfg)
    flops = load.flops(cfg.model)
    ours, theirs, ratio = main.report(cfg.model, "S", load, self.results())
    self.assertEqual(ours["what"], "train")
    self.assertEqual(ours["tokens_per_s"], cfg.tokens_per_step)
    self.assertEqual(ours["peak_gflops"], theirs["peak_gflops"])
    # Printed to four places.
    self.assertAlmostEqual(ours["mfu"], flops / 200e9, delta=1e-4)
    self.assertEqual(ratio["rounds"], [2.0, 1.5, 0.5])
    self.assertEqual(
      (ratio["min"], ratio["median"], ratio["max"]), (0.5, 1.5, 2.0)
    )

  def test_rows_of_decode_say_its_batch_and_count_what_is_written(self):
    load = main.Load("decode", 16, prompt=3, new=5)
    rows = list(main.report(presets.S.model, "S", load, self.results()))
    self.assertEqual(
      [row["what"] for row in rows],
      ["decode", "decode_transformers", "decode_ratio_to_transformers"],
    )
    self.assertEqual([row["batch"] for row in rows], [16, 16, 16])
    self.assertEqual([row.get("seq") for row in rows], [8, 8, None])
    self.assertEqual(rows[0]["tokens_per_s"], 16 * 5)

  def results(self):
    """Results of two sides: three rounds of two steps each."""
    return {
      name: {
        "version": name,
        "compile_s": 1.0,
        "rounds": [
          {
            "steps": 2,
            "seconds": seconds,
            "peak_gflops": peak,
            "peak_rss_mib": 100.0,
            "idle_s": 1.0,
            "idle_cpu_s": 0.0,
          }
          for seconds in times
        ],
      }
      for name, times, peak in (
        (main.OURS, (1.0, 2.0, 4.0), 100.0),
        ("transformers", (2.0, 3.0, 2.0), 200.0),
      )
    }


if __name__ == "__main__":
  absltest.main()

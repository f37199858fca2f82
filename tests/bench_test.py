"""Tests of the benchmark: its arithmetic, its flags and its workers."""

import math
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from dsv3_jax import config
from dsv3_jax import presets
from scripts import bench
from scripts import bench_jax
from scripts import bench_worker

# A worker whose step sleeps and prints, and whose waiting can be watched.
FAKE_WORKER = """
import time
from scripts import bench_worker

def prepare(job):
  def step():
    print("noise on stdout")
    time.sleep(job["step_s"])
    return 1.5
  return bench_worker.Task(step=step, matmul=lambda: time.sleep(1e-3),
                           version="fake")

bench_worker.serve(prepare)
"""


def norm_gains(model: config.Model) -> int:
  ranks = model.mla.q_rank + model.mla.kv_rank
  return model.n_layers * (2 * model.d_model + ranks) + model.d_model


class CostTest(parameterized.TestCase):

  @parameterized.parameters(
      ("v3_671b", 36_625_603_584),
      ("v2_236b", 20_851_512_320),
      ("v2_lite_16b", 2_451_435_008),
  )
  def test_active_weights_are_the_published_ones(self, name, active):
    model = presets.PRESETS[name].model
    self.assertEqual(bench.active_weights(model) + norm_gains(model), active)

  def test_attention_cost_counts_the_causal_pairs(self):
    model, seq_len = presets.S.model, 7
    pairs = sum(range(1, seq_len + 1))
    mla = model.mla
    per_pair = 2 * model.n_layers * mla.n_heads * (mla.qk_dim + mla.v_dim)
    linear = 6 * bench.active_weights(model) * seq_len
    self.assertEqual(
        bench.train_flops_per_token(model, seq_len) * seq_len,
        linear + 3 * per_pair * pairs,
    )


class FlagsTest(parameterized.TestCase):

  @parameterized.parameters(
      ("--what=train,decode", "decode"),
      ("--what=", "--what"),
      ("--shape=XL", "XL"),
      ("--rounds=0", "rounds"),
      ("--against=vllm", "vllm"),
      ("--rival_python=python3", "--against"),
      ("--roundz=3", "roundz"),
      ("train", "stray"),
  )
  def test_bad_flags_exit_2_and_are_named(self, argument, named):
    self.assert_refused([argument], named)

  def test_all_problems_are_told_at_once(self):
    arguments = ["now", "--against=transformers", "--rival_python=/no/python"]
    self.assert_refused(arguments, "'now'", "/no/python")

  def test_rival_without_its_libraries_is_refused(self):
    arguments = ["--against=transformers", "--rival_python=false"]
    self.assert_refused(arguments, "cannot import torch and transformers")

  def assert_refused(self, arguments, *named):
    command = [sys.executable, "-m", "scripts.bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertEqual(done.stdout, "")
    for text in named:
      self.assertIn(text, done.stderr)


class WorkerTest(absltest.TestCase):

  def start(self, code):
    worker = bench_worker.start([sys.executable, "-c", code], {}, ".")
    return self.enter_context(worker)

  def test_workers_take_turns_and_sleep_in_between(self):
    round_s, step_s = 0.5, 0.1
    self.enter_context(mock.patch.object(bench, "ROUND_S", round_s))
    workers = {name: self.start(FAKE_WORKER) for name in "ab"}
    jobs = {name: {"step_s": step_s} for name in workers}
    results = bench.take_turns(workers, jobs, n_rounds=2)
    for result in results.values():
      self.assertLen(result["rounds"], 2)
      for answer in result["rounds"]:
        self.assertBetween(answer["steps"], 1, round(round_s / step_s))
        self.assertGreaterEqual(answer["seconds"], answer["steps"] * step_s)
        self.assertEqual(answer["loss"], 1.5)
    (a_0, a_1), (b_0, b_1) = (results[name]["rounds"] for name in "ab")
    for waited, other in ((b_0, a_0), (a_1, b_0), (b_1, a_1)):
      self.assertGreater(waited["idle_s"], other["seconds"])
      self.assertLess(waited["idle_cpu_s"], 0.05 * waited["idle_s"])

  def test_a_worker_that_ends_is_an_error(self):
    worker = self.start("raise SystemExit(3)")
    with self.assertRaisesRegex(RuntimeError, "exit code 3"):
      bench_worker.ask(worker, {})

  def test_our_worker_trains_the_shape_that_it_is_given(self):
    small = ("n_layers=2", "d_model=32", "vocab_size=64", "train.batch_size=2")
    job = {"shape": "S", "set": [*bench.OVERRIDES, *small, "data.seq_len=16"]}
    task = bench_jax.prepare(job)
    # Untrained, every one of the 64 tokens is about equally likely; the
    # balance loss and the spread of the initial logits are far below 0.2.
    self.assertAlmostEqual(task.step(), math.log(64), delta=0.2)
    self.assertEqual(task.matmul().shape, 2 * (bench_worker.PEAK_SIZE,))


class ReportTest(absltest.TestCase):

  def test_speed_mfu_and_pairwise_ratios(self):
    cfg = presets.S
    flops = bench.train_flops_per_token(cfg.model, cfg.data.seq_len)
    results = {
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
            (bench.OURS, (1.0, 2.0, 4.0), 100.0),
            ("transformers", (2.0, 3.0, 2.0), 200.0),
        )
    }
    ours, theirs, ratio = bench.report(cfg, "S", results)
    self.assertEqual(ours["what"], "train")
    self.assertEqual(ours["tokens_per_s"], cfg.tokens_per_step)
    self.assertEqual(ours["peak_gflops"], theirs["peak_gflops"])
    # Printed to four places.
    self.assertAlmostEqual(
        ours["mfu"], cfg.tokens_per_step * flops / 200e9, delta=1e-4
    )
    self.assertEqual(ratio["rounds"], [2.0, 1.5, 0.5])
    self.assertEqual(
        (ratio["min"], ratio["median"], ratio["max"]), (0.5, 1.5, 2.0)
    )


if __name__ == "__main__":
  absltest.main()

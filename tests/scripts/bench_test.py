"""Tests of the benchmark: its arithmetic, its flags and its workers."""

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import micro
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.errors import InputError
from dsv3_jax.plan import flops
from dsv3_jax.trainer.terminal import Terminal
from scripts.bench import against_jax, compare, gguf_file, main, turns
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
    ("--batch=4", "--what=decode only"),
    ("--workdir=DIR", "take --what=prefill,decode"),
    ("--against=llama.cpp", "does not train"),
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

  def test_batches_of_decode_are_whole_numbers(self):
    arguments = ["--what=decode", "--batch=4,0,x"]
    self.assert_refused(arguments, "--batch=0: must", "--batch=x: must")

  def test_a_workdir_is_instead_of_a_shape(self):
    arguments = ["--what=decode", "--workdir=DIR", "--shape=S"]
    self.assert_refused(arguments, "give one of them")

  def test_noise_needs_rounds(self):
    arguments = ["--compare=FILE", "--rounds=2"]
    self.assert_refused(arguments, "--rounds=2: at least 3")

  def test_what_an_earlier_run_has_not_is_told_before_anything_starts(self):
    path = testing.folder(self) / "rows.jsonl"
    row = {"what": "train", "shape": "S", "batch": 8, "rounds": [1, 2, 3]}
    path.write_text(json.dumps(row))
    arguments = ["--what=train,decode", "--batch=1", f"--compare={path}"]
    self.assert_refused(
      arguments,
      "has no decode of S, batch 1, fp32",
      "has train of S, batch 8, fp32;",
    )

  def test_rival_without_its_libraries_is_refused(self):
    arguments = ["--against=transformers", "--baseline_python=false"]
    self.assert_refused(arguments, "cannot import torch and transformers")
    arguments[0] = "--against=llama.cpp"
    self.assert_refused(arguments, "cannot import xllamacpp and numpy")

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

  def lines(self, stream=None):
    return self.enter_context(
      contextlib.closing(Terminal(None, stream or io.StringIO()))
    )

  def test_workers_take_turns_and_sleep_in_between(self):
    round_s, step_s = 0.5, 0.1
    self.enter_context(mock.patch.object(turns, "ROUND_S", round_s))
    workers = {name: self.start("-c", FAKE_WORKER) for name in "ab"}
    jobs = {name: {"step_s": step_s} for name in workers}
    lines = self.lines(stream := io.StringIO())
    results = turns.take_turns(workers, jobs, 2, lines)
    self.assertRegex(stream.getvalue(), "a: compiled in .* s, a step takes 0.1")
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

  def test_a_person_sees_what_is_waited_for(self):
    self.enter_context(mock.patch.object(turns, "ROUND_S", 0.1))
    jobs = {"a": {"step_s": 0.6}}
    stream = io.StringIO()
    stream.isatty = lambda: True
    with mock.patch.dict("os.environ", {"TERM": "xterm"}):
      lines = self.lines(stream)
    turns.take_turns({"a": self.start("-c", FAKE_WORKER)}, jobs, 1, lines)
    self.assertIn("a: starting and compiling  0:0", stream.getvalue())
    self.assertIn("a: round 1/1, 1 steps  0:0", stream.getvalue())

  def test_our_worker_trains_the_shape_that_it_is_given(self):
    small = ("n_layers=1", "n_dense_layers=0", "d_model=32", "vocab_size=64")
    small += ("train.batch_size=2",)
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

  @pytest.mark.slow
  def test_llama_writes_as_many_tokens_of_random_parameters(self):
    path = testing.folder(self) / "model.gguf"
    settings = [*main.OVERRIDES, "n_layers=2", "d_model=32"]
    model = config.override(presets.S, *settings).model
    gguf_file.write(path, None, model)
    for n_texts, new in ((1, 0), (3, 5)):
      load = main.Load("decode", n_texts, prompt=4, new=new)
      job = main.job("S", load, settings) | {"gguf": str(path)}
      worker = self.start("-m", "scripts.bench.against_llama")
      self.assertIn("llama.cpp", worker_lib.ask(worker, job)["version"])
      answer = worker_lib.ask(worker, {"steps": 1})
      self.assertEqual(answer["value"], n_texts * max(1, new))

  @pytest.mark.slow
  def test_our_worker_and_llama_have_the_model_of_a_run(self):
    workdir = testing.folder(self) / "run"
    micro.make(workdir, "router.top_groups=1")
    args = main.Args(what=("decode",), workdir=str(workdir), rounds=1)
    model = config.override(presets.S, *args.settings()).model
    self.assertEqual(model.d_model, testing.run().model.d_model)
    self.enter_context(mock.patch.object(turns, "ROUND_S", 0.1))
    args = dataclasses.replace(args, against="llama.cpp")
    sides = main._sides(args, model, workdir)
    load = main.Load("decode", 1, prompt=4, new=5)
    results = main.measure(args, load, sides, self.lines())
    self.assertEqual(list(results), ["dsv3_jax", "llama.cpp"])

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
    # Rounds of 1, 2 and 4 s: 2, 1 and 0.5 of the median speed.
    self.assertEqual(ours["spread"], 1.5)
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


def rows(*rounds, what="decode", **others):
  return {"what": what, "shape": "S", "batch": 1, "rounds": rounds} | others


class CompareTest(parameterized.TestCase):
  @parameterized.parameters(
    ((98, 100, 102), (99, 103, 102), 0.02, 0.04, "within noise"),
    ((98, 100, 102), (105, 104, 106), 0.05, 0.04, "faster"),
    ((98, 100, 102), (95, 94.5, 96), -0.05, 0.04, "slower"),
    # The noise of a busy run, or of a busy earlier one.
    ((98, 100, 102), (95, 94.5, 110), -0.05, 15.5 / 95, "within noise"),
    ((90, 100, 110), (95, 94.5, 96), -0.05, 0.2, "within noise"),
    ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0), -0.5, 0, "slower"),
  )
  def test_a_change_is_told_from_noise(self, old, new, change, noise, verdict):
    result = compare.compare(rows(*old), rows(*new))
    self.assertAlmostEqual(result["change"], change, places=4)
    self.assertAlmostEqual(result["noise"], noise, places=3)
    self.assertEqual(result["verdict"], verdict)

  @parameterized.parameters(
    ("decode", True),
    ("decode_ratio_to_transformers", True),
    ("decode_transformers", False),
  )
  def test_a_rival_that_is_slower_is_no_regression(self, what, expected):
    verdict = compare.compare(
      rows(2, 2, 2, what=what), rows(1, 1, 1, what=what)
    )
    self.assertEqual(compare.is_regression(verdict, main.WHAT), expected)

  def test_reads_the_lines_of_a_run_and_of_a_comparison(self):
    path = testing.folder(self) / "rows.jsonl"
    verdict = compare.compare(rows(2, 2, 2), rows(1, 1, 1))
    lines = (
      rows(1, 1, 1),
      rows(2, 3, 4),
      verdict,
      rows(1, 1, 1, precision="fp8"),
    )
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    earlier = compare.read(path)
    self.assertEqual([key[-1] for key in earlier], ["fp32", "fp8"])
    self.assertEqual(earlier["decode", "S", 1, "fp32"]["rounds"], [2, 3, 4])

  @parameterized.parameters(
    ("{", "line 1: is not a metric"),
    ("[1]", "line 1: is not a metric"),
    ("{}", "line 1: is not a metric"),
    ('{"rounds": ["a", "b", "c"]}', "line 1: is not a metric"),
    ('{"rounds": [1, 2]}', "line 1: has 2 rounds, and at least 3"),
  )
  def test_another_file_is_refused(self, text, named):
    path = testing.folder(self) / "rows.jsonl"
    path.write_text(text)
    with self.assertRaisesRegex(InputError, named):
      compare.read(path)
    with self.assertRaisesRegex(InputError, "cannot be read"):
      compare.read(pathlib.Path(f"{path}.none"))

  def test_another_or_a_busy_machine_is_named(self):
    here = {"cpu": "2 x A", "peak_gflops": 100.0}
    new = rows(1, 1, 1, **here)

    def warn(**old):
      return list(compare.warnings("F", rows(1, 1, 1, **old), new))

    self.assertEmpty(warn(**here))
    self.assertEqual(warn(cpu="4 x B"), ["F was measured on 4 x B, not 2 x A"])
    (busy,) = warn(cpu="2 x A", peak_gflops=150.0)
    self.assertIn("100 GFLOP/s, was 150: the machine itself is slower", busy)

  @parameterized.parameters(((1.0, 1.1, 0.9), 0), ((4.0, 4.1, 3.9), 1))
  def test_the_exit_code_says_if_something_is_slower(self, old, code):
    path = testing.folder(self) / "rows.jsonl"
    path.write_text(json.dumps(rows(*old, shape="tiny", cpu=compare.cpu())))
    args = ["--what=decode", "--shape=tiny", "--batch=1", f"--compare={path}"]
    measured = [rows(1.0, 1.0, 1.0, shape="tiny", precision="fp32")]
    patch = mock.patch.object(main, "_measurements", lambda *_: measured)
    with patch:
      found, out, err = testing.command_line(main.run, *args)
    self.assertEqual(found, code, err)
    self.assertIn("verdict=slower" if code else "within noise", out)
    self.assertEqual("decode of tiny, batch 1" in err, bool(code))


if __name__ == "__main__":
  absltest.main()

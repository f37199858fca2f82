"""Tests of import, export, verify and logits by the command line."""

import errno
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import gguf
import jax
import micro
import ml_dtypes
import numpy as np
import pytest
import released
import testing
import torch
import transformers
from absl.testing import absltest, parameterized

from dsv3_jax import config, errors, param_spec, train
from dsv3_jax.data import chat, tokenizer
from dsv3_jax.infer import engine, inference_params
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.interop import (
  hf_import,
  hf_mapping,
  hf_read,
  hf_write,
  open_run,
  resumable,
  safetensors,
)
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import exit_codes, loop, trainer
from experiments import cli
from scripts import convert

convert_main = functools.partial(cli.run_main, convert.execute)


def converted(mode, **arguments):
  """Returns exit code, output and errors; True stands for a bare flag."""
  line = [
    f"--{name}" if value is True else f"--{name}={value}"
    for name, value in arguments.items()
  ]
  return testing.command_line(convert_main, f"--mode={mode}", *line)


def _greedy(run, state, ids, n):
  cfg = config.override(run.model, "mtp.depth=0")
  params = inference_params.from_params(state.params, state.router_bias, cfg)
  writer = engine.Engine(params, cfg, EngineOptions(max_batch=1, max_len=64))
  request = GenerationRequest(ids, max_tokens=n, temperature=0)
  return [event.token for event in writer.run([request])]


def _exponents(folder):
  """Makes scales powers of two, in a byte."""

  def change(found):
    for name in [n for n in found if n.endswith("_scale_inv")]:
      found[name] = found[name].to(torch.float8_e8m0fnu)

  path = folder / "config.json"
  how = json.loads(path.read_text())["quantization_config"]
  facts = {"quantization_config": how | {"scale_fmt": "ue8m0"}}
  return released.rewrite(folder, change, facts)


class ConvertTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    self.hf, self.out = self.folder / "hf", self.folder / "out"
    self.workdir = self.folder / "workdir"

  def convert(self, mode, code=0, **arguments):
    got, out, err = converted(mode, **arguments)
    self.assertEqual(got, code, err)
    return out if not code else err


class RoundTripTest(ConvertTest):
  @parameterized.named_parameters(
    (
      "bf16",
      lambda folder: released.rewrite(
        folder,
        lambda found: {
          name: t if "e_score" in name else t.to(torch.bfloat16)
          for name, t in found.items()
        },
      ),
    ),
    ("fp8", lambda folder: released.in_fp8(folder)),
    ("fp8_ragged", lambda folder: released.in_fp8(folder, (28, 20))),
    ("fp8_exponents", lambda folder: _exponents(released.in_fp8(folder))),
  )
  def test_every_byte_comes_back(self, change):
    self.check_round_trip(change)

  @pytest.mark.slow
  def test_every_byte_of_float32_comes_back(self):
    self.check_round_trip(lambda folder: None)

  def check_round_trip(self, change):
    released.with_mtp(self.hf)
    change(self.hf)
    self.convert("import", hf=self.hf, workdir=self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.out)
    self.assertEqual(released.raw(self.out), released.raw(self.hf))
    configs = (folder / "config.json" for folder in (self.hf, self.out))
    self.assertEqual(*(json.loads(path.read_text()) for path in configs))
    if "quantization_config" in hf_read.open_folder(self.hf).config_json:
      asked = self.folder / "asked"
      self.convert("export", workdir=self.workdir, hf=asked, fp8=True)
      self.assertEqual(released.raw(asked), released.raw(self.hf))
    again = self.folder / "again"
    self.convert("import", hf=self.out, workdir=again)
    self.assertEqual(released.raw(again / "hf"), released.raw(self.hf))
    # `ExportTest` compares the logits with those of transformers.
    with mock.patch.object(convert, "_compare_with_transformers"):
      self.assertIn("all accounted for", self.convert("verify", hf=self.out))

  @pytest.mark.slow
  def test_queries_that_are_not_compressed_and_v2(self):
    released.save(released.model({"q_lora_rank": None}, kind="V2"), self.hf)
    self.convert("import", hf=self.hf, workdir=self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.out)
    self.assertEqual(released.raw(self.out), released.raw(self.hf))
    out = self.convert("verify", hf=self.out)
    self.assertRegex(out, "logits of 256 random tokens: .*e-0[678] from")

  def test_what_holds_nothing_of_the_model_is_imported_as_it_is(self):
    def change(found):
      found["model.rotary_emb.inv_freq"] = torch.arange(4.0)
      found["model.layers.0.more.weight"] = torch.zeros(0, 64)

    released.save(released.model(), self.hf)
    released.rewrite(self.hf, change)
    code, out, err = converted("import", hf=self.hf, workdir=self.workdir)
    self.assertEqual(code, 0, err)
    self.assertIn("inv_freq: holds nothing of the model, passed over", out)
    self.assertEqual(released.raw(self.workdir / "hf"), released.raw(self.hf))
    code, _, err = converted("verify", workdir=self.workdir)
    self.assertEqual(code, 0, err)

  def test_fp8_as_bfloat16_and_float32(self):
    released.save(released.model(), self.hf)
    released.in_fp8(self.hf, (28, 20))
    self.convert("import", hf=self.hf, workdir=self.workdir)
    source = hf_read.open_folder(self.hf)
    kinds = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    for dtype, kind in kinds.items():
      out = self.folder / dtype
      self.convert("export", workdir=self.workdir, hf=out, dtype=dtype)
      found = hf_read.open_folder(out)
      self.assertNotIn("quantization_config", found.config_json)
      self.assertEqual(found.config_json["torch_dtype"], dtype)
      for b in hf_mapping.model_blocks(found.model):
        inner = (slice(None),) * len((*b.inputs, *b.outputs))
        want = source.read_slice(b, inner)
        if b.path != hf_mapping.BIAS:
          want = want.astype(kind)
        np.testing.assert_array_equal(
          found.read_slice(b, inner), want, b.names[0]
        )

  def test_several_shards_and_their_sums(self):
    released.with_mtp(self.hf)
    self.convert("import", hf=self.hf, workdir=self.workdir)
    with mock.patch.object(hf_write, "SHARD_BYTES", 200_000):
      self.convert("export", workdir=self.workdir, hf=self.out)
    shards = sorted(self.out.glob("*.safetensors"))
    self.assertGreater(len(shards), 4)
    lines = (self.out / "SHA256SUMS").read_text().splitlines()
    sums = [hashlib.sha256(p.read_bytes()).hexdigest() for p in shards]
    self.assertEqual(
      lines, [f"{s}  {p.name}" for s, p in zip(sums, shards, strict=True)]
    )
    for path in shards:
      self.assertLess(path.stat().st_size, 220_000)
    self.assertEqual(released.raw(self.out), released.raw(self.hf))

  def test_samples_from_what_was_imported(self):
    run, state, tok = micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.hf)
    imported = self.folder / "imported"
    self.convert("import", hf=self.hf, workdir=imported)
    mesh = device_mesh.make_mesh({})
    testing.assert_same(
      *(
        jax.device_get(open_run.load_newest_params(folder, run, mesh))
        for folder in (self.workdir, imported)
      )
    )
    # In a process of its own, with its own flags.
    program = [sys.executable, "-m", "experiments.sample"]
    flags = f"--workdir={imported} --prompt=cold --max_tokens=9 --temperature=0"
    out = subprocess.run(
      [*program, *flags.split()],
      cwd=pathlib.Path(convert.__file__).parents[1],
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    ids = tok.encode("cold", add_special_tokens=False).ids
    made = _greedy(run, state, [tokenizer.BOS_ID, *ids], 9)
    self.assertEqual(out, f"cold{tok.decode(made)}\n")


class ExportTest(ConvertTest):
  def test_transformers_has_the_same_logits_and_text(self):
    run, state, tok = micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.out)
    self.assertIn("logits of 256", self.convert("verify", hf=self.out))
    model = transformers.AutoModelForCausalLM.from_pretrained(self.out)
    theirs = transformers.AutoTokenizer.from_pretrained(self.out)
    text = "It was 你好 1984"
    ids = theirs(text).input_ids
    own = tok.encode(text, add_special_tokens=False).ids
    self.assertEqual(ids, [tokenizer.BOS_ID, *own])
    made = _greedy(run, state, ids, 20)
    prompt = torch.tensor([ids])
    out = model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=20,
      do_sample=False,
      eos_token_id=None,
    )
    self.assertEqual(out[0, len(ids) :].tolist(), made)

  def test_gguf(self):
    _, _, tok = micro.make(self.workdir)
    path = self.folder / "model.gguf"
    self.convert("export", workdir=self.workdir, gguf=path)
    found = gguf.GGUFReader(path)
    names = [t.name for t in found.tensors]
    self.assertLen(names, len(set(names)))
    self.assertIn("blk.1.exp_probs_b.bias", names)
    self.assertFalse([name for name in names if name.startswith("blk.2")])
    tokens = found.get_field("tokenizer.ggml.tokens").contents()
    self.assertLen(tokens, 300)
    self.assertEqual(tokens[0], tokenizer.BOS)
    err = self.convert("export", code=2, workdir=self.workdir, gguf=path)
    self.assertIn("already exists", err)

  def test_a_bias_that_the_format_cannot_hold(self):
    micro.make(
      self.workdir, "router.score=softmax", "router.renormalize=false",
      "mtp.depth=0",
    )  # fmt: skip
    err = self.convert("export", code=2, workdir=self.workdir, hf=self.out)
    self.assertIn("a bias that is not 0", err)

  def test_the_average(self):
    run, state, _ = micro.make(self.workdir, "optim.ema_decay=0.9")
    self.convert("export", workdir=self.workdir, hf=self.out, ema=True)
    norm = released.tensors(self.out)["model.norm.weight"].numpy()
    np.testing.assert_array_equal(norm, np.asarray(state.params["norm"]) + 1)

  def test_fp8_of_a_run(self):
    run, state, _ = micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.out, fp8=True)
    found = hf_read.open_folder(self.out)
    self.assertEmpty(list(hf_read.validate_values(found)))
    self.assertEqual(found.tile, (128, 128))
    wrong = 0
    for b in hf_mapping.model_blocks(found.model):
      values = found.tensors[b.names[0]]
      quantized = "FP8" if values.dtype == hf_read.E4M3 else str(values.dtype)
      want = "FP8" if b.quantized else "bfloat16"
      self.assertEqual(
        quantized, "float32" if b.path == hf_mapping.BIAS else want
      )
      if b.quantized:
        inner = (slice(None),) * len((*b.inputs, *b.outputs))
        got = found.read_slice(b, inner)
        own = state.params
        for key in b.path.split("/"):
          own = own[key]
        want = np.asarray(own)[b.index]
        # Half of a step: three bits of mantissa, or of the smallest numbers,
        # 2^-9 times a scale.
        error = np.abs(got - want)
        bound = np.maximum(np.abs(want) / 16, np.abs(want).max() / 448 / 2**10)
        wrong += (error > bound * 1.001).sum()
    self.assertEqual(wrong, 0)

  def test_fp8_of_nan(self):
    _, state, _ = micro.make(self.workdir)
    source = hf_write.ParamArrays(
      testing.run().model,
      {
        path: np.full(a.shape, np.nan, np.float32)
        for path, a in param_spec.flatten_with_paths(state.params).items()
      }
      | {hf_mapping.BIAS: np.asarray(state.router_bias)},
    )
    form = hf_write.ExportFormat(source, "fp8")
    with self.assertRaisesRegex(ValueError, "not finite"):
      hf_write.export(form, self.out, {}, lambda n: None, lambda: None)

  def test_fp8_again_is_the_same(self):
    micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.hf, fp8=True)
    imported = self.folder / "imported"
    self.convert("import", hf=self.hf, workdir=imported)
    self.convert("export", workdir=imported, hf=self.out)
    self.assertEqual(released.raw(self.out), released.raw(self.hf))

  def test_a_bfloat16_run_rounds_to_nearest(self):
    _, state, _ = micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.out, dtype="bfloat16")
    got = released.tensors(self.out)["lm_head.weight"]
    want = torch.from_numpy(np.array(state.params["head"]).T)
    self.assertTrue(torch.equal(got, want.to(torch.bfloat16)))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = released.tensors(self.out)[name]
    self.assertEqual(bias.dtype, torch.float32)
    np.testing.assert_array_equal(bias.numpy(), state.router_bias[0])

  def test_chat_template(self):
    _, _, tok = micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.out)
    theirs = transformers.AutoTokenizer.from_pretrained(self.out)
    system = {"role": "system", "content": "Be brief."}
    turns = [
      {"role": "user", "content": "你好 (1984)?"},
      {"role": "assistant", "content": " It was.\n"},
      {"role": "user", "content": "cold"},
    ]
    both = [system, *turns]
    for messages in (turns[:1], turns, both, [system, *both]):
      for answer_next in (False, True):
        want = theirs.apply_chat_template(
          messages, add_generation_prompt=answer_next, return_dict=False
        )
        self.assertEqual(chat.encode(tok, messages, answer_next), want)
    with self.assertRaisesRegex(Exception, "role must be"):
      theirs.apply_chat_template([{"role": "tool", "content": ""}])
    with self.assertRaisesRegex(ValueError, "role='tool'"):
      chat.encode(tok, [{"role": "tool", "content": ""}])


class FineTuneTest(ConvertTest):
  @pytest.mark.slow
  def test_begins_with_what_was_imported(self):
    run, state, _ = micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.hf)
    imported = self.folder / "imported"
    self.convert("import", hf=self.hf, workdir=imported)
    text = self.folder / "text.txt"
    text.write_text("It was a bright cold day in April.\n" * 100)
    run = config.override(run, f"data.path={text}")
    command = trainer.Trainer(
      run,
      self.folder / "tuned",
      stop=1,
      mesh={"data": 8, "model": 2},
      init_from=imported,
    )
    # Before the first step.
    fit = lambda state, *_, **__: state
    self.enter_context(mock.patch.object(loop, "fit", fit))
    with self.assertRaises(exit_codes.PreemptedError):
      command.fit()
    got = open_run.load_newest_params(
      command.workdir, run, device_mesh.make_mesh({})
    )
    testing.assert_same(
      *map(jax.device_get, (got, (state.params, state.router_bias)))
    )


class LogitsTest(ConvertTest):
  def setUp(self):
    super().setUp()
    self.oracle = released.with_mtp(self.hf)[1]
    self.tokens = self.folder / "in.npy"
    np.save(self.tokens, released.random_tokens(3, 11))

  def test_logits_are_those_of_the_oracle(self):
    main, ahead = self.folder / "main.npy", self.folder / "ahead.npy"
    self.convert(
      "logits", hf=self.hf, tokens=self.tokens, out=main, mtp_out=ahead
    )
    want = self.oracle.logits(np.load(self.tokens))
    for path, theirs in zip((main, ahead), want, strict=True):
      ours = np.load(path)
      self.assertEqual(ours.dtype, np.float32)
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    alone = self.folder / "alone.npy"
    self.convert("logits", hf=self.hf, tokens=self.tokens, out=alone)
    np.testing.assert_array_equal(np.load(alone), np.load(main))

  def test_one_token_and_none(self):
    out = self.folder / "out.npy"
    for shape in ((1, 1), (0, 5)):
      np.save(self.tokens, released.random_tokens(*shape))
      self.convert("logits", hf=self.hf, tokens=self.tokens, out=out)
      self.assertEqual(np.load(out).shape, (*shape, 259))

  @parameterized.named_parameters(
    ("range", [[259]], r"259 to 259, must be in \[0, 259\)"),
    ("negative", [[-1, 2]], "-1 to 2"),
    ("floats", [[1.0]], "must be integers"),
    ("vector", [1, 2], "must be integers"),
    ("no_tokens", np.zeros((2, 0), int), "0 in a row"),
  )
  def test_bad_tokens(self, tokens, message):
    np.save(self.tokens, tokens)
    out = self.folder / "out.npy"
    err = self.convert(
      "logits", code=2, hf=self.hf, tokens=self.tokens, out=out
    )
    self.assertRegex(err, message)
    self.assertFalse(out.exists())

  def test_pickled_tokens_are_not_loaded(self):
    np.save(self.tokens, np.array([{}]), allow_pickle=True)
    err = self.convert(
      "logits", code=2, hf=self.hf, tokens=self.tokens, out="x.npy"
    )
    self.assertIn("cannot be read", err)

  def test_mtp_of_a_model_without(self):
    folder = released.save(released.model(), self.folder / "plain")
    err = self.convert(
      "logits", code=2, hf=folder, tokens=self.tokens, out="x", mtp_out="y"
    )
    self.assertIn("has no MTP layer", err)


class CommandTest(ConvertTest):
  @parameterized.parameters(
    ({}, "--mode=: must be one of"),
    ({"mode": "imprt"}, "--mode=imprt: must be one of"),
    ({"mode": "import"}, "--hf is missing"),
    ({"mode": "verify", "hf": "x", "fp8": True}, "--fp8: is not used by"),
    (
      {"mode": "import", "hf": "x", "workdir": "y", "link": "soft"},
      "--link=soft: must be hard or symbolic",
    ),
    ({"mode": "verify"}, "one of --hf=DIR and --workdir=DIR"),
    ({"mode": "export", "workdir": "x"}, "one of --hf=DIR and --gguf=FILE"),
    (
      {"mode": "export", "workdir": "x", "hf": "y", "dtype": "int8"},
      "--dtype=int8",
    ),
    (
      {"mode": "export", "workdir": "x", "hf": "y", "fp8": True,
       "dtype": "float32"},
      "--fp8: cannot be combined",
    ),
    ({"mode": "logits", "hf": "x", "mesh": "a=2"}, "--mesh=a=2"),
    ({"mode": "logits", "out": "/no/folder/x"}, "--out=/no/folder/x"),
    ({"mode": "verify", "hf": "/no/folder"}, "no such folder"),
    ({"mode": "export", "workdir": "/no/folder", "hf": "x"}, "holds no run"),
  )  # fmt: skip
  def test_is_refused(self, arguments, message):
    line = [
      f"--{k}" if v is True else f"--{k}={v}" for k, v in arguments.items()
    ]
    code, _, err = testing.command_line(convert_main, *line)
    self.assertEqual(code, cli.BAD_INPUT)
    self.assertIn(message, err)

  def test_import_into_a_run(self):
    released.save(released.model(), self.hf)
    micro.make(self.workdir)
    err = self.convert("import", code=2, hf=self.hf, workdir=self.workdir)
    self.assertIn("belongs to a run", err)

  def test_export_onto_a_checkpoint_or_other_files(self):
    micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.out)
    err = self.convert("export", code=2, workdir=self.workdir, hf=self.out)
    self.assertIn("holds a checkpoint already", err)
    other = self.folder / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    err = self.convert("export", code=2, workdir=self.workdir, hf=other)
    self.assertIn("must be empty, holds thesis.tex", err)

  def test_export_without_a_tokenizer_writes_nothing(self):
    micro.make(self.workdir)
    (self.workdir / "data" / "tokenizer.json").unlink()
    err = self.convert("export", code=2, workdir=self.workdir, hf=self.out)
    self.assertIn("tokenizer.json", err)
    self.assertFalse(self.out.exists())

  def test_gguf_into_no_folder(self):
    micro.make(self.workdir)
    path = self.folder / "none" / "x.gguf"
    err = self.convert("export", code=2, workdir=self.workdir, gguf=path)
    self.assertIn("there is no folder", err)

  def test_corrupt_shard(self):
    micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.out)
    (path,) = self.out.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    err = self.convert("verify", code=2, hf=self.out)
    self.assertIn("safetensors: corrupt", err)

  def test_sums_that_do_not_name_a_shard(self):
    micro.make(self.workdir)
    self.convert("export", workdir=self.workdir, hf=self.out)
    (self.out / "SHA256SUMS").write_text("nonsense\n")
    err = self.convert("verify", code=2, hf=self.out)
    self.assertIn("SHA256SUMS", err)


class Stop(BaseException):
  """Stands for a signal in the middle of the work."""


def stopping_after(n):
  """Returns a progress bar that raises when n tensors are done."""
  import contextlib

  @contextlib.contextmanager
  def bar(title, total):
    left = [n]

    def advance(n_bytes):
      left[0] -= 1
      if left[0] < 0:
        raise Stop

    yield advance

  return bar


@pytest.mark.fault(
  "F47",
  "an export interrupted",
  "no index until all shards are verified; resumes",
)
class InterruptedTest(ConvertTest):
  def setUp(self):
    super().setUp()
    released.with_mtp(self.hf)
    self.enter_context(mock.patch.object(resumable, "IN_FLIGHT", 1))

  def stopped(self, n, mode, **arguments):
    with mock.patch.object(convert, "_progress_bar", stopping_after(n)):
      with self.assertRaises(Stop):
        converted(mode, **arguments)

  @parameterized.parameters(0, 1, 40, 99)
  def test_import_is_resumed(self, n):
    how = {"hf": self.hf, "workdir": self.workdir}
    with mock.patch.object(hf_import, "_COMMIT", 3000):
      self.stopped(n, "import", **how)
    self.assertFalse((self.workdir / "config.json").exists())
    self.assertFalse((self.workdir / "hf" / "import.json").exists())
    err = self.convert("export", code=2, workdir=self.workdir, hf=self.out)
    self.assertIn("holds no run", err)
    read = []
    write = safetensors.write
    watched = lambda t, a: read.append(t) or write(t, a)
    with mock.patch.object(safetensors, "write", watched):
      self.convert("import", **how)
    n_tensors = len(hf_read.open_folder(self.hf).tensors)
    self.assertEqual(len(read) < n_tensors, n > 0, len(read))
    self.assertFalse((self.workdir / "hf" / ".import.jsonl").exists())
    self.convert("export", workdir=self.workdir, hf=self.out)
    self.assertEqual(released.raw(self.out), released.raw(self.hf))

  def test_other_import_into_an_interrupted_one(self):
    with mock.patch.object(hf_import, "_COMMIT", 3000):
      self.stopped(40, "import", hf=self.hf, workdir=self.workdir)
    other = released.with_mtp(self.folder / "other", seed=5)[0]
    err = self.convert("import", code=2, hf=other, workdir=self.workdir)
    self.assertIn("holds a part of another checkpoint", err)

  def test_cut_off_entry_of_the_journal(self):
    how = {"hf": self.hf, "workdir": self.workdir}
    with mock.patch.object(hf_import, "_COMMIT", 3000):
      self.stopped(40, "import", **how)
    with (self.workdir / "hf" / ".import.jsonl").open("a") as file:
      file.write('{"done": {"model.la')
    self.convert("import", **how)
    self.convert("export", workdir=self.workdir, hf=self.out)
    self.assertEqual(released.raw(self.out), released.raw(self.hf))

  def test_entries_after_a_cut_off_one_are_read(self):
    path = testing.folder(self) / "journal.jsonl"
    resumable.Journal(path, "source").begin(0)
    with path.open("a") as file:
      file.write('{"done": {"a')
    resumable.Journal(path, "source").add({"b": 1}, [])
    self.assertEqual(resumable.Journal(path, "source").done, {"b": 1})

  @parameterized.parameters("nothing", "[]", '{"done": 3}', "[" * 100_000)
  def test_corrupt_journal(self, line):
    folder = testing.folder(self)
    path = folder / "journal.jsonl"
    path.write_text(f"{line}\n")
    with self.assertRaisesRegex(ValueError, "corrupt: .*start again"):
      resumable.Journal(path, "source")

  def test_import_a_second_time(self):
    how = {"hf": self.hf, "workdir": self.workdir}
    self.convert("import", **how)
    err = self.convert("import", code=2, **how)
    self.assertIn("belongs to a run", err)
    # As if stopped between the parameters and the configuration.
    (self.workdir / "config.json").unlink()
    other = released.with_mtp(self.folder / "other", seed=5)[0]
    err = self.convert("import", code=2, hf=other, workdir=self.workdir)
    self.assertIn("holds another checkpoint already", err)
    self.convert("import", **how)
    self.convert("verify", workdir=self.workdir)

  @parameterized.parameters(0, 30, 100)
  def test_export_is_resumed(self, n):
    self.convert("import", hf=self.hf, workdir=self.workdir)
    how = {"workdir": self.workdir, "hf": self.out}
    self.enter_context(mock.patch.object(hf_write, "SHARD_BYTES", 100_000))
    self.stopped(n, "export", **how)
    self.assertFalse((self.out / "model.safetensors.index.json").exists())
    err = self.convert("verify", code=2, hf=self.out)
    self.assertIn("config.json", err)
    kept = {p: p.stat().st_mtime_ns for p in self.out.glob("*.safetensors")}
    self.assertEqual(bool(kept), n > 0)
    self.convert("export", **how)
    for path, at in kept.items():
      self.assertEqual(path.stat().st_mtime_ns, at)
    self.assertEqual(released.raw(self.out), released.raw(self.hf))
    self.assertEmpty(list(self.out.glob(".*")))

  def test_other_export_into_an_interrupted_one(self):
    self.convert("import", hf=self.hf, workdir=self.workdir)
    self.stopped(30, "export", workdir=self.workdir, hf=self.out)
    err = self.convert(
      "export", code=2, workdir=self.workdir, hf=self.out, dtype="bfloat16"
    )
    self.assertIn("holds a part of another checkpoint", err)

  def test_disk_without_space(self):
    usage = mock.Mock(free=1000)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
      err = self.convert("import", code=2, hf=self.hf, workdir=self.workdir)
      self.assertIn("disk full", err)
    shutil.rmtree(self.workdir)
    self.convert("import", hf=self.hf, workdir=self.workdir)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
      err = self.convert("export", code=2, workdir=self.workdir, hf=self.out)
      self.assertIn("disk full", err)

  def test_disk_full_while_writing(self):
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(os, "pwrite", side_effect=full):
      err = self.convert("import", code=2, hf=self.hf, workdir=self.workdir)
    self.assertIn("disk full", err)
    self.assertFalse((self.workdir / "config.json").exists())
    self.convert("import", hf=self.hf, workdir=self.workdir)
    with mock.patch.object(os, "fsync", side_effect=full):
      err = self.convert("export", code=2, workdir=self.workdir, hf=self.out)
    self.assertIn("disk full", err)
    self.assertEmpty(list(self.out.glob("*.safetensors")))
    self.convert("export", workdir=self.workdir, hf=self.out)
    self.assertEqual(released.raw(self.out), released.raw(self.hf))

  def test_shard_that_does_not_read_as_written(self):
    self.convert("import", hf=self.hf, workdir=self.workdir)
    with mock.patch.object(hf_write, "_sha256_on_disk", return_value="other"):
      err = self.convert("export", code=2, workdir=self.workdir, hf=self.out)
    self.assertIn("does not read as it was written", err)
    self.assertEmpty(list(self.out.glob("*.safetensors")))


class BenchTest(ConvertTest):
  @pytest.mark.slow
  def test_compares_with_a_plain_read(self):
    released.save(released.model(), self.hf)
    arguments = f"--hf={self.hf} --rounds=1 --scratch={self.out}".split()
    done = subprocess.run(
      [sys.executable, "-m", "scripts.bench.convert", *arguments],
      cwd=pathlib.Path(convert.__file__).parents[1],
      check=True,
      capture_output=True,
      text=True,
    )
    found, median = map(json.loads, done.stdout.splitlines())
    self.assertEqual(median["median"], found)
    for task in ("load", "import"):
      ratio = found[f"{task}_gb_per_s"] / found["read_gb_per_s"]
      self.assertAlmostEqual(found[f"{task}_ratio"], ratio)
      self.assertGreater(found[f"{task}_peak_rss_mib"], 50)
    self.assertFalse(self.out.exists())


class ImportedTest(ConvertTest):
  """Tests that damage of an imported checkpoint is detected and named."""

  def setUp(self):
    super().setUp()
    released.with_mtp(self.hf)
    released.in_fp8(self.hf, (28, 20))
    self.convert("import", hf=self.hf, workdir=self.workdir)
    self.imported = self.workdir / "hf"

  def damage(self, name):
    """Changes the last byte of a tensor."""
    tensor = hf_read.open_folder(self.imported).tensors[name]
    content = bytearray(tensor.file.read_bytes())
    content[tensor.offset + tensor.n_bytes - 1] ^= 1
    tensor.file.write_bytes(content)
    return f"{tensor.file}: {name}: corrupt: its CRC-32 is"

  def test_slices_are_those_of_the_source(self):
    source = hf_read.open_folder(self.hf)
    found = hf_import.open_import(self.workdir)
    self.assertEqual(found.model, source.model)
    rng = np.random.default_rng(0)
    for b in hf_mapping.model_blocks(found.model):
      inner = tuple(
        slice(*sorted(map(int, rng.choice(n + 1, 2, replace=False))))
        for n in (*b.inputs, *b.outputs)
      )
      np.testing.assert_array_equal(
        found.read_slice(b, inner), source.read_slice(b, inner), b.names[0]
      )

  @parameterized.parameters(
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.self_attn.o_proj.weight_scale_inv",
    "model.layers.1.mlp.experts.3.up_proj.weight",
    "model.embed_tokens.weight",
  )
  def test_damage_is_not_exported_or_loaded(self, name):
    message = self.damage(name)
    err = self.convert("export", code=2, workdir=self.workdir, hf=self.out)
    self.assertIn(message, err)
    self.assertEmpty(list(self.out.glob("*.safetensors")))
    run = open_run.run_from_config(open_run.read_config(self.workdir))
    with self.assertRaisesRegex(ValueError, message):
      open_run.load_newest_params(self.workdir, run, device_mesh.make_mesh({}))

  def test_verify(self):
    out = self.convert("verify", workdir=self.workdir)
    self.assertIn("all as imported", out)
    err = self.convert("verify", code=2, workdir=self.hf)
    self.assertIn("holds no imported checkpoint", err)

  def test_verify_names_each_corrupt_tensor(self):
    names = (
      "model.layers.1.mlp.experts.7.down_proj.weight",
      "model.layers.2.mlp.gate.e_score_correction_bias",
    )
    messages = [self.damage(name) for name in names]
    err = self.convert("verify", code=2, workdir=self.workdir)
    for message in messages:
      self.assertIn(message, err)
    self.assertLen(err.splitlines(), 2 + err.count("verify"))

  def test_on_a_mesh(self):
    run = open_run.run_from_config(open_run.read_config(self.workdir))
    one = open_run.load_newest_params(
      self.workdir, run, device_mesh.make_mesh({})
    )
    run = config.override(run, "parallel.layout=zero1")
    mesh = device_mesh.make_mesh({"expert": 2, "data": 2, "model": 2})
    many = open_run.load_newest_params(self.workdir, run, mesh)
    like = train.abstract_state(run, mesh)
    places = jax.tree.map(lambda a: a.sharding, many[0])
    self.assertEqual(places, jax.tree.map(lambda a: a.sharding, like.params))
    testing.assert_same(*map(jax.device_get, (one, many)))

  @parameterized.parameters(
    ("import.json", b"{", "is not JSON"),
    ("import.json", b"[]", "must hold an object"),
    ("import.json", b"{}", "must have a CRC-32 of each tensor"),
    ("import.json", b'{"crc32": {"x": 1}}', "must have a CRC-32"),
    ("import.json", None, "incomplete; run the import again"),
    ("config.json", b"{}", "model_type"),
    ("model.safetensors", None, "has neither"),
    ("model.safetensors", b"12345678", "truncated"),
  )
  def test_is_refused(self, name, content, message):
    if content is None:
      (self.imported / name).unlink()
    else:
      (self.imported / name).write_bytes(content)
    err = self.convert("export", code=2, workdir=self.workdir, hf=self.out)
    self.assertIn(message, err)

  def test_an_import_of_an_older_version_is_refused(self):
    self.imported.rename(self.workdir / "weights")
    command = "python -m scripts.convert --mode=import --hf=DIR"
    for mode in ("export", "verify"):
      arguments = {"workdir": self.workdir}
      arguments |= {"hf": self.out} if mode == "export" else {}
      self.assertIn(command, self.convert(mode, code=2, **arguments))
    err = self.convert("import", code=2, hf=self.hf, workdir=self.workdir)
    self.assertIn(command, err)
    run = open_run.run_from_config(open_run.read_config(self.workdir))
    with self.assertRaisesRegex(errors.InputError, command):
      open_run.load_newest_params(self.workdir, run, device_mesh.make_mesh({}))


class LinkTest(ConvertTest):
  @parameterized.parameters("hard", "symbolic")
  def test_links_have_the_parameters_and_checksums_of_copies(self, link):
    released.with_mtp(self.hf)
    linked = self.folder / "linked"
    self.convert("import", hf=self.hf, workdir=linked, link=link)
    self.convert("import", hf=self.hf, workdir=self.workdir)
    for path in self.hf.glob("*.safetensors"):
      self.assertTrue((linked / "hf" / path.name).samefile(path))
      self.assertFalse((self.workdir / "hf" / path.name).samefile(path))
    copy, own = map(hf_import.open_import, (self.workdir, linked))
    self.assertEqual(own.checksums, copy.checksums)
    self.convert("verify", workdir=linked)
    self.convert("export", workdir=linked, hf=self.out)
    self.assertEqual(released.raw(self.out), released.raw(self.hf))

  def test_links_need_no_room_and_survive_an_interruption(self):
    released.with_mtp(self.hf)
    arguments = {"hf": self.hf, "workdir": self.workdir, "link": "symbolic"}
    self.enter_context(mock.patch.object(resumable, "IN_FLIGHT", 1))
    usage = mock.Mock(free=1000)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
      with mock.patch.object(convert, "_progress_bar", stopping_after(5)):
        with self.assertRaises(Stop):
          converted("import", **arguments)
      self.convert("import", **arguments)
    self.convert("verify", workdir=self.workdir)


if __name__ == "__main__":
  absltest.main()

"""Tests that llama.cpp writes the same text with the same probabilities."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import gguf as library
import jax
import numpy as np
import testing
import tokenizers
from absl.testing import absltest, parameterized

from dsv3_jax import config, param_spec
from dsv3_jax.data import chat, tokenizer
from dsv3_jax.interop import gguf, hf_mapping, hf_write, tokenizer_files
from dsv3_jax.model import transformer

_LLAMA = pathlib.Path(__file__).with_name("llama.py")
_TEXTS = ["It was a bright cold day in April.", "你好，世界。 1984 + 1\n"]
_N = 12
_ONE_GROUP = "router.n_groups=1", "router.top_groups=1"
_YARN = (
  "attention.yarn.factor=8",
  "attention.yarn.original_len=16",
  "attention.yarn.mscale=0.707",
)


def _arrays(model, tok=None):
  """Returns random parameters, which prefer ASCII tokens of a tokenizer.

  llama.cpp tells nothing of a token that is part of a character.
  """
  params = testing.draw(transformer.specs(model))
  if tok:
    texts = [tok.decode([i]) for i in range(model.vocab_size)]
    plain = np.array([bool(text) and text.isascii() for text in texts])
    params["head"] = params["head"] * plain[None].astype(np.float32)
  arrays = {
    path: np.asarray(a)
    for path, a in param_spec.flatten_with_paths(params).items()
  }
  rng = np.random.default_rng(1)
  shape = model.n_routers, model.router.n_experts
  bias = rng.normal(size=shape).astype(np.float32)
  if model.router.score == "softmax":
    bias[:] = 0
  else:
    arrays[hf_mapping.BIAS] = bias
  return params, bias, hf_write.ParamArrays(model, arrays)


def _llama(path, prompt, n=_N):
  done = subprocess.run(
    [sys.executable, str(_LLAMA), str(path), prompt, str(n)],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {"XLA_FLAGS": ""},
  )
  return json.loads(done.stdout.splitlines()[-1])


class GgufTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = tokenizer.train(_TEXTS * 20, 300)

  def setUp(self):
    super().setUp()
    self.path = testing.folder(self) / "model.gguf"

  def write(self, form, max_len=128):
    gguf.write(form, self.tok, self.path, max_len, lambda n: None)

  @parameterized.named_parameters(
    ("v3", (), "float32", 1e-4),
    ("v3_bfloat16", (), "bfloat16", None),
    ("yarn", _YARN, "float32", 1e-4),
    ("one_group", _ONE_GROUP, "float32", 1e-4),
    (
      "softmax",
      (*_ONE_GROUP, "router.score=softmax", "router.renormalize=false",
       "router.scale=1", "mtp.depth=0"),
      "float32",
      1e-4,
    ),
    (  # what llama.cpp would misread, or refuse, in its plain form
      "other_forms",
      (*_YARN[:2], "attention.yarn.mscale=0", "router.n_groups=4",
       "router.top_groups=4", "n_layers=2"),
      "float32",
      1e-4,
    ),
    (
      "queries_as_they_are",
      ("attention.q_rank=0", "n_layers=27", "vocab_size=300"),
      "float32",
      1e-4,
    ),
  )  # fmt: skip
  def test_writes_the_same_text(self, assignments, dtype, close):
    model = testing.tiny("vocab_size=304", *assignments)
    params, bias, source = _arrays(model, self.tok)
    self.write(hf_write.ExportFormat(source, dtype))
    if dtype == "bfloat16":
      halved = lambda a: a.astype(jax.numpy.bfloat16).astype(np.float32)
      norms = lambda path: param_spec.name(path).endswith(("norm", "router"))
      params = jax.tree.map_with_path(
        lambda path, a: a if norms(path) else halved(a), params
      )
    prompt = [0, 5, 270, 19, 33]
    found = _llama(self.path, json.dumps(prompt))
    ids = [token for token, _ in found["tokens"]]
    self.assertLen(ids, _N)
    main = config.override(model, "mtp.depth=0")
    forward = jax.jit(
      lambda p, b, t: transformer.logits(
        p, transformer.forward(p, b, t, main).hidden
      )
    )
    whole = np.array([[*prompt, *ids]], np.int32)
    logits = forward(params, bias[: main.n_routers], whole)[0]
    logits = np.asarray(jax.nn.log_softmax(logits[len(prompt) - 1 : -1]))
    np.testing.assert_array_equal(logits.argmax(-1), ids)
    got = [probability for _, probability in found["tokens"]]
    # Rounding of activations in llama.cpp's BF16 products is not ours.
    np.testing.assert_allclose(got, logits.max(-1), rtol=0, atol=close or 0.05)
    self.assertEqual(found["text"], self.tok.decode(ids))

  def test_reads_text_as_we_do(self):
    _, _, source = _arrays(testing.tiny("vocab_size=304"), self.tok)
    self.write(hf_write.ExportFormat(source, "float32"))
    for text in (*_TEXTS, "  a\n\nb 12345 x", f"a{tokenizer.USER}b"):
      parts = text.split(tokenizer.USER)
      # Of a special token's name llama.cpp makes the token.
      first, *rest = (
        self.tok.encode(part, add_special_tokens=False).ids for part in parts
      )
      user = self.tok.token_to_id(tokenizer.USER)
      ids = [tokenizer.BOS_ID, *first, *(i for r in rest for i in (user, *r))]
      want = _llama(self.path, json.dumps(ids), 3)
      self.assertEqual(_llama(self.path, text, 3), want, text)

  @parameterized.parameters(
    ("expects compressed queries", "attention.q_rank=0"),
    ("expects no compressed queries", "n_layers=26"),
    ("at most 512", "n_layers=513", "d_model=2"),
    ("at most 1024", "router.n_experts=1032", "d_model=2"),
    ("shared experts", "moe.n_shared=0"),
    ("mixture layers", "n_dense_layers=4"),
    ("one number for both", "norm_eps=1e-5"),
    ("by their best 2", "router.score=softmax", "mtp.depth=0"),
    ("has 32 and 1, whatever", *_YARN, "attention.yarn.beta_fast=16"),
    ("has 32 and 1, whatever", *_YARN, "attention.yarn.beta_slow=2"),
    ("has groups of 1", "router.n_groups=16", "router.top_groups=4"),
  )
  def test_models_that_llama_cpp_would_misread_are_refused(
    self, message, *assignments
  ):
    _, _, source = _arrays(testing.tiny("vocab_size=304", *assignments))
    with self.assertRaisesRegex(ValueError, message):
      self.write(hf_write.ExportFormat(source, "float32"))
    self.assertFalse(self.path.exists())

  def test_a_bias_in_bfloat16_is_written_in_float32(self):
    _, _, source = _arrays(testing.tiny("vocab_size=304"))
    bias = source.params[hf_mapping.BIAS].astype(jax.numpy.bfloat16)
    source.params[hf_mapping.BIAS] = bias
    self.write(hf_write.ExportFormat(source, "stored"))
    found = {t.name: t.data for t in library.GGUFReader(self.path).tensors}
    for i in range(3):
      got = found[f"blk.{i + 1}.exp_probs_b.bias"]
      self.assertEqual(got.dtype, np.float32)
      np.testing.assert_array_equal(got, bias[i].astype(np.float32))

  def test_a_score_of_ones_own_is_refused(self):
    config.ROUTER_SCORES.append("third")
    self.addCleanup(config.ROUTER_SCORES.remove, "third")
    model = testing.tiny("vocab_size=304", "router.score=third")
    problems = list(gguf.validate(model))
    self.assertEqual(
      problems, ["router.score=third: llama.cpp has only sigmoid and softmax"]
    )

  def test_says_of_generation_what_the_folder_says(self):
    _, _, source = _arrays(testing.tiny("vocab_size=304"))
    export_format = hf_write.ExportFormat(source, "float32")

    def write(**changes):
      defaults = dataclasses.replace(tokenizer_files.DEFAULTS, **changes)
      path = self.path.with_name(f"{len(str(changes))}.gguf")
      gguf.write(export_format, self.tok, path, 9, lambda n: None, defaults)
      return {
        name: field.contents()
        for name, field in library.GGUFReader(path).fields.items()
      }

    found = write(
      template=chat.ChatTemplate("own"),
      stop_token_ids=(1, 7),
      settings={"temperature": 0.5, "top_k": 3, "max_tokens": 9},
    )
    self.assertEqual(found["tokenizer.chat_template"], "own")
    self.assertEqual(found["tokenizer.ggml.eos_token_id"], 1)
    self.assertEqual(found["tokenizer.ggml.eot_token_id"], 7)
    self.assertEqual(found["general.sampling.temp"], 0.5)
    self.assertEqual(found["general.sampling.top_k"], 3)
    found = write()
    self.assertEqual(found["tokenizer.chat_template"], chat.TEMPLATE)
    self.assertNotIn("general.sampling.temp", found)
    self.assertNotIn("tokenizer.chat_template", write(template=None))
    with self.assertRaisesRegex(ValueError, "at most 3 tokens that end"):
      write(stop_token_ids=(1, 2, 3, 4))

  @parameterized.parameters(
    ({"pre_tokenizer": {"type": "ByteLevel"}}, "is not DeepSeek-V3's"),
    ({"normalizer": {"type": "NFC"}}, "GGUF has none"),
    ({"model": {"ignore_merges": True}}, "whose merges make all tokens"),
    ({"added_tokens": {"lstrip": True}}, "takes spaces beside it"),
  )
  def test_tokenizers_that_llama_cpp_has_not_are_refused(
    self, changes, message
  ):
    facts = json.loads(self.tok.to_str())
    byte_level = {"add_prefix_space": False, "trim_offsets": True}
    byte_level |= {"use_regex": True}
    for name, change in changes.items():
      if name == "added_tokens":
        facts[name][-1] |= change
      elif name == "pre_tokenizer":
        facts[name] = change | byte_level
      else:
        facts[name] = (facts[name] or {}) | change
    tok = tokenizers.Tokenizer.from_str(json.dumps(facts))
    self.assertEmpty(list(gguf.validate_tokenizer(self.tok)))
    (problem,) = gguf.validate_tokenizer(tok)
    self.assertIn(message, problem)

  def test_fp8(self):
    _, _, source = _arrays(testing.tiny("vocab_size=304"))
    with self.assertRaisesRegex(ValueError, "no FP8"):
      self.write(hf_write.ExportFormat(source, "fp8"))

  def test_existing_file_is_refused(self):
    self.path.write_text("")
    _, _, source = _arrays(testing.tiny("vocab_size=304"))
    with self.assertRaisesRegex(ValueError, "already exists"):
      self.write(hf_write.ExportFormat(source, "float32"))

  def test_too_large_tokenizer_is_refused(self):
    _, _, source = _arrays(testing.tiny("vocab_size=256"))
    with self.assertRaisesRegex(ValueError, "vocab_size=256"):
      self.write(hf_write.ExportFormat(source, "float32"))

  def test_interrupted_write_leaves_no_file(self):
    _, _, source = _arrays(testing.tiny("vocab_size=304"))

    def stop(n_bytes):
      raise KeyboardInterrupt

    with self.assertRaises(KeyboardInterrupt):
      gguf.write(
        hf_write.ExportFormat(source, "float32"), self.tok, self.path, 9, stop
      )
    self.assertFalse(self.path.exists())


if __name__ == "__main__":
  absltest.main()

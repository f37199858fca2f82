"""Tests that released checkpoints are read as `transformers` reads them."""

import dataclasses
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
import released
import testing
import torch
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.evals import hidden, logits
from dsv3_jax.interop import hf_mapping, hf_read, load_sharded, safetensors
from dsv3_jax.model import router, transformer
from dsv3_jax.parallel import device_mesh, layouts

CLOSE = 2e-5  # of logits, absolute; rounding in float32 stays far below


def loaded(found, sizes=None, layout="replicated"):
  """Returns the model of a folder on a mesh."""
  run = dataclasses.replace(testing.run(), model=found.model)
  run = config.override(run, f"parallel.layout={layout}")
  mesh = device_mesh.make_mesh(sizes or {})
  where = layouts.make_layout(run, mesh.shape, staged=False)
  return hidden.EvalModel(
    *load_sharded.load(found, where.specs, mesh, np.float32), run, mesh
  )


def our_logits(found, tokens, **how):
  parts = logits.of_rows(loaded(found, **how), tokens)
  found = zip(*(made for _, made in parts), strict=True)
  return [np.concatenate(a) for a in found]


class ParityTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("plain", "V3", {}, 0),
    ("other_seed", "V3", {}, 1),
    ("queries_as_they_are", "V3", {"q_lora_rank": None}, 2),
    ("yarn", "V3", {"rope_parameters": released.YARN}, 3),
    (
      "yarn_mscale",
      "V3",
      {
        "rope_parameters": released.YARN
        | {"mscale": 0.707, "mscale_all_dim": 0.707, "factor": 8.0},
        "q_lora_rank": None,
      },
      4,
    ),
    ("one_group", "V3", {"n_group": 1, "topk_group": 1}, 5),
    ("eight_groups", "V3", {"n_routed_experts": 16, "n_group": 8}, 6),
    ("gates_as_they_are", "V3", {"norm_topk_prob": False}, 7),
    ("two_shared", "V3", {"n_shared_experts": 2}, 8),
    ("no_dense_layer", "V3", {"first_k_dense_replace": 0}, 9),
    ("another_base", "V3", {"rope_theta": 50_000.0, "rms_norm_eps": 1e-5}, 10),
    ("v2", "V2", {}, 11),
    (
      "v2_lite",
      "V2",
      {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
      },
      12,
    ),
  )
  def test_logits_at_every_position(self, kind, facts, seed):
    model = released.model(facts, kind=kind, seed=seed)
    folder = released.save(model, testing.folder(self))
    tokens = released.random_tokens(2, 50, seed=seed)
    (got,) = our_logits(hf_read.open_folder(folder), tokens)
    want = released.logits(model, tokens)
    self.assertGreater(np.abs(want).max(), 0.5)
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE)

  def test_without_shared_experts(self):
    with warnings.catch_warnings(action="ignore"):
      model = released.model({"n_shared_experts": 0})
    found = hf_read.open_folder(released.save(model, testing.folder(self)))
    self.assertIn("passed over", "".join(found.notes))
    tokens = released.random_tokens(2, 9)
    (ours,) = our_logits(found, tokens)
    np.testing.assert_allclose(
      ours, released.logits(model, tokens), rtol=0, atol=CLOSE
    )

  def test_float16(self):
    model = released.model().half()
    found = hf_read.open_folder(released.save(model, testing.folder(self)))
    self.assertRegex("".join(found.notes), "biases are float16")
    tokens = released.random_tokens(2, 9)
    (ours,) = our_logits(found, tokens)
    want = released.logits(model.float(), tokens)
    np.testing.assert_allclose(ours, want, rtol=0, atol=CLOSE)

  def test_experts_chosen(self):
    model = released.model({"n_routed_experts": 16}, seed=3)
    folder = released.save(model, testing.folder(self))
    theirs, ours = [], []
    for layer in model.model.layers[1:]:
      layer.mlp.gate.register_forward_hook(
        lambda module, inputs, outputs: theirs.append(outputs[2].numpy())
      )
    tokens = released.random_tokens(2, 30)
    released.logits(model, tokens)
    found = hf_read.open_folder(folder)
    route = router.route

    def watched(*args):
      made = route(*args)
      ours.append(np.asarray(made.experts).reshape(-1, 2))
      return made

    params = loaded(found)
    self.enter_context(absltest.mock.patch.object(router, "route", watched))
    parts = device_mesh.on_first_device(
      (params.params, params.bias), params.mesh
    )
    unrolled = transformer.ForwardContext(scan=False)
    transformer.forward(*parts, tokens, found.model, unrolled)
    self.assertLen(ours, 2)
    for got, want in zip(ours, theirs, strict=True):
      np.testing.assert_array_equal(np.sort(got), np.sort(want))

  @parameterized.parameters(0, 1)
  def test_mtp_layer(self, seed):
    folder, oracle = released.with_mtp(testing.folder(self), seed)
    tokens = released.random_tokens(2, 20, seed=seed)
    got = our_logits(hf_read.open_folder(folder), tokens)
    want = oracle.logits(tokens)
    self.assertEqual(got[1].shape, (2, 19, released.V3["vocab_size"]))
    for ours, theirs in zip(got, want, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)

  def test_on_a_mesh(self):
    self.check_mesh({"model": 2, "expert": 2}, "fsdp")

  @parameterized.parameters(
    ({"expert": 2, "data": 2}, "replicated"),
    ({"node": 2, "expert": 2}, "zero1"),
    ({"data": 3}, "fsdp"),
  )
  @pytest.mark.slow
  def test_on_other_meshes(self, sizes, layout):
    self.check_mesh(sizes, layout)

  def check_mesh(self, sizes, layout):
    folder, _ = released.with_mtp(testing.folder(self))
    tokens = released.random_tokens(3, 12)
    found = hf_read.open_folder(folder)
    want = our_logits(found, tokens)
    got = our_logits(found, tokens, sizes=sizes, layout=layout)
    for ours, one in zip(got, want, strict=True):
      np.testing.assert_allclose(ours, one, rtol=0, atol=CLOSE)

  def test_without_mtp_tensors_there_is_no_mtp(self):
    # As `transformers` writes models: the default of its configuration.
    model = released.model({"num_nextn_predict_layers": 1})
    found = hf_read.open_folder(released.save(model, testing.folder(self)))
    self.assertEqual(found.model.mtp.depth, 0)
    self.assertIn("no tensor begins with model.layers.3.", found.notes[0])

  def test_several_shards(self):
    model = released.model()
    folder = released.save(model, testing.folder(self), max_shard_size="300KB")
    self.assertGreater(len(list(folder.glob("*.safetensors"))), 2)
    tokens = released.random_tokens(1, 9)
    (got,) = our_logits(hf_read.open_folder(folder), tokens)
    np.testing.assert_allclose(
      got, released.logits(model, tokens), rtol=0, atol=CLOSE
    )


class Fp8Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = released.save(released.model(), testing.folder(self))
    # 40 and 96 rows: the last tile of some is smaller.
    self.folder = released.in_fp8(folder, (16, 28))
    self.found = hf_read.open_folder(self.folder)

  def test_is_dequantized(self):
    tensors = released.tensors(self.folder)
    by_name = {b.names[0]: b for b in hf_mapping.model_blocks(self.found.model)}
    for name, b in by_name.items():
      inner = (slice(None),) * len((*b.inputs, *b.outputs))
      got = self.found.read_slice(b, inner).astype(np.float32)
      want = []
      for one in b.names:
        values = tensors[one].double()
        if f"{one}_scale_inv" in tensors:
          scales = tensors[f"{one}_scale_inv"].double()
          scales = scales.repeat_interleave(16, 0)[: values.shape[0]]
          scales = scales.repeat_interleave(28, 1)[:, : values.shape[1]]
          values = (values * scales).float().double()
        want.append(values.numpy())
      want = np.stack(want, 0)
      if b.transposed:
        want = want.transpose(2, 0, 1)
      np.testing.assert_array_equal(got, want.reshape(got.shape), name)

  def test_slices_are_slices_of_the_block(self):
    rng = np.random.default_rng(0)
    for b in hf_mapping.model_blocks(self.found.model):
      dims = *b.inputs, *b.outputs
      whole = self.found.read_slice(b, (slice(None),) * len(dims))
      inner = tuple(
        slice(*sorted(map(int, rng.choice(n + 1, 2, replace=False))))
        for n in dims
      )
      np.testing.assert_array_equal(
        self.found.read_slice(b, inner), whole[inner], b.names[0]
      )

  def test_a_bf16_model_with_the_same_numbers_has_the_same_logits(self):
    # Scales that are powers of two: nothing is rounded.
    def powers(found):
      for name in [n for n in found if n.endswith("_scale_inv")]:
        found[name] = torch.full_like(found[name], 2.0**-10)

    tokens = released.random_tokens(1, 12)
    found = hf_read.open_folder(released.rewrite(self.folder, powers))
    (got,) = our_logits(found, tokens)

    def multiplied(found):
      for name in [n for n in found if n.endswith("_scale_inv")]:
        scales = found.pop(name)
        weight = name.removesuffix("_scale_inv")
        values = found[weight].float() * float(scales[0, 0])
        found[weight] = values.to(torch.bfloat16)

    facts = {"quantization_config": None}
    folder = released.rewrite(self.folder, multiplied, facts)
    (want,) = our_logits(hf_read.open_folder(folder), tokens)
    np.testing.assert_array_equal(got, want)


class LoadTest(absltest.TestCase):
  def test_in_chunks(self):
    folder, _ = released.with_mtp(testing.folder(self))
    found = hf_read.open_folder(released.in_fp8(folder, (28, 20)))
    mesh = {"expert": 2, "data": 2, "model": 2}
    want = loaded(found, mesh, "zero1")
    # One row at a time, and some.
    for piece in (1, 700):
      self.enter_context(
        absltest.mock.patch.object(load_sharded, "CHUNK", piece)
      )
      got = loaded(found, mesh, "zero1")
      testing.assert_same(
        *(jax.device_get((m.params, m.bias)) for m in (got, want))
      )

  def test_a_device_reads_its_own_experts_only(self):
    folder = released.save(released.model(), testing.folder(self))
    found, read = hf_read.open_folder(folder), []
    whole = safetensors.read

    def watched(tensor, rows=slice(None), columns=slice(None), out=None):
      made = whole(tensor, rows, columns, out)
      names = [n for n, t in found.tensors.items() if t is tensor]
      read.append((names[0], made.nbytes))
      return made

    self.enter_context(absltest.mock.patch.object(safetensors, "read", watched))
    loaded(found, {"expert": 4}, "zero1")
    routed = [(n, size) for n, size in read if ".experts." in n]
    sizes = {n: t.n_bytes for n, t in found.tensors.items()}
    self.assertEqual(
      sum(size for _, size in routed), sum(sizes[n] for n, _ in routed)
    )
    self.assertLen(routed, 2 * 8 * 3)
    head = sum(size for n, size in read if n == "lm_head.weight")
    self.assertEqual(head, sizes["lm_head.weight"])


@pytest.mark.fault(
  "F44",
  "an index that points elsewhere; links; shards missing, extra, twice",
  "refused",
)
class RefusedTest(parameterized.TestCase):
  """Tests that all problems of a folder are listed."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.good = testing.folder(cls)
    released.with_mtp(cls.good)

  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self) / "hf"
    shutil.copytree(self.good, self.folder)

  def refused(self, *messages, **how):
    with self.assertRaises(ValueError) as caught:
      found = hf_read.open_folder(self.folder, **how)
      if problems := list(hf_read.validate_values(found)):
        raise ValueError("\n".join(problems))
    for message in messages:
      self.assertIn(message, str(caught.exception))

  def change_config(self, **changes):
    path = self.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  def test_valid_checkpoint_is_accepted(self):
    found = hf_read.open_folder(self.folder)
    self.assertEmpty(found.notes)
    self.assertEmpty(list(hf_read.validate_values(found)))

  @pytest.mark.fault(
    "F45",
    "tensors missing, extra, misshapen; FP8 scales absent, NaN, negative",
    "all listed; never initialized at random",
  )
  def test_missing_extra_and_misshaped_tensors_together(self):
    def change(found):
      del found["model.layers.1.mlp.experts.3.up_proj.weight"]
      del found["model.layers.3.shared_head.head.weight"]
      found["model.norm.weight"] = torch.zeros(63)
      found["../../evil"] = torch.zeros(1)
      found["model.layers.9.self_attn.o_proj.weight"] = torch.zeros(2, 2)

    released.rewrite(self.folder, change)
    self.refused(
      "model.layers.1.mlp.experts.3.up_proj.weight: missing",
      "model.layers.3.shared_head.head.weight: missing",
      "model.norm.weight: shape (63,), must be (64,)",
      "../../evil: not part of this model",
      "model.layers.9.self_attn.o_proj.weight: not part of this model",
    )

  def lines(self):
    with self.assertRaises(ValueError) as caught:
      hf_read.open_folder(self.folder)
    return str(caught.exception).splitlines()

  @parameterized.parameters(0, None)
  def test_mtp_layers_that_config_json_does_not_announce(self, depth):
    self.change_config(num_nextn_predict_layers=depth)
    (line,) = self.lines()
    self.assertRegex(
      line,
      "num_nextn_predict_layers=0, but 44 tensors are of MTP layers,"
      " .*layers.3. on; set it to 1 in config.json",
    )
    self.change_config(num_nextn_predict_layers=1)
    self.assertEqual(hf_read.open_folder(self.folder).model.mtp.depth, 1)

  def test_problems_of_one_kind_are_one_line(self):
    def change(found):
      for layer in (1, 2):
        for expert in range(8):
          del found[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
          found[f"model.layers.{layer}.mlp.extra.{expert}"] = torch.zeros(1)

    released.rewrite(self.folder, change)
    missing, extra = self.lines()
    self.assertRegex(missing, r"up_proj.weight: missing \(and 15 more of this")
    self.assertRegex(extra, r"not part of this model \(and 15 more of this")

  def test_what_holds_nothing_is_named_and_passed_over(self):
    def change(found):
      for layer in range(4):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        found[name] = torch.ones(4)
      found["model.rotary_emb.inv_freq"] = torch.ones(4)
      found["model.layers.0.mlp.more.weight"] = torch.ones(0, 64)

    released.rewrite(self.folder, change)
    notes = "\n".join(hf_read.open_folder(self.folder).notes)
    self.assertRegex(notes, r"layers.0.*inv_freq: holds .* \(and 3 more")
    self.assertRegex(notes, r"model.rotary_emb.inv_freq: holds nothing")
    self.assertRegex(notes, r"mlp.more.weight: holds nothing")

  @parameterized.parameters(torch.float16, torch.int16)
  @pytest.mark.fault("F43")
  def test_relabelled_dtype(self, dtype):
    def change(found):
      name = "model.layers.0.self_attn.o_proj.weight"
      found[name] = found[name].to(torch.bfloat16).view(dtype)

    released.rewrite(self.folder, change)
    self.refused("o_proj.weight: dtype", "must be float32 or bfloat16")

  def test_layers_in_different_types(self):
    def change(found):
      name = "model.layers.2.self_attn.o_proj.weight"
      found[name] = found[name].to(torch.bfloat16)

    released.rewrite(self.folder, change)
    self.refused("layers.2.self_attn.o_proj.weight: dtype bfloat16, but")

  def test_a_copy_that_differs(self):
    def change(found):
      name = "model.layers.3.embed_tokens.weight"
      found[name] = found[name].clone()
      found[name][-1, -1] += 1

    released.rewrite(self.folder, change)
    self.refused("embed_tokens.weight: differs from model.embed_tokens.weight")

  @parameterized.named_parameters(
    ("absent", lambda f, n: f.pop(n), "missing, model.layers.0"),
    ("mis_shaped", lambda f, n: f.update({n: f[n][:, :1]}), "shape (4, 1)"),
    ("wide", lambda f, n: f.update({n: f[n].double()}), "dtype float64"),
    ("nan", lambda f, n: f[n][0].fill_(torch.nan), "not all finite"),
    ("inf", lambda f, n: f[n][0].fill_(torch.inf), "not all finite"),
    ("zero", lambda f, n: f[n][1].fill_(0), "not all above 0"),
    ("negative", lambda f, n: f[n][1].fill_(-1), "not all above 0"),
  )
  @pytest.mark.fault("F45")
  def test_scales(self, change, message):
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"

    def changed(found):
      change(found, name)

    released.rewrite(released.in_fp8(self.folder), changed)
    self.refused(name, message)

  def test_scales_are_read_whatever_their_format_is_called(self):
    released.in_fp8(self.folder)  # as in V3.1, whose o_proj has other scales
    path = self.folder / "config.json"
    how = json.loads(path.read_text())["quantization_config"]
    self.change_config(
      quantization_config=how | {"scale_fmt": "ue8m0", "other": 1}
    )
    found = hf_read.open_folder(self.folder)
    self.assertEmpty(list(hf_read.validate_values(found)))
    self.assertRegex("\n".join(found.notes), "other=1.*\n.*'ue8m0' .* as they")

  @parameterized.parameters(
    ("layers.0.self_attn.o_proj.weight_scale_inv", "not all finite"),
    ("layers.3.embed_tokens.weight", "differs from"),
  )
  def test_who_loads_has_the_same_opinion(self, name, message):
    def change(found):
      found[f"model.{name}"] = found[f"model.{name}"].clone().fill_(torch.nan)

    released.rewrite(released.in_fp8(self.folder), change)
    self.refused(message)
    found, mesh = hf_read.open_folder(self.folder), device_mesh.make_mesh({})
    specs = layouts.make_layout(found.make_run(), mesh.shape).specs
    with self.assertRaisesRegex(ValueError, f"{name}: {message}"):
      load_sharded.load(found, specs, mesh, np.float32)

  def test_fp8_without_quantization_config(self):
    released.in_fp8(self.folder)
    self.change_config(quantization_config=None)
    self.refused("dtype float8_e4m3fn, must be float32 or bfloat16")

  @parameterized.parameters(
    ({"quant_method": "awq"}, "quant_method='awq'"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2'"),
    ({"quant_method": "fp8"}, "weight_block_size=None"),
    ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "above 0"),
    ([], "must be an object"),
  )
  def test_other_quantization(self, how, message):
    self.change_config(quantization_config=how)
    self.refused("quantization_config", message)

  @pytest.mark.fault("F46")
  def test_remote_code(self):
    marker = self.folder / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    (self.folder / "modeling_evil.py").write_text(code)
    self.change_config(auto_map={"AutoConfig": "modeling_evil.Config"})
    self.refused("auto_map", "never run", "--ignore_auto_map")
    hf_read.open_folder(self.folder, ignore_auto_map=True)
    self.assertFalse(marker.exists())

  @parameterized.parameters("pytorch_model.bin", "model.pt", "x.pkl")
  @pytest.mark.fault(
    "F46", "only pickles; a config with remote code", "refused; never imported"
  )
  def test_only_pickles(self, name):
    (self.folder / "model.safetensors").rename(self.folder / name)
    self.refused(f"holds only {name}", "safe_serialization=True")

  def test_empty_folder(self):
    (self.folder / "model.safetensors").unlink()
    self.refused("has neither model.safetensors.index.json nor")

  def test_no_folder(self):
    self.folder = self.folder / "none"
    self.refused("no such folder")

  @parameterized.parameters("", "{", "[]", "[" * 100_000, "\xff")
  def test_bad_config(self, text):
    path = self.folder / "config.json"
    path.write_bytes(text.encode("latin-1"))
    self.refused("config.json: ")

  def index(self, **weight_map):
    names = released.tensors(self.folder)
    weight_map = dict.fromkeys(names, "model.safetensors") | weight_map
    path = self.folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))

  @parameterized.parameters(
    "../x.safetensors", "/etc/x.safetensors", "a/b.safetensors",
    "model.bin", "x\\y.safetensors", 3, None,
  )  # fmt: skip
  def test_index_that_points_elsewhere(self, file):
    self.index(**{"model.norm.weight": file})
    self.refused("model.norm.weight: ", "must be a file of this folder")

  def test_missing_shard(self):
    self.index(**{"model.norm.weight": "other.safetensors"})
    self.refused(
      "other.safetensors: cannot be read",
      "model.norm.weight: the index has it in other.safetensors",
    )

  def test_tensor_that_is_not_where_the_index_has_it(self):
    self.index(**{"model.none.weight": "model.safetensors"})
    self.refused("model.none.weight: missing, the index has it there")

  def test_tensor_in_two_shards(self):
    self.index(**{"model.norm.weight": "b.safetensors"})
    shutil.copy(
      self.folder / "model.safetensors", self.folder / "b.safetensors"
    )
    self.refused("model.norm.weight: the index has it in b.safetensors")

  def test_shard_that_the_index_does_not_know(self):
    self.index()
    shutil.copy(
      self.folder / "model.safetensors", self.folder / "b.safetensors"
    )
    self.refused("b.safetensors: no tensor of the index is in it")

  def test_index_without_a_map(self):
    path = self.folder / "model.safetensors.index.json"
    path.write_text("{}")
    self.refused("has no weight_map")

  def test_links(self):
    path = self.folder / "model.safetensors"
    path.rename(self.folder.parent / "blob")
    path.symlink_to("../blob")
    self.refused("is a link to ../blob", "--follow_links")
    hf_read.open_folder(self.folder, follow_links=True)

  def test_truncated_shard(self):
    path = self.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    self.refused("model.safetensors: truncated")


@pytest.mark.fault("F43")
class MutatedTest(parameterized.TestCase):
  """Tests that a file with any content is read or refused by InputError."""

  @parameterized.parameters("config.json", "model.safetensors", "index")
  def test_bytes(self, name):
    folder, _ = released.with_mtp(testing.folder(self))
    index = folder / "model.safetensors.index.json"
    if name == "index":
      name = index.name
      names = dict.fromkeys(released.tensors(folder), "model.safetensors")
      index.write_text(json.dumps({"weight_map": names}))
    path, rng = folder / name, np.random.default_rng(0)
    good = path.read_bytes()
    refused = 0
    for _ in range(100):
      content = bytearray(good)
      # Of a shard, the header.
      at = int(rng.integers(min(len(content), 9000)))
      kind = rng.integers(3)
      if kind == 0:
        content[at] = rng.integers(256)
      elif kind == 1:
        del content[at : at + int(rng.integers(1, 9))]
      else:
        content[at:at] = rng.bytes(int(rng.integers(1, 9)))
      path.write_bytes(content)
      try:
        list(hf_read.validate_values(hf_read.open_folder(folder)))
      except ValueError:
        refused += 1
    self.assertGreater(refused, 50)

  @parameterized.parameters(
    ("num_hidden_layers", 10**30, "n_layers=.*: must be at most"),
    ("num_hidden_layers", 10_000, "describes a model of"),
    ("n_routed_experts", 10**12, "n_experts=.*: must be at most"),
    ("num_nextn_predict_layers", 10**12, "depth=.*: must be at most 100"),
    ("num_nextn_predict_layers", 100, "describes a model of"),
  )
  def test_sizes_that_no_file_has(self, key, value, message):
    folder, _ = released.with_mtp(testing.folder(self))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with self.assertRaisesRegex(ValueError, message):
      hf_read.open_folder(folder)


class RoundedBiasTest(absltest.TestCase):
  def test_is_noted(self):
    folder = released.save(released.model(), testing.folder(self))

    def change(found):
      for name in found:
        if "e_score" in name:
          found[name] = found[name].to(torch.bfloat16)

    found = hf_read.open_folder(released.rewrite(folder, change))
    self.assertIn("they were rounded when the file was", found.notes[0])


if __name__ == "__main__":
  absltest.main()

import copy
import dataclasses
import json
from unittest import mock

import transformers
from absl.testing import absltest, parameterized

from dsv3_jax import config, errors
from dsv3_jax.config import presets
from dsv3_jax.interop import hf_config
from dsv3_jax.model import router
from dsv3_jax.plan import flops

# What DeepSeek's config.json of V3 says; R1's is the same.
_V3 = {
  "architectures": ["DeepseekV3ForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "aux_loss_alpha": 0.001,
  "bos_token_id": 0,
  "eos_token_id": 1,
  "ep_size": 1,
  "first_k_dense_replace": 3,
  "hidden_act": "silu",
  "hidden_size": 7168,
  "initializer_range": 0.02,
  "intermediate_size": 18432,
  "kv_lora_rank": 512,
  "max_position_embeddings": 163840,
  "model_type": "deepseek_v3",
  "moe_intermediate_size": 2048,
  "moe_layer_freq": 1,
  "n_group": 8,
  "n_routed_experts": 256,
  "n_shared_experts": 1,
  "norm_topk_prob": True,
  "num_attention_heads": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 61,
  "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1,
  "pretraining_tp": 1,
  "q_lora_rank": 1536,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
  },
  "rms_norm_eps": 1e-06,
  "rope_scaling": {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
  },
  "rope_theta": 10000,
  "routed_scaling_factor": 2.5,
  "scoring_func": "sigmoid",
  "seq_aux": True,
  "tie_word_embeddings": False,
  "topk_group": 4,
  "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1",
  "use_cache": True,
  "v_head_dim": 128,
  "vocab_size": 129280,
}
_V31 = _V3 | {
  "quantization_config": _V3["quantization_config"] | {"scale_fmt": "ue8m0"}
}
_OLD_YARN = _V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}
_V2 = _V3 | {
  "architectures": ["DeepseekV2ForCausalLM"],
  "model_type": "deepseek_v2",
  "vocab_size": 102400,
  "hidden_size": 5120,
  "num_hidden_layers": 60,
  "first_k_dense_replace": 1,
  "intermediate_size": 12288,
  "n_shared_experts": 2,
  "moe_intermediate_size": 1536,
  "n_routed_experts": 160,
  "num_experts_per_tok": 6,
  "topk_group": 3,
  "scoring_func": "softmax",
  "topk_method": "group_limited_greedy",
  "norm_topk_prob": False,
  "routed_scaling_factor": 16.0,
  "num_nextn_predict_layers": None,
  "rope_scaling": _OLD_YARN,
}
_V2_LITE = _V2 | {
  "hidden_size": 2048,
  "num_hidden_layers": 27,
  "intermediate_size": 10944,
  "num_attention_heads": 16,
  "num_key_value_heads": 16,
  "q_lora_rank": None,
  "moe_intermediate_size": 1408,
  "n_routed_experts": 64,
  "n_group": 1,
  "topk_group": 1,
  "topk_method": "greedy",
  "routed_scaling_factor": 1.0,
}
_MOONLIGHT = _V3 | {
  "vocab_size": 163840,
  "hidden_size": 2048,
  "intermediate_size": 11264,
  "moe_intermediate_size": 1408,
  "num_hidden_layers": 27,
  "num_nextn_predict_layers": 0,
  "num_attention_heads": 16,
  "num_key_value_heads": 16,
  "n_shared_experts": 2,
  "n_routed_experts": 64,
  "routed_scaling_factor": 2.446,
  "q_lora_rank": None,
  "n_group": 1,
  "topk_group": 1,
  "num_experts_per_tok": 6,
  "first_k_dense_replace": 1,
  "max_position_embeddings": 8192,
  "rms_norm_eps": 1e-5,
  "rope_theta": 50000.0,
  "rope_scaling": None,
}
_KIMI_K2 = _V3 | {
  "model_type": "kimi_k2",
  "vocab_size": 163840,
  "num_nextn_predict_layers": 0,
  "num_attention_heads": 64,
  "num_key_value_heads": 64,
  "n_routed_experts": 384,
  "routed_scaling_factor": 2.827,
  "n_group": 1,
  "topk_group": 1,
  "first_k_dense_replace": 1,
  "max_position_embeddings": 131072,
  "rope_theta": 50000.0,
  "rope_scaling": _V3["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0},
}
_YARN_40 = ("attention.yarn.factor=40", "init_std=0.02")


class ReadTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("v3", _V3, presets.V3_671B, ()),
    ("v31", _V31, presets.V3_671B, ()),
    ("v2", _V2, presets.V2_236B, ("attention.yarn.mscale=0.707",)),
    (
      "v2_lite",
      _V2_LITE,
      presets.V2_LITE_16B,
      ("attention.yarn.mscale=0.707",),
    ),
  )
  def test_is_the_preset(self, facts, preset, assignments):
    # How it is trained does not stand in the file as it was.
    training = f"router.balance_weight={1e-4}"
    want = config.override(preset, *_YARN_40, *assignments, training).model
    got = hf_config.read_model(facts)
    both = config.flatten(want), config.flatten(got)
    self.assertEqual(config.diff(*both), [])

  @parameterized.named_parameters(
    # Moonlight's report counts without embedding and head: 15.29B, 2.24B.
    ("moonlight", _MOONLIGHT, 15.29e9, 2.24e9, 0.005),
    # "1T parameters of which 32B are active".
    ("kimi_k2", _KIMI_K2, 1e12, 32e9, 0.05),
  )
  def test_counts_of_other_models(self, facts, main, active, delta):
    model = hf_config.read_model(facts)
    counts = flops.parameter_counts(model)
    outer = 2 * model.vocab_size * model.d_model
    self.assertAlmostEqual((counts["main"] - outer) / main, 1, delta=delta)
    self.assertAlmostEqual(counts["active_no_head"] / active, 1, delta=delta)

  def test_details_of_other_models(self):
    moonlight = hf_config.read_model(_MOONLIGHT)
    self.assertEqual(moonlight.attention.rope_theta, 50_000)
    self.assertEqual(moonlight.norm_eps, 1e-5)
    self.assertEqual(moonlight.attention.norm_eps, 1e-6)
    self.assertEqual(moonlight.attention.yarn.factor, 1)
    kimi = hf_config.read_model(_KIMI_K2)
    self.assertEqual(kimi.attention.yarn.max_len, 131_072)
    self.assertEqual(kimi.router.scale, 2.827)
    self.assertEqual(hf_config.read_model(_V2).router.bias_speed, 0)

  def test_rope_parameters_of_newer_files(self):
    old = _V3 | {"rope_theta": 7.0}
    new = {k: v for k, v in _V3.items() if not k.startswith("rope_")}
    yarn = {k: v for k, v in _V3["rope_scaling"].items() if k != "type"}
    yarn |= {"rope_type": "yarn", "rope_theta": 7}
    new["rope_parameters"] = yarn
    self.assertEqual(hf_config.read_model(new), hf_config.read_model(old))

  def test_nothing_of_v3_is_unknown(self):
    for facts in (_V3, _V31, _V2, _MOONLIGHT, _KIMI_K2):
      self.assertEmpty(facts.keys() - hf_config.KNOWN)

  @parameterized.parameters((_V3, (128, 128)), (_V31, (128, 128)), ({}, None))
  def test_tile(self, facts, want):
    self.assertEqual(hf_config.read_fp8_tile(facts), want)


class MissingTest(parameterized.TestCase):
  """Tests keys that config.json lacks, or that are null."""

  @parameterized.parameters(
    (transformers.DeepseekV3Config, _V3),
    (transformers.DeepseekV3Config, _MOONLIGHT),
    (transformers.DeepseekV2Config, _V2),
    (transformers.DeepseekV2Config, _V2_LITE),
  )
  def test_missing_is_the_default_of_the_reference_or_refused(self, cls, facts):
    self.assertNotEmpty(hf_config._SETTINGS)
    for key, path in hf_config._SETTINGS.items():
      less = {k: v for k, v in facts.items() if k != key}
      try:
        ours = config.flatten(hf_config.read_model(less))[path]
      except ValueError as error:
        self.assertRegex(str(error), key)
        continue
      given = {k: v for k, v in less.items() if k != "quantization_config"}
      theirs = getattr(cls(**copy.deepcopy(given)), key, None)
      if theirs is None:  # of V2: no groups, no MTP
        theirs = {"n_group": 1, "topk_group": 1}.get(key, 0)
      self.assertEqual(ours, theirs, key)

  def test_without_a_method_v2_chooses_among_all_experts(self):
    facts = {k: v for k, v in _V2.items() if k != "topk_method"}
    model = hf_config.read_model(facts)
    self.assertEqual((model.router.n_groups, model.router.top_groups), (1, 1))

  def test_null_is_null(self):
    nulls = dict.fromkeys(("q_lora_rank", "n_shared_experts"))
    nulls |= dict.fromkeys(("norm_topk_prob", "num_nextn_predict_layers"))
    model = hf_config.read_model(_V3 | nulls)
    self.assertEqual(model.attention.q_rank, 0)
    self.assertEqual(model.moe.n_shared, 0)
    self.assertEqual(model.router.renormalize, False)
    self.assertEqual(model.mtp.depth, 0)

  @parameterized.parameters(
    *(hf_config._SETTINGS.keys() - hf_config._NULL.keys())
  )
  def test_null_that_means_nothing_is_refused(self, key):
    with self.assertRaisesRegex(ValueError, f"{key} is missing or null|heads"):
      hf_config.read_model(_V3 | {key: None})

  def test_longest_context(self):
    for facts, want in ((_V3, 4096), (_V2, 2048)):
      less = {k: v for k, v in facts.items() if not k.startswith("max_pos")}
      self.assertEqual(hf_config.max_len(less), want)


def _others(run, path):
  """Yields the run with other values of a setting of its model."""
  value = config.flatten(run)[path]
  numbers = value if type(value) in (int, float) else 0
  for other in (
    *(numbers + 1, numbers * 2, numbers / 2, 0),
    *(not value, "pre_norm", "routed", "softmax"),
  ):
    try:
      changed = config.override(run, f"{path}={other}")
    except ValueError:
      continue
    if changed != run:
      yield changed


class ChoicesTest(parameterized.TestCase):
  """Tests that other software reads the model that was trained."""

  def test_every_setting_comes_back_or_is_refused(self):
    run = config.override(presets.V3_671B, *_YARN_40)
    training = {
      *("model.router.bias_speed", "model.router.balance_weight"),
      *("model.router.balance_map", "model.mtp.weight"),
      *("model.mtp.late_weight", "model.mtp.trains_trunk"),
    }
    paths = {p for p in config.flatten(run) if p.startswith("model.")}
    told = 0
    for path in sorted(paths - training):
      for changed in _others(run, path):
        try:
          facts = hf_config.make_config_json(changed)
        except errors.InputError:
          continue
        got = hf_config.read_model(facts)
        want = config.flatten(changed.model)
        got = config.flatten(got) | {
          k.removeprefix("model."): want[k.removeprefix("model.")]
          for k in training
        }
        self.assertEqual(got, want, path)
        told += 1
    self.assertGreater(told, len(paths))

  @parameterized.parameters(
    ("third", {}, "router.score=third: must be sigmoid or softmax"),
    ("sigmoid", {"group_top": 1}, "by their best 2 experts, here by 1"),
    ("softmax", {"group_top": 2}, "by their best 1 experts, here by 2"),
  )
  def test_a_router_of_ones_own_is_refused(self, score, changes, message):
    entry = router.SCORES.get(score, router.SCORES["sigmoid"])
    table = {score: dataclasses.replace(entry, **changes)}
    config.ROUTER_SCORES.append(score)
    self.addCleanup(config.ROUTER_SCORES.pop)
    run = config.override(
      presets.V3_671B, f"router.score={score}", "router.renormalize=false"
    )
    with mock.patch.dict(router.SCORES, table):
      with self.assertRaisesRegex(errors.InputError, message):
        hf_config.make_config_json(run)

  @parameterized.parameters(
    (
      ("router.score=softmax", "mtp.depth=0"),
      "router.renormalize=True with router.score=softmax: must be False",
    ),
    (("router.n_groups=256", "router.top_groups=8"), "a group must have as"),
  )
  def test_a_router_that_others_misread_is_refused(self, assignments, message):
    run = config.override(presets.V3_671B, *assignments)
    with self.assertRaisesRegex(errors.InputError, message):
      hf_config.make_config_json(run)

  def test_v2_with_gates_of_sum_1_is_refused(self):
    with self.assertRaisesRegex(errors.InputError, "norm_topk_prob=True: must"):
      hf_config.read_model(_V2 | {"norm_topk_prob": True})


class BothWaysTest(parameterized.TestCase):
  @parameterized.parameters(*presets.PRESETS)
  def test_presets(self, name):
    run = presets.PRESETS[name]
    facts = json.loads(json.dumps(hf_config.make_config_json(run)))
    training = f"router.balance_weight={run.model.router.balance_weight}"
    speed = f"router.bias_speed={run.model.router.bias_speed}"
    got = config.override(hf_config.read_model(facts), training, speed)
    self.assertEqual(got, run.model)
    self.assertEqual(facts["max_position_embeddings"], run.data.seq_len)

  def test_extended_context(self):
    run = config.override(presets.V3_671B, *_YARN_40)
    facts = hf_config.make_config_json(run)
    self.assertEqual(hf_config.read_model(facts), run.model)
    for key, value in _V3["rope_scaling"].items():
      self.assertEqual(facts["rope_scaling"][key], value)
    theirs = {k: v for k, v in _V3.items() if k in facts}
    self.assertEqual({k: facts[k] for k in theirs}, theirs)

  @parameterized.parameters(
    ("mtp.input_state=pre_norm", "post_norm"),
    ("attention.norm_eps=1e-5", "1e-06"),
    ("n_dense_layers=61", "must be below n_layers=61"),
  )
  def test_refuses_what_config_json_cannot_express(self, assignment, message):
    run = config.override(presets.V3_671B, assignment)
    with self.assertRaisesRegex(ValueError, message):
      hf_config.make_config_json(run)


class RefusedTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"model_type": "llama"}, "model_type='llama': must be one of"),
    ({"model_type": ["x"]}, "must be one of"),
    ({"model_type": None}, "must be one of"),
    ({"hidden_act": "gelu"}, "must be 'silu'"),
    ({"attention_bias": True}, "must be False"),
    ({"tie_word_embeddings": True}, "must be False"),
    ({"moe_layer_freq": 2}, "must be 1"),
    ({"rope_interleave": False}, "must be True"),
    ({"scoring_func": "softmax"}, "must be 'sigmoid'"),
    ({"topk_method": "greedy"}, "must be noaux_tc"),
    ({"num_key_value_heads": 8}, "must be num_attention_heads=128"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "7168"}, "expected int"),
    ({"hidden_size": -1}, "at least 1"),
    ({"n_group": 7}, "must divide"),
    ({"max_position_embeddings": "x"}, "must be an integer"),
    ({"max_position_embeddings": 0}, "must be an integer"),
    ({"rms_norm_eps": float("nan")}, "finite"),
    ({"norm_topk_prob": "yes"}, "expected bool"),
    ({"rope_scaling": {"type": "linear"}}, "must be 'default' or 'yarn'"),
    ({"rope_scaling": "yarn"}, "must be an object"),
    ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
    ({"rope_scaling": _OLD_YARN | {"mscale": 1.0}}, "must equal"),
    ({"rope_scaling": _OLD_YARN | {"attention_factor": 2.0}}, "must be None"),
    ({"rope_scaling": _OLD_YARN | {"truncate": False}}, "must be True"),
    ({"rope_scaling": _OLD_YARN | {"factor": 0.5}}, "at least 1"),
    ({"rope_scaling": _OLD_YARN | {"factor": "x"}}, "expected float"),
  )
  def test_names_the_problem(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      hf_config.read_model(_V3 | changes)

  def test_lists_all_problems(self):
    bad = _V3 | {"hidden_act": "gelu", "vocab_size": None, "rope_scaling": 3}
    with self.assertRaises(ValueError) as caught:
      hf_config.read_model(bad)
    self.assertLen(str(caught.exception).splitlines(), 3)


if __name__ == "__main__":
  absltest.main()

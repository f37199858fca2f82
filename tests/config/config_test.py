import dataclasses
import math
from unittest import mock

import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import fields, overrides, presets
from dsv3_jax.config import model as model_lib

# The recipe of the preset may change; these numbers stand in messages below.
RUN = config.override(
  presets.TINY,
  "data.seq_len=256",
  "train.tokens=2e6",
  "train.batch_size=16",
  "train.micro_batches=1",
  "schedule.constant_until=0.3",
  "schedule.decay_until=0.9",
  "schedule.tail_from=0.95",
)


@pytest.mark.fault("F41")
class FieldTest(parameterized.TestCase):
  """Values that a class refuses; each message names value and limit."""

  @parameterized.parameters(
    # MLA
    ("attention.n_heads", 0, "at least 1"),
    ("attention.q_rank", -1, "at least 0"),
    ("attention.kv_rank", 0, "at least 1"),
    ("attention.nope_dim", 0, "at least 1"),
    ("attention.rope_dim", 1, "at least 2"),
    ("attention.rope_dim", 7, "must be even"),
    ("attention.v_dim", 0, "at least 1"),
    ("attention.rope_theta", 0.0, "above 0"),
    # Router
    ("router.n_experts", 0, "at least 1"),
    ("router.top_k", 0, "at least 1"),
    ("router.top_k", 17, "at most 8"),
    ("router.top_k", 9, "at most 8, the experts in top_groups=2"),
    ("router.n_groups", 0, "at least 1"),
    ("router.n_groups", 5, "must divide n_experts=16; 1, 2, 4, 8, 16 do"),
    ("router.top_groups", 0, "at least 1"),
    ("router.top_groups", 5, "at most n_groups=4"),
    ("router.score", "sigmoit", "did you mean 'sigmoid'"),
    ("router.scale", 0.0, "above 0"),
    ("router.bias_speed", -1e-3, "at least 0"),
    ("router.balance_weight", -1.0, "at least 0"),
    ("router.balance_map", "both", "one of scores, routed"),
    # MoE, MTP, Model
    ("moe.n_shared", -1, "at least 0"),
    ("moe.ffn_dim", 0, "at least 1"),
    ("mtp.depth", -1, "at least 0"),
    ("mtp.weight", -0.1, "at least 0"),
    ("mtp.late_weight", -0.1, "at least 0"),
    ("mtp.input_state", "postnorm", "did you mean 'post_norm'"),
    ("vocab_size", 3, "at least 4"),
    ("d_model", 0, "at least 1"),
    ("n_layers", 0, "at least 1"),
    ("n_dense_layers", -1, "at least 0"),
    ("n_dense_layers", 6, "at most n_layers=5"),
    ("dense_ffn_dim", 0, "at least 1"),
    ("norm_eps", 0.0, "above 0"),
    ("init_std", 0.0, "above 0"),
    # Data, Optim, Schedule, Train
    ("data.tokenizer", "deep_seek", "did you mean 'deepseek'"),
    ("data.seq_len", 0, "at least 1"),
    ("data.heldout_fraction", 0.0, "above 0"),
    ("data.heldout_fraction", 0.6, "at most 0.5"),
    ("data.on_decode_error", "ignore", "one of error, replace, skip"),
    ("data.fim_rate", 1.1, "at most 1"),
    ("data.fim_rate", -0.1, "at least 0"),
    ("data.split_rate", 2.0, "at most 1"),
    ("data.domains", "a=1", "needs Data.path"),
    ("attention.yarn.factor", 0.5, "at least 1"),
    ("attention.yarn.beta_fast", 0.5, "at least beta_slow=1"),
    ("router.n_experts", 2**40, "at most 100000"),
    ("attention.yarn.original_len", 0, "at least 1"),
    ("optim.peak_lr", -1.0, "above 0"),
    ("optim.min_lr", -1.0, "at least 0"),
    ("optim.final_lr", -1.0, "at least 0"),
    ("optim.beta1", 1.5, "below 1"),
    ("optim.beta1", 1.0, "below 1"),
    ("optim.beta2", 1.0, "below 1"),
    ("optim.beta2", 1 - 1e-9, "below 1 in float32"),
    ("optim.eps", 1e-50, "above 0 in float32"),
    ("norm_eps", 1e-39, "above 0 in float32"),
    ("init_std", 1e39, "finite in float32"),
    ("router.bias_speed", 1e39, "finite in float32"),
    ("optim.beta2", -0.1, "at least 0"),
    ("optim.eps", 0.0, "above 0"),
    ("optim.weight_decay", -0.1, "at least 0"),
    ("optim.clip_norm", 0.0, "above 0"),
    ("optim.moments", "float16", "one of float32, bfloat16"),
    ("schedule.warmup_until", -0.1, "at least 0"),
    ("schedule.warmup_until", 1.1, "at most 1"),
    ("schedule.bias_update_until", 1.1, "at most 1"),
    ("schedule.mtp_until", -0.1, "at least 0"),
    ("schedule.constant_until", 0.99, "must not fall"),
    ("train.tokens", 0, "at least 1"),
    ("train.batch_size", 0, "at least 1"),
    ("train.micro_batches", 3, "must divide batch_size=16"),
    ("train.remat", "full", "one of none, selective, block"),
    ("train.max_bad_steps", -1, "at least 0"),
    ("train.first_batch_size", 32, "at most batch_size=16"),
    ("train.first_batch_size", 8, "multiple of the 16 sequences"),
    ("train.first_batch_size", 16, "a batch that grows needs both"),
    ("schedule.ramp_until", 0.1, "a batch that grows needs both"),
    ("train.ramp_sizes", 0, "at least 1"),
    # Precision, Checkpoint, Evaluate, Run
    ("precision.recipe", "fp16", "one of fp32, bf16"),
    ("checkpoint.every", 0, "at least 1"),
    ("checkpoint.keep", 0, "at least 1"),
    ("evaluate.every", 0, "at least 1"),
    ("evaluate.batch_size", 0, "at least 1"),
    ("evaluate.sample_tokens", -1, "at least 0"),
    ("model.n_layers", 10_001, "at most 10000"),
    ("model.mtp.depth", 101, "at most 100"),
    ("train.tokens", 2**53 + 1, "at most 9007199254740992"),
    ("train.tokens", 10**400, "at most 9007199254740992"),
    ("train.tokens", -(10**400), "-9007199254740992 at least"),
    ("data.seq_len", 1, "above MTP.depth=1"),
    ("train.tokens", 4095, "one step of batch_size * seq_len = 4096"),
  )
  @pytest.mark.fault(
    "F37",
    "lengths of 0, 1, up to the MTP depth; batches that do not divide",
    "refused",
  )
  def test_refuses(self, path, value, message):
    with self.assertRaises(ValueError) as raised:
      config.override(RUN, f"{path}={value}")
    text = str(raised.exception)
    self.assertIn(message, text)
    self.assertIn(path.split(".")[-1], text)
    self.assertIn(str(value), text)

  def test_another_attention_asks_for_what_it_requires(self):
    @fields.checked
    class Other(config.Attention):
      type: str = "other"
      n_kv_heads: int = fields.number(low=0)

    types = {"mla": config.MLA, "other": Other}
    with mock.patch.object(model_lib, "attention_types", lambda: types):
      with self.assertRaisesRegex(ValueError, "attention.n_kv_heads: needed"):
        config.override(RUN, "attention.type=other")
      run = config.override(
        RUN, "attention.type=other", "attention.n_kv_heads=0"
      )
    self.assertEqual(run.model.attention.n_kv_heads, 0)
    self.assertEqual(run.model.attention.n_heads, RUN.model.attention.n_heads)

  @parameterized.parameters(1.0, 0.5)
  def test_yarn_needs_pairs_that_turn_differently(self, theta):
    with self.assertRaisesRegex(ValueError, f"rope_theta={theta:g}: .*above 1"):
      config.override(
        RUN, "attention.yarn.factor=2", f"attention.rope_theta={theta}"
      )
    config.override(RUN, f"attention.rope_theta={theta}")

  @parameterized.parameters(
    path for path, value in config.flatten(RUN).items() if type(value) is float
  )
  @pytest.mark.fault("F37")
  def test_refuses_what_is_not_finite(self, path):
    for value in ("nan", "inf", "-inf"):
      with self.assertRaisesRegex(ValueError, "must be finite"):
        config.override(RUN, f"{path}={value}")

  @parameterized.parameters(
    dict(n_heads=2.0), dict(n_heads="2"), dict(n_heads=True), dict(q_rank=None)
  )
  @pytest.mark.fault("F37")
  def test_refuses_other_types(self, **fields):
    with self.assertRaisesRegex(ValueError, "expected int"):
      dataclasses.replace(RUN.model.attention, **fields)

  def test_an_integer_is_a_fine_float(self):
    self.assertEqual(
      dataclasses.replace(RUN.model.attention, rope_theta=500).rope_theta, 500
    )

  def test_a_class_lists_all_its_problems(self):
    with self.assertRaises(ValueError) as raised:
      config.MoE(n_shared=-1, ffn_dim=0)
    self.assertLen(str(raised.exception).splitlines(), 2)

  def test_is_frozen_hashable_and_equal_by_value(self):
    with self.assertRaises(dataclasses.FrozenInstanceError):
      RUN.model.d_model = 3
    same = config.override(RUN, "d_model=192")
    self.assertEqual(same, RUN)
    self.assertEqual(hash(same), hash(RUN))


@pytest.mark.fault("F41")
class OverrideTest(parameterized.TestCase):
  @parameterized.parameters(
    ("model.attention.n_heads=4", "model.attention.n_heads", 4),
    ("attention.n_heads=4", "model.attention.n_heads", 4),
    ("router.bias_speed=0", "model.router.bias_speed", 0.0),
    ("router.renormalize=False", "model.router.renormalize", False),
    ("router.renormalize=1", "model.router.renormalize", True),
    ("train.tokens=1e9", "train.tokens", 10**9),
    ("optim.peak_lr=1e-3", "optim.peak_lr", 1e-3),
    ("data.path=/a=b", "data.path", "/a=b"),
  )
  def test_sets_one_value_of_the_right_type(self, text, path, value):
    before, after = (
      config.flatten(RUN),
      config.flatten(config.override(RUN, text)),
    )
    self.assertEqual(after[path], value)
    self.assertIs(type(after[path]), type(before[path]))
    after[path] = before[path]
    self.assertEqual(after, before)

  def test_values_are_judged_together(self):
    # Neither of these is valid alone: 16 experts, 4 groups.
    cfg = config.override(RUN, "router.n_experts=18", "router.n_groups=6")
    self.assertEqual(cfg.model.router.n_groups, 6)

  def test_lists_all_problems_at_once_with_suggestions(self):
    with self.assertRaises(ValueError) as raised:
      config.override(
        RUN,
        "attention.n_head=4",
        "optim.peak_lr=fast",
        "router.top_k=99",
        "train.micro_batches=5",
        "mtp.depth",
        "attention.rope_dim=9",
        "data.seq_len=1.5",
        "router.renormalize=maybe",
      )
    lines = str(raised.exception).splitlines()
    self.assertLen(lines, 8)
    for words in (
      ("attention.n_head", "did you mean 'attention.n_heads'?"),
      ("optim.peak_lr='fast'", "expected float"),
      ("Router.top_k=99", "at most 8"),
      ("Train.micro_batches=5", "must divide batch_size=16"),
      ("'mtp.depth'", "expected path=value"),
      ("MLA.rope_dim=9", "even", "try 10"),
      ("data.seq_len='1.5'", "expected int"),
      ("router.renormalize='maybe'", "expected bool"),
    ):
      matching = [line for line in lines if all(word in line for word in words)]
      self.assertLen(matching, 1, (words, lines))

  def test_the_same_setting_under_both_names_is_one(self):
    cfg = config.override(
      RUN, "attention.n_heads=2", "model.attention.n_heads=3"
    )
    self.assertEqual(cfg.model.attention.n_heads, 3)

  def test_difference_names_each_setting(self):
    old = config.flatten(RUN)
    new = config.flatten(config.override(RUN, "d_model=256", "optim.beta2=0.9"))
    self.assertEqual(
      config.diff(old, new),
      ["model.d_model: 192 -> 256", "optim.beta2: 0.95 -> 0.9"],
    )
    self.assertEqual(config.diff(old, old), [])
    self.assertEqual(config.diff({"a": 1}, {}), ["a: 1 -> '(not there)'"])


class OldNamesTest(parameterized.TestCase):
  """Settings of an earlier version, which are read for one release."""

  @parameterized.parameters(*overrides.RENAMED.items())
  def test_renamed_settings_exist(self, old, new):
    paths = {path.removeprefix("model.") for path in config.flatten(RUN)}
    in_group = lambda name: any(f"{p}.".startswith(f"{name}.") for p in paths)
    self.assertTrue(in_group(new))
    self.assertFalse(in_group(old))

  def test_old_names_are_set_with_a_warning_that_names_the_new(self):
    overrides._warn_once.cache_clear()
    with self.assertLogs(level="WARNING") as logs:
      run = config.override(
        RUN,
        "optim.tail_lr=0.5",
        "optim.tail_lr=0.25",
        "mtp.hidden=pre_norm",
        "model.mtp.hidden=pre_norm",
      )
    self.assertEqual(run.optim.final_lr, 0.25)
    self.assertEqual(run.model.mtp.input_state, "pre_norm")
    self.assertLen(logs.output, 2)
    self.assertIn("optim.tail_lr is now optim.final_lr", logs.output[0])
    self.assertIn("mtp.hidden is now mtp.input_state", logs.output[1])

  @parameterized.parameters("model.data.heldout=0.5", "data.heldout.a=0.5")
  def test_other_paths_are_no_old_names(self, text):
    with self.assertRaisesRegex(ValueError, "no such setting"):
      config.override(RUN, text)

  def test_groups_and_values_are_renamed(self):
    groups = {"attn": "attention", "attn.heads": "attention.n_heads"}
    values = {("router.score", "logistic"): "sigmoid"}
    with (
      mock.patch.dict(overrides.RENAMED, groups),
      mock.patch.dict(overrides.RENAMED_VALUES, values),
    ):
      run = config.override(
        RUN, "attn.heads=3", "model.attn.v_dim=5", "router.score=logistic"
      )
      stored = config.with_current_names(
        {"attn.heads": 3, "model.router.score": "logistic", "x": ["y"]}
      )
    self.assertEqual(
      (run.model.attention.n_heads, run.model.attention.v_dim), (3, 5)
    )
    self.assertEqual(run.model.router.score, "sigmoid")
    self.assertEqual(
      stored,
      {"attention.n_heads": 3, "model.router.score": "sigmoid", "x": ["y"]},
    )


class PresetTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (
      "v3",
      presets.V3_671B,
      dict(
        vocab_size=129280,
        d_model=7168,
        n_layers=61,
        n_dense_layers=3,
        dense_ffn_dim=18432,
        n_heads=128,
        q_rank=1536,
        kv_rank=512,
        n_shared=1,
        ffn_dim=2048,
        n_experts=256,
        top_k=8,
        n_groups=8,
        top_groups=4,
        score="sigmoid",
        renormalize=True,
        scale=2.5,
        bias_speed=0.001,
        balance_weight=1e-4,
        depth=1,
      ),
    ),
    (
      "v2",
      presets.V2_236B,
      dict(
        vocab_size=102400,
        d_model=5120,
        n_layers=60,
        n_dense_layers=1,
        dense_ffn_dim=12288,
        n_heads=128,
        q_rank=1536,
        kv_rank=512,
        n_shared=2,
        ffn_dim=1536,
        n_experts=160,
        top_k=6,
        n_groups=8,
        top_groups=3,
        score="softmax",
        renormalize=False,
        scale=16,
        bias_speed=0,
        balance_weight=0.003,
        depth=0,
      ),
    ),
    (
      "v2_lite",
      presets.V2_LITE_16B,
      dict(
        vocab_size=102400,
        d_model=2048,
        n_layers=27,
        n_dense_layers=1,
        dense_ffn_dim=10944,
        n_heads=16,
        q_rank=0,
        kv_rank=512,
        n_shared=2,
        ffn_dim=1408,
        n_experts=64,
        top_k=6,
        n_groups=1,
        top_groups=1,
        score="softmax",
        renormalize=False,
        scale=1,
        bias_speed=0,
        balance_weight=0.001,
        depth=0,
      ),
    ),
    (
      "S",
      presets.S,
      dict(
        vocab_size=8192,
        d_model=256,
        n_layers=8,
        n_dense_layers=1,
        dense_ffn_dim=1024,
        n_heads=8,
        q_rank=128,
        kv_rank=64,
        nope_dim=32,
        rope_dim=16,
        v_dim=32,
        n_shared=1,
        ffn_dim=128,
        n_experts=32,
        top_k=4,
        n_groups=4,
        top_groups=2,
      ),
    ),
    (
      "M",
      presets.M,
      dict(
        vocab_size=16384,
        d_model=512,
        n_layers=12,
        n_dense_layers=1,
        dense_ffn_dim=2048,
        n_heads=8,
        q_rank=256,
        kv_rank=128,
        nope_dim=64,
        rope_dim=32,
        v_dim=64,
        n_shared=1,
        ffn_dim=256,
        n_experts=64,
        top_k=6,
        n_groups=4,
        top_groups=2,
      ),
    ),
  )
  def test_published_sizes(self, run, fields):
    published = dict(nope_dim=128, rope_dim=64, v_dim=128) | fields
    published |= dict(rope_theta=1e4, norm_eps=1e-6)
    actual = {
      path.split(".")[-1]: value
      for path, value in config.flatten(run.model).items()
    }
    self.assertEqual(actual, actual | published)

  @parameterized.parameters(
    *("a", "a=0", "a=-1", "a=x", "a=inf", "=1"),
    *("a=1,a=2", "../a=1", ".a=1", "a=1,"),
  )
  def test_domains_are_names_with_weights(self, text):
    with self.assertRaisesRegex(ValueError, "must be name=weight"):
      config.override(RUN, "data.path=x", f"data.domains={text}")

  def test_a_context_beyond_the_extension_is_refused(self):
    yarn = "attention.yarn.factor=2", "attention.yarn.original_len=100"
    config.override(RUN, *yarn, "data.seq_len=200")
    with self.assertRaisesRegex(ValueError, "seq_len=201: must be at most 200"):
      config.override(RUN, *yarn, "data.seq_len=201")

  def test_defaults_are_those_of_the_classes(self):
    found = config.default_settings(config.Run, {})
    self.assertEqual(found["optim.beta2"], 0.95)
    self.assertEqual(found["model.attention.yarn.factor"], 1.0)
    self.assertNotIn("train.tokens", found)
    self.assertLessEqual(set(found), set(config.flatten(RUN)))

  def test_domains(self):
    run = config.override(RUN, "data.path=x", "data.domains=b.txt=2, a=.5")
    self.assertEqual(run.data.domain_weights, {"b.txt": 2.0, "a": 0.5})

  @parameterized.parameters(1, 3, 4, 7, 16)
  def test_phases_grow_linearly_and_miss_no_row(self, n):
    run = config.override(
      RUN,
      "train.batch_size=16",
      "train.micro_batches=8",
      "train.first_batch_size=4",
      f"train.ramp_sizes={n}",
      "schedule.ramp_until=0.25",
    )
    rows, row = run.train.tokens // run.data.seq_len, 0
    for step in range(run.total_steps):
      self.assertEqual(run.rows_before(step), row)
      size = run.batch_phase(step).batch_size
      # Steps of the sizes before; a micro-batch of 2 sequences is not cut.
      linear = min(4 + 12 * row / (0.25 * rows), 16)
      self.assertBetween(size, linear - 12 / n - 2, min(linear + 1e-9, 16))
      row += size
    self.assertBetween(rows - row, 0, 15)
    self.assertLessEqual(len(run.batch_phases), n + 1)

  def test_v3_recipe(self):
    run = presets.V3_671B
    optim = run.optim
    self.assertEqual((optim.beta1, optim.beta2), (0.9, 0.95))
    self.assertEqual((optim.weight_decay, optim.clip_norm), (0.1, 1.0))
    self.assertEqual(optim.peak_lr, 2.2e-4)
    self.assertEqual((optim.min_lr, optim.final_lr), (2.2e-5, 7.3e-6))
    self.assertEqual(optim.moments, "bfloat16")
    self.assertEqual(run.warmup_steps, 2000)
    self.assertEqual(run.model.init_std, 0.006)
    self.assertEqual(
      (run.model.mtp.weight, run.model.mtp.late_weight), (0.3, 0.1)
    )
    # 62.9M tokens a step; phases end at 10T, 14.3T, 14.633T of 14.8T tokens.
    self.assertEqual(run.tokens_per_step, 62_914_560)
    budget, schedule = run.train.tokens, run.schedule
    for share, trillions in (
      (schedule.constant_until, 10),
      (schedule.decay_until, 14.3),
      (schedule.tail_from, 14.633),
      (schedule.bias_update_until, 14.3),
      (schedule.mtp_until, 10),
      (schedule.ramp_until, 0.469),
    ):
      self.assertTrue(math.isclose(share * budget, trillions * 1e12))
    # 3072 to 15360 sequences over 469B tokens, then about 227.8K steps.
    sizes = [phase.batch_size for phase in run.batch_phases]
    self.assertEqual(sizes, [3072, 6144, 9216, 12_288, 15_360])
    ramp, full = 469e9 / 4096, run.batch_phases[-1]
    self.assertBetween(full.first_row, ramp, ramp + 15_360)
    self.assertEqual(round(run.total_steps - full.first_step, -2), 227_800)

  def test_v2_recipes(self):
    for run, lr, batch, trillions in (
      (presets.V2_236B, 2.4e-4, 9216, 8.1),
      (presets.V2_LITE_16B, 4.2e-4, 4608, 5.7),
    ):
      self.assertEqual(run.optim.peak_lr, lr)
      self.assertEqual(run.train.batch_size, batch)
      self.assertEqual(run.train.tokens, trillions * 1e12)

  def test_routers_are_counted_with_mtp(self):
    self.assertEqual(presets.V3_671B.model.n_routers, 58 + 1)
    self.assertEqual(testing.TINY.n_routers, 3 + 1)


if __name__ == "__main__":
  absltest.main()

"""The published models and our own small ones, as complete runs.

Sizes: arXiv:2412.19437 (V3), arXiv:2405.04434 (V2 and V2-Lite).
"""

from dsv3_jax import config


def _override(run: config.Run, settings: str) -> config.Run:
  return config.override(run, *settings.split())


_V3_MLA = config.MLA(
  n_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
)
V3_671B = config.Run(
  model=config.Model(
    vocab_size=129_280,
    d_model=7168,
    n_layers=61,
    n_dense_layers=3,
    dense_ffn_dim=18_432,
    attention=_V3_MLA,
    moe=config.MoE(n_shared=1, ffn_dim=2048),
    router=config.Router(n_experts=256, top_k=8, n_groups=8, top_groups=4),
  ),
  data=config.Data(seq_len=4096, tokenizer="deepseek"),
  train=config.Train(
    tokens=14_800_000_000_000,
    batch_size=15_360,
    micro_batches=120,
    first_batch_size=3072,
    remat="selective",
  ),
  optim=config.Optim(moments="bfloat16", ema_decay=0.999),
  schedule=config.Schedule(ramp_until=469 / 14_800),
  precision=config.Precision(recipe="bf16"),
  checkpoint=config.Checkpoint(every=500),
  evaluate=config.Evaluate(every=500),
)

# V2's gate is a softmax without bias or renormalization. Its learning rate
# falls in two steps, to 0.316 and 0.316^2 of the peak: a cosine of no length.
# Not like V2: of its balance losses only that of experts (alpha_1) is here, not
# those of devices and of communication, and training drops no token.
V2_236B = _override(
  V3_671B,
  """
  vocab_size=102_400 d_model=5120 n_layers=60 n_dense_layers=1
  dense_ffn_dim=12_288 moe.n_shared=2 moe.ffn_dim=1536
  router.n_experts=160 router.top_k=6 router.n_groups=8 router.top_groups=3
  router.score=softmax router.renormalize=false router.scale=16
  router.bias_speed=0 router.balance_weight=0.003 mtp.depth=0
  train.tokens=8_100_000_000_000 train.batch_size=9216 train.micro_batches=72
  train.first_batch_size=2304 train.ramp_sizes=3
  optim.peak_lr=2.4e-4 optim.min_lr=7.584e-5 optim.final_lr=2.396544e-5
  schedule.warmup_until=0.00233017
  schedule.constant_until=0.6 schedule.decay_until=0.6 schedule.tail_from=0.9
  schedule.ramp_until=0.0277778
  """,
)
V2_LITE_16B = _override(
  V2_236B,
  """
  d_model=2048 n_layers=27 dense_ffn_dim=10_944
  attention.n_heads=16 attention.q_rank=0 moe.ffn_dim=1408
  router.n_experts=64 router.n_groups=1 router.top_groups=1
  router.scale=1 router.balance_weight=0.001
  train.tokens=5_700_000_000_000 train.batch_size=4608 train.micro_batches=36
  train.first_batch_size=0 schedule.ramp_until=0
  optim.peak_lr=4.2e-4 optim.min_lr=1.3272e-4 optim.final_lr=4.193952e-5
  schedule.warmup_until=0.00662259
  schedule.constant_until=0.8 schedule.decay_until=0.8 schedule.tail_from=0.9
  """,
)

# Benchmark shapes.
_S_MLA = config.MLA(
  n_heads=8, q_rank=128, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32
)
S = config.Run(
  model=config.Model(
    vocab_size=8192,
    d_model=256,
    n_layers=8,
    n_dense_layers=1,
    dense_ffn_dim=1024,
    attention=_S_MLA,
    moe=config.MoE(n_shared=1, ffn_dim=128),
    router=config.Router(n_experts=32, top_k=4, n_groups=4, top_groups=2),
    init_std=0.02,
  ),
  data=config.Data(seq_len=512),
  train=config.Train(
    tokens=100_000_000, batch_size=8, remat="none", scan_layers=False
  ),
  # Some dims are below the paper's tile of 128.
  precision=config.Precision(recipe="fp32", tile=64),
  # The virtual devices of a processor share its memory.
  parallel=config.Parallel(layout="replicated"),
  checkpoint=config.Checkpoint(every=500),
  evaluate=config.Evaluate(every=500),
)

M = _override(
  S,
  """
  vocab_size=16_384 d_model=512 n_layers=12 dense_ffn_dim=2048
  attention.n_heads=8 attention.q_rank=256 attention.kv_rank=128
  attention.nope_dim=64 attention.rope_dim=32 attention.v_dim=64
  moe.ffn_dim=256 router.n_experts=64 router.top_k=6 precision.tile=128
  """,
)

# Trains in minutes on two cores: every mechanism of V3, on two novels. In a few
# hundred steps the bias must move faster than in the paper's many. The paper's
# init_std is 0.006 for a width of 7168: std * sqrt(d_model) is the same.
TINY = _override(
  S,
  f"""
  vocab_size=2048 d_model=192 n_layers=5 dense_ffn_dim=512 init_std=0.037
  attention.n_heads=6 attention.q_rank=96
  moe.ffn_dim=96 router.n_experts=16 router.bias_speed=0.007
  data.seq_len=256 train.tokens=573_440
  optim.peak_lr=2e-3 optim.min_lr=5e-5 optim.final_lr=5e-5
  schedule.warmup_until={40 / 280}
  schedule.constant_until=0.2 schedule.decay_until=1
  schedule.tail_from=1 schedule.bias_update_until=1 schedule.mtp_until=0.5
  checkpoint.every=70 evaluate.every=70
  """,
)

# Smaller, for experiments of minutes that answer thousands of questions.
NANO = _override(
  TINY,
  """
  vocab_size=512 d_model=128 n_layers=3 dense_ffn_dim=256 init_std=0.045
  attention.n_heads=4 attention.q_rank=64 attention.kv_rank=32 moe.ffn_dim=64
  router.n_experts=8 router.top_k=2 router.n_groups=1 router.top_groups=1
  data.seq_len=128
  """,
)

# Overnight on a laptop, or minutes on an accelerator; reads the output of
# `scripts/prepare_data.py`. init_std is scaled to the width as in TINY.
SMALL = _override(
  S,
  """
  vocab_size=32_768 router.bias_speed=0.003 init_std=0.032 data.path=corpus
  data.heldout_fraction=0.003 data.fim_rate=0.1 data.split_rate=0.1
  train.tokens=19_660_800 train.batch_size=32 train.micro_batches=2
  optim.peak_lr=1.5e-3 optim.min_lr=1e-4 optim.final_lr=1e-4
  optim.ema_decay=0.99
  schedule.warmup_until=0.05 schedule.constant_until=0.3 schedule.decay_until=1
  schedule.tail_from=1 schedule.bias_update_until=1 schedule.mtp_until=0.7
  evaluate.every=300 evaluate.ema=true data.domains=\
prose=1,python=2,go=2,docs=2,maths-docs=1,maths-formal=1,chinese=2,languages=1
  """,
)

# Settings of fine-tuning (section 5.1), on top of those of the run that it
# begins with. What acts over long times is off: the bias of the router stays,
# lambda is the last of pre-training, and no loss balances single rows, since
# these hold several samples. Batch size and row length are not in the report.
_SFT = """
  data.segment_mask=true data.fim_rate=0 data.split_rate=0 data.domains=
  data.heldout_fraction=0.05
  optim.peak_lr=5e-6 optim.min_lr=1e-6 optim.final_lr=1e-6 optim.ema_decay=0
  schedule.name=constant_cosine schedule.warmup_until=0
  schedule.constant_until=0 schedule.decay_until=1 schedule.tail_from=1
  schedule.bias_update_until=0 schedule.mtp_until=0 schedule.ramp_until=0
  router.balance_weight=0 train.first_batch_size=0 train.batch_size=64
  train.micro_batches=1 train.tokens=1e9 evaluate.ema=false
""".split()
SFT = {
  "sft": _SFT,
  # Learns to calculate in minutes, so that experts must be free to move.
  "sft_tiny": [
    *_SFT,
    *"optim.peak_lr=2e-3 optim.min_lr=4e-5 optim.final_lr=4e-5".split(),
    *"schedule.warmup_until=0.03 schedule.constant_until=0.1".split(),
    *"schedule.bias_update_until=1 router.bias_speed=0.001".split(),
    *"train.batch_size=4 data.seq_len=128 data.heldout_fraction=0.015".split(),
    *"checkpoint.every=500 evaluate.every=500 evaluate.answers=600".split(),
  ],
  "sft_small": [
    *_SFT,
    *"optim.peak_lr=3e-4 optim.min_lr=3e-5 optim.final_lr=3e-5".split(),
    "train.batch_size=32",
  ],
}
SFT_EPOCHS = {"sft": 2, "sft_tiny": 2, "sft_small": 2}

# Reinforcement learning (section 5.2.2). What the report leaves open is that of
# DeepSeek-R1's: groups of 16, beta 0.001.
_GRPO = [
  *_SFT,
  *"optim.peak_lr=1e-6 optim.min_lr=1e-6 optim.final_lr=1e-6".split(),
  *"optim.weight_decay=0 mtp.trains_trunk=false grpo.prompts=32".split(),
]
GRPO = {
  "grpo": _GRPO,
  "grpo_tiny": [
    *_GRPO,
    *"optim.peak_lr=3e-4 optim.min_lr=3e-4 optim.final_lr=3e-4".split(),
    *"train.batch_size=32 data.seq_len=128 data.heldout_fraction=0.015".split(),
    *"grpo.answer_tokens=32 grpo.slots=64 grpo.group_size=8".split(),
    *"checkpoint.every=25 evaluate.every=25 evaluate.answers=600".split(),
  ],
}
GRPO_ITERATIONS = {"grpo": 1000, "grpo_tiny": 200}

RECIPE_PURPOSES = {  # of training a model given, for `--help`
  "sft": "the report's recipe: 2 epochs, cosine from 5e-6 to 1e-6",
  "sft_tiny": "for models like tiny: from 2e-3 to 4e-5, in short rows",
  "sft_small": "for models like small: from 3e-4 to 3e-5",
  "grpo": "the report's objective, with DeepSeek-R1's groups and beta",
  "grpo_tiny": "for models like tiny: short answers and a rate of 3e-4",
}
PURPOSES = {  # by name, for `--help`
  "tiny": "trains in minutes on two cores",
  "nano": "trains in a minute; for reinforcement learning",
  "small": "a night on a laptop, or minutes on an accelerator",
  "v2_lite_16b": "DeepSeek-V2-Lite as published",
  "v2_236b": "DeepSeek-V2 as published",
  "v3_671b": "DeepSeek-V3 as published; its plan: --dry_run",
  "S": "shape of benchmarks",
  "M": "shape of benchmarks, larger",
}
PRESETS = {
  "tiny": TINY,
  "nano": NANO,
  "small": SMALL,
  "v2_lite_16b": V2_LITE_16B,
  "v2_236b": V2_236B,
  "v3_671b": V3_671B,
  "S": S,
  "M": M,
}

"""The published models and our own small ones, as complete runs.

Sizes: arXiv:2412.19437 (V3), arXiv:2405.04434 (V2 and V2-Lite).
"""

from dataclasses import replace

from dsv3_jax import config

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

_V2_MODEL = config.Model(
  vocab_size=102_400,
  d_model=5120,
  n_layers=60,
  n_dense_layers=1,
  dense_ffn_dim=12_288,
  attention=_V3_MLA,
  moe=config.MoE(n_shared=2, ffn_dim=1536),
  # V2's gate is a softmax without bias or renormalization.
  router=config.Router(
    n_experts=160,
    top_k=6,
    n_groups=8,
    top_groups=3,
    score="softmax",
    renormalize=False,
    scale=16.0,
    bias_speed=0.0,
    balance_weight=0.003,
  ),
  mtp=config.MTP(depth=0),
)

V2_236B = replace(
  V3_671B,
  model=_V2_MODEL,
  train=replace(
    V3_671B.train,
    tokens=8_100_000_000_000,
    batch_size=9216,
    micro_batches=72,
    first_batch_size=2304,
    ramp_sizes=3,
  ),
  optim=replace(V3_671B.optim, peak_lr=2.4e-4),
  schedule=replace(V3_671B.schedule, ramp_until=0.0277778),
)

V2_LITE_16B = replace(
  V2_236B,
  model=replace(
    _V2_MODEL,
    d_model=2048,
    n_layers=27,
    dense_ffn_dim=10_944,
    attention=replace(_V3_MLA, n_heads=16, q_rank=0),
    moe=config.MoE(n_shared=2, ffn_dim=1408),
    router=replace(
      _V2_MODEL.router,
      n_experts=64,
      n_groups=1,
      top_groups=1,
      scale=1.0,
      balance_weight=0.001,
    ),
  ),
  train=replace(
    V2_236B.train,
    tokens=5_700_000_000_000,
    batch_size=4608,
    micro_batches=36,
    first_batch_size=0,
  ),
  optim=replace(V2_236B.optim, peak_lr=4.2e-4),
  schedule=replace(V2_236B.schedule, ramp_until=0.0),
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

M = replace(
  S,
  model=replace(
    S.model,
    vocab_size=16_384,
    d_model=512,
    n_layers=12,
    dense_ffn_dim=2048,
    attention=config.MLA(
      n_heads=8, q_rank=256, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64
    ),
    moe=config.MoE(n_shared=1, ffn_dim=256),
    router=replace(S.model.router, n_experts=64, top_k=6),
  ),
  precision=replace(S.precision, tile=128),
)

# Trains in minutes on two cores: every mechanism of V3, on two novels.
TINY = replace(
  S,
  model=replace(
    S.model,
    vocab_size=2048,
    d_model=192,
    n_layers=5,
    dense_ffn_dim=512,
    attention=replace(_S_MLA, n_heads=6, q_rank=96),
    moe=config.MoE(n_shared=1, ffn_dim=96),
    # A few hundred steps: the bias must move faster than in the paper's many.
    router=replace(S.model.router, n_experts=16, bias_speed=0.007),
    # The paper's 0.006 for a width of 7168: std * sqrt(d_model) is the same.
    init_std=0.037,
  ),
  data=config.Data(seq_len=256),
  train=replace(S.train, tokens=573_440),
  optim=config.Optim(peak_lr=2e-3, min_lr=5e-5, final_lr=5e-5),
  schedule=config.Schedule(
    warmup_steps=40,
    constant_until=0.2,
    decay_until=1.0,
    tail_from=1.0,
    bias_update_until=1.0,
    mtp_until=0.5,
  ),
  checkpoint=config.Checkpoint(every=70),
  evaluate=config.Evaluate(every=70),
)

# Overnight on a laptop, or minutes on an accelerator; reads what
# `scripts/prepare_data.py` writes.
SMALL = replace(
  S,
  model=replace(
    S.model,
    vocab_size=32_768,
    router=replace(S.model.router, bias_speed=0.003),
    init_std=0.032,  # scaled to the width as in TINY
  ),
  data=config.Data(
    seq_len=512,
    path="corpus",
    domains=(
      "prose=1,python=2,go=2,docs=2,maths-docs=1,maths-formal=1,chinese=2,"
      "languages=1"
    ),
    heldout_fraction=0.003,
    fim_rate=0.1,
    split_rate=0.1,
  ),
  train=replace(S.train, tokens=19_660_800, batch_size=32, micro_batches=2),
  optim=config.Optim(
    peak_lr=1.5e-3, min_lr=1e-4, final_lr=1e-4, ema_decay=0.99
  ),
  schedule=replace(
    TINY.schedule, warmup_steps=60, constant_until=0.3, mtp_until=0.7
  ),
  evaluate=config.Evaluate(every=300, ema=True),
)

PRESETS = {
  "tiny": TINY,
  "small": SMALL,
  "v2_lite_16b": V2_LITE_16B,
  "v2_236b": V2_236B,
  "v3_671b": V3_671B,
  "S": S,
  "M": M,
}

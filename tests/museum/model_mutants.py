"""Faults of the model and its data that users of others complain of."""

from mutant import Mutant

_ROUTER = "dsv3_jax/model/router.py"
_TESTS = "tests/model/router_test.py::"
_LOSSES = "tests/losses_test.py::LossTest::"

ROUTER = (
  Mutant(
    "MaxText#2494",
    "the router bias is never updated",
    _ROUTER,
    "  return bias + speed * (under.astype(bias.dtype)"
    " - over.astype(bias.dtype))",
    "  return bias",
    f"{_TESTS}GoldenTest::test_bias_step",
  ),
  Mutant(
    "torchtitan#1593",
    "counts are doubled before they move it",
    "dsv3_jax/train.py",
    "  bias = router.update_bias(state.router_bias, stats.load, speed)",
    "  bias = router.update_bias(state.router_bias, stats.load, 2 * speed)",
    "tests/train_test.py::StepTest::"
    "test_bias_moves_once_a_step_by_the_counts_of_the_batch",
  ),
  Mutant(
    "Megatron#7081",
    "counts of tokens in bfloat16 change the sign of the update",
    _ROUTER,
    "  over = load > total // n_experts",
    "  over = load.astype(jnp.bfloat16) > total // n_experts",
    f"{_TESTS}UpdateBiasTest::test_counts_beyond_float32_are_told_apart",
  ),
  Mutant(
    "Megatron#1482",
    "the bias is rounded to bfloat16",
    _ROUTER,
    "  biased = jax.lax.stop_gradient(scores + bias)",
    "  biased = jax.lax.stop_gradient("
    "scores + jax.lax.reduce_precision(bias, 8, 7))",
    f"{_TESTS}SelectTest::test_a_thousandth_of_a_large_bias_decides",
  ),
  Mutant(
    "transformers#45440, flashinfer#2168",
    "masked groups have a score of 0, which wins over negative ones",
    _ROUTER,
    "    groups = jnp.where(selected[..., None], groups, -jnp.inf)",
    "    groups = jnp.where(selected[..., None], groups, 0.0)",
    f"{_TESTS}SelectTest::test_masked_groups_lose_to_negative_scores",
  ),
  Mutant(
    "flashinfer#3803",
    "scores that underflow are divided by their sum, 0",
    _ROUTER,
    "    gates = gates / (gates.sum(-1, keepdims=True) + FLOOR)",
    "    gates = gates / gates.sum(-1, keepdims=True)",
    f"{_TESTS}RouteTest::test_scores_that_underflow_stay_finite",
  ),
  Mutant(
    "Megatron-Bridge#5165",
    "the weight of the balance loss is silently 0",
    _ROUTER,
    "  return cfg.balance_weight * (f * p).sum(-1).mean()",
    "  return 0 * cfg.balance_weight * (f * p).sum(-1).mean()",
    f"{_TESTS}GoldenTest::test_balance_loss",
  ),
)

MODEL = (
  Mutant(
    "transformers#39687, vLLM#26995, sglang#13495",
    "rotary pairs are the halves of a head, not its neighbours",
    "dsv3_jax/model/rope.py",
    "  even, odd = pairs[..., 0], pairs[..., 1]",
    "  even, odd = jnp.split(pairs.reshape(x.shape), 2, -1)",
    "tests/model/rope_test.py::RotateTest::test_matches_complex_multiplication",
  ),
  Mutant(
    "Megatron#1429, optimum-intel#1877",
    "the scale of attention leaves out YaRN's mscale",
    "dsv3_jax/config/model.py",
    "    root_t = 0.1 * self.yarn.mscale * math.log(self.yarn.factor) + 1",
    "    root_t = 0.1 * math.log(self.yarn.factor) + 1",
    "tests/model/mla_test.py::MlaTest::test_temperature_of_v3_golden",
  ),
  Mutant(
    "Megatron#1532",
    "the MTP loss is a sum over depths, not a mean",
    "dsv3_jax/losses.py",
    "      mtp += term(hidden, depth, head) / cfg.mtp.depth",
    "      mtp += term(hidden, depth, head)",
    f"{_LOSSES}test_segments_have_the_mean_of_what_they_predict2",
  ),
  Mutant(
    "MaxText#1525, #1977",
    "MTP joins state and embedding in the wrong order",
    "dsv3_jax/model/mtp.py",
    "  concatenated = jnp.concatenate([ahead, hidden], axis=-1)",
    "  concatenated = jnp.concatenate([hidden, ahead], axis=-1)",
    "tests/model/mtp_test.py::MtpTest::test_matches_a_brute_force_loop0",
  ),
)

DATA = (
  Mutant(
    "flax#136, transformers#12842, Megatron#2570",
    "token ids beyond the vocabulary are taken",
    "dsv3_jax/data/token_file.py",
    "  bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))",
    "  bad = np.flatnonzero(ids < 0)",
    "tests/data/token_file_test.py::CheckIdsTest::test_refused_above",
  ),
  Mutant(
    "SkyRL#2204",
    "files are read in the order of their folder",
    "dsv3_jax/data/text_files.py",
    "  return sorted((f.relative_to(root).as_posix(), f) for f in _walk(root))",
    "  return [(f.relative_to(root).as_posix(), f) for f in _walk(root)]",
    "tests/data/text_files_test.py::"
    "ReadTest::test_listing_order_does_not_matter",
  ),
)

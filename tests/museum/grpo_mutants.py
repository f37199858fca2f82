"""Faults of reinforcement learning: normalisation, KL, advantages, answers."""

from mutant import Mutant

_OBJECTIVES = "dsv3_jax/posttrain/objectives.py"
_BATCH = "dsv3_jax/posttrain/policy_batch.py"
_GRPO = "dsv3_jax/posttrain/grpo.py"
_ROLLOUT = "dsv3_jax/posttrain/rollout.py"
_TESTS = "tests/posttrain/"
_ADVANTAGE = f"{_TESTS}objectives_test.py::AdvantageTest::"
_DIVERGENCE = f"{_TESTS}objectives_test.py::DivergenceTest::"
_LEDGER = f"{_DIVERGENCE}test_estimators_have_the_gradients_of_the_ledger"
_SUM = (
  f"{_TESTS}objectives_test.py::SumTest::"
  "test_no_split_order_or_packing_changes_it"
)
_LOGPROBS = (
  f"{_TESTS}objectives_test.py::TokenLogprobsTest::"
  "test_equals_float64_over_chunks"
)
_MASK = (
  f"{_TESTS}objectives_test.py::MaskTest::"
  "test_is_by_answer_of_mean_and_of_negative_advantage"
)
_EVERY = (
  f"{_TESTS}policy_batch_test.py::BatchTest::test_every_number_is_at_its_token"
)
_PARTS = f"{_TESTS}policy_batches_test.py::"

NORMALISATION = (
  Mutant(
    "ms-swift#10116, #10117, TRL#3021",
    "the loss is divided by the rows of its micro-batch once more",
    _OBJECTIVES,
    "    policy_loss = -(weights * gain).sum()",
    "    policy_loss = -(weights * gain).sum() / len(weights)",
    _SUM,
  ),
  Mutant(
    "open-instruct#1137, #1161, TRL#3187",
    "the mean is over the tokens of a micro-batch, not of the batch",
    _OBJECTIVES,
    "    policy_loss = -(weights * gain).sum()",
    "    policy_loss = -gain.sum() / jnp.maximum(in_loss.sum(), 1)",
    _SUM,
  ),
  Mutant(
    "Automodel#3830",
    "gradients grow with the number of micro-batches",
    "dsv3_jax/train.py",
    "    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)",
    "    grads = jax.tree.map(lambda g: g / share, grads)",
    f"{_TESTS}packed_samples_test.py::PackedTest::"
    "test_equals_single_samples_micro_batches",
  ),
  Mutant(
    "MaxText#4025",
    "the way to aggregate that is set never reaches the loss",
    _BATCH,
    "    lengths, counted, settings.aggregation, settings.answer_tokens",
    '    lengths, counted, "sequence", settings.answer_tokens',
    f"{_TESTS}policy_batch_test.py::BatchTest::"
    "test_weights_are_those_of_the_setting",
  ),
  Mutant(
    "TRL#6365, #6681",
    "answers of groups left out are in the denominator",
    _OBJECTIVES,
    '    "token": lengths.sum(where=counted),',
    '    "token": lengths.sum(),',
    f"{_ADVANTAGE}test_weights_have_one_denominator",
  ),
  Mutant(
    "TRL#6365, #6681",
    "and in that of the mean over answers",
    _OBJECTIVES,
    "  n = counted.sum()",
    "  n = counted.size",
    f"{_ADVANTAGE}test_weights_have_one_denominator",
  ),
)

KL = (
  Mutant(
    "verl#2953, #2983, TRL#4637",
    "k3 as the report writes it, without the ratio: biased",
    _OBJECTIVES,
    '  "weighted_k3": KLEstimator("weighted", "k3", EXACT, EXACT),',
    '  "weighted_k3": KLEstimator("plain", "k3", EXACT, EXACT),',
    _LEDGER,
  ),
  Mutant(
    "TRL#4638, #4967",
    "the ratio that weights the estimator is held fixed",
    _OBJECTIVES,
    '  "weighted": lambda ratio: ratio,',
    '  "weighted": jax.lax.stop_gradient,',
    _LEDGER,
  ),
  Mutant(
    "open-instruct#534, #535",
    "k1 in the loss: the reference has no effect, and nobody is told",
    _OBJECTIVES,
    '  "k1": KLEstimator("plain", "k1", INERT, BIASED),',
    '  "k1": KLEstimator("plain", "k1", EXACT, EXACT),',
    f"{_TESTS}objectives_test.py::NotesTest::"
    "test_says_what_is_biased_or_does_nothing0",
  ),
  Mutant(
    "TRL#6503",
    "an inert estimator is the default",
    "dsv3_jax/config/grpo.py",
    "    *KL,",
    "    *KL[1:],",
    f"{_TESTS}objectives_test.py::NotesTest::test_defaults_have_none",
  ),
  Mutant(
    "TRL#6594",
    "the ratio of the whole answer weights each of its tokens",
    _OBJECTIVES,
    "  weight = _WEIGHTINGS[estimator.weighting](_exp(policy - sampler))",
    "  weight = _WEIGHTINGS[estimator.weighting]("
    "_exp((policy - sampler).sum(-1, keepdims=True)))",
    f"{_DIVERGENCE}"
    "test_gradient_over_answers_is_that_of_the_stated_expectation",
  ),
  Mutant(
    "NeMo-RL ClippedPGLossFn",
    "a clamp of k3 has no gradient where the reference is far",
    _OBJECTIVES,
    '  "k3": lambda x: jnp.expm1(jnp.minimum(-x, _LARGEST_LOG)) + x,',
    '  "k3": lambda x: jnp.clip(jnp.expm1(jnp.minimum(-x, 40)) + x, -10, 10),',
    f"{_DIVERGENCE}test_k3_pulls_back_from_far_away",
  ),
  Mutant(
    "prime-rl#2972",
    "exp of a log ratio overflows",
    _OBJECTIVES,
    "  return jnp.exp(jnp.minimum(log_ratio, _LARGEST_LOG))",
    "  return jnp.exp(log_ratio)",
    f"{_TESTS}objectives_test.py::RangeTest::test_no_ratio_overflows",
  ),
  Mutant(
    "prime-rl#2973",
    "what is left out is multiplied by 0, and 0 * inf is NaN",
    _OBJECTIVES,
    "      jnp.where(in_loss, a, 0)\n",
    "      a\n",
    _SUM,
  ),
)

ADVANTAGES = (
  Mutant(
    "verl#6348",
    "epsilon inside the root flattens small spreads",
    _OBJECTIVES,
    "  return _mean(squares, valid, axis) ** 0.5",
    "  return (_mean(squares, valid, axis) + 1e-6) ** 0.5",
    f"{_ADVANTAGE}test_are_as_defined",
  ),
  Mutant(
    "TRL#5773, ms-swift#8123",
    "one reward of NaN makes a group NaN, or silent",
    _OBJECTIVES,
    "  valid = ~np.isnan(rewards)",
    "  valid = np.ones_like(rewards, bool)",
    f"{_ADVANTAGE}test_failed_reward_is_as_if_it_were_not_there",
  ),
  Mutant(
    "NeMo-RL#4158",
    "equal rewards have a spread of rounding, which they are divided by",
    _OBJECTIVES,
    "  return np.where(n > 0, np.clip(mean, low, high), np.nan)",
    "  return np.where(n > 0, mean, np.nan)",
    f"{_ADVANTAGE}test_is_0_without_another_answer_or_spread",
  ),
  Mutant(
    "verl#7581",
    "a group of one answer is taken, whose advantage is 0",
    "dsv3_jax/config/grpo.py",
    'group_size: int = number(16, low=2, doc="answers to a question")',
    'group_size: int = number(16, low=1, doc="answers to a question")',
    f"{_PARTS}PartsTest::test_one_answer_is_no_group",
  ),
  Mutant(
    "NeMo-RL#3794",
    "after groups are divided, answers have the advantages of others",
    _GRPO,
    "        advantages[groups].reshape(-1),",
    "        advantages[:n].reshape(-1),",
    f"{_PARTS}PartsTest::test_each_part_has_the_advantages_of_its_own_answers",
  ),
  Mutant(
    "NeMo-RL#3794",
    "in packed rows an answer has the advantage of another one",
    _BATCH,
    '    values["advantages"][row, at] = advantages[i]',
    '    values["advantages"][row, at] = advantages[row]',
    _EVERY,
  ),
  Mutant(
    "verl-recipe#125, NeMo-RL#2431",
    "groups are filtered by the reward with its penalty of length",
    _GRPO,
    "        raw, settings.filter_low, settings.filter_high",
    "        shaped, settings.filter_low, settings.filter_high",
    f"{_PARTS}PartsTest::"
    "test_groups_are_filtered_by_what_the_answers_are_worth",
  ),
)

SAMPLER = (
  Mutant(
    "TRL#3029, #4159",
    "the trainer's distribution has no temperature",
    _OBJECTIVES,
    "    logits /= temperature",
    "    logits /= 1.0",
    _LOGPROBS,
  ),
  Mutant(
    "TRL#3029, #4159",
    "the objective does not pass it on",
    _OBJECTIVES,
    "      settings.temperature,",
    "      1.0,",
    _SUM,
  ),
  Mutant(
    "TRL#6789, #7269",
    "the trainer's distribution has all tokens, not those that top-p kept",
    _OBJECTIVES,
    '    kept = targets.get("kept")',
    "    kept = None",
    _SUM,
  ),
  Mutant(
    "prime-rl#3235, #3431, ms-swift#8442",
    "what the sampler kept never reaches the trainer",
    _BATCH,
    "  if settings.replay_mask and rollouts[0].kept is not None:",
    "  if False:",
    f"{_TESTS}policy_batch_test.py::BatchTest::"
    "test_what_is_kept_reaches_the_batch",
  ),
  Mutant(
    "TRL#4303",
    "logits of the head are rounded to bfloat16",
    _OBJECTIVES,
    "      x, head.astype(x.dtype), preferred_element_type=jnp.float32",
    "      x, head.astype(x.dtype), preferred_element_type=jnp.bfloat16",
    _LOGPROBS,
  ),
  Mutant(
    "SkyRL#1315",
    "the old policy is the new one, so that no clip ever acts",
    _OBJECTIVES,
    '      old = jnp.where(in_loss, targets["old_logprobs"], 0)',
    "      old = jax.lax.stop_gradient(policy)",
    _SUM,
  ),
  Mutant(
    "TRL#3029",
    "the sampler tells log-probabilities of the model, not of its settings",
    "dsv3_jax/infer/sampling.py",
    "  logits = logits / jnp.where(temperature > 0, temperature, 1)",
    "  logits = logits / 1",
    "tests/infer/trace_test.py::StepTest::"
    "test_probabilities_are_of_the_sampling_settings_and_kept_are_bits",
  ),
)

MASK = (
  Mutant(
    "slime#1917, miles#1127",
    "the off-policy mask is per token, not per answer",
    _OBJECTIVES,
    "  return (advantage < 0) & jnp.take_along_axis(far, segments, axis=1)",
    "  return (advantage < 0) & (away > threshold)",
    _MASK,
  ),
  Mutant(
    "TRL#6095",
    "it is broadcast over the rows",
    _OBJECTIVES,
    "  return (advantage < 0) & jnp.take_along_axis(far, segments, axis=1)",
    "  return (advantage < 0) & jnp.take_along_axis(far, segments, axis=1)"
    ".any(0, keepdims=True)",
    _MASK,
  ),
  Mutant(
    "TRL#4857",
    "it compares the log-probabilities of the old policy, not the sampler's",
    _OBJECTIVES,
    "      policy, sampler, advantage, data, settings.mask_threshold",
    "      policy, old, advantage, data, settings.mask_threshold",
    _SUM,
  ),
)

ANSWERS = (
  Mutant(
    "tunix dapo_learner:125",
    "the penalty of length counts characters",
    _GRPO,
    "    lengths = np.array([len(r.answer) for r in one.rollouts])",
    "    lengths = np.array([len(r.text) for r in one.rollouts])",
    f"{_PARTS}PartsTest::test_the_penalty_of_length_counts_tokens",
  ),
  Mutant(
    "SkyRL#1319, TRL#7039",
    "the last token decides whether an answer was cut",
    _ROLLOUT,
    "      ended = event.finish_reason == engine.STOP",
    "      ended = event.token == tokenizer.EOS_ID",
    f"{_PARTS}GenerateTest::test_answers_are_the_ids_that_were_drawn",
  ),
  Mutant(
    "rllm#816, #898, prime-rl#1334, verl#6719",
    "answers are decoded and encoded again",
    _ROLLOUT,
    "        np.asarray(answers[i], np.int32),",
    "        np.asarray(tok.encode(text).ids, np.int32),",
    f"{_PARTS}GenerateTest::test_answers_are_the_ids_that_were_drawn",
  ),
  Mutant(
    "MemGen#33",
    "the mask of the loss is empty, and the loss 0",
    _BATCH,
    "    supervised[row, begin : whole.stop] = True",
    "    supervised[row, begin : whole.stop] = False",
    _EVERY,
  ),
  Mutant(
    "CoursIA#11304",
    "a prompt of plain text has no chat template",
    "dsv3_jax/posttrain/questions.py",
    "    return chat.encode(self.tok, [message], template=self.template)",
    "    return self.tok.encode(problem.prompt).ids",
    f"{_PARTS}QuestionTest::test_a_prompt_is_in_the_template",
  ),
  Mutant(
    "verl#5635",
    "a reward that fails is 0, as that of a wrong answer",
    "dsv3_jax/posttrain/rewards/reward.py",
    '    return failed("; ".join(wrong), **parts)',
    "    return Reward(0.0, parts)",
    f"{_TESTS}reward_test.py::ScoreAllTest::"
    "test_one_failure_moves_no_other_and_is_never_zero",
  ),
  Mutant(
    "open-r1#255, #436, #474",
    "what failed is 0 in the curve, so that nobody sees why it is flat",
    _GRPO,
    "        r.value if one.ended or r.error else 0.0",
    "        np.nan_to_num(r.value) if one.ended else 0.0",
    f"{_PARTS}RewardTest::test_failed_is_not_wrong_and_cut_is",
  ),
)

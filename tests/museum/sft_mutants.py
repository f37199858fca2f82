"""Faults of fine-tuning, of reward models, and of what samples are made of."""

from mutant import Mutant

_CONVERSATIONS = "dsv3_jax/data/conversations.py"
_BATCH = "dsv3_jax/data/batch.py"
_LOSSES = "dsv3_jax/losses.py"
_TESTS = "tests/data/conversations_test.py::"
_HEADERS = (
  f"{_TESTS}SamplesTest::"
  "test_first_answer_token_and_end_are_supervised_and_headers_are_not"
)
_MAKE = "tests/data/batch_test.py::MakeBatchTest::"
_PAIRS = "tests/losses_pairs_test.py::PairTest::"

SAMPLES = (
  Mutant(
    "marin#7237",
    "no token is supervised",
    _CONVERSATIONS,
    "    supervised += [True] * len(answer)",
    "    supervised += [False] * len(answer)",
    _HEADERS,
  ),
  Mutant(
    "Megatron-Bridge#3359, #3927",
    "all tokens are",
    _CONVERSATIONS,
    "    supervised += [False] * (len(context) - len(ids))",
    "    supervised += [True] * (len(context) - len(ids))",
    _HEADERS,
  ),
  Mutant(
    "verl#3287, OpenRLHF#973",
    "the first token of an answer is not supervised",
    _CONVERSATIONS,
    "    supervised += [True] * len(answer)",
    "    supervised += [False] + [True] * (len(answer) - 1)",
    _HEADERS,
  ),
  Mutant(
    "nanochat#20, #570, Automodel#3739",
    "the end token is not",
    _CONVERSATIONS,
    "    supervised += [True] * len(answer)",
    "    supervised += [True] * (len(answer) - 1) + [False]",
    _HEADERS,
  ),
  Mutant(
    "MaxText#3284",
    "the header that the template writes before an answer is",
    _CONVERSATIONS,
    "    supervised += [False] * (len(context) - len(ids))",
    "    supervised += [False] * (len(context) - len(ids) - 1) + [True]",
    _HEADERS,
  ),
  Mutant(
    "TRL#4970, #6357",
    "the end token is that of padding, and no answer learns to end",
    _CONVERSATIONS,
    "  if end == tokenizer.PAD_ID:",
    "  if False:",
    f"{_TESTS}SamplesTest::test_an_end_token_that_is_padding_is_refused",
  ),
  Mutant(
    "TRL#4970, #6357",
    "end tokens are taken for padding by their id",
    _BATCH,
    "  ignored = there == 0",
    "  ignored = (there == 0) | (labels == 1)",
    f"{_MAKE}test_no_label_is_in_another_segment",
  ),
  Mutant(
    "NeMo-RL#2821, #2844",
    "an answer follows a history that its template would not write",
    _CONVERSATIONS,
    "    if not ids or context[: len(ids)] != ids:",
    "    if not ids:",
    f"{_TESTS}InvariantTest::test_trained_ids_are_those_that_the_engine_sees",
  ),
  Mutant(
    "NeMo-Aligner#57",
    "a sample that is longer than a row is taken",
    _CONVERSATIONS,
    "  if longest and n > longest:",
    "  if False:",
    "tests/data/conversation_corpus_test.py::CorpusTest::"
    "test_all_that_are_longer_than_a_row_are_named",
  ),
  Mutant(
    "reward-bench#164",
    "a sample may begin with BOS twice",
    _CONVERSATIONS,
    "    if ids[0] != tokenizer.BOS_ID or ids.count(tokenizer.BOS_ID) > 1:",
    "    if ids[0] != tokenizer.BOS_ID:",
    f"{_TESTS}SamplesTest::test_bos_must_stand_at_the_beginning_alone1",
  ),
)

PACKING = (
  Mutant(
    "TRL#805, #1230, torchforge#546, functionary#265",
    "packed samples see each other",
    _BATCH,
    "  return Batch(tokens, labels, here if segment_mask else None, here != 0)",
    "  return Batch(tokens, labels, here * 0 + 1, here != 0)",
    f"{_MAKE}test_no_label_is_in_another_segment",
  ),
  Mutant(
    "marin#7087",
    "the last token of a sample predicts the first of the next one",
    _BATCH,
    "    ignored |= there != here",
    "    pass",
    f"{_MAKE}test_no_label_is_in_another_segment",
  ),
  Mutant(
    "nanoVLM#201",
    "positions go on over the samples of a row",
    "dsv3_jax/model/rope.py",
    "  return index[None] - starts",
    "  return index[None] - 0 * starts",
    "tests/posttrain/packed_samples_test.py::PositionTest::"
    "test_positions_begin_anew_in_each_segment",
  ),
  Mutant(
    "ms-swift#8192, miles#3219, Pai-Megatron#559",
    "MTP predicts across the end of an answer",
    _LOSSES,
    "      predicted = predicted[..., 1:] & counted[..., :-k]",
    "      predicted = predicted[..., 1:]",
    "tests/posttrain/packed_samples_test.py::LabelTest::"
    "test_mtp_target_lies_in_the_answer_of_the_label_before",
  ),
  Mutant(
    "transformers#34191, torchtune#1875, nanochat#59, verl#3332",
    "the loss is a mean over rows of the means of their tokens",
    _LOSSES,
    "  predicted, n = counted, counted.sum()",
    "  predicted, n = counted, counted.sum(-1, keepdims=True)",
    "tests/losses_test.py::LossTest::"
    "test_segments_have_the_mean_of_what_they_predict0",
  ),
)

REWARD_MODELS = (
  Mutant(
    "gpt-neox#1285",
    "the score is read one token before the end token",
    _LOSSES,
    "  ends = jnp.pad(labels[:, :-1] != IGNORE, ((0, 0), (1, 0)))",
    "  ends = labels != IGNORE",
    f"{_PAIRS}test_scores_are_read_at_the_end_tokens",
  ),
  Mutant(
    "trlx#474",
    "the score is read at the end of the row, as if padding were on the left",
    _LOSSES,
    "  ends = jnp.pad(labels[:, :-1] != IGNORE, ((0, 0), (1, 0)))",
    "  ends = jnp.zeros_like(labels, bool).at[:, -1].set(True)",
    f"{_PAIRS}test_scores_are_read_at_the_end_tokens",
  ),
)

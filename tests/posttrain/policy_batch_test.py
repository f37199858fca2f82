"""Rows of rollouts: every number lies at its token, whatever the packing."""

import numpy as np
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.data import tokenizer
from dsv3_jax.data.batch import IGNORE
from dsv3_jax.errors import InputError
from dsv3_jax.posttrain import policy_batch, rollout

SEQ_LEN = 24
RUN = testing.run(
  "data.source=tasks",
  "data.segment_mask=true",
  f"data.seq_len={SEQ_LEN}",
  "train.batch_size=2",
  "grpo.prompts=2",
)
MODEL = RUN.model
N_BYTES = -(-MODEL.vocab_size // 8)


def make_rollout(rng, i, kept=True):
  p, n = int(rng.integers(3, 9)), int(rng.integers(1, 6))
  prompt, answer = rng.integers(8, 200, p), rng.integers(8, 200, n)
  prompt[0] = tokenizer.BOS_ID
  k, e = MODEL.router.top_k, MODEL.router.n_experts
  shape = p + n - 1, MODEL.n_routers, k
  experts = np.argsort(rng.random((*shape[:2], e)))[..., :k]
  read = np.concatenate([prompt, answer])[:-1]
  return rollout.Rollout(
    prompt.astype(np.int32),
    answer.astype(np.int32),
    bool(i % 2),
    np.float32(-rng.random(n)),
    rng.integers(0, 256, (n, N_BYTES), np.uint8) if kept else None,
    experts.astype(np.int32),
    read.astype(np.int32),
    f"answer {i}",
  )


def rollouts(n=12, kept=True):
  rng = np.random.default_rng(3)
  return [make_rollout(rng, i, kept) for i in range(n)]


class BatchTest(parameterized.TestCase):
  def make(self, given, *settings, counted=None):
    counted = np.ones(len(given), bool) if counted is None else counted
    run = config.override(RUN, *settings)
    advantages = np.arange(len(given), dtype=float) - 3
    return policy_batch.make(given, advantages, counted, run)

  def by_rollout(self, batch, name, given):
    """Returns the values of each rollout's answer, found by its token ids."""
    values = batch.routes if name == "routes" else batch.targets[name]
    last = batch.labels[:, -1:]
    rows = np.concatenate([batch.tokens, np.maximum(last, 0)], 1)
    places = {}
    for row, at in np.argwhere(batch.tokens == tokenizer.BOS_ID):
      for i, one in enumerate(given):
        ids = np.concatenate([one.prompt, one.answer])
        if np.array_equal(rows[row, at : at + len(ids)], ids):
          places[i] = row, at + len(one.prompt) - 1
    self.assertEqual(sorted(places), list(range(len(given))))
    found = []
    for i, one in enumerate(given):
      row, first = places[i]
      span = slice(first, first + len(one.answer))
      np.testing.assert_array_equal(batch.labels[row, span], one.answer)
      found.append(values[row, span])
    return found

  def test_every_number_is_at_its_token(self):
    given = rollouts()
    batch = self.make(given)
    logprobs = self.by_rollout(batch, "sampler_logprobs", given)
    kept = self.by_rollout(batch, "kept", given)
    routes = self.by_rollout(batch, "routes", given)
    advantages = self.by_rollout(batch, "advantages", given)
    for i, one in enumerate(given):
      np.testing.assert_array_equal(advantages[i], i - 3)
      np.testing.assert_array_equal(logprobs[i], one.logprobs)
      np.testing.assert_array_equal(kept[i], one.kept)
      np.testing.assert_array_equal(
        routes[i], one.routes[len(one.prompt) - 1 :]
      )
    n_labels = (batch.labels != IGNORE).sum()
    self.assertEqual(n_labels, sum(len(one.answer) for one in given))
    self.assertEqual((batch.targets["weights"] != 0).sum(), n_labels)

  def test_what_is_kept_reaches_the_batch(self):
    given = rollouts(2)
    self.assertIn("kept", self.make(given).targets)
    without = self.make(given, "grpo.replay_mask=false")
    self.assertNotIn("kept", without.targets)
    self.assertNotIn("kept", self.make(rollouts(2, kept=False)).targets)

  @parameterized.parameters("sequence", "token", "fixed")
  def test_order_and_rows_change_no_weight(self, aggregation):
    given, setting = rollouts(), f"grpo.aggregation={aggregation}"
    batch = self.make(given, setting)
    wide = self.make(given, setting, "data.seq_len=100", "train.batch_size=1")
    for a, b in zip(
      self.by_rollout(batch, "weights", given),
      self.by_rollout(wide, "weights", given),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)

  def test_weights_are_those_of_the_setting(self):
    given = rollouts(5)
    lengths = [len(one.answer) for one in given]
    for aggregation, expected in (
      ("sequence", [1 / 5 / n for n in lengths]),
      ("token", [1 / sum(lengths)] * 5),
      ("fixed", [1 / 5 / 7] * 5),
    ):
      setting = f"grpo.aggregation={aggregation}"
      batch = self.make(given, setting, "grpo.answer_tokens=7")
      found = self.by_rollout(batch, "weights", given)
      for weights, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(weights, value, rtol=1e-6)

  def test_what_is_not_counted_is_in_no_denominator(self):
    given = rollouts()
    counted = np.arange(len(given)) % 3 > 0
    batch = self.make(given, counted=counted)
    alone = self.make([one for one, c in zip(given, counted, strict=True) if c])
    weights = self.by_rollout(batch, "weights", given)
    self.assertEqual([bool(w.all()) for w in weights], counted.tolist())
    for name in ("weights", "token_share"):
      self.assertAlmostEqual(
        batch.targets[name].sum(), alone.targets[name].sum(), places=5
      )
    self.assertAlmostEqual(batch.targets["token_share"].sum(), 1, places=5)

  def test_rows_grow_and_nothing_is_left_out(self):
    batch = self.make(rollouts(40))
    self.assertIn(len(batch.tokens), (16, 32))  # 2 doubled until all have room
    self.assertEqual((batch.tokens == tokenizer.BOS_ID).sum(), 40)

  def test_one_answer_of_one_token(self):
    one = rollouts(1)[0]
    one = rollout.Rollout(
      one.prompt,
      one.answer[:1],
      True,
      one.logprobs[:1],
      None,
      one.routes[: len(one.prompt)],
      one.route_tokens[: len(one.prompt)],
      "",
    )
    batch = self.make([one])
    self.assertEqual((batch.labels != IGNORE).sum(), 1)
    self.assertNotIn("kept", batch.targets)

  def test_a_shifted_route_is_an_error(self):
    given = rollouts()
    one = given[4]
    given[4] = rollout.Rollout(
      **{
        **vars(one),
        "routes": np.roll(one.routes, 1, 0),
        "route_tokens": np.roll(one.route_tokens, 1),
      }
    )
    with self.assertRaisesRegex(ValueError, "the route of another token"):
      self.make(given)

  def test_a_missing_and_a_doubled_route_are_errors(self):
    for value, text in ((-1, "no route"), (None, "an expert twice")):
      given = rollouts()
      routes = given[2].routes.copy()
      routes[1, 0] = routes[1, 0, 0] if value is None else value
      given[2] = rollout.Rollout(**{**vars(given[2]), "routes": routes})
      with self.assertRaisesRegex(ValueError, text):
        self.make(given)


class FileTest(absltest.TestCase):
  def test_what_is_read_is_what_was_written(self):
    path = testing.folder(self) / "rollouts" / "0.npz"
    for kept in (True, False):
      one = rollout.Iteration(
        rollouts(4, kept),
        np.array([[1.0, np.nan], [0.5, 0.0]]),
        7,
        ["1+1=", "2+2="],
        ["chain_sum"] * 2,
        {"reward_failed/exact: timeout": 1.0},
      )
      rollout.save(path, one)
      read = rollout.load(path)
      self.assertEqual(read.policy_step, 7)
      self.assertEqual(read.questions, one.questions)
      self.assertEqual(read.figures, one.figures)
      np.testing.assert_array_equal(read.rewards, one.rewards)
      for a, b in zip(read.rollouts, one.rollouts, strict=True):
        for name, value in vars(b).items():
          np.testing.assert_array_equal(getattr(a, name), value, name)

  def test_a_damaged_file_is_named(self):
    path = testing.folder(self) / "3.npz"
    path.write_bytes(b"PK\x03\x04 torn")
    with self.assertRaisesRegex(InputError, "3.npz: cannot be read"):
      rollout.load(path)

  def test_seeds_differ(self):
    places = [
      (s, i, q, a)
      for s in (0, 1)
      for i in (0, 1)
      for q in (0, 1)
      for a in (0, 1)
    ]
    self.assertLen({rollout.seed_of(*place) for place in places}, 16)


if __name__ == "__main__":
  absltest.main()

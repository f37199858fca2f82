"""Tests of the optimizer step and of the loop around it."""

import functools
import itertools
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest
from absl.testing import parameterized

from dsv3_jax import checkpoint
from dsv3_jax import losses
from dsv3_jax import schema
from dsv3_jax import train
from dsv3_jax.data import stream
from dsv3_jax.model import router
from experiments import runner

RUN = testing.run()
PROSE = "It was a bright cold day, and {} clocks were striking thirteen.\n"


@functools.cache
def compiled_step():
  return train.make_step(RUN)


def fresh_state(run=RUN):
  """A first state; parameters do not depend on how a step is computed."""
  return jax.jit(train.init_state, static_argnums=0)(run, jax.random.key(7))


def batch_of(run=RUN, seed=0):
  cfg = run.model
  shape = (run.train.batch_size, run.data.seq_len + 1)
  rows = testing.tokens(*shape, vocab_size=cfg.vocab_size, seed=seed)
  rows = rows.reshape(run.train.micro_batches, -1, shape[1])
  return losses.batch(rows, cfg.vocab_size)


def host(state):
  """A copy that outlives donation, the key as integers."""
  return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def assert_same(actual, expected):
  """Equal bit for bit, in dtype too."""
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  dtypes = [
      [leaf.dtype for leaf in jax.tree.leaves(tree)]
      for tree in (actual, expected)
  ]
  assert dtypes[0] == dtypes[1], dtypes


class StepTest(absltest.TestCase):

  def test_moves_everything_that_it_should(self):
    before = host(fresh_state())
    state, metrics = compiled_step()(fresh_state(), batch_of())
    after, metrics = host(state), jax.device_get(metrics)
    for name, value in metrics.items():
      self.assertTrue(np.isfinite(value).all(), name)
    old, new = map(schema.paths, (before.params, after.params))
    for name, value in new.items():
      self.assertTrue(np.isfinite(value).all(), name)
      self.assertFalse(np.array_equal(value, old[name]), name)
    self.assertEqual((after.step, after.skipped), (1, 0))
    np.testing.assert_array_equal(after.key, before.key)
    # Untrained and nearly uniform: within a few tenths of a guess.
    guess = np.log(RUN.model.vocab_size)
    self.assertLess(abs(metrics["main_loss"] - guess), 0.5)
    expected = metrics["main_loss"] + metrics["balance_loss"]
    expected += RUN.model.mtp.weight * metrics["mtp_loss"]
    self.assertAlmostEqual(metrics["loss"], expected, delta=4 * testing.EPS * 8)

  def test_bias_moves_once_a_step_by_the_counts_of_the_batch(self):
    cfg = RUN.model
    state, expected = fresh_state(), np.zeros((2, 8), np.float32)
    for seed in range(2):
      state, metrics = compiled_step()(state, batch_of(seed=seed))
      load = np.asarray(metrics["load"])
      tokens = RUN.train.batch_size * (RUN.data.seq_len - np.arange(2))
      np.testing.assert_array_equal(load.sum(-1), tokens * cfg.router.top_k)
      mean = load.mean(-1, keepdims=True)
      speed = np.float32(cfg.router.bias_speed)
      expected += speed * np.sign(mean - load).astype(np.float32)
      np.testing.assert_array_equal(state.router_bias, expected)
    self.assertTrue(expected.any())

  def test_a_step_that_is_not_finite_changes_only_the_counters(self):
    state, _ = compiled_step()(fresh_state(), batch_of())
    poisoned = state.params["head"].at[0, 0].set(jnp.nan)
    state = state.replace(params=state.params | {"head": poisoned})
    before = host(state)
    state, metrics = compiled_step()(state, batch_of(seed=1))
    after = host(state)
    self.assertFalse(metrics["finite"])
    self.assertTrue(np.ptp(metrics["load"]))  # the bias had reason to move
    self.assertEqual((after.step, after.skipped), (2, 1))
    assert_same(after, before.replace(step=after.step, skipped=after.skipped))


class SplitTest(parameterized.TestCase):

  @staticmethod
  @functools.cache
  def gradients(remat, micro_batches):
    run = testing.run(
        f"train.remat={remat}", f"train.micro_batches={micro_batches}"
    )
    state = fresh_state()
    bias = 0.01 * testing.normal(*state.router_bias.shape, seed=3)
    state = state.replace(router_bias=bias)
    compute = jax.jit(train.gradients, static_argnames="run")
    grads, terms, load = compute(state, batch_of(run), run=run)
    bias = router.update_bias(bias, load, run.model.router.bias_speed)
    return grads, terms, load, bias

  @parameterized.parameters(
      ("block", 1), ("block", 2), ("none", 2), ("none", 4), ("none", 8)
  )
  def test_remat_and_micro_batches_change_no_decision(self, remat, n):
    grads, terms, load, bias = self.gradients(remat, n)
    want_grads, want_terms, want_load, want_bias = self.gradients("none", 1)
    np.testing.assert_array_equal(load, want_load)
    np.testing.assert_array_equal(bias, want_bias)
    # Sums of the same terms in another order: 64 tokens, and the longest way
    # back through two blocks and the MTP module, 3 * 100 terms.
    testing.assert_close((grads, terms), (want_grads, want_terms), 64 + 300)


class ResumeTest(absltest.TestCase):

  def test_n_steps_and_n_more_are_2n_steps(self):
    n = 3
    self.enter_context(
        mock.patch.object(train, "make_step", lambda *_: compiled_step())
    )
    folder = pathlib.Path(self.create_tempdir())
    text = folder / "text.txt"
    text.write_text("".join(PROSE.format(i) for i in range(100)))
    run = testing.run(f"data.path={text}")
    data = stream.prepare(run.data, run.model.vocab_size, folder / "data")

    def fit(state, stop, save=lambda state: None):
      first, fed = int(state.step), []

      def batches():
        for batch in runner.micro_batches(data, run, 5, first):
          fed.append(batch.tokens)
          yield batch

      state = train.fit(
          state,
          run,
          batches(),
          stop,
          report=lambda *_: None,
          evaluate=lambda *_: None,
          save=save,
      )
      return state, np.array(fed)

    whole, all_fed = fit(fresh_state(), 2 * n)

    checkpoints = checkpoint.manager(folder / "checkpoints", run.checkpoint)
    save = lambda state: checkpoint.save(checkpoints, state, {})
    _, first_fed = fit(fresh_state(), n, save)
    checkpoints.close()
    checkpoints = checkpoint.manager(folder / "checkpoints", run.checkpoint)
    state, _ = checkpoint.restore(checkpoints, run, n)
    parts, second_fed = fit(state, 2 * n)
    checkpoints.close()

    assert_same(host(parts), host(whole))
    np.testing.assert_array_equal(
        np.concatenate([first_fed, second_fed]), all_fed
    )
    self.assertFalse(np.array_equal(first_fed, second_fed))


class FitTest(absltest.TestCase):

  def test_reports_each_step_before_what_follows_it(self):
    run = testing.run("checkpoint.every=2", "evaluate.every=3")
    done = itertools.count(1)
    calls = []

    def fake_step(state, batch):
      calls.append(("start", batch))
      return state, next(done)

    with mock.patch.object(train, "make_step", lambda *_: fake_step):
      train.fit(
          mock.Mock(step=0),
          run,
          itertools.count(1),
          5,
          report=lambda step, metrics: calls.append(("report", step, metrics)),
          evaluate=lambda _: calls.append("evaluate"),
          save=lambda _: calls.append("save"),
      )
    reports = [call[1:] for call in calls if call[0] == "report"]
    self.assertEqual(reports, [(i, i) for i in range(1, 6)])
    # Step 2 starts before the host looks at step 1; what is saved or evaluated
    # has been reported, and the last step is both.
    expected = [("start", 1), ("start", 2), ("report", 1, 1), ("report", 2, 2)]
    expected += ["save", ("start", 3), ("report", 3, 3), "evaluate"]
    expected += [("start", 4), ("report", 4, 4), "save"]
    expected += [("start", 5), ("report", 5, 5), "evaluate", "save"]
    self.assertEqual(calls, expected)


if __name__ == "__main__":
  absltest.main()

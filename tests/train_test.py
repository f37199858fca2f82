"""Tests of the optimizer step and of the loop around it."""

import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import testing
from absl.testing import absltest, parameterized
from jax.extend import core

from dsv3_jax import losses, optim, param_spec, train
from dsv3_jax.checkpoint import checkpointer
from dsv3_jax.data import loader, prepare
from dsv3_jax.data.batch import make_batch
from dsv3_jax.model import moe, router
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import loop
from dsv3_jax.trainer.loop import global_batches

RUN = testing.run()
MESH = device_mesh.make_mesh({"data": 2})
PROSE = "It was a bright cold day, and {} clocks were striking thirteen.\n"


def equations(jaxpr):
  """All equations of a program, those of its loops and functions too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from equations(inner)


@functools.cache
def compiled_step():
  return train.make_step(RUN, MESH)


def first_state(**changes):
  state = testing.state(RUN)
  state = state.replace(params=state.params | changes)
  return jax.device_put(state, train.shardings(RUN, MESH))


def placed(seed=0):
  n_rows = RUN.train.micro_batch_size
  batch = batch_of(seed=seed)
  return device_mesh.make_global_batch(batch, n_rows, MESH, dim=1)


def batch_of(run=RUN, seed=0):
  cfg = run.model
  shape = (run.train.batch_size, run.data.seq_len + 1)
  rows = testing.tokens(*shape, vocab_size=cfg.vocab_size, seed=seed)
  rows = rows.reshape(run.train.micro_batches, -1, shape[1])
  return make_batch(rows)


# Ways to divide a batch: settings, and sizes of a mesh.
SPLITS = (
  ((), {}),
  (("train.micro_batches=4",), {}),
  (("parallel.layout=fsdp", "parallel.rounds=many"), {"data": 2, "expert": 2}),
  (("parallel.dispatch=allgather",), {"node": 2, "expert": 2}),
  ((), {"data": 2, "model": 2}),
  (("train.micro_batches=4", "parallel.schedule=dualpipev"), {"pipe": 2}),
)
SUMS = "cumsum", "psum", "reduce_scatter", "reduce_sum", "scatter-add"


class SumsTest(parameterized.TestCase):
  """Sums over tokens, micro-batches, devices and stages are in float32."""

  @parameterized.parameters(*SPLITS)
  def test_none_is_in_bfloat16(self, *split):
    self.check_program("bf16", *split)

  @parameterized.parameters(*SPLITS)
  @pytest.mark.slow
  def test_nor_in_fp8(self, *split):
    self.check_program("fp8", *split)

  def check_program(self, recipe, settings, sizes):
    """No sum of a step is in bfloat16, in its program."""
    run = testing.run(
      "n_layers=4",
      "d_model=32",
      "moe.ffn_dim=32",
      "attention.v_dim=16",
      "precision.tile=8",
      f"precision.recipe={recipe}",
      *settings,
    )
    step = train.trace_step(run, device_mesh.make_mesh(sizes))
    sums = [
      eqn
      for eqn in equations(step.jaxpr.jaxpr)
      if eqn.primitive.name.startswith(SUMS)
    ]
    self.assertNotEmpty(sums)
    for eqn in sums:
      for out in eqn.outvars:
        self.assertNotEqual(out.aval.dtype, jnp.bfloat16, eqn)

  @parameterized.parameters(*SPLITS)
  @pytest.mark.slow
  def test_many_tokens_however_they_are_divided(self, settings, sizes):
    """Gradients in bfloat16 of 16,384 tokens, against those in float32."""
    found = skewed_gradients(
      ("precision.recipe=bf16", *settings), tuple(sizes.items())
    )
    want = skewed_gradients((), ())
    for path, g in want.items():
      ratio = np.linalg.norm(found[path]) / np.linalg.norm(g)
      self.assertBetween(ratio, 0.97, 1.03, path)
    # A few roundings of 2^-9 each; a running sum in bfloat16 loses the half of
    # token 5, which occurs 5000 times.
    for i in range(5, 10):
      error = found["embed"][i] - want["embed"][i]
      share = np.linalg.norm(error) / np.linalg.norm(want["embed"][i])
      self.assertLess(share, 0.02, i)


@functools.cache
def skewed_gradients(settings, sizes):
  """Gradients of 16,384 tokens, some of which are far more frequent."""
  run = testing.run(
    "n_layers=4",
    "d_model=32",
    "data.seq_len=512",
    "train.batch_size=32",
    "train.tokens=1e6",
    # All experts of every token: no rounding moves a token elsewhere.
    "router.top_k=8",
    "router.n_groups=1",
    "router.top_groups=1",
    *settings,
  )
  mesh = device_mesh.make_mesh(dict(sizes))
  state = jax.device_put(testing.state(run), train.shardings(run, mesh))
  p = np.ones(300)
  p[5:7] = 150, 30
  rows = np.random.default_rng(0).choice(300, (32, 513), p=p / p.sum())
  shape = run.train.micro_batches, run.train.micro_batch_size, 513
  batch = device_mesh.make_global_batch(
    make_batch(rows.reshape(shape)), run.train.micro_batch_size, mesh, dim=1
  )
  grads = jax.jit(lambda *a: train.gradients(*a, run, mesh).grads)(state, batch)
  return {
    path: np.float64(g)
    for path, g in param_spec.flatten_with_paths(grads).items()
  }


class AbstractBatchTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_is_that_of_a_batch(self, segment_mask):
    # A step compiled for another batch would be compiled again, unseen.
    run = testing.run(f"data.segment_mask={segment_mask}")
    shape = 2, run.train.micro_batch_size, run.data.seq_len + 1
    ones = np.ones(shape, np.int32)
    batch = device_mesh.make_global_batch(
      make_batch(ones, ones, segment_mask=segment_mask), shape[1], MESH, dim=1
    )
    expected = train.abstract_batch(run, MESH, 2)
    self.assertEqual(jax.tree.structure(batch), jax.tree.structure(expected))
    for a, like in zip(*map(jax.tree.leaves, (batch, expected)), strict=True):
      self.assertEqual((a.shape, a.dtype), (like.shape, like.dtype))
      self.assertEqual(a.sharding, like.sharding)


class InitTest(absltest.TestCase):
  def test_mtp_modules_change_no_other_parameter(self):
    key = jax.random.key(7)
    with_mtp = train.init_state(RUN, key)
    without = train.init_state(testing.run("mtp.depth=0"), key)
    params = param_spec.flatten_with_paths(with_mtp.params)
    expected = param_spec.flatten_with_paths(without.params)
    self.assertContainsSubset(expected, params)
    for name, value in expected.items():
      np.testing.assert_array_equal(params[name], value, name)
    self.assertEqual(with_mtp.step, 0)
    self.assertFalse(with_mtp.router_bias.any())
    self.assertEqual(with_mtp.router_bias.shape, (2, 8))


class StepTest(absltest.TestCase):
  def test_moves_everything_that_it_should(self):
    before = testing.host(testing.state(RUN))
    state, metrics = compiled_step()(first_state(), placed())
    after, metrics = testing.host(state), jax.device_get(metrics)
    for name, value in metrics.items():
      self.assertTrue(np.isfinite(value).all(), name)
    old, new = map(param_spec.flatten_with_paths, (before.params, after.params))
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
    state, expected = first_state(), np.zeros((2, 8), np.float32)
    for seed in range(2):
      state, metrics = compiled_step()(state, placed(seed))
      load = np.asarray(metrics["load"])
      tokens = RUN.train.batch_size * (RUN.data.seq_len - np.arange(2))
      np.testing.assert_array_equal(load.sum(-1), tokens * cfg.router.top_k)
      mean = load.mean(-1, keepdims=True)
      speed = np.float32(cfg.router.bias_speed)
      expected += speed * np.sign(mean - load).astype(np.float32)
      np.testing.assert_array_equal(state.router_bias, expected)
    self.assertTrue(expected.any())

  @pytest.mark.fault(
    "F29",
    "NaN or infinity in loss, gradient or update",
    "the step changes only its counters; reported with its rows; never saved",
  )
  def test_a_step_that_is_not_finite_changes_only_the_counters(self):
    head = testing.state(RUN).params["head"].at[0, 0].set(jnp.nan)
    state = first_state(head=head)
    before = testing.host(state)
    state, metrics = compiled_step()(state, placed())
    after = testing.host(state)
    self.assertFalse(metrics["finite"])
    self.assertTrue(np.ptp(metrics["load"]))  # the bias had reason to move
    self.assertEqual((after.step, after.skipped), (1, 1))
    expected = before.replace(step=after.step, skipped=after.skipped)
    testing.assert_same(after, expected)

  @pytest.mark.fault("F29")
  def test_nor_does_one_whose_update_alone_is_not_finite(self):
    sums = train.BatchGradients(
      {"w": jnp.array([1e15, 1.0])},
      losses.Losses(*jnp.ones(4)),
      moe.MoEStats(jnp.arange(8).reshape(1, 8), jnp.ones(1), jnp.zeros((1, 2))),
      {},
    )
    params = {"w": jnp.array([2.0, 3.0])}
    infinite_moment = optax.GradientTransformation(
      lambda params: jnp.zeros(()), lambda g, m, params: (g, m + jnp.inf)
    )
    for name, optimizer, bad in (
      ("adamw", optim.adamw, False),
      ("nan", lambda run: optax.scale(jnp.nan), True),
      ("overflow", lambda run: optax.scale(1e30), True),
      ("moment", lambda run: infinite_moment, True),
    ):
      with (
        self.subTest(name),
        mock.patch.dict(optim.OPTIMIZERS, {name: optimizer}),
      ):
        run = testing.run(f"optim.name={name}")
        opt_state = optim.make(run).init(params)
        state = testing.state(RUN).replace(params=params, opt_state=opt_state)
        new, metrics = train.update(state, sums, run)
        self.assertEqual(metrics["finite"], not bad)
        self.assertEqual((new.step, new.skipped), (1, bad))
        if bad:
          new = new.replace(step=state.step, skipped=state.skipped)
          testing.assert_same(testing.host(new), testing.host(state))


@pytest.mark.fault(
  "F27",
  "other micro-batches, rematerialization",
  "counts and bias bitwise identical, same gradient",
)
class SplitTest(parameterized.TestCase):
  @staticmethod
  @functools.cache
  def gradients(remat, micro_batches):
    run = testing.run(
      f"train.remat={remat}", f"train.micro_batches={micro_batches}"
    )
    state = testing.state(RUN)
    bias = 0.01 * testing.normal(*state.router_bias.shape, seed=3)
    state = state.replace(router_bias=bias)
    compute = jax.jit(functools.partial(train.gradients, run=run))
    batch = batch_of(run)
    sums = jax.device_get(compute(state, batch))
    load, speed = sums.stats.load, run.model.router.bias_speed
    bias = router.update_bias(bias, load, speed)
    return sums.grads, sums.losses, load, bias

  @parameterized.parameters(("block", 2), ("none", 4), ("none", 8))
  def test_no_way_to_compute_a_step_changes_a_decision(self, *way):
    grads, terms, load, bias = self.gradients(*way)
    want_grads, want_terms, want_load, want_bias = self.gradients("none", 1)
    np.testing.assert_array_equal(load, want_load)
    np.testing.assert_array_equal(bias, want_bias)
    # Sums of the same terms in another order: 64 tokens, and the longest way
    # back through two blocks and the MTP module, 3 * 100 terms.
    testing.assert_close((grads, terms), (want_grads, want_terms), 64 + 300)


@pytest.mark.fault(
  "F23",
  "N steps, a restart and N more",
  "state, data and metrics are those of 2N steps",
)
class ResumeTest(absltest.TestCase):
  @pytest.mark.slow
  def test_n_steps_and_n_more_are_2n_steps(self):
    n = 3
    step = compiled_step()
    self.enter_context(mock.patch.object(train, "make_step", lambda *_: step))
    folder = testing.folder(self)
    text = folder / "text.txt"
    text.write_text("".join(PROSE.format(i) for i in range(100)))
    run = testing.run(f"data.path={text}")
    data = prepare.prepare(run.data, run.model.vocab_size, folder / "data")

    def fit(state, stop, save=lambda state: None):
      first, fed = int(state.step), []
      hooks = loop.Hooks()
      hooks.save = save

      def batches():
        source = loader.BatchSource(data, run, 5)
        for batch in global_batches(source, first, MESH):
          fed.append(batch.tokens)
          yield batch

      state = loop.fit(state, run, loop.Batches(batches()), stop, hooks=hooks)
      return state, np.array(fed)

    whole, all_fed = fit(first_state(), 2 * n)

    store = functools.partial(
      checkpointer.Checkpointer, folder / "checkpoints", run.checkpoint
    )
    checkpoints = store()
    save = lambda state: checkpoints.save(state, {})
    _, first_fed = fit(first_state(), n, save)
    checkpoints.close()
    checkpoints = store()
    like = train.abstract_state(run, MESH)
    state = checkpoints.restore(n, like)
    parts, second_fed = fit(state, 2 * n)
    checkpoints.close()

    testing.assert_same(testing.host(parts), testing.host(whole))
    np.testing.assert_array_equal(
      np.concatenate([first_fed, second_fed]), all_fed
    )
    self.assertFalse(np.array_equal(first_fed, second_fed))


class FitTest(absltest.TestCase):
  def test_reports_each_step_before_what_follows_it(self):
    run = testing.run(
      "checkpoint.every=2", "evaluate.every=3", "parallel.replica_check_every=4"
    )
    done = itertools.count(1)
    calls = []

    def fake_step(state, batch):
      calls.append(("start", batch))
      return state, next(done)

    class Hooks(loop.Hooks):
      def report(self, done, metrics):
        calls.append(("report", done, metrics))

      def check(self, state):
        calls.append("check")

      def evaluate(self, state):
        calls.append("evaluate")

      def save(self, state):
        calls.append("save")

    with mock.patch.object(train, "make_step", lambda *_: fake_step):
      batches = loop.Batches(itertools.count(1))
      loop.fit(mock.Mock(step=0), run, batches, 5, hooks=Hooks())
    reports = [call[1:] for call in calls if call[0] == "report"]
    self.assertEqual(reports, [(i, i) for i in range(1, 6)])
    # Step 2 starts before the host looks at step 1; what is saved or evaluated
    # has been reported, and the last step is both.
    expected = [("start", 1), ("start", 2), ("report", 1, 1), ("report", 2, 2)]
    expected += ["save", ("start", 3), ("report", 3, 3), "evaluate"]
    expected += [("start", 4), ("report", 4, 4), "check", "save"]
    expected += [("start", 5), ("report", 5, 5), "evaluate", "save"]
    self.assertEqual(calls, expected)


@pytest.mark.slow
class MemoryTest(absltest.TestCase):
  def test_a_step_holds_neither_old_moments_nor_a_layers_experts_twice(self):
    run = testing.run(
      "n_layers=5",
      "mtp.depth=0",
      "router.n_experts=64",
      "moe.ffn_dim=64",
      "train.scan_layers=false",
      "train.remat=none",
      "precision.recipe=fp32",
    )
    state, batch = train.abstract_state(run, MESH), placed()
    step = train.make_step(run, MESH).lower(state, batch).compile()
    params = sum(4 * a.size for a in jax.tree.leaves(state.params))
    temporary = step.memory_analysis().temp_size_in_bytes / params
    # 2.67, with copies of both 3.35.
    self.assertLess(temporary, 3)


if __name__ == "__main__":
  absltest.main()

"""Routers take the experts given, keep their gradients, and count them."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, train
from dsv3_jax.data.batch import make_batch
from dsv3_jax.model import moe, router, transformer
from dsv3_jax.parallel import device_mesh
from dsv3_jax.posttrain import routes as routes_lib

N, LENGTH = 16, 32  # samples, and tokens of a row
# Two samples a row, or one; four MoE layers and two MTP modules.
SETTINGS = (
  f"data.seq_len={LENGTH}",
  "train.batch_size=8",
  "train.tokens=1e6",
  "data.source=conversations",
  "data.segment_mask=true",
  "router.balance_weight=0",
  "n_layers=5",
  "mtp.depth=2",
)
PIPE = "train.micro_batches=4", "parallel.schedule=1f1b"
LAYOUTS = {
  "one_device": ((), {}),
  "micro_batches": (("train.micro_batches=2", "train.scan_layers=false"), {}),
  "remat": (("train.remat=block",), {}),
  "selective": (("train.remat=selective",), {}),
  "fsdp": (("parallel.layout=fsdp", "train.remat=block"), {"data": 2}),
  "expert": ((), {"expert": 2}),
  "model": ((), {"model": 2}),
  "pipe": ((*PIPE, "train.remat=block"), {"pipe": 2}),
  "dualpipev": (
    ("train.micro_batches=4", "parallel.schedule=dualpipev"),
    {"pipe": 2, "expert": 2},
  ),
}
GRADIENTS = jax.jit(train.gradients, static_argnums=(2, 3))


def draw_routes(cfg, *shape, seed=0):
  """Returns distinct experts [*shape, n_routers, K]."""
  rng = np.random.default_rng(seed)
  draws = rng.random((*shape, cfg.n_routers, cfg.router.n_experts))
  return draws.argsort(-1)[..., : cfg.router.top_k].astype(np.int32)


@functools.cache
def samples():
  """Returns the ids of N samples and their routes."""
  rng = np.random.default_rng(1)
  ids = [rng.integers(8, 300, n) for n in rng.integers(6, LENGTH // 2 + 1, N)]
  lengths = [len(a) for a in ids]
  cfg = testing.run(*SETTINGS).model
  return ids, routes_lib.Routes(
    samples=np.repeat(np.arange(N), lengths),
    positions=np.concatenate([np.arange(n) for n in lengths]),
    tokens=np.concatenate(ids),
    experts=draw_routes(cfg, sum(lengths)),
  )


def batch_of(parts, n_micro):
  """Packs the samples of each row; returns a batch with routes."""
  ids, routes = samples()
  shape = len(parts), LENGTH + 1
  rows, segments, positions = np.zeros((3, *shape), np.int32)
  which = np.full(shape, -1)
  for row, part in enumerate(parts):
    at = 0
    for segment, i in enumerate(part, 1):
      here = row, slice(at, at + len(ids[i]))
      rows[here], segments[here] = ids[i], segment
      which[here], positions[here] = i, np.arange(len(ids[i]))
      at += len(ids[i])
  batch = make_batch(rows, segments, segment_mask=True)
  experts, keys = routes_lib.pack(routes, which[:, :-1], positions[:, :-1])
  cfg = testing.run(*SETTINGS).model
  routes_lib.validate(
    experts,
    keys,
    batch.tokens,
    batch.valid,
    cfg.router.n_experts,
    cfg.n_moe_layers,
  )
  batch = batch.replace(routes=experts)
  return jax.tree.map(lambda a: a.reshape(n_micro, -1, *a.shape[1:]), batch)


def expected_load(batch, cfg):
  """Counts the experts of routes [n_routers, E], from the batch alone."""
  segments = batch.segments.reshape(-1, LENGTH)
  routes = batch.routes.reshape(*segments.shape, cfg.n_routers, -1)
  loads = []
  for r in range(cfg.n_routers):
    k = max(r - cfg.n_moe_layers + 1, 0)  # MTP depth
    ahead, here = segments[:, k:], segments[:, : LENGTH - k]
    used = routes[:, : LENGTH - k, r][(ahead == here) & (ahead > 0)]
    loads.append(np.bincount(used.reshape(-1), minlength=cfg.router.n_experts))
  return np.stack(loads)


PACKED = tuple((i, i + 1) for i in range(0, N, 2))
SINGLE = tuple((i,) for i in range(N))


def gradients(run, sizes, batch):
  """Returns the sums of a batch on a mesh, or with {} on one device."""
  state = testing.state(run)
  mesh = None
  if sizes:
    mesh = device_mesh.make_mesh(sizes)
    state = jax.device_put(state, train.shardings(run, mesh))
    n_rows = batch.tokens.shape[1]
    batch = device_mesh.make_global_batch(batch, n_rows, mesh, dim=1)
  return jax.device_get(GRADIENTS(state, batch, run, mesh))


@functools.cache
def single():
  """Returns the sums of samples that have a row each."""
  run = testing.run(*SETTINGS, f"train.batch_size={N}")
  return gradients(run, {}, batch_of(SINGLE, 1))


def own_routes(run, batch):
  """Returns the routes that the model itself chooses for rows [B, T]."""
  state, seen = testing.state(run), []

  def select(*args):
    experts, gates = SELECT(*args)
    left = batch.tokens.shape[1] - experts.shape[1]
    seen.append(np.pad(experts, ((0, 0), (0, left), (0, 0))))
    return experts, gates

  ctx = transformer.ForwardContext(scan=False)
  masks = batch.segments, batch.valid
  with mock.patch.object(router, "select", select):
    transformer.forward(
      state.params, state.router_bias, batch.tokens, run.model, ctx, *masks
    )
  return np.stack(seen, axis=2)


SELECT = router.select


class RouterTest(parameterized.TestCase):
  CFG = config.Router(n_experts=4, top_k=2, scale=1.0)

  def test_gates_and_gradient_are_those_of_the_experts_given(self):
    # The router would choose 0 and 1 for both; it may for the first.
    w = jnp.float32([[2, 1, -1, -2]])
    x = jnp.float32([[[1.0], [0.5]]])
    routes = jnp.int32([[[-1, -1], [3, 0]]])

    def gates(w):
      result = router.route(w, x, jnp.zeros(4), self.CFG, routes)
      return result.gates[0, 1, 0], result

    slope, result = jax.grad(gates, has_aux=True)(w)
    np.testing.assert_array_equal(result.experts, [[[0, 1], [3, 0]]])
    np.testing.assert_array_equal(result.load, [2, 1, 0, 1])
    np.testing.assert_array_equal(result.replayed, [2, 1])
    a, b = reference.sigmoid(-1.0), reference.sigmoid(1.0)
    np.testing.assert_allclose(result.gates[0, 1], np.array([a, b]) / (a + b))
    # Of a / (a + b), where each sigmoid s has the slope s (1 - s) x.
    da, db = 0.5 * a * (1 - a), 0.5 * b * (1 - b)
    want = np.array([-a * db, 0, 0, b * da]) / (a + b) ** 2
    np.testing.assert_allclose(slope, want[None], atol=1e-7)

  def test_padding_goes_to_no_expert(self):
    cfg = testing.tiny(
      "router.n_experts=4",
      "router.top_k=2",
      "router.n_groups=1",
      "router.top_groups=1",
    )
    p = {"router": testing.normal(cfg.d_model, 4)}
    x, valid = testing.normal(1, 3, cfg.d_model), jnp.bool_([[1, 1, 0]])
    routes = jnp.int32([[[3, 2], [3, 1], [0, 1]]])
    result, _ = moe.route(p, x, jnp.zeros(4), cfg, valid, routes)
    np.testing.assert_array_equal(result.experts, [[[3, 2], [3, 1], [4, 4]]])
    np.testing.assert_array_equal(result.load, [0, 1, 1, 2])
    self.assertEqual(result.replayed[0], 4)


@pytest.mark.slow
class OwnTest(parameterized.TestCase):
  """The trainer's own choice, given to it, changes no bit."""

  def check(self, run, rows, sizes=None):
    routes = own_routes(run, rows)
    n = run.train.micro_batches
    batch = dataclasses.replace(rows, routes=routes)
    batch = jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[1:]), batch)
    replayed = gradients(run, sizes, batch)
    alone = gradients(run, sizes, dataclasses.replace(batch, routes=None))
    given, other = replayed.stats.replayed.T
    self.assertGreater(given.min(), 0)
    np.testing.assert_array_equal(given, alone.stats.load.sum(-1))
    np.testing.assert_array_equal(other, 0)
    self.assertIsNone(alone.stats.replayed)
    stats = dataclasses.replace(replayed.stats, replayed=None)
    testing.assert_same(dataclasses.replace(replayed, stats=stats), alone)

  @parameterized.named_parameters(
    (name, *LAYOUTS[name])
    for name in ("one_device", "micro_batches", "remat", "expert", "pipe")
  )
  def test_in_packed_rows(self, settings, sizes):
    run = testing.run(*SETTINGS, *settings, "router.balance_weight=0.01")
    rows = jax.tree.map(lambda a: a[0], batch_of(PACKED, 1))
    self.check(run, rows, sizes)


@pytest.mark.slow
class ReferenceTest(parameterized.TestCase):
  @parameterized.parameters((), ("router.balance_map=routed",))
  def test_loss_and_gradients_are_those_of_the_reference(self, *assignments):
    run = testing.run(
      "n_layers=3",
      "mtp.depth=2",
      "vocab_size=41",
      "router.balance_weight=0.1",
      *assignments,
    )
    cfg, state = run.model, testing.state(run)
    state = state.replace(
      router_bias=testing.normal(*state.router_bias.shape, scale=0.1)
    )
    rows = testing.tokens(2, 8, vocab_size=41)
    routes = draw_routes(cfg, 2, 7)
    routes[np.random.default_rng(2).random(routes.shape[:-1]) < 0.2] = -1
    batch = dataclasses.replace(make_batch(rows[None]), routes=routes[None])
    sums = jax.device_get(GRADIENTS(state, batch, run, None))
    params, bias = reference.f64((state.params, state.router_bias))
    load = reference.forward(params, bias, rows[:, :-1], cfg, routes)[2]
    np.testing.assert_array_equal(sums.stats.load, load)

    def total(p, given=routes):
      main, mtp, balance = reference.losses(p, bias, rows, cfg, given)
      return main + run.model.mtp.weight * np.mean(mtp) + balance

    # Of `losses_test`, through one layer more.
    terms = 2 * (5 * 465 + 64 + 41) + 14
    testing.assert_close(sums.losses.total, total(params), terms)
    self.assertGreater(abs(total(params) - total(params, None)), 1e-4)
    testing.assert_slopes(total, params, sums.grads, terms)
    for group in "moe", "mtp":
      g = sums.grads[group]
      g = (g if group == "moe" else g["block"])["ffn"]["router"]
      self.assertGreater(np.abs(g).max((1, 2)).min(), 1e-6)


@pytest.mark.slow
class LayoutTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (name, *layout) for name, layout in LAYOUTS.items()
  )
  def test_changes_no_result(self, settings, sizes):
    run = testing.run(*SETTINGS, *settings)
    batch = batch_of(PACKED, run.train.micro_batches)
    sums = gradients(run, sizes, batch)
    np.testing.assert_array_equal(
      sums.stats.load, expected_load(batch, run.model)
    )
    np.testing.assert_array_equal(
      sums.stats.replayed[:, 0], sums.stats.load.sum(-1)
    )
    np.testing.assert_array_equal(sums.stats.replayed, single().stats.replayed)
    for name in ("total", "main", "mtp"):
      value, expected = (getattr(s.losses, name) for s in (sums, single()))
      np.testing.assert_allclose(value, expected, rtol=1e-6)
    leaves = jax.tree.leaves_with_path(single().grads)
    for (path, expected), value in zip(
      leaves, jax.tree.leaves(sums.grads), strict=True
    ):
      # The bounds of `sharding_test`.
      error = np.abs(value - expected).max() / np.abs(expected).max()
      self.assertLess(error, 1e-5, jax.tree_util.keystr(path))

  def test_padding_has_any_routes(self):
    run = testing.run(*SETTINGS)
    batch = batch_of(PACKED, 1)
    padding = ~batch.valid[..., None, None]
    other = draw_routes(run.model, *batch.tokens.shape, seed=3)
    garbage = np.where(padding, other, batch.routes)
    self.assertGreater(padding.sum(), LENGTH)
    sums, changed = (
      gradients(run, {}, dataclasses.replace(batch, routes=r))
      for r in (batch.routes, garbage)
    )
    testing.assert_same(sums, changed)


@pytest.mark.slow
class StepTest(absltest.TestCase):
  def test_bias_and_metric_are_those_of_the_experts_used(self):
    run = testing.run(*SETTINGS)
    batch = batch_of(PACKED, 1)
    step = jax.jit(functools.partial(train.train_step, run=run))
    state, metrics = step(testing.state(run), batch)
    load = expected_load(batch, run.model)
    np.testing.assert_array_equal(metrics["load"], load)
    speed = np.float32(metrics["bias_speed"])
    for bias, counts in zip(state.router_bias, load, strict=True):
      want = reference.update_bias([0.0] * len(counts), counts, speed)
      np.testing.assert_array_equal(bias, np.float32(want))
    own = own_routes(run, jax.tree.map(lambda a: a[0], batch))
    given, other = single().stats.replayed.sum(0)
    self.assertAlmostEqual(metrics["routes_replaced"], other / given, 6)
    self.assertGreater(other, given / 4)
    rows = dataclasses.replace(batch, routes=own[None])
    self.assertEqual(step(testing.state(run), rows)[1]["routes_replaced"], 0)
    none = dataclasses.replace(batch, routes=np.full_like(own[None], -1))
    self.assertEqual(step(testing.state(run), none)[1]["routes_replaced"], 0)
    plain = dataclasses.replace(batch, routes=None)
    self.assertNotIn("routes_replaced", step(testing.state(run), plain)[1])


if __name__ == "__main__":
  absltest.main()

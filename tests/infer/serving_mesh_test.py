"""Tests of units of devices: they write what one device does, and share work.

Compiling is nearly all of the time: most tests use the programs of two units.
"""

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import numpy as np
import pytest
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, param_spec
from dsv3_jax.config import presets
from dsv3_jax.infer import (
  engine,
  eplb,
  inference_params,
  serving_ffn,
  serving_mesh,
  serving_params,
)
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.model import layers, transformer
from dsv3_jax.parallel import device_mesh, sharding

VOCAB, E = 61, 16
SLOTS, CHUNK, MAX_LEN = 4, 16, 32
# Prompts of one chunk, of a full one, of two; more than there are slots. The
# first makes the cache as long as it gets.
PROMPTS, WRITTEN = (20, 5, 3, 24, 1, 16), 6
# One of them takes the most likely token. All draw from a cut distribution, so
# that there is one program for them.
SETTINGS = (
  dict(temperature=1, top_p=0.9),
  dict(temperature=1, top_k=1),
  dict(temperature=0.7, top_p=0.9, top_k=8),
)
# Of a layer of the tiny model, see transformer_test; the products with the
# latent, of 16, twice more. Then the head.
TERMS = 2 * (465 + 2 * 16) + 64
# Sums of n = 64 terms or so in another order are off by sqrt(n) * eps of the
# largest; some thirty of them follow each other, up to logits of about 4.
TOLERANCE = 30 * 8 * testing.EPS * 4

SMALL = {"node": 2, "expert": 2}
CUBE = {"node": 2, "expert": 2, "model": 2}
MESHES = (
  {},
  SMALL,
  {"expert": 2, "model": 2},
  {"data": 2, "expert": 2, "model": 2},
  CUBE,
)


def unit(sizes, kind, dispatch, shared, n_redundant):
  made = serving_mesh.ServingMesh(
    mesh=device_mesh.make_mesh(sizes),
    rules=serving_mesh.ROLES[kind],
    n_replicas=0,
    dispatch=dispatch,
    shared_routed=shared,
  )
  n = E + shared + n_redundant
  return dataclasses.replace(made, n_replicas=n + -n % made.n_devices)


@functools.cache
def prefill_unit():
  return unit(SMALL, "prefill", "all_to_all", False, 4)  # 5 slots a device


@functools.cache
def decode_unit():
  return unit(CUBE, "decode", "allgather", True, 4)  # 3 slots a device


# The units of most tests, and how many drafts their engines make.
BOTH = ((prefill_unit, 0), (decode_unit, 1))


@functools.cache
def model(skew=0.1):
  """A model with one dense layer, one mixture and one MTP module.

  Args:
    skew: of the router bias. Scores of experts differ by 0.2 or so.
  """
  cfg = testing.tiny(f"vocab_size={VOCAB}", "n_layers=2", "n_dense_layers=1")
  params = testing.draw(transformer.specs(cfg))
  return cfg, params, testing.normal(cfg.n_routers, E, seed=1, scale=skew)


@functools.cache
def parameters(skew=0.1):
  cfg, params, bias = model(skew)
  return jax.jit(inference_params.from_params, static_argnums=2)(
    params, bias, cfg
  )


def requests(settings=SETTINGS, prompts=PROMPTS):
  return [
    GenerationRequest(
      testing.tokens(n, vocab_size=VOCAB, seed=i).tolist(),
      WRITTEN,
      seed=i,
      **settings[i % len(settings)],
    )
    for i, n in enumerate(prompts)
  ]


def make(used=None, n_drafts=0, *, skew=0.1, params=None, placed=None, **more):
  """An engine of a unit, or of one device."""
  cfg, *_ = model(skew)
  sizes = dict(max_batch=SLOTS, max_len=MAX_LEN, chunk=CHUNK) | more
  options = EngineOptions(n_drafts=n_drafts, **sizes)
  return engine.Engine(
    params or parameters(skew), cfg, options, mesh=used, placement=placed
  )


def texts(events):
  """[requests, WRITTEN] tokens and their log-probabilities."""
  events = sorted(events, key=lambda event: event.index)  # stable
  found = np.array([(event.token, event.logprob) for event in events])
  token, logprob = found.reshape(-1, WRITTEN, 2).transpose(2, 0, 1)
  return token.astype(int), logprob


def run(made, asked=None):
  return texts(made.run(asked or requests()))


@functools.cache
def of_one_device(n_drafts=0, skew=0.1):
  return run(make(n_drafts=n_drafts, skew=skew))


@functools.cache
def load(used):
  """Returns the load of the texts on a serving mesh."""
  made = make(used)
  run(made)
  return made.balancer.load


def assert_same_texts(found, expected):
  for actual, wanted in zip(found, expected, strict=True):
    assert actual.shape == wanted.shape
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=TOLERANCE)


@functools.cache
def full():
  """Logits and load of the texts of one device in float64, without a cache."""
  cfg, params, bias = model()
  params, bias = reference.f64((params, bias))
  logits, total = [], 0
  for r, text in zip(requests(), of_one_device()[0], strict=True):
    # The last token of a text is not read.
    tokens = np.array([[*r.prompt, *text[:-1]]])
    hidden, _, load, _ = reference.forward(params, bias, tokens, cfg)
    logits.append(hidden[0, len(r.prompt) - 1 :] @ params["head"])
    total = total + load[: cfg.n_moe_layers]
  return np.array(logits), total


class TextsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("prefill", prefill_unit, 0),
    ("decode", decode_unit, 1),
    (
      "texts_and_heads_apart",
      lambda: unit(
        {"data": 2, "expert": 2, "model": 2}, "decode", "all_to_all", False, 2
      ),
      0,
    ),
  )
  def test_are_those_of_one_device(self, used, n_drafts):
    assert_same_texts(run(make(used(), n_drafts)), of_one_device(n_drafts))

  def test_are_as_likely_as_whole_passes_say(self):
    tokens, found = run(make(prefill_unit()))
    logits, _ = full()
    p = np.log(reference.softmax(logits))
    expected = np.take_along_axis(p, tokens[..., None], axis=-1)[..., 0]
    # A log-probability has the error of a logit and that of a mean of them.
    error = 2 * TERMS * testing.EPS * np.abs(logits).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=error)
    # Those that draw nothing take the most likely token.
    np.testing.assert_array_equal(tokens[1::3], p.argmax(-1)[1::3])
    self.assertFalse((tokens == p.argmax(-1)).all())

  def test_counts_what_experts_get(self):
    _, expected = full()
    found = load(prefill_unit())
    np.testing.assert_array_equal(found, [*expected, np.zeros(E)])

  def test_counts_what_experts_get_with_drafts(self):
    made = make(decode_unit(), 1)
    n_tokens, k = 0, made.cfg.router.top_k
    for i, r in enumerate(requests()):
      # Alone, so that most slots are idle; its cycles follow each other.
      made.submit(r)
      cycles = []
      while made.busy:
        before = made.stats.tokens
        made.step()
        cycles.append(made.stats.tokens - before)
      # MTP reads the first token, and what is new of the cycle before.
      n_tokens += 1 + sum(cycles[:-1])
      main, ahead = made.balancer.load.sum(axis=1)
      read = made.stats.prompt_tokens + 2 * made.stats.rows
      self.assertEqual((main, ahead), (k * read, k * n_tokens), i)


def cases():
  """(name, unit, drafts, greedy) of every mesh and all that is beside it."""
  forms = "allgather", "all_to_all", "hierarchical_all_to_all"
  for sizes, kind, dispatch, shared in itertools.product(
    MESHES, serving_mesh.ROLES, forms, (False, True)
  ):
    n_hops = forms.index(dispatch)
    # One device has nothing to send, and two hops are of two axes.
    if n_hops > len(device_mesh.active_axes(sizes, serving_mesh.GROUP)):
      continue
    # So that each of two of these meets each of another two.
    greedy = (n_hops + (kind == "decode")) % 2
    n_drafts = (greedy + shared) % 2
    name = "_".join(
      [
        *(f"{axis}{n}" for axis, n in sizes.items()),
        kind,
        dispatch,
        "shared_placed" if shared else "routed_placed",
        f"{n_drafts}_drafts",
        "greedy" if greedy else "drawn",
      ]
    )
    used = functools.partial(unit, sizes, kind, dispatch, shared, 3)
    yield name, used, n_drafts, greedy


@functools.cache
def growing(n_drafts, greedy):
  """Requests that make the cache grow, and what one device writes."""
  settings = (dict(temperature=0),) if greedy else SETTINGS
  asked = requests(settings, (3, 9, 1, 17, 24, 16, 20))
  return asked, run(make(n_drafts=n_drafts), asked)


@pytest.mark.slow
class AllUnitsTest(parameterized.TestCase):
  @parameterized.named_parameters(*cases())
  def test_texts_are_those_of_one_device(self, used, n_drafts, greedy):
    asked, expected = growing(n_drafts, greedy)
    made = make(used(), n_drafts, rebalance_every=4)
    assert_same_texts(run(made, asked), expected)


class ReplicasTest(parameterized.TestCase):
  ROUTER = config.Router(n_experts=5, top_k=1, n_groups=1, top_groups=1)
  CFG = dataclasses.replace(testing.TINY, router=ROUTER)
  # Four replicas of the first expert, one of each other.
  PLACED = eplb.balance_experts([[9, 1, 1, 1, 1]], n_replicas=8, n_devices=4)

  def slots_of(self, sizes, dispatch, chosen):
    """The slot that each row [M] was sent to, 8: none, by what it returned."""
    used = serving_mesh.ServingMesh(
      device_mesh.make_mesh(sizes), serving_mesh.PREFILL, 8, dispatch
    )
    one = testing.draw(layers.swiglu_specs(6, 4, 0.1))
    factor = np.arange(1, 9, dtype=np.float32)
    p = {
      "gate_up": np.tile(one["gate_up"], (8, 1, 1, 1)),
      # Otherwise the same: a row comes back times its slot and one.
      "down": factor[:, None, None] * np.asarray(one["down"]),
    }
    put = lambda tree, axes: jax.device_put(
      tree,
      jax.NamedSharding(used.mesh, jax.P(device_mesh.active_axes(sizes, axes))),
    )
    tables = {
      "replicas": np.maximum(self.PLACED.replicas[0], 0),
      "count": self.PLACED.count[0],
    }
    p = put(p, serving_mesh.GROUP) | put(tables, ())
    x = np.asarray(testing.normal(len(chosen), 6))
    chosen = np.int32(chosen)[:, None]
    gates = np.ones(chosen.shape, np.float32)
    ffn = jax.shard_map(
      serving_ffn.make_experts(used, self.CFG).ffn,
      out_specs=used.batch,
      mesh=used.mesh,
    )
    y = jax.jit(ffn)(p, *put((x, chosen, gates), device_mesh.BATCH))
    unit_y = reference.swiglu(reference.f64(one), np.float64(x))
    found = (np.asarray(y) / unit_y).mean(-1)
    slot = np.rint(found).astype(int)
    testing.assert_close(np.asarray(y), unit_y * slot[:, None], 6 + 4 + 8)
    return np.where(slot > 0, slot - 1, 8)

  @parameterized.parameters(
    ({}, "allgather"), (CUBE, "allgather"), (SMALL, "all_to_all")
  )
  def test_rows_go_to_all_replicas_of_what_they_chose(self, sizes, dispatch):
    n_shards = device_mesh.axis_size(sizes, device_mesh.BATCH)
    # Of each shard: 13 of the first expert, some of others, some of none.
    own = [0] * 13 + [5, 1, 5, 4, 3, 2, 1]
    slot = self.slots_of(sizes, dispatch, own * n_shards)
    slot = slot.reshape(n_shards, -1)
    holds = np.append(self.PLACED.expert[0], 5)
    np.testing.assert_array_equal(holds[slot], [own] * n_shards)
    # Each of the devices that share a shard's rows divides its part evenly.
    for row in slot[:, :13]:
      _, counts = np.unique(row, return_counts=True)
      self.assertLen(counts, 4)
      self.assertLessEqual(np.ptp(counts), sizes.get("model", 1))

  @parameterized.parameters(
    (SMALL, "allgather"), ({"expert": 2, "model": 2}, "all_to_all")
  )
  def test_devices_with_few_rows_begin_with_different_ones(
    self, sizes, dispatch
  ):
    # A row for each device: with `model`, two of the same shard.
    slot = self.slots_of(sizes, dispatch, [0] * 4)
    self.assertCountEqual(slot, np.flatnonzero(self.PLACED.expert[0] == 0))

  def test_texts_need_every_replica_and_each_only_some(self):
    cfg, *_ = model()
    used = prefill_unit()
    placed = serving_params.placement_for_load(load(used), used, cfg)
    expert = placed.count[0].argmax()
    slots = placed.replicas[0, expert, : placed.count[0, expert]]
    self.assertLen(slots, 2)

    def without(broken):
      made = make(used, placed=placed)
      experts = inference_params.moe_ffns(made._params)[0]["experts"]
      down = np.array(experts["down"])
      down[broken] = 0
      experts["down"] = jax.device_put(down, experts["down"].sharding)
      return run(made)

    _, expected = of_one_device()
    for slot in slots:
      _, found = without([slot])
      changed = np.abs(found - expected)[:, 0] > TOLERANCE
      self.assertTrue(changed.any())
      self.assertFalse(changed.all())
    # Without both it is a model without this expert.
    params = jax.tree.map(lambda a: a, parameters())
    experts = inference_params.moe_ffns(params)[0]["experts"]
    experts["down"] = experts["down"].at[expert].set(0)
    assert_same_texts(without(slots), run(make(params=params)))


class RebalanceTest(parameterized.TestCase):
  SKEW = 0.4

  @parameterized.parameters(*BOTH)
  def test_evens_the_load_and_changes_no_text(self, used, n_drafts):
    used, made = used(), make(used(), n_drafts, skew=self.SKEW)
    expected = of_one_device(n_drafts, self.SKEW)
    assert_same_texts(run(made), expected)
    load, before = made.balancer.load, made.balancer.imbalance()
    placed = serving_params.uniform_placement(used, made.cfg)
    self.check_imbalance(made, placed)
    made.rebalance()
    np.testing.assert_array_equal(made.balancer.load, np.zeros_like(load))
    np.testing.assert_array_equal(made.balancer.imbalance(), [1, 1])
    assert_same_texts(run(made), expected)
    # The same texts are the same load.
    np.testing.assert_array_equal(made.balancer.load, load)
    new = serving_params.placement_for_load(load, used, made.cfg)
    self.check_imbalance(made, new)
    fresh = serving_params.shard_params(
      parameters(self.SKEW), new, used, made.cfg
    )
    testing.assert_same(jax.device_get(made._params), jax.device_get(fresh))
    drafting = slice(1 + n_drafts)  # routers that were used
    self.assertTrue(
      (made.balancer.imbalance()[drafting] < before[drafting]).all()
    )
    self.assertGreater(before[0], 1.3)

  def check_imbalance(self, made, placed):
    used = made.mesh
    everyone = used.with_shared(made.balancer.load, made.cfg)
    devices = placed.loads(everyone, used.n_devices)
    expected = eplb.imbalance(devices)
    np.testing.assert_array_equal(made.balancer.imbalance(), expected)

  @parameterized.parameters(*BOTH)
  def test_in_the_middle_of_texts_nobody_sees_it(self, used, n_drafts):
    made, events = make(used(), n_drafts, skew=self.SKEW), []
    for r in requests():
      made.submit(r)
    for _ in range(2):
      events += made.step()
    self.assertLen(made._slots.active, SLOTS)
    before = made.balancer.placement.expert
    made.rebalance()
    self.assertFalse((made.balancer.placement.expert == before).all())
    while made.busy:
      events += made.step()
    assert_same_texts(texts(events), of_one_device(n_drafts, self.SKEW))

  def test_comes_every_few_cycles(self):
    made = make(prefill_unit(), skew=self.SKEW, rebalance_every=3)
    with mock.patch.object(
      serving_params,
      "placement_for_load",
      wraps=serving_params.placement_for_load,
    ) as best:
      found = run(made)
    assert_same_texts(found, of_one_device(skew=self.SKEW))
    self.assertEqual(best.call_count, made.stats.cycles // 3)
    self.assertGreater(best.call_count, 1)

  def test_tells_how_uneven_devices_were(self):
    made, before = make(decode_unit(), 1, skew=self.SKEW), []
    for _ in range(2):
      run(made)
      before.append(made.balancer.imbalance().mean())
      made.rebalance()
    self.assertEqual(made.stats.imbalance, before)
    self.assertLess(before[1], before[0])

  @parameterized.parameters(*BOTH)
  def test_moved_experts_are_as_if_placed_at_once(self, used, n_drafts):
    del n_drafts
    used, (cfg, *_) = used(), model()
    rng = np.random.default_rng(0)
    old, new = (
      serving_params.placement_for_load(rng.gamma(0.5, size=(2, E)), used, cfg)
      for _ in range(2)
    )
    moved = serving_params.apply_placement(
      serving_params.shard_params(parameters(), old, used, cfg),
      old,
      new,
      used,
      cfg,
    )
    expected = serving_params.shard_params(parameters(), new, used, cfg)
    shardings = lambda tree: jax.tree.map(lambda a: a.sharding, tree)
    self.assertEqual(shardings(moved), shardings(expected))
    testing.assert_same(jax.device_get(moved), jax.device_get(expected))


class PlaceTest(parameterized.TestCase):
  def held(self, array):
    """The shapes of what devices hold of it."""
    return {shard.data.shape for shard in array.addressable_shards}

  def test_devices_hold_their_slots_and_heads_alone(self):
    cfg, *_ = model()
    used = decode_unit()
    placed = serving_params.uniform_placement(used, cfg)
    params = serving_params.shard_params(parameters(), placed, used, cfg)
    dense, mixture = params["layers"]
    for block in (mixture, params["mtp"][0]["block"]):
      experts = block["ffn"]["experts"]
      # 24 slots for 17 experts on 8 devices.
      self.assertEqual(self.held(experts["gate_up"]), {(3, 64, 2, 32)})
      self.assertEqual(self.held(experts["down"]), {(3, 32, 64)})
      self.assertLen(experts["down"].addressable_shards, 8)
      self.assertNotIn("shared", block["ffn"])
      self.assertEqual(self.held(block["ffn"]["router"]), {(64, 16)})
    # 4 heads and a width of 128 over model=2.
    self.assertEqual(self.held(mixture["mla"]["up_k"]), {(2, 16, 16)})
    self.assertEqual(self.held(dense["ffn"]["gate_up"]), {(64, 2, 64)})
    self.assertEqual(self.held(params["head"]), {(VOCAB, 64)})

  def test_dense_layers_and_shared_experts_are_whole_for_prefill(self):
    cfg, *_ = model()
    used = unit(CUBE, "prefill", "all_to_all", False, 0)
    placed = serving_params.uniform_placement(used, cfg)
    params = serving_params.shard_params(parameters(), placed, used, cfg)
    dense, mixture = params["layers"]
    self.assertEqual(
      self.held(mixture["ffn"]["experts"]["down"]), {(2, 32, 64)}
    )
    self.assertEqual(self.held(mixture["ffn"]["shared"]["down"]), {(32, 64)})
    self.assertEqual(self.held(mixture["mla"]["up_k"]), {(2, 16, 16)})
    self.assertEqual(self.held(dense["ffn"]["gate_up"]), {(64, 2, 128)})

  def test_slots_hold_the_experts_of_the_placement(self):
    cfg, *_ = model()
    used = decode_unit()
    load = np.random.default_rng(0).gamma(0.5, size=(2, E))
    placed = serving_params.placement_for_load(load, used, cfg)
    params = serving_params.shard_params(parameters(), placed, used, cfg)
    for layer, (ffn, there) in enumerate(
      zip(
        inference_params.moe_ffns(params),
        inference_params.moe_ffns(parameters()),
        strict=True,
      )
    ):
      for name in ("gate_up", "down"):
        # The shared expert is the last.
        every = np.concatenate(
          [there["experts"][name], there["shared"][name][None]]
        )
        np.testing.assert_array_equal(
          ffn["experts"][name], every[placed.expert[layer]]
        )

  def test_several_shared_experts_are_the_shared_feed_forward(self):
    cfg = testing.tiny(
      "n_layers=1", "n_dense_layers=0", "moe.n_shared=3", "mtp.depth=0"
    )
    params = testing.draw(inference_params.specs(cfg))
    used = unit({}, "decode", "allgather", True, 2)
    used = dataclasses.replace(used, n_replicas=E + 3)
    placed = eplb.identity(1, E + 3)
    experts = serving_params.shard_params(params, placed, used, cfg)["layers"][
      0
    ]["ffn"]
    experts = {n: experts["experts"][n][E:] for n in ("gate_up", "down")}
    x = np.float64(testing.normal(5, 64))
    expected = reference.swiglu(
      reference.f64(params["layers"][0]["ffn"]["shared"]), x
    )
    every = np.tile([0, 1, 2], (5, 1)), np.ones((5, 3))
    found = reference.expert_ffn(reference.f64(experts), x, *every)
    # Sums of 64 and 96 products, in float64.
    atol = (64 + 96) * np.finfo(np.float64).eps * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)

  @parameterized.parameters(
    # Layers, experts and slots of a placement.
    (1, 16, 20),
    (3, 16, 20),
    (2, 17, 20),
    (2, 15, 20),
    (2, 16, 16),
    (2, 16, 24),
  )
  def test_refuses_a_placement_of_another_shape(self, n_layers, n_experts, n):
    cfg, *_ = model()
    used = prefill_unit()
    fits = serving_params.uniform_placement(used, cfg)
    other = eplb.balance_experts(
      np.ones((n_layers, n_experts)), n_replicas=n, n_devices=4
    )
    params = serving_params.shard_params(parameters(), fits, used, cfg)
    message = (
      rf"^a placement of \(layers, experts, slots\) \({n_layers},"
      rf" {n_experts}, {n}\): must be \(2, 16, 20\)$"
    )
    with self.assertRaisesRegex(ValueError, message):
      serving_params.shard_params(parameters(), other, used, cfg)
    with self.assertRaisesRegex(ValueError, message):
      serving_params.apply_placement(params, fits, other, used, cfg)


class BestPlacementTest(parameterized.TestCase):
  def groups_on_nodes(self, placed, n_groups):
    """[layers, groups] on how many nodes of two there are experts of each."""
    n_layers, n = placed.expert.shape
    where = np.zeros((n_layers, n_groups, 2), bool)
    group = placed.expert // (E // n_groups)
    node = np.arange(n) * 2 // n
    where[np.arange(n_layers)[:, None], group, node] = True
    return where.sum(-1)

  def test_groups_stay_on_nodes_where_they_divide_over_them(self):
    cfg, *_ = model()
    load = np.random.default_rng(0).gamma(0.3, size=(2, E))
    used = prefill_unit()
    placed = serving_params.placement_for_load(load, used, cfg)
    self.assertEqual(self.groups_on_nodes(placed, 8).max(), 1)
    # Anywhere, it would be another.
    free = eplb.balance_experts(load, n_replicas=20, n_devices=4)
    self.assertEqual(self.groups_on_nodes(free, 8).max(), 2)

  def test_shared_experts_have_the_load_of_all_tokens(self):
    cfg, *_ = model()
    load = np.random.default_rng(0).integers(1, 50, (2, E))
    used = decode_unit()
    # Each token is counted for 4 experts.
    with_shared = np.append(load, load.sum(-1, keepdims=True) / 4, axis=1)
    np.testing.assert_array_equal(used.with_shared(load, cfg), with_shared)
    np.testing.assert_array_equal(prefill_unit().with_shared(load, cfg), load)
    found = serving_params.placement_for_load(load, used, cfg)
    expected = eplb.balance_experts(with_shared, n_replicas=24, n_devices=8)
    np.testing.assert_array_equal(found.expert, expected.expert)
    self.assertGreater(found.count[0, E], 1)

  def test_layers_without_load_are_placed_as_at_first(self):
    cfg, *_ = model()
    used = prefill_unit()
    load = np.zeros((2, E))
    load[0, :3] = 5, 0, 1
    found = serving_params.placement_for_load(load, used, cfg)
    first = serving_params.uniform_placement(used, cfg)
    np.testing.assert_array_equal(found.expert[1], first.expert[1])
    self.assertFalse((found.expert[0] == first.expert[0]).all())
    np.testing.assert_array_equal(
      eplb.imbalance(first.loads(np.ones((2, E)), 4)),
      [first.loads(np.ones((2, E)), 4)[0].max() / 4] * 2,
    )


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      {"data": 3, "expert": 2},
      dict(n_replicas=18),
      [
        "max_batch=4: must be a multiple of 6, the devices"
        " data=3 x node=1 x expert=2"
      ],
    ),
    (
      {"model": 3},
      dict(n_replicas=18, rules=serving_mesh.PREFILL),
      ["attention.n_heads=4: must be a multiple of 3, the devices model=3"],
    ),
    (
      {"model": 3},
      dict(n_replicas=18),
      [
        "attention.n_heads=4: must be a multiple of 3, the devices model=3",
        "dense_ffn_dim=128: must be a multiple of 3, the devices model=3",
      ],
    ),
    (
      CUBE,
      dict(n_replicas=20),
      [
        "n_replicas=20: must be a multiple of 8, the devices"
        " node=2 x expert=2 x model=2"
      ],
    ),
    (
      CUBE,
      dict(n_replicas=8),
      ["n_replicas=8: must be at least 16, the number of experts"],
    ),
    (
      CUBE,
      dict(n_replicas=16, shared_routed=True),
      ["n_replicas=16: must be at least 17, the number of experts"],
    ),
    (CUBE, dict(n_replicas=16), []),
    (CUBE, dict(n_replicas=24, shared_routed=True), []),
  )
  def test_names_what_does_not_divide(self, sizes, options, expected):
    cfg, *_ = model()
    used = serving_mesh.ServingMesh(
      **{"mesh": device_mesh.abstract_mesh(sizes), "rules": serving_mesh.DECODE}
      | options
    )
    self.assertEqual(serving_mesh.validate(used, cfg, SLOTS), expected)

  def test_an_engine_names_all_of_them(self):
    cfg, *_ = model()
    used = serving_mesh.ServingMesh(
      device_mesh.abstract_mesh({"expert": 3}), serving_mesh.DECODE, 16
    )
    with self.assertRaises(ValueError) as caught:
      options = EngineOptions(max_batch=4, n_drafts=-1)
      engine.Engine(parameters(), cfg, options, mesh=used)
    found = str(caught.exception)
    for said in (
      "n_drafts=-1",
      "max_batch=4: must be a multiple of 3",
      "n_replicas=16: must be a multiple of 3",
    ):
      self.assertIn(said, found)

  def test_an_engine_of_one_device_has_no_placement(self):
    cfg, *_ = model()
    with self.assertRaisesRegex(ValueError, "^placement: needs a mesh"):
      engine.Engine(parameters(), cfg, placement=eplb.identity(2, E))


class DeploymentTest(parameterized.TestCase):
  @parameterized.parameters(
    # Slots: at least 16 routed experts, and for decode a shared one.
    (SMALL, "decode", None, 20),
    (SMALL, "decode", 3, 20),
    (SMALL, "decode", 7, 24),
    (SMALL, "prefill", None, 16),
    (SMALL, "prefill", 8, 24),
    (CUBE, "decode", None, 24),
    ({}, "decode", None, 17),
    ({}, "prefill", 5, 21),
  )
  def test_makes_a_unit(self, sizes, kind, n_redundant, n):
    cfg, *_ = model()
    wanted = serving_mesh.ServingConfig(sizes, kind, n_redundant, "all_to_all")
    found = serving_mesh.make_serving_mesh(wanted, cfg)
    self.assertEqual(found.mesh, device_mesh.make_mesh(sizes))
    self.assertEqual(found.n_replicas, n)
    self.assertEqual(found.dispatch, "all_to_all")
    self.assertEqual(found.shared_routed, kind == "decode")
    rules = {"decode": serving_mesh.DECODE, "prefill": serving_mesh.PREFILL}
    self.assertEqual(found.rules, rules[kind])
    self.assertEmpty(serving_mesh.validate(found, cfg, SLOTS))

  @parameterized.parameters(
    (dict(role="train"), "role=train: must be one of prefill, decode"),
    (
      dict(dispatch="mail"),
      "dispatch=mail: must be one of allgather, all_to_all,"
      " hierarchical_all_to_all",
    ),
    (
      dict(redundant_experts=4),
      "redundant_experts=4: with 17 experts on 4 devices it must be 3, or a"
      " multiple of 4 more",
    ),
    (
      dict(redundant_experts=-1),
      "redundant_experts=-1: with 17 experts on 4 devices it must be 3, or a"
      " multiple of 4 more",
    ),
  )
  def test_refuses(self, options, message):
    cfg, *_ = model()
    with self.assertRaises(ValueError) as caught:
      serving_mesh.make_serving_mesh(
        serving_mesh.ServingConfig(SMALL, **options), cfg
      )
    self.assertEqual(str(caught.exception), message)


class PublishedTest(parameterized.TestCase):
  """Units of sections 3.4.1 and 3.4.2, of devices that are not here."""

  CFG = presets.PRESETS["v3_671b"].model

  def divided(self, used):
    """The mesh axes of parameters by path, those of dims that have some."""
    found = {}
    for path, spec in param_spec.flatten_with_paths(
      inference_params.specs(self.CFG)
    ).items():
      place = sharding.param_sharding(spec, used.rules, used.mesh.shape)
      axes = (axis for axis, _ in spec.dims)
      found[path] = {
        name: dim for name, dim in zip(axes, place.dims, strict=True) if dim
      }
    return found

  def check(self, used, of_ffn):
    for path, dims in self.divided(used).items():
      with self.subTest(path):
        *_, part, name = path.split("/") if "/" in path else ("", path)
        if part == "experts":
          self.assertEqual(dims, {"experts": ("node", "expert", "model")})
        elif name in ("q_up", "up_k", "up_v", "out"):
          self.assertEqual(dims, {"heads": ("model",)})
        elif name in ("gate_up", "down"):
          self.assertEqual(dims, of_ffn)
        else:
          self.assertEqual(dims, {})

  def test_decode_has_an_expert_a_device(self):
    sizes = {"node": 40, "expert": 2, "model": 4}
    used = serving_mesh.ServingMesh(
      device_mesh.abstract_mesh(sizes),
      serving_mesh.DECODE,
      320,
      shared_routed=True,
    )
    self.assertEmpty(serving_mesh.validate(used, self.CFG, 80))
    self.assertEqual((used.n_devices, used.n_shards), (320, 80))
    self.check(used, {"ffn": ("model",)})
    # A routed expert has one of 32 tokens, the shared one all: it has as many
    # slots, 32 of the 64 that are left, and some routed ones have the rest.
    count = serving_params.uniform_placement(used, self.CFG).count
    np.testing.assert_array_equal(count, [[2] * 32 + [1] * 224 + [32]] * 59)

  def test_prefill_has_nine_experts_a_device(self):
    sizes = {"node": 4, "expert": 2, "model": 4}
    used = serving_mesh.ServingMesh(
      device_mesh.abstract_mesh(sizes),
      serving_mesh.PREFILL,
      288,
      "hierarchical_all_to_all",
    )
    self.assertEmpty(serving_mesh.validate(used, self.CFG, 8))
    self.assertEqual((used.n_devices, used.n_shards), (32, 8))
    self.check(used, {})
    placed = serving_params.uniform_placement(used, self.CFG)
    # Two of the eight groups on each node.
    node = placed.expert.reshape(59, 4, 72) // 32
    for groups in node.reshape(-1, 72):
      self.assertLen(set(groups), 2)


if __name__ == "__main__":
  absltest.main()

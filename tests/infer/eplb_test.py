"""Tests of the placement of experts on devices."""

import itertools
import math

import chex
import numpy as np
from absl.testing import absltest, parameterized

from dsv3_jax.infer import eplb

# Loads of two layers, and what slots hold, printed beside the published code.
GOLDEN_LOAD = [
  [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
  [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
GOLDEN_EXPERT = [
  [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
  [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
SMALL = dict(n_replicas=16, n_devices=8, n_groups=4, n_nodes=2)

# Deployments: experts, then how they are placed.
GLOBAL = (
  (12, dict(n_replicas=16, n_devices=8)),
  (12, dict(n_replicas=12, n_devices=4)),
  (12, dict(n_replicas=20, n_devices=20)),
  (12, dict(n_replicas=40, n_devices=4)),
  (12, dict(n_replicas=18, n_devices=6, n_groups=4, n_nodes=3)),
  (1, dict(n_replicas=6, n_devices=3)),
  (7, dict(n_replicas=9, n_devices=1)),
  (1, dict(n_replicas=1, n_devices=1)),
)
HIERARCHICAL = (
  (12, SMALL),
  (12, dict(n_replicas=12, n_devices=6, n_groups=6, n_nodes=3)),
  (16, dict(n_replicas=24, n_devices=8, n_groups=4, n_nodes=4)),
  (16, dict(n_replicas=20, n_devices=2, n_groups=8, n_nodes=1)),
  # As in section 3.4.1: four nodes of eight, nine experts a device.
  (256, dict(n_replicas=288, n_devices=32, n_groups=8, n_nodes=4)),
)


def uniform(*shape, seed=0):
  return np.random.default_rng(seed).uniform(0.1, 1, shape)


def zipf(n_layers, n_experts, seed=0):
  """Integers that fall off as 1 / rank, in another order in each layer."""
  load = np.tile(100_000 // np.arange(1, n_experts + 1), (n_layers, 1))
  return np.random.default_rng(seed).permuted(load, axis=1)


def compositions(total, parts):
  """All ways to write total as a sum of that many numbers, each at least 1."""
  for cuts in itertools.combinations(range(1, total), parts - 1):
    yield np.diff((0, *cuts, total))


class GoldenTest(absltest.TestCase):
  def test_is_the_published_example(self):
    placed = eplb.balance_experts(GOLDEN_LOAD, **SMALL)
    np.testing.assert_array_equal(placed.expert, GOLDEN_EXPERT)

  def test_has_the_replicas_of_the_published_example(self):
    placed = eplb.balance_experts(GOLDEN_LOAD, **SMALL)
    np.testing.assert_array_equal(
      placed.count,
      [
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
        [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
      ],
    )
    self.assertEqual(placed.replicas.shape, (2, 12, 2))
    # Experts 5 and 6 of the first layer.
    np.testing.assert_array_equal(placed.replicas[0, 5:7], [[0, 2], [1, -1]])


class PackTest(parameterized.TestCase):
  @parameterized.named_parameters(
    # In order: 5 | ; | 4 ; | 4 3 ; 5 3 | ; | 4 3 2 ; 5 3 1 |.
    dict(
      testcase_name="to_the_lightest",
      weights=[5, 4, 3, 3, 2, 1],
      n_bins=2,
      bins=[0, 1, 1, 0, 1, 0],
      places=[0, 0, 1, 1, 2, 2],
    ),
    dict(
      testcase_name="by_weight_not_by_index",
      weights=[1, 2, 3, 4],
      n_bins=2,
      bins=[0, 1, 1, 0],
      places=[1, 1, 0, 0],
    ),
    # The last one finds the lighter bin full.
    dict(
      testcase_name="with_room",
      weights=[10, 1, 1, 1],
      n_bins=2,
      bins=[0, 1, 1, 0],
      places=[0, 0, 1, 1],
    ),
    dict(
      testcase_name="ties_to_the_lower",
      weights=[1] * 6,
      n_bins=3,
      bins=[0, 1, 2, 0, 1, 2],
      places=[0, 0, 0, 1, 1, 1],
    ),
    dict(
      testcase_name="one_each_in_their_own_order",
      weights=[1, 3, 2],
      n_bins=3,
      bins=[0, 1, 2],
      places=[0, 0, 0],
    ),
    dict(
      testcase_name="one_bin_by_decreasing_weight",
      weights=[1, 3, 2],
      n_bins=1,
      bins=[0, 0, 0],
      places=[2, 0, 1],
    ),
  )
  def test_items_go(self, weights, n_bins, bins, places):
    chosen, place = eplb.pack(weights, n_bins)
    np.testing.assert_array_equal(chosen, bins)
    np.testing.assert_array_equal(place, places)

  @parameterized.product(n_bins=(1, 2, 3, 6, 12), seed=(0, 1))
  def test_fills_every_place_of_every_bin_once(self, n_bins, seed):
    chosen, place = eplb.pack(uniform(12, seed=seed), n_bins)
    self.assertCountEqual(
      zip(chosen, place, strict=True),
      itertools.product(range(n_bins), range(12 // n_bins)),
    )

  @parameterized.parameters(*range(20))
  def test_is_within_a_third_of_the_best_of_all(self, seed):
    weights = uniform(10, seed=seed) ** 3
    chosen, _ = eplb.pack(weights, 2)
    heavier = np.bincount(chosen, weights).max()
    halves = itertools.combinations(weights, 5)
    best = min(max(sum(half), weights.sum() - sum(half)) for half in halves)
    self.assertLessEqual(heavier, 4 / 3 * best)

  def test_does_not_overfill_where_weights_overflow(self):
    with np.errstate(over="ignore"):
      chosen, _ = eplb.pack([1.7e308] * 6, 2)
    np.testing.assert_array_equal(np.bincount(chosen), [3, 3])


class ReplicateTest(parameterized.TestCase):
  @parameterized.named_parameters(
    # 6 4 1; 3 4 1; 3 2 1; 2 2 1.
    dict(
      testcase_name="the_heaviest",
      weights=[6, 4, 1],
      expert=[0, 1, 2, 0, 1, 0],
      rank=[0, 0, 0, 1, 1, 2],
      count=[3, 2, 1],
    ),
    dict(
      testcase_name="the_lower_of_two",
      weights=[1, 2, 2],
      expert=[0, 1, 2, 1],
      rank=[0, 0, 0, 1],
      count=[1, 2, 1],
    ),
    dict(
      testcase_name="none_more",
      weights=[1, 3, 2],
      expert=[0, 1, 2],
      rank=[0, 0, 0],
      count=[1, 1, 1],
    ),
    dict(
      testcase_name="the_first_without_load",
      weights=[0, 0],
      expert=[0, 1, 0, 0],
      rank=[0, 0, 1, 2],
      count=[3, 1],
    ),
  )
  def test_gives_more_to(self, weights, expert, rank, count):
    actual = eplb.replicate(weights, len(expert))
    for array, expected in zip(actual, (expert, rank, count), strict=True):
      np.testing.assert_array_equal(array, expected)

  @parameterized.product(n=(1, 2, 3, 4), more=(0, 1, 2, 5), seed=(0, 1, 2))
  def test_leaves_the_smallest_maximum_of_all(self, n, more, seed):
    weights = uniform(n, seed=seed) ** 3
    _, _, count = eplb.replicate(weights, n + more)
    best = min((weights / c).max() for c in compositions(n + more, n))
    self.assertEqual((weights / count).max(), best)

  @parameterized.parameters(0, 1, 2)
  def test_ranks_the_replicas_of_an_expert(self, seed):
    expert, rank, count = eplb.replicate(uniform(5, seed=seed) ** 3, 17)
    np.testing.assert_array_equal(np.bincount(expert), count)
    for i in range(5):
      np.testing.assert_array_equal(rank[expert == i], np.arange(count[i]))


class PlaceTest(parameterized.TestCase):
  @parameterized.product(deployment=GLOBAL + HIERARCHICAL, power=(0, 1, 6))
  def test_says_the_same_of_slots_and_of_experts(self, deployment, power):
    n_experts, how = deployment
    load = uniform(3, n_experts) ** power
    placed = eplb.balance_experts(load, **how)
    n_slots, most = how["n_replicas"], placed.count.max()
    chex.assert_type([placed.expert, placed.replicas, placed.count], np.int32)
    chex.assert_shape(placed.expert, (3, n_slots))
    chex.assert_shape(placed.count, (3, n_experts))
    chex.assert_shape(placed.replicas, (3, n_experts, most))
    self.assertGreaterEqual(placed.count.min(), 1)
    np.testing.assert_array_equal(placed.count.sum(-1), [n_slots] * 3)
    padding = np.arange(most) >= placed.count[..., None]
    np.testing.assert_array_equal(placed.replicas == -1, padding)
    for layer in range(3):
      slots = []
      for expert, replicas in enumerate(placed.replicas[layer]):
        own = replicas[replicas >= 0]
        np.testing.assert_array_equal(placed.expert[layer, own], expert)
        slots.extend(own)
      self.assertCountEqual(slots, range(n_slots))

  @parameterized.product(deployment=HIERARCHICAL, seed=(0, 1))
  def test_keeps_a_group_within_a_node(self, deployment, seed):
    n_experts, how = deployment
    n_groups, n_nodes = how["n_groups"], how["n_nodes"]
    placed = eplb.balance_experts(uniform(3, n_experts, seed=seed), **how)
    groups = placed.expert // (n_experts // n_groups)
    for layer in groups.reshape(3, n_nodes, -1):
      nodes = [set(node) for node in layer]
      for node in nodes:
        self.assertLen(node, n_groups // n_nodes)
      self.assertLen(set.union(*nodes), n_groups)

  def test_packs_groups_into_nodes_by_their_load(self):
    # Groups of 2 experts and load 9, 8, 2 and 1: the first joins the last.
    load = [[4, 5, 8, 0, 1, 1, 0, 1]]
    placed = eplb.balance_experts(
      load, n_replicas=8, n_devices=8, n_groups=4, n_nodes=2
    )
    np.testing.assert_array_equal(placed.expert, [[0, 1, 6, 7, 2, 3, 4, 5]])

  def test_is_global_where_nodes_do_not_divide_groups(self):
    load = zipf(4, 12)
    whole = eplb.balance_experts(load, n_replicas=24, n_devices=12)
    for n_groups, n_nodes in ((1, 4), (4, 3), (3, 2), (2, 4)):
      placed = eplb.balance_experts(
        load, n_replicas=24, n_devices=12, n_groups=n_groups, n_nodes=n_nodes
      )
      chex.assert_trees_all_equal(vars(placed), vars(whole))
    other = eplb.balance_experts(
      load, n_replicas=24, n_devices=12, n_groups=4, n_nodes=2
    )
    self.assertFalse(np.array_equal(other.expert, whole.expert))

  def test_with_one_slot_a_device_adds_replicas_and_moves_nothing(self):
    load = zipf(4, 12)
    placed = eplb.balance_experts(load, n_replicas=16, n_devices=16)
    np.testing.assert_array_equal(placed.expert[:, :12], [range(12)] * 4)
    expected = [eplb.replicate(row, 16)[0] for row in load]
    np.testing.assert_array_equal(placed.expert, expected)

  @parameterized.parameters(*GLOBAL[:2], HIERARCHICAL[0])
  def test_places_each_layer_by_itself(self, n_experts, how):
    load = zipf(4, n_experts)
    placed = eplb.balance_experts(load, **how)
    for i, row in enumerate(load):
      alone = eplb.balance_experts(row[None], **how)
      np.testing.assert_array_equal(placed.expert[i], alone.expert[0])

  def test_reads_counts_and_leaves_them_alone(self):
    load = zipf(4, 12).astype(np.int32)
    before = load.copy()
    placed = eplb.balance_experts(load, **SMALL)
    np.testing.assert_array_equal(load, before)
    # Loads matter in proportion alone; powers of two divide exactly.
    other = eplb.balance_experts(load / 2**20, **SMALL)
    chex.assert_trees_all_equal(vars(placed), vars(other))

  def test_replicas_that_share_a_device_are_legal(self):
    placed = eplb.balance_experts([[3]], n_replicas=4, n_devices=2)
    np.testing.assert_array_equal(placed.expert, [[0, 0, 0, 0]])
    np.testing.assert_array_equal(placed.replicas, [[[0, 2, 1, 3]]])
    np.testing.assert_array_equal(placed.loads([[3]], 2), [[1.5, 1.5]])

  def test_no_load_at_all(self):
    placed = eplb.balance_experts(np.zeros((1, 3)), n_replicas=4, n_devices=2)
    np.testing.assert_array_equal(placed.count, [[2, 1, 1]])
    np.testing.assert_array_equal(placed.loads(np.zeros((1, 3)), 2), [[0, 0]])


class LoadsTest(parameterized.TestCase):
  def test_by_hand(self):
    placed = eplb.ExpertPlacement(
      expert=np.int32([[0, 1, 2, 0], [1, 1, 0, 2]]),
      replicas=np.int32(
        [[[0, 3], [1, -1], [2, -1]], [[2, -1], [0, 1], [3, -1]]]
      ),
      count=np.int32([[2, 1, 1], [1, 2, 1]]),
    )
    load = np.int32([[6, 1, 2], [5, 4, 7]])
    np.testing.assert_array_equal(placed.loads(load, 2), [[4, 5], [4, 12]])
    np.testing.assert_array_equal(
      placed.loads(load, 4), [[3, 1, 2, 3], [2, 2, 5, 7]]
    )
    np.testing.assert_array_equal(placed.loads(load, 1), [[9], [16]])

  @parameterized.parameters(*GLOBAL, *HIERARCHICAL[:4])
  def test_is_where_tokens_go_that_take_turns(self, n_experts, how):
    tokens = zipf(2, n_experts) // 1000
    placed = eplb.balance_experts(tokens, **how)
    # So that every number of replicas divides them.
    tokens *= math.lcm(*np.unique(placed.count))
    per_device = how["n_replicas"] // how["n_devices"]
    for layer, expected in enumerate(placed.loads(tokens, how["n_devices"])):
      received = np.zeros(how["n_devices"])
      for expert, n_tokens in enumerate(tokens[layer]):
        replicas = placed.replicas[layer, expert]
        replicas = replicas[replicas >= 0]
        turns = replicas[np.arange(n_tokens) % len(replicas)]
        received += np.bincount(turns // per_device, minlength=how["n_devices"])
      np.testing.assert_array_equal(received, expected)

  @parameterized.parameters(0, 1, 2)
  def test_skewed_load_is_balanced(self, seed):
    load = zipf(3, 256, seed)
    before = eplb.identity(3, 256).loads(load, 32)
    # The top expert alone is 1 / H(256) = 16 % of all, five times the mean of
    # 32 devices.
    self.assertGreater(eplb.imbalance(before).min(), 5)
    placed = eplb.balance_experts(load, n_replicas=288, n_devices=32)
    after = placed.loads(load, 32)
    np.testing.assert_allclose(after.sum(-1), load.sum(-1), rtol=1e-12)
    self.assertLess(eplb.imbalance(after).max(), 1.01)

  @parameterized.parameters(0, 1, 2)
  def test_skewed_load_is_balanced_within_nodes(self, seed):
    load = zipf(3, 256, seed)
    before = eplb.identity(3, 256).loads(load, 32)
    placed = eplb.balance_experts(load, **HIERARCHICAL[-1][1])
    after = placed.loads(load, 32)
    np.testing.assert_allclose(after.sum(-1), load.sum(-1), rtol=1e-12)
    # What remains is mostly between nodes, which own whole groups.
    ratio = eplb.imbalance(before) / eplb.imbalance(after)
    self.assertGreater(ratio.min(), 2)
    nodes = after.reshape(3, 4, 8)
    heaviest = np.take_along_axis(load / placed.count, placed.expert, -1)
    heaviest = heaviest.reshape(3, 4, -1).max(-1)
    np.testing.assert_array_less(nodes.max(-1) - nodes.mean(-1), heaviest)

  def test_one_replica_a_device_is_as_good_as_replication_allows(self):
    load = zipf(3, 256)
    placed = eplb.balance_experts(load, n_replicas=320, n_devices=320)
    after = placed.loads(load, 320)
    np.testing.assert_array_equal(after.max(-1), (load / placed.count).max(-1))
    before = eplb.identity(3, 256).loads(load, 256)
    ratio = eplb.imbalance(before) / eplb.imbalance(after)
    self.assertGreater(ratio.min(), 10)

  def test_identity_holds_every_expert_once_in_order(self):
    placed = eplb.identity(2, 4)
    np.testing.assert_array_equal(placed.expert, [range(4)] * 2)
    np.testing.assert_array_equal(placed.replicas[..., 0], [range(4)] * 2)
    np.testing.assert_array_equal(placed.count, np.ones((2, 4)))
    chex.assert_shape(placed.replicas, (2, 4, 1))
    chex.assert_type([placed.expert, placed.replicas, placed.count], np.int32)
    load = uniform(2, 4)
    np.testing.assert_array_equal(placed.loads(load, 4), load)

  def test_imbalance_is_the_largest_over_the_mean(self):
    loads = [[[1, 1, 1, 1], [4, 0, 0, 0]], [[0, 0, 0, 0], [1, 2, 2, 3]]]
    np.testing.assert_array_equal(eplb.imbalance(loads), [[1, 4], [1, 1.5]])
    self.assertEqual(eplb.imbalance([3, 1]), 1.5)
    self.assertEqual(eplb.imbalance([0, 0]), 1)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(n_replicas=11), "n_replicas=11: must be at least n_experts=12"),
    (dict(n_replicas=15), "n_replicas=15: must be a multiple of n_devices=8"),
    (dict(n_nodes=3), "n_devices=8: must be a multiple of n_nodes=3"),
    (dict(n_groups=5), "n_experts=12: must be a multiple of n_groups=5"),
    (dict(n_devices=0), "n_devices=0: must be at least 1"),
    (dict(n_nodes=-2), "n_nodes=-2: must be at least 1"),
    (dict(n_groups=0), "n_groups=0: must be at least 1"),
    (
      dict(load=np.ones(12)),
      r"load has shape \(12,\): must have 2 dim\(s\), none of them 0",
    ),
    (dict(load=np.ones((2, 0))), r"load has shape \(2, 0\): must have 2"),
    (dict(load=[[1] * 11 + [-2]]), "load holds -2.0: must be finite and at"),
    (dict(load=[[np.nan] * 12]), "load holds nan: must be finite and at"),
    (dict(load=[[np.inf] * 12]), "load holds inf: must be finite and at"),
  )
  def test_of_a_placement(self, changed, message):
    how = {"load": GOLDEN_LOAD, **SMALL, **changed}
    with self.assertRaisesRegex(ValueError, f"^{message}"):
      eplb.balance_experts(**how)

  @parameterized.named_parameters(
    (
      "bins",
      lambda: eplb.pack([1, 2, 3], 2),
      "n_items=3: must be a multiple of n_bins=2",
    ),
    ("no_bin", lambda: eplb.pack([1], 0), "n_bins=0: must be at least"),
    (
      "rows",
      lambda: eplb.pack([[1]], 1),
      r"weights has shape \(1, 1\): must have 1 dim",
    ),
    (
      "heavy",
      lambda: eplb.pack([1, np.inf], 1),
      "weights holds inf: must be finite",
    ),
    (
      "replicas",
      lambda: eplb.replicate([1, 2], 1),
      "n_replicas=1: must be at least n_experts=2",
    ),
    (
      "light",
      lambda: eplb.replicate([1, -1], 2),
      "weights holds -1.0: must be finite",
    ),
    (
      "layers",
      lambda: eplb.identity(0, 4),
      "n_layers=0, n_experts=4: must be at least 1",
    ),
    (
      "experts",
      lambda: eplb.identity(4, 0),
      "n_layers=4, n_experts=0: must be at least 1",
    ),
    (
      "shape",
      lambda: eplb.identity(2, 4).loads(np.ones((1, 4)), 2),
      r"load has shape \(1, 4\): must be \(2, 4\)",
    ),
    (
      "load",
      lambda: eplb.identity(1, 2).loads([[1, np.nan]], 2),
      "load holds nan: must be finite",
    ),
    (
      "devices",
      lambda: eplb.identity(2, 4).loads(np.ones((2, 4)), 3),
      "n_replicas=4: must be a multiple of n_devices=3",
    ),
    (
      "scalar",
      lambda: eplb.imbalance(3.0),
      r"loads has shape \(\): must have 1 dim",
    ),
    (
      "nothing",
      lambda: eplb.imbalance(np.ones((2, 0))),
      r"loads has shape \(2, 0\): must have 2 dim",
    ),
    (
      "negative",
      lambda: eplb.imbalance([2, -1]),
      "loads holds -1.0: must be finite",
    ),
  )
  def test_of(self, call, message):
    with self.assertRaisesRegex(ValueError, f"^{message}"):
      call()


if __name__ == "__main__":
  absltest.main()

"""Tests of FP8 through experts, dispatch, layouts and pipelines."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized
from quantize_test import relative

from dsv3_jax import config, losses, param_spec, train
from dsv3_jax.config import presets
from dsv3_jax.data.batch import make_batch
from dsv3_jax.linear import linear, quantize
from dsv3_jax.linear import recipe as recipe_lib
from dsv3_jax.model import experts, layers, moe, transformer
from dsv3_jax.parallel import device_mesh, dispatch, layout_check, layouts
from dsv3_jax.trainer import step_monitor

HOW = config.Precision(recipe="fp8", fp8="*", tile=32, scales="power_of_two")
CFG = config.Router(n_experts=16, top_k=4, n_groups=8, top_groups=4)
D, F = 96, 48
RUN = config.override(
  presets.PRESETS["tiny"],
  "vocab_size=300",
  "d_model=64",
  "n_layers=4",
  "n_dense_layers=2",
  "dense_ffn_dim=64",
  "attention.n_heads=4",
  "attention.q_rank=32",
  "attention.kv_rank=32",
  "attention.nope_dim=16",
  "attention.v_dim=16",
  "moe.ffn_dim=64",
  "init_std=0.1",
  "data.seq_len=16",
  "train.batch_size=16",
  "train.micro_batches=4",
  "train.tokens=65536",
  "train.scan_layers=true",
  "precision.recipe=fp8",
  "precision.tile=32",
)


def mixture(m):
  """Weights of experts in float32 and in FP8, tokens, choices, gates, dy."""
  specs = param_spec.stack(layers.swiglu_specs(D, F, 0.4), 16, "experts")
  p = testing.draw(specs)
  rng = np.random.default_rng(m)
  chosen = np.array([rng.permutation(16)[:4] for _ in range(m)], np.int32)
  gates = jnp.asarray(rng.uniform(0.1, 1, chosen.shape), jnp.float32)
  x, dy = testing.normal(m, D), testing.normal(m, D, seed=1)
  p8 = recipe_lib.compute_params(p, specs, HOW)
  return p, p8, x, chosen, gates, dy


def paths_of(params):
  """The weights in FP8 by path."""
  is_fp8 = lambda w: isinstance(w, linear.Fp8Weight)
  leaves = jax.tree.leaves_with_path(params, is_leaf=is_fp8)
  return {param_spec.name(path): w for path, w in leaves if is_fp8(w)}


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(ffn, p, x, chosen, gates, dy):
  trained = recipe_lib.differentiable(p)
  y, vjp = jax.vjp(
    lambda new, x, gates: ffn(
      recipe_lib.with_differentiable(new, p), x, chosen, gates
    ),
    trained,
    x,
    gates,
  )
  dp, *rest = vjp(dy)
  dp, counted = recipe_lib.split_gradients(dp)
  return (y, dp, *rest), counted


class ExpertsTest(parameterized.TestCase):
  @parameterized.parameters(1, 7, 100, 600)
  def test_are_near_those_in_float32(self, m):
    p, p8, *args = mixture(m)
    found, _ = value_and_gradients(experts.grouped_ffn, p8, *args)
    want, _ = value_and_gradients(experts.grouped_ffn, p, *args)
    leaves = zip(*map(jax.tree.leaves, (found, want)), strict=True)
    for a, b in leaves:
      # Four to seven quantizations of 2.5 % each.
      self.assertBetween(relative(a, b), 0.01, 0.12)

  @parameterized.parameters("gate_up", "down")
  def test_one_of_their_weights_may_be_in_fp8_alone(self, name):
    p, p8, *args = mixture(20)
    mixed = p | {name: p8[name]}
    found, counted = value_and_gradients(experts.grouped_ffn, mixed, *args)
    want, _ = value_and_gradients(experts.grouped_ffn, p, *args)
    for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
      self.assertLess(relative(a, b), 0.12)
    self.assertEqual(counted["gradient"].keys(), {name})

  def test_weights_gradients_apart_are_the_same(self):
    _, p8, *args = mixture(100)
    apart = functools.partial(experts.grouped_ffn, split_wgrad=True)
    found = value_and_gradients(experts.grouped_ffn, p8, *args)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      found,
      value_and_gradients(apart, p8, *args),
    )

  def test_gradients_are_linear_in_that_of_the_output(self):
    _, p8, *args, dy = mixture(100)
    (_, *want), _ = value_and_gradients(experts.grouped_ffn, p8, *args, dy)
    power = np.float32(2) ** -60
    small, _ = value_and_gradients(experts.grouped_ffn, p8, *args, power * dy)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, power * b),
      small[1:],
      tuple(want),
    )

  def test_gradients_that_are_not_finite_are_counted(self):
    _, p8, x, *args, dy = mixture(20)
    x = x.at[3, 5].set(np.nan)
    _, counted = value_and_gradients(experts.grouped_ffn, p8, x, *args, dy)
    column = quantize.COUNTERS.index("not_finite")
    self.assertEqual(counted["activation"]["gate_up"][column], 1)
    # Of its four experts, what follows is not finite at all.
    self.assertEqual(counted["activation"]["down"][column], 4 * -(-F // 32))


class DispatchTest(parameterized.TestCase):
  @parameterized.parameters(
    "allgather", "all_to_all", "hierarchical_all_to_all", "all_to_all apart"
  )
  def test_sends_what_one_device_would_quantize(self, form):
    sizes = {"node": 2, "expert": 2}
    mesh = device_mesh.make_mesh(sizes)
    _, p8, *args = mixture(96)
    name, *apart = form.split()
    ffn = dispatch.make_expert_parallel_ffn(
      name, sizes, CFG, split_wgrad=bool(apart)
    ).ffn
    spec = jax.P(device_mesh.EXPERTS)
    in_specs = jax.tree.map(lambda a: spec, (p8, *args))
    counts = jax.tree.map(lambda _: jax.P(), p8["down"].handle.counts)
    for name in ("gate_up", "down"):
      w = in_specs[0][name]
      in_specs[0][name] = w.replace(handle=w.handle.replace(counts=counts))

    def local(*args):
      made, counted = value_and_gradients.__wrapped__(ffn, *args)
      return made, jax.tree.map(
        lambda a: jax.lax.psum(a, sorted(jax.typeof(a).mat.varying)), counted
      )

    run = jax.jit(
      jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=(spec, jax.P())
      )
    )
    args = jax.device_put(
      (p8, *args), jax.tree.map(lambda s: jax.NamedSharding(mesh, s), in_specs)
    )
    (y, dp, dx, dgates), _ = jax.device_get(run(*args))
    # What is sent has scales of its own magnitude, however small.
    power = np.float32(2) ** -60
    small, _ = jax.device_get(run(*args[:-1], power * args[-1]))
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, power * b),
      small[1:],
      (dp, dx, dgates),
    )
    (y1, dp1, dx1, dgates1), _ = value_and_gradients(
      experts.grouped_ffn, *mixture(96)[1:]
    )
    # In float32 the same numbers are multiplied, and added in another order;
    # where that moves a number over the edge between two steps of FP8, a result
    # differs by a little of one product.
    for a, b in ((y, y1), (dx, dx1), (dgates, dgates1)):
      self.assertLess(relative(a, b), 2e-3)
    # Tiles along tokens are of the tokens that come together.
    for name in dp:
      self.assertLess(relative(dp[name], dp1[name]), 0.05)


class SlicesTest(parameterized.TestCase):
  @parameterized.parameters("zero1", "fsdp")
  @pytest.mark.slow
  def test_slices_are_quantized_as_the_whole(self, layout):
    run = config.override(
      RUN,
      f"parallel.layout={layout}",
      "attention.q_rank=36",
      "attention.kv_rank=40",
    )
    specs = transformer.specs(run.model)
    params = testing.draw(specs)
    # A block of zeros, cut by slices, and some numbers that are lost.
    w = params["dense"]["mla"]["q_up"]
    params["dense"]["mla"]["q_up"] = w.at[0, :32].set(0).at[0, 33].mul(1e-6)
    whole = recipe_lib.compute_params(params, specs, run.precision)
    mesh = device_mesh.make_mesh({"pipe": 2, "data": 2, "expert": 2})
    layout = layouts.make_layout(run, mesh.shape, staged=False)

    def local(params):
      args = params, specs, run.precision, layout.fsdp_dims
      counts = recipe_lib.weight_counts(*args)
      p = layout.gather_for_step(recipe_lib.compute_params(*args))
      layers = ("dense", "moe", "mtp")
      for kind in layers:
        one = [
          layout.gather_layer(kind, jax.tree.map(lambda a, i=i: a[i], p[kind]))
          for i in range(len(jax.tree.leaves(p[kind])[0]))
        ]
        p[kind] = jax.tree.map(lambda *a: jnp.stack(a), *one)
      # What experts others hold is not here.
      keep = lambda w: (w.codes, w.scales)
      flat = {
        path: keep(w)
        for path, w in paths_of(p).items()
        if "experts" not in path
      }
      flat = jax.tree.map(
        lambda a: jax.lax.pmax(a, tuple(jax.typeof(a).mat.varying)), flat
      )
      return flat, counts

    made, counts = jax.jit(
      jax.shard_map(
        local, mesh=mesh, in_specs=(layout.specs,), out_specs=jax.P()
      )
    )(jax.device_put(params, train.shardings(run, mesh).params))
    # What was counted of slices is what there is to count of the whole.
    counts_of_whole = recipe_lib.weight_counts(params, specs, run.precision)
    for path, n in counts_of_whole.items():
      np.testing.assert_array_equal(counts[path], n, path)
      self.assertEqual(
        n[3], param_spec.flatten_with_paths(params)[path].size, path
      )
    expected = paths_of(whole)
    self.assertGreater(len(made), 10)
    for path, (bits, scales) in made.items():
      np.testing.assert_array_equal(scales, expected[path].scales, path)
      np.testing.assert_array_equal(bits, expected[path].codes, path)


class CollectivesTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_a_weight_is_gathered_in_a_byte_a_number(self):
    self.check("fsdp")

  @pytest.mark.slow
  def test_and_so_is_what_zero1_holds_in_slices(self):
    self.check("zero1")

  def check(self, layout):
    run = config.override(RUN, f"parallel.layout={layout}")
    mesh = device_mesh.make_mesh({"data": 2})
    gathers = re.findall(
      r" = (\w+)\[([\d,]*)\]\S* all-gather\(",
      train.trace_step(run, mesh).lower().compile().as_text(),
    )
    specs = param_spec.flatten_with_paths(transformer.specs(run.model))
    names = recipe_lib.fp8_paths(transformer.specs(run.model), run.precision)
    n_bytes = sum(kind == "u8" for kind, _ in gathers)
    self.assertEqual(n_bytes, len(names))
    # Nor is a master: all else is small, or of experts' scales.
    largest = max(
      math.prod(map(int, dims.split(",")))
      for kind, dims in gathers
      if kind != "u8"
    )
    others = (s.shape for p, s in specs.items() if p not in names)
    self.assertLessEqual(largest, max(map(math.prod, others)))


@functools.cache
def step_gradients(run, sizes=()):
  """Gradients, loss, loads and what was counted of a seeded batch."""
  mesh = device_mesh.make_mesh(dict(sizes)) if sizes else None
  state = train.init_state(run, jax.random.key(0))
  rng = np.random.default_rng(0)
  shape = run.train.micro_batches, run.train.micro_batch_size, 17
  rows = rng.integers(0, 300, shape).astype(np.int32)
  batch = make_batch(rows)
  if mesh is not None:
    state = jax.device_put(state, train.shardings(run, mesh))
    batch = device_mesh.make_global_batch(
      batch, run.train.micro_batch_size, mesh, dim=1
    )
  of = functools.partial(train.gradients, run=run, mesh=mesh)
  return jax.device_get(jax.jit(of)(state, batch))


def check(test, sizes, settings):
  """A layout's gradients, against one device and against float32."""
  # All experts of every token: no rounding moves a token elsewhere.
  same = ("router.top_k=16", "router.n_groups=1", "router.top_groups=1")
  run = config.override(RUN, *same)
  one = step_gradients(run).grads
  exact = step_gradients(config.override(run, "precision.recipe=fp32")).grads
  sums = step_gradients(config.override(run, *settings), tuple(sizes.items()))
  found, counted = sums.grads, sums.fp8_counts
  test.assertEqual(sums.stats.load.sum(), 16 * 16 * 16 * 3 - 16 * 16)
  norm = lambda a, b: np.sqrt(
    sum(
      np.sum((x - y) ** 2)
      for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
  )
  test.assertLess(norm(found, one), 0.6 * norm(one, exact))
  names = recipe_lib.fp8_paths(transformer.specs(run.model), run.precision)
  test.assertEqual(counted.keys(), set(linear.CLASSES))
  for by_path in counted.values():
    test.assertEqual(by_path.keys(), names)


class BatchSizeTest(absltest.TestCase):
  @pytest.mark.slow
  def test_gradients_keep_their_precision_at_any_batch_size(self):
    # A token's share of a mean loss: in batches of 256 tokens, and of 2^27.
    run = config.override(
      presets.PRESETS["tiny"],
      "n_layers=2",
      "data.seq_len=64",
      "train.tokens=1e6",
      "router.balance_weight=0",
    )
    state = train.init_state(run, jax.random.key(0))
    rows = np.random.default_rng(0).integers(8, 2048, (4, 65))
    batch = make_batch(rows)
    weights = losses.token_weights(batch, run.model.mtp.depth)

    def gradients(recipe, *shares):
      how = config.override(run, f"precision.recipe={recipe}").precision
      specs = transformer.specs(run.model)

      @jax.jit
      def of(share):
        p = recipe_lib.compute_params(state.params, specs, how)
        objective = lambda trained: (
          losses.loss(
            recipe_lib.with_differentiable(trained, p),
            state.router_bias,
            batch,
            tuple(w * share for w in weights),
            0.3,
            run.model,
          )[0].total
        )
        grads = jax.grad(objective)(recipe_lib.differentiable(p))
        return recipe_lib.split_gradients(grads)[0]

      for share in shares:
        leaves = param_spec.flatten_with_paths(of(np.float32(share))).items()
        yield {k: np.float64(v).ravel() / share for k, v in leaves}

    (want,) = gradients("fp32", 1)
    for found in gradients("fp8", 1, 2.0**-19):
      norm = {k: np.linalg.norm(found[k]) for k in want}
      exact = {k: np.linalg.norm(want[k]) for k in want}
      cos = [found[k] @ want[k] / norm[k] / exact[k] for k in want]
      self.assertGreater(np.median(cos), 0.98)
      for k in want:
        self.assertBetween(norm[k] / exact[k], 0.97, 1.03, k)


class LayoutsTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_differ_by_less_than_the_recipe_does(self):
    check(self, {"data": 2, "expert": 2}, ("parallel.layout=fsdp",))

  @pytest.mark.slow
  def test_counts_do_not_depend_on_micro_batches_or_the_pipeline(self):
    run = config.override(RUN, "precision.counters=true")
    one = step_gradients(run).fp8_counts
    dense = "dense/mla/q_up"
    for settings, sizes in (
      (("train.micro_batches=1",), ()),
      (("parallel.schedule=1f1b",), (("pipe", 2),)),
    ):
      other = config.override(run, *settings)
      counted = step_gradients(other, sizes).fp8_counts
      # Tiles and elements in all: of the 256 tokens of each layer.
      for column, kind in itertools.product((0, 3), linear.CLASSES):
        np.testing.assert_array_equal(
          counted[kind][dense][..., column], one[kind][dense][..., column]
        )
      for path, counts in one["weight"].items():
        np.testing.assert_array_equal(counted["weight"][path], counts, path)
    activations = one["activation"][dense]
    self.assertEqual(activations.shape, (2, 6))
    np.testing.assert_array_equal(activations[:, 3], 256 * 32)


@pytest.mark.slow
class MoreLayoutsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"pipe": 2}, ("parallel.schedule=dualpipe",)),
    ({"expert": 4}, ()),
    ({"node": 2, "expert": 2}, ("parallel.layout=zero1",)),
    ({"model": 2}, ()),
    (
      {"pipe": 2, "data": 2},
      ("parallel.schedule=zb1p", "parallel.layout=zero1"),
    ),
  )
  def test_differ_by_less_than_the_recipe_does(self, sizes, settings):
    check(self, sizes, settings)


def kept_bytes(kind, recipe, n_tokens):
  """Bytes that the forward pass of a layer of shape S saves."""
  cfg = presets.S.model
  how = dataclasses.replace(presets.S.precision, recipe=recipe, fp8="*")
  specs = transformer.specs(cfg)[kind]

  def forward(masters, x, bias):
    p = recipe_lib.compute_params(masters, specs, how)
    p = jax.tree.map(lambda a: a[0], p)

    def layer(trained, x):
      whole = recipe_lib.with_differentiable(trained, p)
      if kind == "dense":
        return transformer.dense_block(whole, x, cfg)
      return transformer.moe_block(whole, x, bias, cfg, moe.LOCAL)[0]

    return jax.vjp(layer, recipe_lib.differentiable(p), x)

  masters = param_spec.abstract(specs)
  x = jax.ShapeDtypeStruct((1, n_tokens, cfg.d_model), jnp.bfloat16)
  bias = jax.ShapeDtypeStruct([cfg.router.n_experts], jnp.float32)
  compiled = jax.jit(forward).lower(masters, x, bias).compile()
  return compiled.memory_analysis().output_size_in_bytes


class MemoryTest(parameterized.TestCase):
  @parameterized.parameters("dense", "moe")
  def test_falls_by_a_byte_for_each_number_that_a_linear_layer_reads(
    self, kind
  ):
    cfg, tile = presets.S.model, presets.S.precision.tile
    d, mla, ffn = cfg.d_model, cfg.attention, cfg.moe.ffn_dim
    # Inputs of the projections down and up to queries and to the latent; that
    # of the output is as it was, as attention keeps it too. Then those of the
    # feed-forward layers, and their hidden states, of which the inputs of their
    # second layers are made again (section 3.3.3).
    widths = [d, d, mla.q_rank, mla.kv_rank]
    if kind == "dense":
      widths += [d, 2 * cfg.dense_ffn_dim]
    else:
      widths += [d, 2 * ffn * cfg.moe.n_shared, d]
      widths += [2 * ffn] * cfg.router.top_k
    # A byte less for each number, and a scale for each tile.
    expected = sum(n - 4 * -(-n // tile) for n in widths)
    bytes_of = {
      (recipe, n): kept_bytes(kind, recipe, n)
      for recipe in ("bf16", "fp8")
      for n in (256, 512)
    }
    a_token = {
      recipe: (bytes_of[recipe, 512] - bytes_of[recipe, 256]) / 256
      for recipe in ("bf16", "fp8")
    }
    self.assertEqual(a_token["bf16"] - a_token["fp8"], expected)


class ProblemsTest(absltest.TestCase):
  def test_model_must_not_cut_tiles(self):
    self.assertEqual(layout_check.validate(RUN, {"model": 2}), [])
    run = config.override(RUN, "moe.ffn_dim=32")
    (line,) = layout_check.validate(run, {"model": 2})
    self.assertIn("model=2 leaves 16 of moe/ffn/experts/down to a device", line)

  def test_a_recipe_must_name_weights_that_have_a_tile(self):
    found = layout_check.validate(config.override(RUN, "precision.tile=64"), {})
    self.assertLen(found, 1)
    self.assertIn("has 32 rows or columns, which is less", found[0])
    run = config.override(RUN, "precision.fp8=moe/x,head")
    found = layout_check.validate(run, {})
    self.assertLen(found, 2)
    self.assertIn("'head': names no weight of a linear layer", found[1])


class WordsTest(absltest.TestCase):
  def test_shares_and_lines(self):
    counts = np.zeros((3, 6), np.float32)
    counts[:, 0], counts[:, 3] = 4, 512
    gradients = counts.copy()
    gradients[2] = [4, 1, 1, 512, 0, 64]
    counted = {
      "activation": {"moe/mla/out": counts},
      "gradient": {"moe/mla/out": gradients},
      "weight": {"head": np.array([8.0, 2, 0, 1024, 0, 1])},
    }
    shares = step_monitor.fp8_shares(counted)
    self.assertEqual(shares["fp8_gradient_underflow"], 64 / 1536)
    self.assertEqual(shares["fp8_gradient_zero"], 1 / 12)
    self.assertEqual(shares["fp8_activation_underflow"], 0)
    self.assertEqual(shares["fp8_weight_underflow"], 1 / 1024)
    self.assertEqual(
      list(step_monitor.not_finite_tiles(counted)),
      [
        "moe/mla/out, layer 2: 1 tiles of the gradient are not finite",
        "head: 2 tiles of the weight are not finite",
      ],
    )
    self.assertEqual(step_monitor.fp8_shares({}), {})


if __name__ == "__main__":
  absltest.main()

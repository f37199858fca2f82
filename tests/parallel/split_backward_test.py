"""Tests of a layer split into passes, against its gradient as a whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.linear import linear
from dsv3_jax.linear import recipe as recipe_lib
from dsv3_jax.model import experts, layers, moe, transformer
from dsv3_jax.parallel.pipeline import split_backward

CFG = testing.tiny()
B, T = 2, 13  # no weight has a size with this factor
BLOCKS = {
  "dense": layers.swiglu_specs(CFG.d_model, CFG.dense_ffn_dim, 0.1),
  "moe": moe.specs(CFG),
}


def dense(p, bias, x):
  return (transformer.dense_block(p, x, CFG), jnp.zeros_like(bias[0])), None


def mixture(ffn, p, bias, x):
  y, stats = transformer.moe_block(p, x, bias, CFG, moe.Experts(ffn))
  return (y, stats.balance), stats.load


SELECTIVE = testing.run("train.remat=selective").train.activations
APART = functools.partial(experts.grouped_ffn, split_wgrad=True)
LAYERS = {
  "dense": ("dense", dense),
  "moe": ("moe", functools.partial(mixture, APART)),
}


def inputs(kind, recipe="fp32"):
  p = testing.draw(transformer.block_specs(CFG, BLOCKS[kind]))
  bias = 0.1 * testing.normal(CFG.router.n_experts, seed=2)
  x, dy = (testing.normal(B, T, CFG.d_model, seed=seed) for seed in (0, 1))
  if recipe != "fp32":
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
  specs = transformer.block_specs(CFG, BLOCKS[kind])
  how = config.Precision(recipe=recipe, fp8="*", tile=8)
  p = recipe_lib.compute_params(p, specs, how)
  return p, jnp.asarray(bias), jnp.asarray(x), (dy, jnp.float32(0.7))


def put_off(p):
  return [leaf.ndim > 1 for leaf in jax.tree.leaves(p)]


def whole(layer, p, bias, x, d_outputs):
  """Outputs and gradients for weights and x, in one go."""
  of = lambda p, x: layer(p, bias, x)
  outputs, vjp, aux = jax.vjp(of, p, x, has_aux=True)
  return outputs, aux, *vjp(d_outputs)


def in_parts(passes, p, bias, x, d_outputs):
  outputs, aux, residuals = passes.forward(p, bias, x)
  dx, early, deferred = passes.input_gradient(p, bias, residuals, d_outputs)
  late = passes.weight_gradient(p, bias, deferred)
  pairs = list(zip(early, late, strict=True))
  assert all((a is None) != (b is None) for a, b in pairs)
  leaves = [b if a is None else a for a, b in pairs]
  dp = jax.tree.unflatten(jax.tree.structure(p), leaves)
  return outputs, aux, dp, dx


def products(f, *args):
  """Matrix products in a program, grouped ones and inner programs included."""
  return str(jax.make_jaxpr(f)(*args)).count("dot_general[")


class SplitTest(parameterized.TestCase):
  @parameterized.parameters(
    ("dense", "fp32"), ("moe", "fp32"), ("moe", "fp8", SELECTIVE)
  )
  def test_the_passes_are_the_layer_and_its_gradient(self, *case):
    self.check_passes(*case)

  @parameterized.parameters(
    ("dense", "bf16"),
    ("moe", "bf16"),
    ("dense", "fp8"),
    ("moe", "fp8"),
    ("dense", "fp8", SELECTIVE),
  )
  @pytest.mark.slow
  def test_so_are_they_in_every_precision(self, *case):
    self.check_passes(*case)

  def check_passes(self, name, recipe, activations=None):
    kind, layer = LAYERS[name]
    p, bias, x, d_outputs = inputs(kind, recipe)

    def of_trained(trained, constants, x):
      p, bias = constants
      return layer(recipe_lib.with_differentiable(trained, p), bias, x)

    trained = recipe_lib.differentiable(p)
    args = trained, (p, bias), x, d_outputs
    passes = split_backward.split(
      of_trained, *args[:3], put_off(trained), activations
    )
    result = jax.jit(functools.partial(in_parts, passes))(*args)
    expected = jax.jit(functools.partial(whole, of_trained))(*args)
    # The same operations in the same order: nothing but fusion may differ.
    # It may move a number over the edge between two of FP8.
    eps = testing.EPS if recipe == "fp32" else float(jnp.finfo("bfloat16").eps)
    self.assertEqual(*map(jax.tree.structure, (result, expected)))
    pairs = zip(
      jax.tree.leaves_with_path(expected), jax.tree.leaves(result), strict=True
    )
    for (path, a), b in pairs:
      a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
      np.testing.assert_allclose(
        b, a, rtol=0, atol=16 * eps * np.abs(a).max(), err_msg=str(path)
      )

  @parameterized.parameters(*LAYERS)
  def test_no_product_is_made_twice_and_none_for_weights_early(self, name):
    kind, layer = LAYERS[name]
    p, bias, x, d_outputs = inputs(kind)
    passes = split_backward.split(layer, p, bias, x, put_off(p))
    _, _, residuals = passes.forward(p, bias, x)
    _, _, deferred = passes.input_gradient(p, bias, residuals, d_outputs)
    forward = products(passes.forward, p, bias, x)
    back = products(passes.input_gradient, p, bias, residuals, d_outputs)
    late = products(passes.weight_gradient, p, bias, deferred)
    one = products(functools.partial(whole, layer), p, bias, x, d_outputs)
    self.assertEqual(forward + back + late, one)
    # One for each matrix that stands alone, and the experts'.
    self.assertGreaterEqual(late, sum(put_off(p)))

  @parameterized.parameters(*LAYERS)
  def test_what_is_kept_is_never_a_weight(self, name):
    kind, layer = LAYERS[name]
    p, bias, x, _ = inputs(kind)
    passes = split_backward.split(layer, p, bias, x, put_off(p))
    sizes = {leaf.size for leaf in jax.tree.leaves(p) if leaf.ndim > 1}
    for types in (*passes.residual_types, *passes.wgrad_types):
      self.assertNotIn(int(np.prod(types.shape)), sizes, types)

  def test_of_a_linear_layer_its_input_and_the_gradient_of_its_output(self):
    def layer(w, constant, x):
      return linear.linear(x, w) * constant, None

    w, x, c = testing.normal(5, 7), testing.normal(3, 4, 5), jnp.float32(2)
    passes = split_backward.split(layer, w, c, x, [True])
    shapes = lambda types: [a.shape for a in types]
    self.assertEqual(shapes(passes.residual_types), [(3, 4, 5)])
    self.assertCountEqual(shapes(passes.wgrad_types), [(3, 4, 5), (3, 4, 7)])

  @parameterized.parameters(((), 1), (("attention", "residual", "hidden"), 6))
  def test_keeps_what_has_a_name_and_repeats_the_rest(self, names, n_kept):
    kind, layer = LAYERS["moe"]
    args = inputs(kind)
    plain = split_backward.split(layer, *args[:3], put_off(args[0]))
    passes = split_backward.split(layer, *args[:3], put_off(args[0]), names)
    self.assertLen(passes.residual_types, n_kept)
    self.assertEqual(passes.residual_types[0].shape, args[2].shape)
    self.assertGreater(len(plain.residual_types), n_kept)
    # As in users' programs: without fusion emitters LLVM contracts some
    # products and sums to multiply-adds, depending on the program.
    jit = functools.partial(
      jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True}
    )
    testing.assert_same(
      jit(functools.partial(in_parts, passes))(*args),
      jit(functools.partial(in_parts, plain))(*args),
    )

  def test_refuses_gradients_that_cannot_be_put_off(self):
    layer = functools.partial(mixture, experts.grouped_ffn)  # shares its loops
    p, bias, x, _ = inputs("moe")
    with self.assertRaisesRegex(ValueError, "made together with others"):
      split_backward.split(layer, p, bias, x, put_off(p))


if __name__ == "__main__":
  absltest.main()

"""Tests of the three products of linear layers in FP8."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest, parameterized
from quantize_test import numpy_quantize, relative

from dsv3_jax import config, param_spec
from dsv3_jax.linear import (
  fp8_matmul_hopper,
  linear,
  quantize,
  recipe,
  scaled_matmul,
)
from dsv3_jax.model import layers

HOW = config.Precision(recipe="fp8", fp8="*", backend="exact")
SHAPES = ((256, 256, 384), (200, 576, 130), (1, 128, 128), (129, 130, 257))
# As in users' programs, products and sums round one by one. Without fusion
# emitters LLVM contracts some to multiply-adds, depending on the program.
OPTIONS = {"xla_cpu_use_fusion_emitters": True}
exact = jax.jit(scaled_matmul.exact, compiler_options=OPTIONS)


def weight(w, how=HOW):
  spec = param_spec.linear(1.0, k=w.shape[0], n=w.shape[1])
  return recipe.compute_params({"w": w}, {"w": spec}, how)["w"]


def inputs(m, k, n):
  """x with large tokens, dy with large channels, and w."""
  x = testing.normal(m, k) * 10.0 ** testing.normal(m, 1, seed=3)
  dy = testing.normal(m, n, seed=1) * 10.0 ** testing.normal(1, n, seed=4)
  return x, testing.normal(k, n, seed=2), dy


def tiled(x, *tile):
  values, scales = numpy_quantize(x, tile)
  bits = jnp.asarray(values.view(np.uint8))
  return quantize.BlockScaled(bits, jnp.asarray(scales), tile)


def numbers(x):
  return np.asarray(quantize.dequantize(x, jnp.float32))


def expected(x, w, dy):
  """Operands of the three products, from NumPy."""
  x8, dy8, w8 = tiled(x, 1, 128), tiled(dy, 1, 128), tiled(w, 128, 128)
  columns = tiled(numbers(x8), 128, 1), tiled(dy, 128, 1)
  return {
    "y": (x8, w8),
    "dx": (dy8, w8.transpose()),
    "dw": (columns[0].transpose(), columns[1]),
  }


def three(x, w, dy, how=HOW):
  """y, dx and dw of `linear.linear`."""

  @functools.partial(jax.jit, compiler_options=OPTIONS)
  def run(x, w, dy):
    y, vjp = jax.vjp(linear.linear, x, weight(w, how))
    dx, dw = vjp(dy)
    return {"y": y, "dx": dx, "dw": dw.handle.master}

  return run(*map(jnp.asarray, (x, w, dy)))


class LinearTest(parameterized.TestCase):
  @parameterized.parameters(*SHAPES)
  def test_each_product_is_the_reference_bit_for_bit(self, m, k, n):
    args = tuple(map(np.asarray, inputs(m, k, n)))
    found = three(*args)
    for name, operands in expected(*args).items():
      np.testing.assert_array_equal(found[name], exact(*operands), name)

  @parameterized.parameters(*SHAPES)
  def test_errors_are_those_that_quantization_makes(self, m, k, n):
    x, w, dy = (np.asarray(a) for a in inputs(m, k, n))
    want = {"y": (x, w), "dx": (dy, w.T), "dw": (x.T, dy)}
    found = three(x, w, dy)
    for name, (a, b) in want.items():
      a8, b8 = expected(x, w, dy)[name]
      product = np.float64(a) @ np.float64(b)
      # To the bit what the quantized operands say, but for float32 sums.
      exactly = np.float64(numbers(a8)) @ np.float64(numbers(b8))
      size = np.abs(numbers(a8)) @ np.abs(numbers(b8))
      self.assertTrue(
        np.all(
          np.abs(found[name] - exactly) <= (a.shape[1] + 4) * testing.EPS * size
        )
      )
      # Half a step of three bits, of each operand; two of x in dw.
      bound = (3 if name == "dw" else 2) * 1.1 * 2**-4
      floor = np.abs(a) @ np.abs(b)
      self.assertLess(np.max(np.abs(exactly - product) / floor), bound)

  def test_gradients_are_linear_in_that_of_the_output(self):
    x, w, dy = inputs(*SHAPES[3])
    want, power = three(x, w, dy), np.float32(2) ** -60
    found = three(x, w, power * dy)
    for name in ("dx", "dw"):
      np.testing.assert_array_equal(found[name], power * want[name])

  def test_independent_errors_add_in_squares(self):
    x, w = testing.normal(512, 512), testing.normal(512, 512, seed=1)
    made = three(x, w, x)["y"]
    parts = [
      relative(numbers(tiled(np.asarray(a), *tile)), a)
      for a, tile in ((x, (1, 128)), (w, (128, 128)))
    ]
    predicted = np.hypot(*parts)
    found = relative(made, np.float64(x) @ np.float64(w))
    np.testing.assert_allclose(found, predicted, rtol=0.05)

  def test_the_weight_gradient_has_tiles_along_tokens(self):
    x, w, dy = (np.asarray(a) for a in inputs(256, 256, 256))
    found = three(x, w, dy)["dw"]
    same = exact(tiled(numbers(tiled(x, 1, 128)).T, 1, 128), tiled(dy, 128, 1))
    np.testing.assert_array_equal(found, same)
    # One grouping for all three products: the tiles along channels.
    once = numbers(tiled(x, 1, 128)).T @ numbers(tiled(dy, 1, 128))
    self.assertGreater(relative(found, once), 1e-2)

  def test_backends_differ_by_rounding_only(self):
    x, w, dy = inputs(200, 576, 130)
    how = dataclasses.replace(HOW, backend="dequantized")
    for name, found in three(x, w, dy, how).items():
      a, b = expected(*map(np.asarray, (x, w, dy)))[name]
      size = np.abs(numbers(a)) @ np.abs(numbers(b))
      bound = (a.codes.shape[1] + 4) * testing.EPS * size
      difference = np.abs(found - three(x, w, dy)[name])
      self.assertTrue(np.all(difference <= bound), name)

  def test_auto_is_the_fastest_that_there_is(self):
    found = lambda: scaled_matmul.dequantizes("auto")
    self.assertTrue(found())
    gpu = mock.patch.object(jax, "default_backend", lambda: "gpu")
    for hopper in (False, True):
      with (
        gpu,
        mock.patch.object(fp8_matmul_hopper, "supported", return_value=hopper),
      ):
        self.assertEqual(found(), not hopper)

  def test_square_tiles_of_gradients_lose_small_rows(self):
    x, w, dy = (np.array(a) for a in inputs(128, 128, 128))
    dy = np.array(testing.normal(128, 128, seed=1))
    dy[3] *= 2.0**17  # one token
    errors = {}
    for gradient_tiles in ("rows", "blocks"):
      how = dataclasses.replace(HOW, gradient_tiles=gradient_tiles)
      dx = np.delete(three(x, w, dy, how)["dx"], 3, 0)
      errors[gradient_tiles] = relative(dx, np.delete(dy, 3, 0) @ w.T)
    self.assertLess(errors["rows"], 0.04)
    self.assertGreater(errors["blocks"], 5 * errors["rows"])

  def test_types(self):
    x, w, dy = inputs(64, 128, 256)
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    found = three(x, w, dy)
    types = {name: a.dtype.name for name, a in found.items()}
    self.assertEqual(
      types, {"y": "bfloat16", "dx": "bfloat16", "dw": "float32"}
    )

  def test_what_is_kept_of_the_input_takes_a_byte_a_number(self):
    x, w, _ = inputs(512, 256, 128)
    w = weight(w)
    _, vjp = jax.vjp(lambda x: linear.linear(x, w), x)
    kept = [a for a in jax.tree.leaves(vjp) if a.size and a.shape[0] == 512]
    self.assertEqual(sum(a.nbytes for a in kept), 512 * 256 + 512 * 2 * 4)

  @parameterized.parameters(np.nan, np.inf)
  def test_what_is_not_finite_reaches_the_loss_and_is_counted(self, bad):
    x, w, dy = inputs(256, 256, 128)
    y, vjp = jax.vjp(linear.linear, x.at[200, 3].set(bad), weight(w))
    self.assertFalse(np.isfinite(y[200]).any())
    self.assertTrue(np.isfinite(np.delete(y, 200, 0)).all())
    _, dw = vjp(dy.at[0, 0].set(bad))
    column = quantize.COUNTERS.index("not_finite")
    np.testing.assert_array_equal(dw.handle.counts[:, column], 1)
    self.assertFalse(np.isfinite(dw.handle.master).all())

  def test_no_rows(self):
    _, w, _ = inputs(1, 128, 256)
    y, vjp = jax.vjp(linear.linear, jnp.zeros((0, 128)), weight(w))
    dx, dw = vjp(y)
    self.assertEqual(dx.shape, (0, 128))
    np.testing.assert_array_equal(dw.handle.master, 0)


class SwigluTest(absltest.TestCase):
  def test_is_near_the_float32_layer(self):
    specs = layers.swiglu_specs(256, 128, 0.1)
    p = testing.draw(specs)
    x, dy = testing.normal(96, 256), testing.normal(96, 256, seed=1)

    def run(p, x, dy):
      y, vjp = jax.vjp(layers.swiglu, p, x)
      dp, dx = vjp(dy)
      return y, recipe.split_gradients(recipe.differentiable(dp))[0], dx

    p8 = recipe.compute_params(p, specs, HOW)
    found = jax.tree.leaves(jax.jit(run)(p8, x, dy))
    for a, b in zip(found, jax.tree.leaves(run(p, x, dy)), strict=True):
      # Four to six quantizations of 2.6 % each.
      self.assertBetween(relative(a, b), 0.02, 0.1)

  def test_keeps_the_hidden_state_in_a_byte_a_number(self):
    specs = layers.swiglu_specs(256, 384, 0.1)
    p = recipe.compute_params(testing.draw(specs), specs, HOW)
    x = testing.normal(640, 256)
    _, vjp = jax.vjp(functools.partial(layers.swiglu, p), x)
    kept = [a for a in jax.tree.leaves(vjp) if a.size and a.shape[0] == 640]
    numbers_kept = 640 * (256 + 2 * 384)
    self.assertEqual(
      sum(a.nbytes for a in kept), numbers_kept + numbers_kept // 128 * 4
    )


if __name__ == "__main__":
  absltest.main()

"""Tests of what layers keep for the backward pass, and what they make again."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized
from jax.extend import core

from dsv3_jax import config, param_spec, train
from dsv3_jax.config import presets
from dsv3_jax.data.batch import make_batch
from dsv3_jax.linear import recipe as recipe_lib
from dsv3_jax.model import attention, experts, moe, transformer
from dsv3_jax.model import remat as remat_lib

pytestmark = pytest.mark.fault("F27")
CFG = presets.S.model
N_TOKENS = 512
KEPT = config.override(presets.S, "train.remat=selective").train.activations
MODES = {"none": None, "selective": KEPT, "block": ()}


def layer(kind, recipe, kept, n_tokens=N_TOKENS):
  """Returns a function with a backward pass, of shape S, and arguments."""
  how = config.override(presets.S, f"precision.recipe={recipe}").precision
  specs = transformer.specs(CFG)[kind]

  def block(p, x, bias):
    if kind == "dense":
      return transformer.dense_block(p, x, CFG)
    y, stats = transformer.moe_block(p, x, bias, CFG, moe.LOCAL)
    return y + stats.balance.astype(y.dtype)

  def backward(masters, x, bias):
    p = recipe_lib.compute_params(masters, specs, how)
    p = jax.tree.map(lambda a: a[0], p)
    of = lambda trained, x: block(
      recipe_lib.with_differentiable(trained, p), x, bias
    )
    return jax.vjp(remat_lib.remat(kept, of), recipe_lib.differentiable(p), x)[
      1
    ]

  dtype = jnp.float32 if recipe == "fp32" else jnp.bfloat16
  x = jax.ShapeDtypeStruct((1, n_tokens, CFG.d_model), dtype)
  bias = jax.ShapeDtypeStruct([CFG.router.n_experts], jnp.float32)
  return backward, (param_spec.abstract(specs), x, bias)


def equations(jaxpr):
  """All of a program, inner ones included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from equations(inner)


def expected(recipe, kind, n_tokens):
  """Bytes that a layer keeps, as docs/recipe.md says."""
  size = 4 if recipe == "fp32" else 2
  m, k, n_experts = CFG.attention, CFG.router.top_k, CFG.router.n_experts
  width = 2 * CFG.d_model + m.q_rank + m.kv_rank + m.rope_dim
  width += m.n_heads * m.v_dim
  total = n_tokens * (size * width + 4 * m.n_heads)
  hidden = [(n_tokens, 2 * CFG.dense_ffn_dim)]
  if kind == "moe":
    total += n_tokens * 4 * (n_experts + k)
    plan = experts._make_plan(n_tokens, k, n_experts, n_tokens * k)
    f = CFG.moe.ffn_dim
    hidden = [(n_tokens, 2 * f * CFG.moe.n_shared), (plan.saved, 2 * f)]
  for rows, width in hidden:
    scales = -(-width // presets.S.precision.tile)
    a_row = width + 4 * scales if recipe == "fp8" else size * width
    total += rows * a_row
  return total


@functools.cache
def more_kept(recipe, kind, kept=KEPT):
  """Bytes for 512 tokens more than for 256; weights are kept too."""
  found = []
  for n_tokens in (256, 512):
    backward, args = layer(kind, recipe, kept, n_tokens)
    compiled = jax.jit(backward).lower(*args).compile()
    found.append(compiled.memory_analysis().output_size_in_bytes)
  return found[1] - found[0]


def gradient_equations(kept, recipe="fp32", kind="moe"):
  """Returns the equations of a layer's forward and backward pass."""
  backward, args = layer(kind, recipe, kept)

  def both(*args):
    return backward(*args)(args[1])

  return list(equations(jax.make_jaxpr(both)(*args).jaxpr))


def products(eqns):
  """Sizes of matrix products, loops' once."""
  dots = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
  return collections.Counter(
    tuple(var.aval.shape for var in (*eqn.invars, *eqn.outvars)) for eqn in dots
  )


class KeptTest(parameterized.TestCase):
  @parameterized.product(recipe=("fp32", "bf16", "fp8"), kind=("dense", "moe"))
  def test_is_what_the_formula_says(self, recipe, kind):
    want = expected(recipe, kind, 512) - expected(recipe, kind, 256)
    self.assertEqual(more_kept(recipe, kind), want)

  def test_is_the_list_and_nothing_else(self):
    backward, args = layer("dense", "bf16", KEPT)
    made = jax.tree.leaves(jax.eval_shape(backward, *args))
    m, t = CFG.attention, N_TOKENS
    self.assertCountEqual(
      [leaf.shape for leaf in made if t in leaf.shape],
      [
        (1, t, CFG.d_model),  # the layer's input
        (1, t, m.q_rank),
        (1, t, m.kv_rank + m.rope_dim),
        (1, t, m.n_heads, m.v_dim),
        (1, m.n_heads, t),
        (1, t, CFG.d_model),  # between attention and feed-forward
        (t, 2 * CFG.dense_ffn_dim),
      ],
    )

  @parameterized.product(name=tuple(MODES), kind=("dense", "moe"))
  def test_attention_keeps_no_probabilities(self, name, kind):
    backward, args = layer(kind, "fp32", MODES[name])
    for leaf in jax.tree.leaves(jax.eval_shape(backward, *args)):
      tokens = [n for n in leaf.shape if n in (attention.CHUNK, N_TOKENS)]
      if CFG.attention.n_heads in leaf.shape:
        self.assertLess(len(tokens), 2, leaf)

  def test_of_nothing_is_the_input_alone(self):
    self.assertEqual(more_kept("fp32", "moe", ()), 256 * 4 * CFG.d_model)

  def test_more_can_be_kept(self):
    m = CFG.attention
    more = more_kept("fp32", "moe", (*KEPT, "up")) - more_kept("fp32", "moe")
    self.assertEqual(more, 256 * 4 * m.n_heads * (2 * m.qk_dim + m.v_dim))

  def test_an_unknown_name_is_refused(self):
    with self.assertRaisesRegex(ValueError, "'norms': must be one of norm,"):
      remat_lib.named(jnp.zeros(3), "norms")


class MadeAgainTest(parameterized.TestCase):
  @parameterized.parameters("fp32", "bf16")
  def test_the_up_projections_and_no_other_product(self, recipe):
    more = products(gradient_equations(KEPT, recipe))
    more.subtract(products(gradient_equations(None, recipe)))
    m, t = CFG.attention, N_TOKENS
    up = lambda n_in, n_out: ((t, n_in), (n_in, n_out), (t, n_out))
    self.assertEqual(
      +more,
      collections.Counter(
        [
          up(m.q_rank, m.n_heads * m.qk_dim),
          up(m.kv_rank, m.n_heads * (m.nope_dim + m.v_dim)),
        ]
      ),
    )
    self.assertFalse(-more)

  @parameterized.parameters("fp32", "fp8")
  def test_never_what_the_router_decides(self, recipe):

    def decisions(kept):
      names = [eqn.primitive.name for eqn in gradient_equations(kept, recipe)]
      return names.count("top_k")

    self.assertEqual(decisions(KEPT), decisions(None))
    self.assertGreater(decisions(()), decisions(None))


class StepTest(parameterized.TestCase):
  @staticmethod
  @functools.cache
  def gradients(*settings):
    run = testing.run("train.batch_size=4", *settings)
    state = testing.state(run)
    bias = 0.01 * testing.normal(*state.router_bias.shape, seed=3)
    rows = testing.tokens(1, 4, 9, vocab_size=run.model.vocab_size)
    batch = make_batch(rows)
    args = state.replace(router_bias=bias), batch
    lowered = jax.jit(functools.partial(train.gradients, run=run)).lower(*args)
    # As users run it, whatever the tests are compiled with, but with all the
    # roundings to bfloat16, of which XLA leaves out those inside of fusions.
    compiled = lowered.compile(
      {
        "xla_backend_optimization_level": 3,
        "xla_cpu_use_fusion_emitters": True,
        "xla_allow_excess_precision": False,
      }
    )
    return jax.device_get(compiled(*args))

  @pytest.mark.slow
  def test_its_gradients_differ_by_sums_in_another_order(self):
    self.check_remat("selective", "true")

  @parameterized.parameters(("selective", "false"), ("block", "true"))
  @pytest.mark.slow
  def test_and_so_they_do_otherwise(self, remat, scan):
    self.check_remat(remat, scan)

  def check_remat(self, remat, scan):
    how = f"train.scan_layers={scan}"
    made = self.gradients(how, f"train.remat={remat}")
    whole = self.gradients(how)
    np.testing.assert_array_equal(made.stats.load, whole.stats.load)
    # The same bits with AVX-512. With AVX2 XLA computes some products of one
    # program otherwise than the same ones of the other: sums over 32 tokens.
    testing.assert_close(made, whole, 32)

  @pytest.mark.slow
  def test_in_bfloat16_they_differ_by_sums_in_another_order(self):
    self.check_recipe("precision.recipe=bf16")

  @pytest.mark.slow
  def test_and_in_fp8(self):
    self.check_recipe(
      "precision.recipe=fp8", "precision.tile=8", "precision.fp8=*ffn*"
    )

  def check_recipe(self, *recipe):
    made = self.gradients("train.remat=selective", *recipe)
    whole = self.gradients(*recipe)
    np.testing.assert_array_equal(made.stats.load, whole.stats.load)
    # Sums over 32 tokens in float32.
    testing.assert_close(made, whole, 32)


class ConfigTest(absltest.TestCase):
  def test_names_are_checked(self):
    with self.assertRaisesRegex(ValueError, "'latent' is none.*'latents'"):
      testing.run("train.saved_activations=latent,hidden")
    run = testing.run(
      "train.remat=selective", "train.saved_activations= hidden, up"
    )
    self.assertEqual(run.train.activations, ("hidden", "up"))
    run = testing.run("train.remat=selective", "train.saved_activations=")
    self.assertEqual(run.train.activations, ())


if __name__ == "__main__":
  absltest.main()

"""Tests of the precision that lowered programs ask of each platform."""

import re

import jax
import jax.numpy as jnp
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import train
from dsv3_jax.infer import cached_forward, inference_params, kvcache
from dsv3_jax.model import router, transformer
from dsv3_jax.parallel import device_mesh

PLATFORMS = "cpu", "cuda", "tpu"
PRODUCT = re.compile(r"stablehlo\.(?:dot|convolution).*")


class PrecisionTest(parameterized.TestCase):
  """Products of float32 are made of float32, not of bfloat16 or TF32."""

  def check(self, traced):
    for platform in PLATFORMS:
      text = traced.lower(lowering_platforms=(platform,)).as_text()
      products = [p for p in PRODUCT.findall(text) if "xf32>," in p]
      self.assertNotEmpty(products)
      for product in products:
        self.assertIn("precision = [HIGHEST, HIGHEST]", product, platform)

  @parameterized.parameters(
    ("precision.recipe=fp32",),
    ("precision.recipe=bf16",),
    ("precision.recipe=fp8", "precision.tile=8", "precision.fp8=*down"),
  )
  def test_of_a_training_step(self, *settings):
    run = testing.run("train.scan_layers=true", *settings)
    self.check(train.trace_step(run, device_mesh.make_mesh({})))

  def test_of_a_router(self):
    cfg = testing.run("router.score=softmax").model.router
    x, w = jnp.zeros((1, 4, 16)), jnp.zeros((16, 8))
    for dtype in (jnp.float32, jnp.bfloat16):
      args = w, x.astype(dtype), jnp.zeros(8), cfg
      self.check(jax.jit(router.route, static_argnums=3).trace(*args))

  @parameterized.parameters(True, False)
  def test_of_inference(self, prefill):
    cfg = testing.run().model
    options = cached_forward.ForwardOptions(prefill=prefill)

    def logits(params, bias, tokens, start):
      params = inference_params.from_params(params, bias, cfg)
      specs = kvcache.specs(cfg, 1, 16, jnp.float32, drafting=False)
      hidden, _, _ = cached_forward.forward(
        params, kvcache.empty(specs), tokens, start, cfg, options
      )
      return cached_forward.logits(params, hidden)

    params = testing.draw(transformer.specs(cfg))
    bias, start = transformer.router_bias(cfg), jnp.zeros(1, jnp.int32)
    tokens = jnp.zeros((1, 4), jnp.int32)
    self.check(jax.jit(logits).trace(params, bias, tokens, start))


if __name__ == "__main__":
  absltest.main()

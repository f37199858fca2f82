import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest

from dsv3_jax import config, param_spec
from dsv3_jax.linear import recipe as recipe_lib
from dsv3_jax.model import transformer


class ComputeParamsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.specs = transformer.specs(testing.TINY)
    self.params = testing.draw(self.specs)

  def cast(self, recipe):
    how = config.Precision(recipe=recipe)
    return recipe_lib.compute_params(self.params, self.specs, how)

  def test_fp32_is_the_masters_themselves(self):
    self.assertIs(self.cast("fp32"), self.params)

  def test_bf16_casts_all_but_norms_and_routers(self):
    cast = param_spec.flatten_with_paths(self.cast("bf16"))
    full = {path for path, leaf in cast.items() if leaf.dtype == jnp.float32}
    expected = {path for path in cast if path.endswith(("norm", "/router"))}
    self.assertEqual(full, expected)
    for path, leaf in param_spec.flatten_with_paths(self.params).items():
      # One rounding to 8 significant bits.
      np.testing.assert_allclose(
        np.asarray(cast[path], np.float32), leaf, rtol=2**-8
      )


if __name__ == "__main__":
  absltest.main()

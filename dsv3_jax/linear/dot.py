"""Products of arrays whose float32 operands are multiplied as float32.

By default a TPU rounds them to bfloat16 and a GPU to TF32. Operands in bfloat16
are not affected. Their sums are in float32 everywhere.
"""

import functools

import jax
import jax.numpy as jnp

_PRECISION = jax.lax.Precision.HIGHEST

dot_general = functools.partial(jax.lax.dot_general, precision=_PRECISION)
einsum = functools.partial(jnp.einsum, precision=_PRECISION)
matmul = functools.partial(jnp.matmul, precision=_PRECISION)

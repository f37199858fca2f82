"""The decode kernel: layers of a few tokens in one C++ function, on CPU.

Optional: nothing else needs it, and this folder can be deleted.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.infer.inference_params import InferenceParams
from dsv3_jax.infer.native import build, kernel
from dsv3_jax.infer.native.build import Unavailable
from dsv3_jax.linear import linear

MAX_TOKENS = kernel.MAX_TOKENS


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Functions in place of those of `cached_forward` with the same names."""

  forward: Callable[..., tuple] = kernel.forward
  forward_mtp: Callable[..., tuple] = kernel.forward_mtp
  logits: Callable[..., jax.Array] = kernel.logits


def load(params: InferenceParams, cfg: config.Model) -> Kernel:
  """Returns the kernel for parameters of a model; builds it where it is new.

  Raises:
    Unavailable: with the reason.
  """
  if (backend := jax.default_backend()) != "cpu":
    raise Unavailable(f"the backend is {backend}, not cpu")
  if (attention := cfg.attention.type) != "mla":
    raise Unavailable(f"the attention is {attention}, not mla")
  leaves = jax.tree.leaves(
    params, is_leaf=lambda leaf: isinstance(leaf, linear.Fp8Weight)
  )
  if any(isinstance(leaf, linear.Fp8Weight) for leaf in leaves):
    raise Unavailable("the weights are in FP8, not float32")
  others = {str(leaf.dtype) for leaf in leaves if leaf.dtype != jnp.float32}
  if others:
    raise Unavailable(f"the parameters are {min(others)}, not float32")
  if reason := _register():
    raise Unavailable(reason)
  return Kernel()


@functools.cache
def _register() -> str:
  """Builds the library, once in a process; returns why there is none, or ""."""
  try:
    library = build.shared_library()
  except Unavailable as reason:
    return str(reason)
  for name in ("dsv3_forward", "dsv3_logits"):
    target = jax.ffi.pycapsule(getattr(library, name))
    jax.ffi.register_ffi_target(name, target, platform="cpu")
  return ""

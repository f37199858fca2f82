"""Rematerialization: which activations a layer saves for its backward pass.

Activations that are worth a choice have a name, of `config.ACTIVATIONS`. With
`train.remat=selective` those in `train.saved_activations` are saved and all
others are recomputed: by default norms, the up-projections of the attention,
and the product of a SwiGLU's halves (sections 3.2.3 and 3.3.3). Attention never
saves its probabilities. A router's decision is saved, so that the recomputed
layer routes as before.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import ad_checkpoint

from dsv3_jax import config

SavedNames = tuple[str, ...] | None  # names of saved activations; None: all


def named(x: Any, name: str) -> Any:
  """Gives arrays a name under which a layer may save them.

  Raises:
    ValueError: the name is not one of `config.ACTIVATIONS`.
  """
  if name not in config.ACTIVATIONS:
    raise ValueError(
      f"activation {name!r}: must be one of {', '.join(config.ACTIVATIONS)}"
    )
  return jax.tree.map(lambda a: ad_checkpoint.checkpoint_name(a, name), x)


def remat(
  saved: SavedNames, layer: Callable[..., Any], *, in_loop: bool = False
) -> Callable[..., Any]:
  """Wraps a layer in `jax.checkpoint`: saves its inputs and named activations.

  Args:
    saved: names; empty: the inputs alone; None: the layer is not wrapped.
    layer: the function.
    in_loop: whether it is the body of a `lax.scan`, whose forward and backward
      pass XLA does not merge anyway.
  """
  if saved is None:
    return layer
  policy = jax.checkpoint_policies.save_only_these_names(*saved)
  return jax.checkpoint(layer, policy=policy, prevent_cse=not in_loop)

"""What a layer keeps for its backward pass, and what it makes again there.

Activations that are worth a choice have a name, of `config.ACTIVATIONS`. With
`train.remat=selective` those that `train.saved_activations` names are kept,
and all else is made again: by default norms, the up-projections of the
attention, and the product of a SwiGLU's halves (sections 3.2.3 and 3.3.3).
Attention never keeps its probabilities. What a router decided is kept: it
cannot decide otherwise.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import ad_checkpoint

from dsv3_jax import config

Kept = tuple[str, ...] | None  # names of what is kept; None: everything


def named(x: Any, name: str) -> Any:
  """x, arrays that a layer may keep under a name."""
  if name not in config.ACTIVATIONS:
    raise ValueError(
      f"activation {name!r}: must be one of {', '.join(config.ACTIVATIONS)}"
    )
  return jax.tree.map(lambda a: ad_checkpoint.checkpoint_name(a, name), x)


def keeping(
  kept: Kept, layer: Callable[..., Any], *, in_loop: bool = False
) -> Callable[..., Any]:
  """The layer, of which a backward pass has its arguments and what is kept.

  Args:
    kept: names; none of them: the arguments alone.
    layer: the function.
    in_loop: it is the body of a `lax.scan`, whose passes XLA does not join.
  """
  if kept is None:
    return layer
  policy = jax.checkpoint_policies.save_only_these_names(*kept)
  return jax.checkpoint(layer, policy=policy, prevent_cse=not in_loop)

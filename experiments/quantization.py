"""What quantization to FP8 did, as numbers of a row and in words."""

from collections.abc import Iterator
from collections.abc import Mapping

import numpy as np

from dsv3_jax.model import gemm
from dsv3_jax.model import tiles

_OF = {
    "zero": "tiles",
    "saturated": "elements",
    "underflow": "elements",
}


def shares(counted: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Shares of tiles that are zero, of elements too large or rounded to zero.

  Args:
    counted: by weight, as `train.gradients` returns them.

  Returns:
    By names such as `fp8_gradient_underflow`, over all weights; nothing if only
    what is not finite was counted.
  """
  total = np.zeros((len(gemm.CLASSES), len(tiles.COUNTED)))
  for counts in counted.values():
    total += counts.reshape(-1, *total.shape).sum(0)
  of = {
      (name, what): total[i, j]
      for i, name in enumerate(gemm.CLASSES)
      for j, what in enumerate(tiles.COUNTED)
  }
  return {
      f"fp8_{name}_{what}": of[name, what] / of[name, whole]
      for name in gemm.CLASSES
      for what, whole in _OF.items()
      if of[name, whole]
  }


def not_finite(counted: Mapping[str, np.ndarray]) -> Iterator[str]:
  """A line for each weight, layer and class with tiles that are not finite."""
  column = tiles.COUNTED.index("not_finite")
  for path, counts in sorted(counted.items()):
    bad = counts.reshape(-1, *counts.shape[-2:])[:, :, column]
    for layer, which in np.argwhere(bad):
      yield (
          f"{path}, layer {layer}: {bad[layer, which]:.0f} tiles of the"
          f" {gemm.CLASSES[which]} are not finite"
      )

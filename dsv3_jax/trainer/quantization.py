"""What quantization to FP8 did, as numbers of a row and in words."""

from collections.abc import Iterator, Mapping

import numpy as np

from dsv3_jax.linear import quantize

_OF = {
  "zero": "tiles",
  "saturated": "elements",
  "underflow": "elements",
}


Counted = Mapping[str, Mapping[str, np.ndarray]]  # as `train.gradients` has it


def shares(counted: Counted) -> dict[str, float]:
  """Shares of tiles that are zero, of elements too large or rounded to zero.

  Args:
    counted: by class and weight.

  Returns:
    By names such as `fp8_gradient_underflow`, over all weights; nothing if only
    what is not finite was counted.
  """
  out = {}
  for kind, by_path in counted.items():
    total = np.zeros(len(quantize.COUNTERS))
    for counts in by_path.values():
      total += counts.reshape(-1, len(total)).sum(0, dtype=np.float64)
    found = dict(zip(quantize.COUNTERS, total, strict=True))
    for what, whole in _OF.items():
      if found[whole]:
        out[f"fp8_{kind}_{what}"] = found[what] / found[whole]
  return out


def not_finite(counted: Counted) -> Iterator[str]:
  """A line for each weight, layer and class with tiles that are not finite."""
  column = quantize.COUNTERS.index("not_finite")
  for kind, by_path in counted.items():
    for path, counts in sorted(by_path.items()):
      of_layers = counts.reshape(-1, counts.shape[-1])[:, column]
      layered = counts.ndim > 1
      for layer in np.flatnonzero(of_layers):
        where = f"{path}, layer {layer}" if layered else path
        n = of_layers[layer]
        yield f"{where}: {n:.0f} tiles of the {kind} are not finite"

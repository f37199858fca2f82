"""DeepSeek-V3 in JAX, for research; docs/tour.md follows a batch through it.

Letters of shapes, in signatures, comments and einsum subscripts:

  A  micro-batches of a step        B  sequences
  T  query positions                S  key or cache positions
  M  tokens, B * T                  D  model width
  N  heads                          R  key-value rank
  P, H, V  nope, rope and value dims of a head; X = P + H
  F  feed-forward width             L  layers
  E  experts                        K  experts that a token chooses
  C  vocabulary; of a cache, its width

Products in `linear` have M rows, K summands and N columns.
`axis` means an axis of the device mesh, `dim` one of a tensor.
"""

__version__ = "0.1.0"

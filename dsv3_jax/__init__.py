"""DeepSeek-V3 in JAX: the whole system, for research.

Notation, the same everywhere (capitals in einsum strings and shape comments):

  B batch            T query positions   S key or cache positions
  D model width      N heads             M tokens, B * T
  Q query rank       R key-value rank    H, P, V  nope, rope and value dims
  F ffn width        E experts           K experts a token chooses
  C vocabulary       L layers

`axis` means an axis of the device mesh, `dim` one of a tensor.
"""

__version__ = "0.1.0"

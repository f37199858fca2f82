"""ParamSpec trees: shape, axes and initializer of every parameter.

A spec tree is a nested dict whose leaves are `ParamSpec`s, written beside the
function that reads the parameters. The dims of a weight are given as
(logical axis, size) pairs, inputs first: y = x @ W.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

STACKS = ("layers", "experts")  # logical axes of stacked parameters

Specs = dict[str, Any]  # nested dict of ParamSpec
Params = dict[str, Any]  # nested dict of jax.Array, same structure


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One parameter: (logical axis, size) per dim, initializer and dtype."""

  dims: tuple[tuple[str, int], ...]
  init: Callable[..., jax.Array]
  dtype: Any = jnp.float32
  n_contracted: int = 0  # dims that a linear layer contracts; 0: not of one

  @property
  def axes(self) -> tuple[str, ...]:
    return tuple(axis for axis, _ in self.dims)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(size for _, size in self.dims)

  @property
  def n_stack(self) -> int:
    """Leading dims that run over layers or experts."""
    return sum(axis in STACKS for axis in self.axes)

  @property
  def matrix(self) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    n = self.n_stack
    inputs, outputs = (
      self.shape[n : n + self.n_contracted],
      self.shape[n + self.n_contracted :],
    )
    return math.prod(inputs), math.prod(outputs)


def weight(std: float, /, **dims: int) -> ParamSpec:
  """A matrix drawn from N(0, std^2), dims as axis=size, inputs first."""
  return ParamSpec(tuple(dims.items()), jax.nn.initializers.normal(std))


def linear(std: float, n_contracted: int = 1, /, **dims: int) -> ParamSpec:
  """The weight of a linear layer, whose first n_contracted dims are inputs."""
  return dataclasses.replace(weight(std, **dims), n_contracted=n_contracted)


def norm_scale(size: int) -> ParamSpec:
  """The scale of an RMSNorm, initially 1."""
  return ParamSpec((("norm", size),), jax.nn.initializers.ones)


def stack(specs: Specs, n: int, axis: str = "layers") -> Specs:
  """The specs of n layers, stacked along a new leading dim for `lax.scan`."""
  return jax.tree.map(
    lambda s: dataclasses.replace(s, dims=((axis, n), *s.dims)), specs
  )


def name(path: tuple[Any, ...]) -> str:
  """A path of `jax.tree` as "moe/mla/out"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_with_paths(tree: Any) -> dict[str, Any]:
  """{"moe/mla/out": leaf} of any tree, in tree order."""
  return {name(p): leaf for p, leaf in jax.tree.leaves_with_path(tree)}


def init(specs: Specs, key: jax.Array) -> Params:
  """Draws every parameter with a key of its own, folded from its *name*.

  Adding or removing a parameter therefore changes no other one.
  """

  def leaf(path, spec):
    leaf_key = jax.random.fold_in(key, zlib.crc32(name(path).encode()))
    return spec.init(leaf_key, spec.shape, spec.dtype)

  return jax.tree.map_with_path(leaf, specs)


def abstract(specs: Specs) -> Params:
  """Shapes and dtypes only: a restore target, or an argument to trace with."""
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)


def count(specs: Specs) -> int:
  """Number of parameters."""
  return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))


def nbytes(specs: Specs) -> int:
  """Bytes of all arrays."""
  leaves = jax.tree.leaves(specs)
  return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in leaves)

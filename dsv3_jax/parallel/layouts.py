"""Where parameters live: tables from their logical axes to mesh axes.

A layout says which dims of a parameter are divided for good (experts, heads),
and over which axes what is left is stored in slices. A slice is made whole
where it is used: once a step (ZeRO-1: master weights and optimizer state are
what is sliced) or layer by layer (FSDP).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from dsv3_jax import config
from dsv3_jax import manual
from dsv3_jax import schema
from dsv3_jax.model import moe
from dsv3_jax.model import transformer
from dsv3_jax.parallel import dispatch
from dsv3_jax.parallel import topology


@dataclasses.dataclass(frozen=True)
class Rules:
  """A layout; an entry of size 1 on a mesh does nothing."""

  # (logical axis, mesh axes that divide it)
  divided: tuple[tuple[str, tuple[str, ...]], ...] = (
      ("experts", topology.EXPERTS),
      ("heads", ("model",)),
      ("ffn", ("model",)),
  )
  slices: tuple[str, ...] = ()  # mesh axes that slice what is not divided
  by_layer: bool = False  # slices become whole a layer at a time


LAYOUTS = {
    "replicated": Rules(),
    "zero1": Rules(slices=topology.BATCH),
    "fsdp": Rules(slices=topology.BATCH, by_layer=True),
}


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where one parameter is; not a pytree, so that trees of them map."""

  dims: tuple[tuple[str, ...], ...]  # mesh axes of each dim
  slices: tuple[tuple[int, tuple[str, ...]], ...]  # dims that slices run along

  @property
  def spec(self) -> jax.P:
    return topology.spec(*self.dims)

  @property
  def axes(self) -> frozenset[str]:
    """All mesh axes that the parameter is divided over."""
    return frozenset(axis for dim in self.dims for axis in dim)

  def of_layer(self) -> "Placement":
    """The same without the leading dim, of layers."""
    slices = tuple((dim - 1, axes) for dim, axes in self.slices)
    return Placement(self.dims[1:], slices)


def placement(
    param: schema.ParamSpec, rules: Rules, sizes: Mapping[str, int]
) -> Placement:
  """Where a parameter is on a mesh.

  Each axis of `rules.slices` that divides no dim for good slices the first of
  the other dims that it divides evenly; where there is none, the parameter is
  whole along that axis.
  """
  divided = dict(rules.divided)
  dims = [topology.used(sizes, divided.get(axis, ())) for axis in param.axes]
  taken = {axis for dim in dims for axis in dim}
  slices = {
      i: ()
      for i, (axis, _) in enumerate(param.dims)
      if not dims[i] and axis != "layers"
  }
  for axis in topology.used(sizes, rules.slices):
    for i in slices if axis not in taken else ():
      more = (*slices[i], axis)
      if param.shape[i] % topology.extent(sizes, more) == 0:
        slices[i] = dims[i] = more
        break
  used = tuple((i, axes) for i, axes in slices.items() if axes)
  return Placement(tuple(dims), used)


# --- inside shard_map ---


def _whole(a: jax.Array, place: Placement) -> jax.Array:
  for dim, axes in place.slices:
    a = jax.lax.all_gather(a, axes, axis=dim, tiled=True)
  return a


@dataclasses.dataclass(frozen=True)
class Layout:
  """A run on a mesh: where its parameters are, and how devices share work."""

  places: Any  # tree of placements
  rules: Rules
  batch_axes: tuple[str, ...]  # mesh axes that tokens are divided over
  n_shards: int  # of a batch
  experts: moe.Experts

  @property
  def specs(self) -> Any:
    """The partition of every parameter."""
    return jax.tree.map(lambda place: place.spec, self.places)

  # The rest is for the inside of a `shard_map` over the whole mesh.

  def step(self, params: schema.Params) -> schema.Params:
    """Makes whole what is whole for a step.

    Everything is said to differ between the devices that tokens are divided
    over: its gradients stay local, and are summed once, by `reduce`.
    """
    whole = {
        kind: jax.tree.map(_whole, p, self.places[kind])
        if self._of_step(kind)
        else p
        for kind, p in params.items()
    }
    return jax.tree.map(lambda a: manual.vary(a, self.batch_axes), whole)

  def layer(self, kind: str, p: schema.Params) -> schema.Params:
    """Makes a layer whole: the `gather` of a forward pass."""
    if self._of_step(kind):
      return p
    return jax.tree.map(
        lambda a, place: _whole(a, place.of_layer()), p, self.places[kind]
    )

  def _of_step(self, kind: str) -> bool:
    return not (self.rules.by_layer and kind in ("dense", "moe", "mtp"))

  def reduce(self, gradients: schema.Params) -> schema.Params:
    """Local gradients of what `step` returned, as those of its argument."""

    def leaf(g, place, sliced):
      for dim, axes in place.slices if sliced else ():
        g = jax.lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
      rest = tuple(axis for axis in self.batch_axes if axis not in place.axes)
      return jax.lax.psum(g, rest)

    return {
        kind: jax.tree.map(
            functools.partial(leaf, sliced=self._of_step(kind)),
            g,
            self.places[kind],
        )
        for kind, g in gradients.items()
    }


def layout(run: config.Run, sizes: Mapping[str, int]) -> Layout:
  """The layout of a run on a mesh of these sizes by axis."""
  rules = LAYOUTS[run.parallel.layout]
  batch_axes = topology.used(sizes, topology.BATCH)
  return Layout(
      places=jax.tree.map(
          lambda param: placement(param, rules, sizes),
          transformer.specs(run.model),
      ),
      rules=rules,
      batch_axes=batch_axes,
      n_shards=topology.extent(sizes, batch_axes),
      experts=dispatch.experts(
          run.parallel.dispatch, sizes, run.model.router
      ),
  )


def problems(run: config.Run, sizes: Mapping[str, int]) -> list[str]:
  """What does not divide evenly over a mesh, a line each, and what would."""
  model, found = run.model, []
  sequences = run.train.micro_batch_size
  for name, size, axes in (
      ("sequences of a micro-batch", sequences, topology.BATCH),
      ("routed experts", model.router.n_experts, topology.EXPERTS),
      ("heads", model.mla.n_heads, ("model",)),
      ("dense_ffn_dim", model.dense_ffn_dim, ("model",)),
      ("moe.ffn_dim", model.moe.ffn_dim, ("model",)),
  ):
    n = topology.extent(sizes, axes)
    if size % n:
      over = " x ".join(f"{a}={sizes.get(a, 1)}" for a in axes)
      fits = [i for i in range(1, size + 1) if size % i == 0]
      found.append(
          f"--mesh: {over} devices must divide the {size} {name};"
          f" {', '.join(map(str, fits))} do"
      )
  return found

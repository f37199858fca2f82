"""Splits a layer's gradient into forward, input-gradient and weight-gradient.

A pipeline runs the three passes at different times. The arrays saved between
them are read off the traced program of all three: the forward pass saves what
depends on the input and is read by a later pass, never a weight, so that
nothing is computed twice; or only activations of given names, and the input
gradient recomputes the others. The input gradient saves what the weight
gradient reads, of a linear layer its input and the gradient of its output
(arXiv:2401.10241).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend import core

from dsv3_jax.model import remat

Types = list[Any]  # of arrays, with shape and dtype
Eqns = list[core.JaxprEqn]

# Recomputed by each pass that reads them rather than saved beside their source.
VIEWS = ("name", "reshape", "squeeze", "expand_dims", "stop_gradient")


@dataclasses.dataclass(frozen=True)
class Passes:
  """The passes of layer(weights, constants, x) -> (outputs, aux).

  Gradients of weights are lists of the leaves of their tree, with None for
  those that the other pass computes.
  """

  residual_types: Types  # saved by the forward pass
  wgrad_types: Types  # saved by the input gradient for the weight gradient
  deferred: list[bool]  # for each weight, if the last pass has its gradient
  results: jax.tree_util.PyTreeDef  # of (outputs, aux)
  run_forward: Callable[..., list[jax.Array]]  # of leaves of the arguments
  run_input: Callable[..., list[jax.Array]]
  run_weights: Callable[..., list[jax.Array]]

  def forward(
    self, weights: Any, constants: Any, x: jax.Array
  ) -> tuple[Any, Any, list[jax.Array]]:
    """Returns outputs, aux and residuals."""
    flat = self.run_forward(*jax.tree.leaves((weights, constants, x)))
    results, residuals = _cut(flat, self.results.num_leaves)
    return *jax.tree.unflatten(self.results, results), residuals

  def input_gradient(
    self,
    weights: Any,
    constants: Any,
    residuals: list[jax.Array],
    d_outputs: Any,
  ) -> tuple[jax.Array, list[jax.Array | None], list[jax.Array]]:
    """Returns the gradients of x and of early weights, and what W reads."""
    args = weights, constants, residuals, d_outputs
    dx, *flat = self.run_input(*jax.tree.leaves(args))
    gradients, saved = _cut(flat, self.deferred.count(False))
    return dx, self._all_weights(gradients, False), saved

  def weight_gradient(
    self, weights: Any, constants: Any, saved: list[jax.Array]
  ) -> list[jax.Array | None]:
    """Returns the gradients of the deferred weights."""
    flat = self.run_weights(*jax.tree.leaves((weights, constants, saved)))
    return self._all_weights(flat, True)

  def _all_weights(
    self, gradients: list[jax.Array], deferred: bool
  ) -> list[jax.Array | None]:
    gradients = iter(gradients)
    return [next(gradients) if d is deferred else None for d in self.deferred]


def split(
  layer: Callable[..., Any],
  weights: Any,
  constants: Any,
  x: jax.Array,
  deferred: list[bool],
  saved_activations: remat.SavedNames = None,
) -> Passes:
  """Splits a layer and its gradient into passes.

  Args:
    layer: (weights, constants, x) -> (outputs, aux); aux has no gradient.
    weights: arrays or types.
    constants: arrays or types that every pass receives; without gradient.
    x: array or type.
    deferred: for each leaf of weights, if its gradient is in the last pass.
    saved_activations: names of what the forward pass may save besides x; None:
      everything.

  Raises:
    ValueError: a deferred gradient is computed together with others.
  """
  results = jax.eval_shape(layer, weights, constants, x)
  program = _trace(layer, weights, constants, x, results[0])
  n_results = len(jax.tree.leaves(results))
  n_fixed = len(jax.tree.leaves((weights, constants)))
  fixed, (x_in, *d_outputs) = _cut(program.jaxpr.invars, n_fixed)
  outputs, (dx, *d_weights) = _cut(program.jaxpr.outvars, n_results)
  pairs = list(zip(d_weights, deferred, strict=True))
  late = [d for d, is_late in pairs if is_late]
  early = [dx, *(d for d, is_late in pairs if not is_late)]

  known, moving = _known(program.jaxpr.eqns, fixed, program.jaxpr.constvars)
  saved_eqns = _saved_eqns(moving, d_outputs, saved_activations)
  forward, for_input, for_weights = _divide(
    moving, outputs, early, late, saved_eqns
  )
  given = _outputs(known) | {*fixed, *program.jaxpr.constvars}
  wgrad = _reads(for_weights, late, given)
  residuals = _reads(for_input, [*early, *wgrad], {*given, *d_outputs})

  def run(
    eqns: Eqns, inputs: list[core.Var], outputs: list[Any]
  ) -> Callable[..., list[jax.Array]]:
    return _function(program, [*known, *eqns], [*fixed, *inputs], outputs)

  return Passes(
    residual_types=[var.aval for var in residuals],
    wgrad_types=[var.aval for var in wgrad],
    deferred=deferred,
    results=jax.tree.structure(results),
    run_forward=run(forward, [x_in], [*outputs, *residuals]),
    run_input=run(for_input, [*residuals, *d_outputs], [*early, *wgrad]),
    run_weights=run(for_weights, wgrad, late),
  )


def _trace(
  layer: Callable[..., Any],
  weights: Any,
  constants: Any,
  x: Any,
  d_outputs: Any,
) -> core.ClosedJaxpr:
  """Traces a layer with its gradient.

  The program returns the leaves of (outputs, aux), then the gradient of x, then
  those of the weights.
  """

  def with_gradient(weights, constants, x, d_outputs):
    def of_trained(weights, x):
      return layer(weights, constants, x)

    outputs, vjp, aux = jax.vjp(of_trained, weights, x, has_aux=True)
    d_weights, dx = vjp(d_outputs)
    return (outputs, aux), dx, jax.tree.leaves(d_weights)

  return jax.make_jaxpr(with_gradient)(weights, constants, x, d_outputs)


def _function(
  program: core.ClosedJaxpr,
  eqns: Eqns,
  inputs: list[core.Var],
  outputs: list[Any],
) -> Callable[..., list[jax.Array]]:
  """Makes a function of some equations of a program, without unused ones."""
  jaxpr = program.jaxpr.replace(
    invars=inputs,
    outvars=outputs,
    eqns=_needed(_in_order(program.jaxpr.eqns, eqns), outputs),
    debug_info=program.jaxpr.debug_info.with_unknown_names(),
  )
  return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, program.consts))


def _cut(items: list[Any], n: int) -> tuple[list[Any], list[Any]]:
  return items[:n], items[n:]


def _variables(atoms: Iterable[Any]) -> list[core.Var]:
  return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _outputs(eqns: Iterable[core.JaxprEqn]) -> set[core.Var]:
  return {var for eqn in eqns for var in eqn.outvars}


def _costly(eqns: Eqns) -> Eqns:
  """Drops equations that only give another view of the same numbers."""
  return [eqn for eqn in eqns if eqn.primitive.name not in VIEWS]


def _saved_eqns(
  eqns: Eqns, d_outputs: list[core.Var], saved_activations: remat.SavedNames
) -> Eqns | None:
  """Selects the equations that name an activation to save, before backward."""
  if saved_activations is None:
    return None
  late, saved_eqns = set(d_outputs), []
  for eqn in eqns:
    if not late.isdisjoint(_variables(eqn.invars)):
      late.update(eqn.outvars)
    elif (
      eqn.primitive.name == "name" and eqn.params["name"] in saved_activations
    ):
      saved_eqns.append(eqn)
  return saved_eqns


def _without(eqns: Eqns, others: Eqns) -> Eqns:
  ids = set(map(id, others))
  return [eqn for eqn in eqns if id(eqn) not in ids]


def _in_order(eqns: Eqns, some: Eqns) -> Eqns:
  return _without(eqns, _without(eqns, some))


def _known(eqns: Eqns, *variables: Iterable[core.Var]) -> tuple[Eqns, Eqns]:
  """Separates the equations that depend on the variables alone."""
  given = set().union(*variables)
  known, moving = [], []
  for eqn in eqns:
    if given.issuperset(_variables(eqn.invars)):
      given.update(eqn.outvars)
      known.append(eqn)
    else:
      moving.append(eqn)
  return known, moving


def _divide(
  eqns: Eqns,
  outputs: list[Any],
  early: list[Any],
  late: list[Any],
  saved_eqns: Eqns | None,
) -> tuple[Eqns, Eqns, Eqns]:
  """Divides equations by what needs them: outputs, early, or late gradients.

  Forward also includes `saved_eqns`, if given; then the input gradient
  recomputes all of forward but those.

  Raises:
    ValueError: a late gradient is computed together with another result.
  """
  forward = _needed(eqns, [*outputs, *_outputs(saved_eqns or ())])
  backward = _without(
    eqns, _costly(forward) if saved_eqns is None else saved_eqns
  )
  for_input = _needed(backward, early)
  for_weights = _needed(_without(backward, _costly(for_input)), late)
  if clash := set(late) & (_outputs(for_input) | _outputs(forward)):
    types = ", ".join(str(var.aval) for var in clash)
    raise ValueError(f"gradients {types} are made together with others")
  return forward, for_input, for_weights


def _needed(eqns: Eqns, outputs: Iterable[Any]) -> Eqns:
  """Selects the equations that the outputs depend on."""
  wanted, needed = set(_variables(outputs)), []
  for eqn in reversed(eqns):
    if not wanted.isdisjoint(eqn.outvars):
      wanted.update(_variables(eqn.invars))
      needed.append(eqn)
  return needed[::-1]


def _reads(
  eqns: Eqns, outputs: Iterable[Any], given: set[core.Var]
) -> list[core.Var]:
  """Lists the variables that equations and outputs read, but are not given."""
  read = [var for eqn in eqns for var in _variables(eqn.invars)]
  read += _variables(outputs)
  inside = _outputs(eqns) | given
  return [var for var in dict.fromkeys(read) if var not in inside]

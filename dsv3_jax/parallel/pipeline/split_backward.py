"""A layer's passes as functions of their own: forward, input, weight gradient.

A pipeline runs them at different times. What must be kept in between is read
off the program of all three: forward keeps what depends on the input and a
later pass reads, never a weight, so that nothing is computed twice; or only
what has one of some names, and the input gradient makes the rest again. The
input gradient leaves what only the weights' gradients still need, of a linear
layer its input and the gradient of its output (arXiv:2401.10241).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend import core

from dsv3_jax.model import remat

Types = list[Any]  # of arrays, with shape and dtype
Eqns = list[core.JaxprEqn]

# Made again by each pass that reads them, rather than kept beside their source.
VIEWS = ("name", "reshape", "squeeze", "expand_dims", "stop_gradient")


@dataclasses.dataclass(frozen=True)
class Passes:
  """The passes of layer(weights, constants, x) -> (outputs, told).

  Gradients of weights come as a list of the tree's leaves, None for those that
  another pass makes.
  """

  # (weights, constants, x) -> outputs, told, kept
  forward: Callable[..., Any]
  # (weights, constants, kept, gradients of outputs) -> gradient of x, those of
  # the weights that are not put off, deferred
  input_gradient: Callable[..., Any]
  # (weights, constants, deferred) -> gradients of the weights put off
  weight_gradient: Callable[..., Any]
  kept: Types  # what forward leaves for the input gradient
  deferred: Types  # what that leaves for the weight gradient


def split(
  layer: Callable[..., Any],
  weights: Any,
  constants: Any,
  x: jax.Array,
  put_off: list[bool],
  activations: remat.Kept = None,
) -> Passes:
  """Divides a layer and its gradient into passes.

  Args:
    layer: (weights, constants, x) -> (outputs, told); told has no gradient.
    weights: arrays or types.
    constants: arrays or types that every pass has at hand; without gradient.
    x: array or type.
    put_off: which of the weights' leaves have their gradient in a pass apart.
    activations: names of what forward may keep besides x; None: everything.

  Raises:
    ValueError: a gradient to be put off is made together with others.
  """

  def whole(weights, constants, x, d_outputs):
    def of(weights, x):
      return layer(weights, constants, x)

    outputs, vjp, told = jax.vjp(of, weights, x, has_aux=True)
    d_weights, dx = vjp(d_outputs)
    return (outputs, told), dx, jax.tree.leaves(d_weights)

  made = jax.eval_shape(layer, weights, constants, x)
  program = jax.make_jaxpr(whole)(weights, constants, x, made[0])
  n_fixed = len(jax.tree.leaves((weights, constants)))
  fixed, (x_in, *d_outputs) = _cut(program.jaxpr.invars, n_fixed)
  result, structure = jax.tree.flatten(made)
  outputs, (dx, *d_weights) = _cut(program.jaxpr.outvars, len(result))
  late = [d for d, later in zip(d_weights, put_off, strict=True) if later]
  early = [d for d, later in zip(d_weights, put_off, strict=True) if not later]

  known, moving = _known(program.jaxpr.eqns, fixed, program.jaxpr.constvars)
  named = _named(moving, d_outputs, activations)
  forward, for_input, for_weights = _divide(
    moving, outputs, [dx, *early], late, named
  )
  at_hand = _made(known) | {*fixed, *program.jaxpr.constvars}
  deferred = _read(for_weights, late, but=at_hand)
  kept = _read(for_input, [dx, *early, *deferred], but={*at_hand, *d_outputs})

  def run(eqns, inputs, outputs):
    eqns = _needed(_in_order(program.jaxpr.eqns, [*known, *eqns]), outputs)
    jaxpr = program.jaxpr.replace(
      invars=[*fixed, *inputs],
      outvars=outputs,
      eqns=eqns,
      debug_info=program.jaxpr.debug_info.with_unknown_names(),
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, program.consts))

  run_forward = run(forward, [x_in], [*outputs, *kept])
  run_input = run(for_input, [*kept, *d_outputs], [dx, *early, *deferred])
  run_weights = run(for_weights, deferred, late)

  def forward_pass(weights, constants, x):
    flat = run_forward(*jax.tree.leaves((weights, constants, x)))
    made, kept = _cut(flat, len(result))
    return *jax.tree.unflatten(structure, made), kept

  def spread(gradients, mine):
    gradients = iter(gradients)
    return [next(gradients) if later is mine else None for later in put_off]

  def input_pass(weights, constants, kept, d_outputs):
    args = weights, constants, kept, d_outputs
    dx, *rest = run_input(*jax.tree.leaves(args))
    gradients, deferred = _cut(rest, len(early))
    return dx, spread(gradients, False), deferred

  def weight_pass(weights, constants, deferred):
    flat = run_weights(*jax.tree.leaves((weights, constants, deferred)))
    return spread(flat, True)

  return Passes(
    forward_pass,
    input_pass,
    weight_pass,
    [var.aval for var in kept],
    [var.aval for var in deferred],
  )


def _cut(items: list[Any], n: int) -> tuple[list[Any], list[Any]]:
  return items[:n], items[n:]


def _variables(atoms: Iterable[Any]) -> list[core.Var]:
  return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _made(eqns: Iterable[core.JaxprEqn]) -> set[core.Var]:
  return {var for eqn in eqns for var in eqn.outvars}


def _costly(eqns: Eqns) -> Eqns:
  """Those that give more than another view of the same numbers."""
  return [eqn for eqn in eqns if eqn.primitive.name not in VIEWS]


def _named(
  eqns: Eqns, later: list[core.Var], activations: remat.Kept
) -> Eqns | None:
  """Those that name what may be kept, and need nothing that comes later."""
  if activations is None:
    return None
  late, found = set(later), []
  for eqn in eqns:
    if not late.isdisjoint(_variables(eqn.invars)):
      late.update(eqn.outvars)
    elif eqn.primitive.name == "name" and eqn.params["name"] in activations:
      found.append(eqn)
  return found


def _without(eqns: Eqns, others: Eqns) -> Eqns:
  gone = set(map(id, others))
  return [eqn for eqn in eqns if id(eqn) not in gone]


def _in_order(eqns: Eqns, some: Eqns) -> Eqns:
  return _without(eqns, _without(eqns, some))


def _known(eqns: Eqns, *variables: Iterable[core.Var]) -> tuple[Eqns, Eqns]:
  """Equations that follow from the variables alone, and the others."""
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
  outputs: Types,
  early: Types,
  late: Types,
  named: Eqns | None,
) -> tuple[Eqns, Eqns, Eqns]:
  """Those that make the outputs; of the rest, the early ones; the late ones.

  If some are named, the first make those too, and the early ones make again all
  but those.

  Raises:
    ValueError: something late is made together with something before it.
  """
  forward = _needed(eqns, [*outputs, *_made(named or ())])
  backward = _without(eqns, _costly(forward) if named is None else named)
  for_input = _needed(backward, early)
  for_weights = _needed(_without(backward, _costly(for_input)), late)
  if clash := set(late) & (_made(for_input) | _made(forward)):
    types = ", ".join(str(var.aval) for var in clash)
    raise ValueError(f"gradients {types} are made together with others")
  return forward, for_input, for_weights


def _needed(eqns: Eqns, outputs: Iterable[Any]) -> Eqns:
  """Those of the equations that the outputs need."""
  wanted, found = set(_variables(outputs)), []
  for eqn in reversed(eqns):
    if not wanted.isdisjoint(eqn.outvars):
      wanted.update(_variables(eqn.invars))
      found.append(eqn)
  return found[::-1]


def _read(
  eqns: Eqns, outputs: Iterable[Any], but: set[core.Var]
) -> list[core.Var]:
  """What equations and outputs take from elsewhere, each once, in order."""
  read = [var for eqn in eqns for var in _variables(eqn.invars)]
  read += _variables(outputs)
  inside = _made(eqns) | but
  return [var for var in dict.fromkeys(read) if var not in inside]

"""Faults of reinforcement learning that are the model's: replay, MTP."""

from mutant import Mutant

_ROUTES = "dsv3_jax/posttrain/routes.py"
_ROUTER = "dsv3_jax/model/router.py"
_TRANSFORMER = "dsv3_jax/model/transformer.py"
_TESTS = "tests/posttrain/"
_REPLAY = (
  f"{_TESTS}replay_test.py::LayoutTest::test_changes_no_result_one_device"
)
_GIVEN = (
  f"{_TESTS}replay_test.py::RouterTest::"
  "test_gates_and_gradient_are_those_of_the_experts_given"
)
_TRUNK = (
  f"{_TESTS}mtp_trunk_test.py::TrunkTest::"
  "test_has_no_gradient_and_that_of_modules_is_as_before0"
)

REPLAY = (
  Mutant(
    "ISEEKYAN#79",
    "weights of experts replayed have no gradient",
    _ROUTER,
    "    gates = _gates(scores, experts, cfg)",
    "    gates = _gates(jax.lax.stop_gradient(scores), experts, cfg)",
    _GIVEN,
  ),
  Mutant(
    "Megatron#4168, #4256",
    "experts are replayed with the weights of the router's own choice",
    _ROUTER,
    "    gates = _gates(scores, experts, cfg)",
    "    pass",
    _GIVEN,
  ),
  Mutant(
    "Megatron#4168, #4256",
    "one layer is not replayed",
    _TRANSFORMER,
    "lambda a: jnp.moveaxis(a[:, :, : cfg.n_moe_layers], 2, 0)",
    "lambda a: jnp.moveaxis(a[:, :, : cfg.n_moe_layers], 2, 0).at[1].set(-1)",
    _REPLAY,
  ),
  Mutant(
    "NeMo-RL#2590, #4057",
    "MTP modules take the experts of decoder layers",
    _TRANSFORMER,
    "    router_index = cfg.n_moe_layers + depth - 1",
    "    router_index = depth - 1",
    _REPLAY,
  ),
  Mutant(
    "miles#2570",
    "routes are bound to tokens by their place in a list",
    _ROUTES,
    "np.append(order, 0)[at]",
    "at",
    f"{_TESTS}routes_test.py::PackTest::"
    "test_puts_each_at_the_place_of_its_key_in_any_order",
  ),
  Mutant(
    "SkyRL#1908",
    "routes are shifted by a token",
    _TRANSFORMER,
    "lambda a: jnp.moveaxis(a[:, :, : cfg.n_moe_layers], 2, 0)",
    "lambda a: jnp.moveaxis(jnp.roll(a, 1, 1)[:, :, : cfg.n_moe_layers], 2, 0)",
    _REPLAY,
  ),
  Mutant(
    "SkyRL#1908",
    "padding is replayed",
    "dsv3_jax/model/moe.py",
    "    if routes is not None and valid is not None:",
    "    if False:",
    f"{_TESTS}replay_test.py::RouterTest::test_padding_goes_to_no_expert",
  ),
  Mutant(
    "tunix#2046",
    "the routes of another token are taken: silent, not a crash",
    _ROUTES,
    "present.any(-1) & (keys != tokens)",
    "present.any(-1) & False",
    f"{_TESTS}routes_test.py::ValidateTest::"
    "test_refuses_routes_of_other_tokens",
  ),
  Mutant(
    "tunix#2046",
    "a route that is missing is the router's own, without a word",
    _ROUTES,
    "required & ~present[..., :n_moe_layers].all(-1)",
    "required & ~present[..., :n_moe_layers].any(-1)",
    f"{_TESTS}routes_test.py::ValidateTest::test_refuses_an_expert0",
  ),
  Mutant(
    "prime-rl#2953",
    "the bias moves by a choice that replay ignores",
    _ROUTER,
    "  load = _multi_hot(experts, cfg.n_experts).sum((0, 1), dtype=jnp.int32)\n"
    "  return Routing(",
    "  load = _multi_hot(select(scores, bias, cfg)[0], cfg.n_experts)"
    ".sum((0, 1), dtype=jnp.int32)\n"
    "  return Routing(",
    _GIVEN,
  ),
  Mutant(
    "Megatron#4785",
    "the bias drifts on when it should be frozen",
    "dsv3_jax/optim.py",
    "  return jnp.where(progress(step, run) < until,"
    " run.model.router.bias_speed, 0)",
    "  return jnp.where(until > 0, run.model.router.bias_speed, 0)",
    "tests/optim_test.py::SwitchTest::test_switches_once0",
  ),
)

MTP = (
  Mutant(
    "Megatron#4549, #5080, #5098",
    "the MTP loss trains the trunk through its states",
    _TRANSFORMER,
    "    start = jax.lax.stop_gradient(start)",
    "    pass",
    _TRUNK,
  ),
  Mutant(
    "verl#4936",
    "and through the head",
    "dsv3_jax/losses.py",
    "      head = jax.lax.stop_gradient(head)",
    "      pass",
    _TRUNK,
  ),
)

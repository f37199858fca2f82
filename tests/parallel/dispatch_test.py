"""Tests of expert parallelism against all experts on one device."""

import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, param_spec
from dsv3_jax.config import presets
from dsv3_jax.model import layers
from dsv3_jax.parallel import comm_volume, device_mesh, dispatch, transports

CFG = config.Router(n_experts=16, top_k=4, n_groups=8, top_groups=4)
M, D, F = 24, 8, 6  # tokens of a device, widths
FORMS = (
  "allgather",
  "all_to_all many",
  "hierarchical_all_to_all many",
  "all_to_all many apart",
  "all_to_all one",
  "hierarchical_all_to_all one",
)
SIZES = {"node": 2, "expert": 2}


def _inputs(n_tokens, chosen=None):
  specs = param_spec.stack(layers.swiglu_specs(D, F, 0.1), 16, "experts")
  p = jax.tree.map(lambda w: 4 * w, testing.draw(specs))
  rng = np.random.default_rng(0)
  if chosen is None:
    chosen = np.array([rng.permutation(16)[:4] for _ in range(n_tokens)])
  gates = rng.uniform(0.1, 1, chosen.shape).astype(np.float32)
  return p, testing.normal(n_tokens, D), chosen.astype(np.int32), gates


@functools.cache
def _compiled(form, sizes):
  sizes = dict(sizes)
  mesh = device_mesh.make_mesh(sizes)
  form, *how = form.split()
  rounds = "many" if "many" in how else "one"
  experts = dispatch.make_expert_parallel_ffn(
    form, sizes, CFG, rounds=rounds, split_wgrad="apart" in how
  )
  axes = device_mesh.active_axes(sizes, device_mesh.EXPERTS)

  def local(p, x, chosen, gates, dy):
    y, vjp = jax.vjp(
      lambda *args: experts.ffn(args[0], args[1], chosen, args[2]), p, x, gates
    )
    # As in a network, whose gradients need the loss.
    dy = jnp.where(jnp.isnan(y), y, dy)
    return y, vjp(dy), jax.lax.psum(experts.sent(chosen), axes)

  spec = jax.P(axes)
  return jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=spec, out_specs=(spec, spec, jax.P())
    )
  ), jax.NamedSharding(mesh, spec)


def _run(form, sizes, *inputs):
  run, sharding = _compiled(form, tuple(sizes.items()))
  return jax.device_get(run(*jax.device_put(inputs, sharding)))


def _traced(form):
  run, sharding = _compiled(form, tuple(SIZES.items()))
  return run.trace(
    *jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
      (*_inputs(4 * M), testing.normal(4 * M, D)),
    )
  )


def _check(form, sizes, p, x, chosen, gates):
  dy = testing.normal(*x.shape, seed=1)
  y, gradients, sent = _run(form, sizes, p, x, chosen, gates, dy)
  p, x, gates, dy = reference.f64((p, x, gates, dy))
  # As in experts_test: up, down, choices, and tokens of a weight's gradient.
  terms = 2 * (D + F) + 4 + len(x)
  testing.assert_close(y, reference.expert_ffn(p, x, chosen, gates), terms)
  expected = reference.expert_ffn_gradients(p, x, chosen, gates, dy)
  testing.assert_close(gradients, expected, terms)
  return sent


def _crossings(chosen, form, n_nodes=2, n_places=2):
  """Copies across nodes and inside them, token by token."""
  across = inside = 0
  n_devices = n_nodes * n_places
  for token, choices in enumerate(chosen):
    home = token * n_devices // len(chosen)
    devices = {int(e) // (16 // n_devices) for e in choices}
    if form == "allgather":
      devices = set(range(n_devices))
    nodes = {d // n_places for d in devices}
    if form.startswith("hierarchical_all_to_all"):
      across += len(nodes - {home // n_places})
      relays = {(d // n_places) * n_places + home % n_places for d in devices}
      inside += len(devices - relays)
    else:
      away = {d for d in devices if d // n_places != home // n_places}
      across, inside = across + len(away), inside + len(devices - away - {home})
  return [across, inside]


@pytest.mark.fault("F34")
class DispatchTest(parameterized.TestCase):
  @parameterized.parameters(*FORMS)
  def test_values_and_gradients_match_the_reference(self, form):
    inputs = _inputs(4 * M)
    sent = _check(form, SIZES, *inputs)
    self.assertEqual(sent.tolist(), _crossings(inputs[2], form))

  @parameterized.parameters(*FORMS)
  def test_all_tokens_to_the_experts_of_one_device(self, form):
    chosen = np.tile(np.arange(12, 16), (4 * M, 1))
    sent = _check(form, SIZES, *_inputs(4 * M, chosen))
    self.assertEqual(sent.tolist(), _crossings(chosen, form))

  @parameterized.parameters(*FORMS)
  def test_a_hot_node_and_a_device_that_gets_no_token(self, form):
    # All choices of all tokens in node 0, none on its device 1.
    rng = np.random.default_rng(1)
    chosen = np.array([rng.permutation(4) for _ in range(4 * M)])
    _check(form, SIZES, *_inputs(4 * M, chosen))

  def test_a_token_crosses_nodes_once_for_each_node_it_needs(self):
    chosen = np.tile([0, 4, 8, 12], (4 * M, 1))
    for form, across, inside in (
      ("all_to_all", 2, 1),
      ("hierarchical_all_to_all", 1, 2),
    ):
      self.assertEqual(
        _crossings(chosen, form), [4 * M * across, 4 * M * inside]
      )
      sent = _check(form, SIZES, *_inputs(4 * M, chosen))
      self.assertEqual(sent.tolist(), [4 * M * across, 4 * M * inside])

  def test_what_arrives_is_what_is_counted(self):
    # Each device adds 1 for a row that arrived: copies that were really sent.
    inside = transports.AllToAll(
      ("expert",),
      ("node", "expert"),
      transports.padded_all_to_all,
      1,
      4,
      dispatch.BUFFER_FACTOR,
    )
    across = transports.AllToAll(
      ("node",),
      ("node", "expert"),
      transports.padded_all_to_all,
      2,
      4,
      dispatch.BUFFER_FACTOR,
    )

    def one(p, x, chosen, gates, n_slots=None):
      arrived = (chosen < p["down"].shape[0]).any(1, keepdims=True)
      return jnp.ones_like(x) * arrived

    def local(p, x, chosen, gates):
      inner = functools.partial(dispatch._exchange, inside, inner=one)
      return dispatch._exchange(across, p, x, chosen, gates, inner=inner)

    mesh, spec = device_mesh.make_mesh(SIZES), jax.P(("node", "expert"))
    run = jax.jit(
      jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    )
    inputs = _inputs(4 * M)
    args = jax.device_put(inputs, jax.NamedSharding(mesh, spec))
    copies = np.asarray(run(*args))[:, 0]
    expected = [len({int(e) // 4 for e in row}) for row in inputs[2]]
    np.testing.assert_array_equal(copies, expected)

  def test_bytes_of_a_step(self):
    # 3.2.2: a token's state goes once to each target node and comes back once;
    # 7168 numbers of 2 bytes each way, 8 choices and gates of 4 bytes.
    sent = np.array([[5, 2], [1, 0]])
    found = comm_volume.bytes_sent(sent, presets.V3_671B)
    copy = 2 * 7168 * 2 + 8 * (4 + 4)
    self.assertEqual(found, {"node": 6 * copy, "expert": 2 * copy})

  def test_no_tokens(self):
    p, x, chosen, gates = _inputs(0, np.zeros((0, 4)))
    y, (dp, _, _), sent = _run(
      "hierarchical_all_to_all", SIZES, p, x, chosen, gates, x
    )
    self.assertEqual(y.shape, (0, D))
    self.assertEqual(sent.tolist(), [0, 0])
    for leaf in dp.values():
      self.assertEqual(np.abs(leaf).max(), 0)

  def test_one_device_needs_no_dispatch(self):
    experts = dispatch.make_expert_parallel_ffn("auto", {"data": 4}, CFG)
    self.assertEqual(experts, dispatch.moe.LOCAL)

  def test_rounds_hold_what_balanced_routing_needs(self):
    rows = functools.partial(
      dispatch._buffer_rows, buffer_factor=dispatch.BUFFER_FACTOR
    )
    # 8 choices, 8 devices: 1 - (7/8)^8 = 0.656 of the rows, and a quarter more.
    self.assertEqual(rows(1000, 8000, 8, fanout=8), 821)
    # At most 4 of 8 nodes: half of the rows.
    self.assertEqual(rows(1000, 8000, 8, fanout=4), 625)
    self.assertEqual(rows(3, 3, 1, fanout=1), 3)

  def test_ragged_forms_lower_for_accelerators(self):
    traced = _traced("ragged_hierarchical_all_to_all many")
    lowered = traced.lower(lowering_platforms=("tpu",))
    self.assertIn("ragged_all_to_all", lowered.as_text())

  @parameterized.parameters(
    "all_to_all many apart", "hierarchical_all_to_all many"
  )
  def test_rounds_come_one_after_the_other(self, form):
    text = _traced(form).lower().compile().as_text()
    self.assertIn(" while(", text)
    self.assertEmpty(hlo.meetings(text))


class MemoryTest(absltest.TestCase):
  def test_grows_with_the_tokens_sent_not_with_the_ranks(self):
    # Fixed tokens a device and choices a token; 2, 4, 8 devices.
    def temporary(n):
      mesh = device_mesh.make_mesh({"expert": n})
      experts = dispatch.make_expert_parallel_ffn(
        "all_to_all", {"expert": n}, CFG, rounds="many"
      )
      specs = param_spec.stack(layers.swiglu_specs(256, 8, 0.1), 16, "experts")
      spec = jax.P("expert")
      run = jax.shard_map(experts.ffn, mesh=mesh, in_specs=spec, out_specs=spec)
      shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(
        dims, dtype, sharding=jax.NamedSharding(mesh, spec)
      )
      p = jax.tree.map(lambda s: shape(*s.shape), specs)
      rows = 256 * n
      compiled = (
        jax.jit(run)
        .lower(
          p, shape(rows, 256), shape(rows, 2, dtype=jnp.int32), shape(rows, 2)
        )
        .compile()
      )
      return compiled.memory_analysis().temp_size_in_bytes

    two, four, eight = map(temporary, (2, 4, 8))
    row = 256 * 4
    # Two choices: at most two copies of each of the 256 tokens and the slack,
    # there and back, in the buffers of the way.
    self.assertLess(eight, 2 * two)
    worst = 2 * 8 * 256 * row  # every token to every device, there and back
    self.assertLess(eight, worst)
    self.assertLess(eight - four, four)


if __name__ == "__main__":
  absltest.main()

"""Seeded inputs, small configs and the one tolerance rule of the tests."""

import contextlib
import io
import json
import pathlib
import socket
import sys
import tempfile
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl.testing import flagsaver

from dsv3_jax import config, optim, param_spec, train
from dsv3_jax.checkpoint import manifest
from dsv3_jax.model import transformer

EPS = float(np.finfo(np.float32).eps)

TINY = config.Model(
  vocab_size=512,
  d_model=64,
  n_layers=4,
  n_dense_layers=1,
  dense_ffn_dim=128,
  attention=config.MLA(
    n_heads=4, q_rank=32, kv_rank=16, nope_dim=16, rope_dim=8, v_dim=16
  ),
  moe=config.MoE(n_shared=1, ffn_dim=32),
  router=config.Router(n_experts=16, top_k=4, n_groups=8, top_groups=4),
  mtp=config.MTP(depth=1),
)


def tiny(*assignments: str) -> config.Model:
  """The small model of the tests with settings replaced."""
  return config.override(TINY, *assignments)


def run(*assignments: str) -> config.Run:
  """The smallest run that has every mechanism; quick to compile."""
  model = tiny(
    "vocab_size=300",
    "d_model=16",
    "n_layers=2",
    "dense_ffn_dim=24",
    "attention.n_heads=2",
    "attention.q_rank=8",
    "attention.kv_rank=8",
    "attention.nope_dim=4",
    "attention.rope_dim=4",
    "attention.v_dim=4",
    "moe.ffn_dim=8",
    "router.n_experts=8",
    "router.top_k=2",
    "router.n_groups=4",
    "router.top_groups=2",
    "init_std=0.1",
  )
  micro = config.Run(
    model=model,
    data=config.Data(seq_len=8),
    train=config.Train(tokens=64 * 100, batch_size=8),
    optim=config.Optim(peak_lr=1e-2),
    schedule=config.Schedule(warmup_until=0.02),
  )
  return config.override(micro, *assignments)


def state(run: config.Run, seed: int = 0) -> train.TrainState:
  """A first state without compiling `train.init_state`, which takes long."""
  params = draw(transformer.specs(run.model), seed)
  return train.TrainState(
    params=params,
    opt_state=optim.make(run).init(params),
    router_bias=transformer.router_bias(run.model),
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    key=jax.random.key(seed),
  )


def host(state: train.TrainState) -> train.TrainState:
  """A copy that outlives donation, its key as integers."""
  return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def assert_same(actual, expected) -> None:
  """Trees of host arrays are equal bit for bit, in dtype too."""
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
  assert dtypes(actual) == dtypes(expected), dtypes(actual)


def folder(test) -> pathlib.Path:
  """An empty folder that goes when the test is over."""
  return pathlib.Path(test.enter_context(tempfile.TemporaryDirectory()))


def reseal(folder: pathlib.Path, **changes) -> None:
  """Changes fields of a checkpoint's manifest, with a sha256 that fits."""
  path = folder / manifest.NAME
  body = json.loads(path.read_text()) | changes
  del body["sha256"]
  path.write_text(json.dumps(body | {"sha256": manifest._seal(body)}))


def free_port() -> int:
  """A port of this machine that nothing listened on just now."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def command_line(program, *arguments) -> tuple[int, str, str]:
  """Exit code and what was printed to stdout and stderr, in this process."""
  out, err = io.StringIO(), io.StringIO()
  with (
    flagsaver.flagsaver(),
    mock.patch.object(sys, "argv", ["program", *arguments]),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    flags.FLAGS.unparse_flags()
    try:
      program()
    except SystemExit as end:
      return end.code, out.getvalue(), err.getvalue()
  raise AssertionError("a program ends by an exit code")


def with_other_copy(
  array: jax.Array, device: int, change: Callable[[np.ndarray], np.ndarray]
) -> jax.Array:
  """The same array, but what one device holds is change(what it held)."""
  parts = [
    jax.device_put(change(np.array(shard.data)), shard.device)
    if shard.device.id == device
    else shard.data
    for shard in array.addressable_shards
  ]
  return jax.make_array_from_single_device_arrays(
    array.shape, array.sharding, parts
  )


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
  """N(0, scale^2) in float32."""
  return jnp.float32(scale * np.random.default_rng(seed).normal(size=shape))


def tokens(*shape: int, vocab_size: int, seed: int = 0) -> np.ndarray:
  """Uniform token ids, int32."""
  rng = np.random.default_rng(seed)
  return rng.integers(vocab_size, size=shape, dtype=np.int32)


def draw(specs: param_spec.Specs, seed: int = 0) -> param_spec.Params:
  """Parameters at scales where every term matters.

  Weights are near 1 / sqrt(d) of the tiny model, so that each layer keeps the
  size of its input; gains differ from 1, so that forgetting one is seen.
  """
  rng = np.random.default_rng(seed)

  def leaf(spec):
    noise = rng.normal(size=spec.shape)
    is_gain = spec.axes[-1] == "norm"
    value = 1 + 0.2 * noise if is_gain else 0.12 * noise
    return jnp.asarray(value, spec.dtype)

  return jax.tree.map(leaf, specs)


def assert_close(actual, expected, terms: int) -> None:
  """Asserts that float32 arrays are within terms * eps of float64 ones.

  A float32 sum of n products is off by at most n * eps / 2 of the sum of their
  absolute values (Higham, Accuracy and Stability of Numerical Algorithms,
  section 3.1), and errors of chained sums add up: `terms` is the total length
  of the contractions on the longest way from the inputs. The unit is the
  largest entry expected, which is smaller than that sum of absolute values by
  about sqrt(n); roundings of random sign gain as much.
  """
  expected_leaves = jax.tree.leaves_with_path(expected)
  actual_leaves = jax.tree.leaves(actual)
  assert len(actual_leaves) == len(expected_leaves)
  for got, (path, want) in zip(actual_leaves, expected_leaves, strict=True):
    want = np.asarray(want, np.float64)
    assert np.shape(got) == want.shape, (path, np.shape(got), want.shape)
    if want.size:
      np.testing.assert_allclose(
        np.asarray(got, np.float64),
        want,
        rtol=0,
        atol=terms * EPS * np.abs(want).max(),
        err_msg=jax.tree_util.keystr(path),
      )


def assert_slopes(f, tree, gradients, terms: int) -> None:
  """Asserts that gradients are slopes of f along random directions.

  Args:
    f: function of a float64 tree, its arrays' values read at every call.
    tree: where; changed in place and back.
    gradients: tree like it, in float32.
    terms: as in `assert_close`, of the gradients.
  """
  rng = np.random.default_rng(0)
  leaves = jax.tree.leaves_with_path(tree)
  for (path, leaf), gradient in zip(
    leaves, jax.tree.leaves(gradients), strict=True
  ):
    gradient = np.asarray(gradient, np.float64)
    direction, h = rng.normal(size=leaf.shape), 1e-5
    leaf += h * direction
    above = f(tree)
    leaf -= 2 * h * direction
    below = f(tree)
    leaf += h * direction
    # Errors of the entries are independent: the direction weights them by
    # random signs. The difference quotient has one of h^2 and of 1e-16 / h.
    error = terms * EPS * np.abs(gradient).max() * leaf.size**0.5
    np.testing.assert_allclose(
      (gradient * direction).sum(),
      (above - below) / (2 * h),
      rtol=0,
      atol=error + 1e-8,
      err_msg=jax.tree_util.keystr(path),
    )

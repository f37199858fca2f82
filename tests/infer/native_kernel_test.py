"""Tests of the decode kernel: the numbers of XLA's form, and of float64."""

import functools
import itertools
import operator
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config
from dsv3_jax.config import presets
from dsv3_jax.infer import (
  cached_forward,
  inference_params,
  kvcache,
  native,
  speculation,
)
from dsv3_jax.infer.native import build
from dsv3_jax.linear import linear
from dsv3_jax.model import transformer
from dsv3_jax.parallel import device_mesh

ROOT = pathlib.Path(__file__).parents[2]
LENGTH, VOCAB = 9, 61
# As in cached_forward_test.
LAYER_TERMS = 465 + 2 * 16
# New tokens of each row; row 1 falls behind, and reads some positions again.
PIECES = ((0, 0), 4), ((4, 1), 1), ((5, 2), 1), ((5, 3), 4), ((5, 5), 4)


def model(*settings):
  cfg = testing.tiny(f"vocab_size={VOCAB}", "n_layers=2", *settings)
  params = testing.draw(transformer.specs(cfg))
  return cfg, params, testing.normal(cfg.n_routers, 16, seed=1, scale=0.1)


def load(params, cfg):
  if not build._compilers():
    raise absltest.SkipTest("there is no C++ compiler")
  return native.load(params, cfg)


@functools.cache
def served():
  cfg, params, bias = model()
  params = inference_params.from_params(params, bias, cfg)
  return cfg, params, load(params, cfg)


def caches(cfg, b, length, drafting=False):
  specs = kvcache.specs(cfg, b, length, "float32", drafting=drafting)
  leaves, tree = jax.tree.flatten(specs)
  return tree.unflatten(
    testing.normal(*spec.shape, seed=i) for i, spec in enumerate(leaves)
  )


class KernelTest(parameterized.TestCase):
  def test_any_pieces_give_the_logits_of_a_full_pass(self):
    cfg, params, bias = model()
    _, served_params, kernel = served()
    tokens = testing.tokens(2, LENGTH, vocab_size=VOCAB)
    hidden, *_ = reference.forward(*reference.f64((params, bias)), tokens, cfg)
    expected = hidden @ reference.f64(params["head"])
    cache = caches(cfg, 2, LENGTH)

    @jax.jit
    def read(params, cache, piece, start):
      x, cache, _ = kernel.forward(params, cache, piece, start, cfg)
      normed = cached_forward.final_norm(params, x, cfg)
      return kernel.logits(params, normed), cache

    for start, size in PIECES:
      rows = list(zip(range(2), start, strict=True))
      piece = np.stack([tokens[row, i : i + size] for row, i in rows])
      logits, cache = read(served_params, cache, piece, np.int32(start))
      want = np.stack([expected[row, i : i + size] for row, i in rows])
      testing.assert_close(logits, want, cfg.n_layers * LAYER_TERMS + 64)

  def test_what_is_not_valid_or_beyond_the_cache_is_left_alone(self):
    cfg, params, kernel = served()
    cache = caches(cfg, 2, 4, drafting=True)
    tokens = testing.tokens(2, 3, vocab_size=VOCAB)
    valid = np.array([[1, 1, 1], [1, 0, 0]], bool)
    options = cached_forward.ForwardOptions(valid=valid)
    start = np.array([2, 1], np.int32)
    hidden = testing.normal(2, 3, cfg.d_model)

    @jax.jit
    def read(params, cache):
      x, filled, load = kernel.forward(
        params, cache, tokens, start, cfg, options
      )
      *_, filled, more = kernel.forward_mtp(
        params, filled, hidden, tokens, start, cfg, options
      )
      return filled, load, more, kernel.logits(params, x, valid)

    filled, load, more, logits = read(params, cache)
    for before, after in zip(
      jax.tree.leaves(cache), jax.tree.leaves(filled), strict=True
    ):
      written = np.asarray(before != after).any(-1)
      np.testing.assert_array_equal(written, [[0, 0, 1, 1], [0, 1, 0, 0]])
    self.assertEqual(load.load.shape, (cfg.n_moe_layers, 16))
    np.testing.assert_array_equal(load.load.sum(-1), 4 * cfg.router.top_k)
    self.assertEqual(more.load.sum(), 4 * cfg.router.top_k)
    for routed in (load, more):
      counts = [np.bincount(e.ravel(), minlength=17) for e in routed.experts]
      n_left = 2 * cfg.router.top_k
      np.testing.assert_array_equal(
        counts, np.insert(routed.load, 16, n_left, axis=1)
      )
      np.testing.assert_array_equal(routed.experts[:, 1, 1:], 16)
    np.testing.assert_array_equal(np.asarray(logits).any(-1), valid)

  def test_bits_of_a_row_do_not_depend_on_others(self):
    cfg, params, kernel = served()
    cache, start = caches(cfg, 6, 12), np.arange(6, dtype=np.int32) + 3
    tokens = testing.tokens(6, 2, vocab_size=VOCAB)

    @jax.jit
    def read(cache, tokens, start):
      x, cache, _ = kernel.forward(params, cache, tokens, start, cfg)
      return x, cache, kernel.logits(params, x)

    whole = read(cache, tokens, start)
    for rows in (slice(1, 2), slice(0, 3)):
      part, same = (
        jax.tree.map(operator.itemgetter(rows), tree)
        for tree in ((cache, tokens, start), whole)
      )
      jax.tree.map(np.testing.assert_array_equal, read(*part), same)

  def test_a_donated_cache_is_not_copied(self):
    cfg, params, kernel = served()
    cache = caches(cfg, 2, 24)

    def step(carry, _):
      cache, tokens, start = carry
      x, cache, _ = kernel.forward(params, cache, tokens, start, cfg)
      tokens = kernel.logits(params, x).argmax(-1).astype(jnp.int32)
      return (cache, tokens, start + 1), tokens

    def steps(cache, tokens, start):
      return jax.lax.scan(step, (cache, tokens, start), length=3)

    first = testing.tokens(2, 1, vocab_size=VOCAB), np.array([0, 5], np.int32)
    run = jax.jit(steps, donate_argnums=0).lower(cache, *first).compile()
    shape = ",".join(map(str, cache["main"][0].shape))
    self.assertNotRegex(run.as_text(), rf"f32\[{shape}\]\S* copy\(")
    one = jax.jit(step)
    carry, tokens = (jax.tree.map(jnp.copy, cache), *first), []
    for _ in range(3):
      carry, token = one(carry, None)
      tokens.append(token)
    (_, _, end), written = run(cache, *first)
    np.testing.assert_array_equal(written, tokens)
    np.testing.assert_array_equal(end, first[1] + 3)

  def test_runs_on_each_of_several_devices(self):
    cfg, params, kernel = served()
    mesh = device_mesh.make_mesh({"data": 4})
    cache, start = caches(cfg, 8, 12), np.arange(8, dtype=np.int32)
    tokens = testing.tokens(8, 1, vocab_size=VOCAB)

    def read(params, cache, tokens, start):
      x, cache, load = kernel.forward(params, cache, tokens, start, cfg)
      return x, cache, load.load[None]

    row = jax.P("data")
    sharded = jax.shard_map(
      read, mesh=mesh, in_specs=(jax.P(), row, row, row), out_specs=row
    )
    put = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, row)
    arguments = jax.device_put(
      (params, cache, tokens, start), (put[0], *[put[1]] * 3)
    )
    x, filled, load = jax.jit(sharded)(*arguments)
    alone = jax.jit(read)(params, cache, tokens, start)
    jax.tree.map(np.testing.assert_array_equal, (x, filled), alone[:2])
    np.testing.assert_array_equal(load.sum(0), alone[2][0])


class UnavailableTest(parameterized.TestCase):
  def test_is_for_float32_alone(self):
    cfg, params, _ = served()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    with self.assertRaisesRegex(native.Unavailable, "are bfloat16, not"):
      native.load(half, cfg)

  def test_is_not_for_fp8(self):
    cfg, params, _ = served()
    head = linear.Fp8Weight(None, params["head"], None, config.Precision())
    with self.assertRaisesRegex(native.Unavailable, "weights are in FP8"):
      native.load(params | {"head": head}, cfg)

  def test_is_not_for_other_attentions(self):
    gqa = types.SimpleNamespace(attention=types.SimpleNamespace(type="gqa"))
    with self.assertRaisesRegex(native.Unavailable, "the attention is gqa"):
      native.load({}, gqa)

  def test_is_not_for_experts_elsewhere(self):
    cfg, params, kernel = served()
    options = cached_forward.ForwardOptions(
      experts=cached_forward.local_experts(1)
    )
    with self.assertRaisesRegex(ValueError, "experts on its device"):
      kernel.forward(
        params, {"main": ()}, np.zeros((1, 1), int), None, cfg, options
      )


SHAPES = {
  "tiny": ("tiny",),
  "S": ("S",),
  "M": ("M",),
  "odd": tuple(
    """
    S attention.q_rank=0 router.score=softmax router.renormalize=false
    router.scale=1 moe.n_shared=2 n_dense_layers=2 moe.ffn_dim=88
    attention.v_dim=20 attention.nope_dim=20 attention.kv_rank=44 d_model=100
    router.n_experts=40 n_layers=4 vocab_size=1037
    """.split()
  ),
  "no shared": tuple(
    """
    S moe.n_shared=0 n_dense_layers=0 router.n_groups=1 router.top_groups=1
    attention.yarn.factor=4 n_layers=3
    """.split()
  ),
  "dense": ("tiny", "n_dense_layers=5"),
}
# Rows, new tokens of each, rows in use, positions of the cache.
CALLS = (1, 1, 1, 64), (3, 2, 3, 64), (8, 3, 5, 64), (40, 1, 40, 64)
MORE_CALLS = (
  *((2, t, 2, 32) for t in (4, 5, 6, 7, 8)),
  (1, 64, 1, 96),
  (1, 1, 1, 1),
)


@pytest.mark.slow
class TableTest(parameterized.TestCase):
  @parameterized.parameters(
    *itertools.product(SHAPES, CALLS), *itertools.product(["tiny"], MORE_CALLS)
  )
  def test_numbers_are_those_of_the_other_form(self, shape, call):
    preset, *settings = SHAPES[shape]
    b, t, in_use, length = call
    cfg = config.override(presets.PRESETS[preset].model, *settings)
    params = testing.draw(inference_params.specs(cfg))
    kernel, cache = load(params, cfg), caches(cfg, b, length, True)
    rng = np.random.default_rng(3)
    start = rng.integers(0, length - t + 1, b).astype(np.int32)
    tokens = testing.tokens(b, t, vocab_size=cfg.vocab_size)
    valid = np.broadcast_to(np.arange(b)[:, None] < in_use, (b, t))
    options = cached_forward.ForwardOptions(valid=valid)

    @functools.partial(jax.jit, static_argnums=(3, 4, 5))
    def read(params, cache, x, forward, forward_mtp, logits):
      x, cache, load = forward(params, cache, tokens, start, cfg, options)
      normed = cached_forward.final_norm(params, x, cfg)
      states = speculation.mtp_input(x, normed, cfg)
      out, onward, cache, more = forward_mtp(
        params, cache, states, tokens, start, cfg, options
      )
      of_rows = jax.tree.map(
        lambda a: a[:in_use], (x, cache, out, onward, logits(params, normed))
      )
      return of_rows, (load, more)

    numbers, loads = read(
      params, cache, None, kernel.forward, kernel.forward_mtp, kernel.logits
    )
    expected, expected_loads = read(
      params,
      cache,
      None,
      cached_forward.forward,
      cached_forward.forward_mtp,
      cached_forward.logits,
    )
    jax.tree.map(np.testing.assert_array_equal, loads, expected_loads)
    for got, want in zip(
      jax.tree.leaves(numbers), jax.tree.leaves(expected), strict=True
    ):
      most = float(np.abs(want).max())
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * most)


PROGRAM = """
import hashlib, sys
sys.path.insert(0, "tests/infer")
import jax, numpy as np, native_kernel_test as test
cfg, params, kernel = test.served()
cache, start = test.caches(cfg, 5, 12), np.arange(5, dtype=np.int32)
tokens = np.arange(10).reshape(5, 2)
"""
# Prints a hash of what a step of 5 rows computes.
HASH = """
x, cache, _ = kernel.forward(params, cache, tokens, start, cfg)
digest = hashlib.sha256(np.asarray(kernel.logits(params, x)))
for leaf in jax.tree.leaves((x, cache)):
  digest.update(np.asarray(leaf))
print(digest.hexdigest())
"""
STEPS = """
step = jax.jit(lambda *args: kernel.forward(*args, cfg)[:2], donate_argnums=1)

def run(n):
  global cache
  for _ in range(n):
    x, cache = step(params, cache, tokens, start)
  x.block_until_ready()

run(1)
print("begin", flush=True)
"""
# Prints whether memory stays as it was.
LEAK = """
import resource
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(100)
before = memory()
run(1000)
print(memory() - before < 4096)
"""


def stop(process):
  process.kill()
  process.wait()
  if process.stdout:
    process.stdout.close()


@pytest.mark.slow
class ProcessTest(absltest.TestCase):
  def start(self, program, **env):
    process = subprocess.Popen(
      [sys.executable, "-c", PROGRAM + program],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": ".:tests"} | env,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.addCleanup(stop, process)
    return process

  def test_bits_do_not_depend_on_the_number_of_threads(self):
    digests = set()
    for n in (1, 2, 8):
      digests.add(self.start(HASH, NPROC=str(n)).communicate(timeout=300)[0])
    self.assertLen(digests, 1)
    self.assertNotIn("", digests)

  def test_ends_beside_busy_processes_without_a_leak(self):
    busy = [
      subprocess.Popen([sys.executable, "-c", "while True: pass"])
      for _ in range(2)
    ]
    for process in busy:
      self.addCleanup(stop, process)
    printed, _ = self.start(STEPS + LEAK).communicate(timeout=300)
    self.assertEqual(printed.split(), ["begin", "True"])

  def test_is_ended_by_a_signal_in_the_middle(self):
    process = self.start(STEPS + "run(10**9)")
    self.assertEqual(process.stdout.readline(), "begin\n")
    time.sleep(1)
    process.terminate()
    self.assertEqual(process.wait(30), -signal.SIGTERM)


# Tests of what writes texts.
DEPENDENT = "infer", "evals", "experiments", "trainer/hooks_test.py"
# The package without the folder of the kernel.
WITHOUT = """
import os
import dsv3_jax.infer.load, dsv3_jax.trainer
from dsv3_jax.infer import forward_form
form = forward_form.choose("auto", None, None, divided=False)
print(os.path.dirname(dsv3_jax.__file__), form.name)
"""


@pytest.mark.slow
class DeletedTest(absltest.TestCase):
  @pytest.mark.timeout(3000)
  def test_other_tests_pass_without_the_folder(self):
    folder = testing.folder(self) / "copy"
    unwanted = "native", "native_*", "__pycache__", ".*", "runs", "corpus"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*unwanted))
    command = "-m pytest -n 0 -x -q -m".split() + ["not slow", "--"]
    command += [f"tests/{path}" for path in DEPENDENT]
    done = subprocess.run(
      [sys.executable, *command],
      cwd=folder,
      env=os.environ | {"PYTHONPATH": str(folder)},
      capture_output=True,
      text=True,
      timeout=3000,
    )
    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

  def test_nothing_else_needs_the_folder_and_xla_is_chosen(self):
    folder = testing.folder(self)
    shutil.copytree(
      ROOT / "dsv3_jax",
      folder / "dsv3_jax",
      ignore=shutil.ignore_patterns("native", "__pycache__"),
    )
    done = subprocess.run(
      [sys.executable, "-c", WITHOUT],
      cwd=folder,
      env=os.environ | {"PYTHONPATH": str(folder)},
      capture_output=True,
      text=True,
      timeout=300,
    )
    self.assertEqual(
      done.stdout.split(), [str(folder / "dsv3_jax"), "xla"], done.stderr
    )


if __name__ == "__main__":
  absltest.main()

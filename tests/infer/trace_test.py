"""Tests of traces: a trainer that reads the text finds the same numbers."""

import collections
import dataclasses
import functools
import operator
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax.infer import (
  compiled,
  engine,
  engine_options,
  inference_params,
  sampling,
  serving_mesh,
  trace,
)
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.model import moe, transformer

LONGEST, CHUNK = 64, 16
SETTINGS = (
  dict(),
  dict(temperature=0.7),
  dict(top_p=0.8),
  dict(top_k=20),
  dict(temperature=0.7, top_p=0.8, top_k=20),
)


# --- the recorder, of made-up programs ---

CFG = testing.run("mtp.depth=2").model
N_MOE, K, N_BYTES = CFG.n_moe_layers, CFG.router.top_k, -(-CFG.vocab_size // 8)


def output(lead, n, n_read, first, drafting=True):
  """Output of a program about positions and tokens numbered from `first` on.

  The experts at a position are its number, the MTP module's 1000 more.
  """
  shape = (*lead, n_read)
  numbers = np.broadcast_to(first + np.arange(n_read), shape)
  of_tokens = numbers[..., -1:] if len(lead) == 1 else numbers
  experts = np.broadcast_to(numbers[..., None, None], (*shape, N_MOE, K))
  told = trace.StepTrace(
    logprobs=-of_tokens / 8,
    kept=np.broadcast_to(of_tokens[..., None], (*of_tokens.shape, N_BYTES)),
    routes=experts,
    mtp_routes=experts[..., 0, :] + 1000 if drafting else None,
  )
  return types.SimpleNamespace(tokens=of_tokens, n=np.full(lead, n), trace=told)


class RecorderTest(parameterized.TestCase):
  def recorded(self, n, drafting=True, **settings):
    """The trace of n tokens after a prompt of 5, read in chunks of 4."""
    asked = GenerationRequest((50, 51, 52, 53, 54), 9, **settings)
    recorder = trace.Recorder(asked, CFG)
    recorder.add_chunk(output((1,), 1, 4, 0, drafting), 0)
    recorder.add_chunk(output((1,), 1, 4, 4, drafting), 0)
    # Each reads three positions, and generates two tokens, then one.
    recorder.add_step(output((2, 3), 2, 3, 10, drafting), (1, 0))
    if n > 3:
      recorder.add_step(output((2, 3), 1, 3, 20, drafting), (0, 2))
    return recorder.trace(n)

  def test_has_the_positions_that_were_read_and_no_rejected_drafts(self):
    found = self.recorded(4)
    read = [0, 1, 2, 3, 4, 10, 11, 20]
    # The last position of the prompt is read by the MTP module in the first
    # step, what a step has read in the next one.
    ahead = [1000, 1001, 1002, 1003, 1010, 1020, 1021, -1]
    expected = np.stack([read] * N_MOE + [ahead, [-1] * 8], axis=1)
    for k in range(K):
      np.testing.assert_array_equal(found.routes[..., k], expected)
    self.assertEqual(found.tokens.tolist(), [50, 51, 52, 53, 54, 7, 10, 11])
    np.testing.assert_array_equal(
      found.logprobs, -np.array([7, 10, 11, 20]) / 8
    )
    dtypes = found.tokens.dtype, found.logprobs.dtype, found.routes.dtype
    self.assertEqual(dtypes, (np.int32, np.float32, np.int32))

  def test_ends_with_the_text_in_the_middle_of_a_step(self):
    whole, found = self.recorded(4), self.recorded(2)
    self.assertEqual(found.tokens.tolist(), whole.tokens[:6].tolist())
    self.assertEqual(found.logprobs.tolist(), whole.logprobs[:2].tolist())
    main, ahead = np.s_[:6, :N_MOE], np.s_[:5, N_MOE:]
    np.testing.assert_array_equal(found.routes[main], whole.routes[main])
    np.testing.assert_array_equal(found.routes[ahead], whole.routes[ahead])
    self.assertEqual(found.routes[5, N_MOE:].max(), -1)

  def test_a_module_that_does_not_draft_has_no_routes(self):
    found = self.recorded(4, drafting=False)
    np.testing.assert_array_equal(found.routes[:, N_MOE:], -1)
    np.testing.assert_array_equal(
      found.routes[:, :N_MOE], self.recorded(4).routes[:, :N_MOE]
    )

  @parameterized.parameters(
    (dict(), False),
    (dict(top_k=3), True),
    (dict(top_p=0.5), True),
    (dict(top_p=0.5, temperature=0), False),
  )
  def test_tells_what_was_kept_only_where_something_is_cut(self, how, cuts):
    kept = self.recorded(3, **how).kept
    self.assertEqual(kept is not None, cuts)
    if cuts:
      self.assertEqual(kept[:, 0].tolist(), [7, 10, 11])
      self.assertEqual((kept.shape, kept.dtype), ((3, N_BYTES), np.int64))


class StepTest(absltest.TestCase):
  def test_probabilities_are_of_the_sampling_settings_and_kept_are_bits(self):
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.125] + [0.125 / 8] * 8]]))
    settings = [GenerationRequest((), temperature=0.5, top_k=2)]
    mode = sampling.mode(settings)
    adjusted = sampling.adjust(logits, sampling.stack_params(settings), mode)
    experts = np.zeros((0, 1, 1, 2), np.int32)
    told = trace.of_step(adjusted, np.array([[1]]), experts, None, mode)
    np.testing.assert_allclose(told.logprobs, [[np.log(0.2)]], rtol=1e-6)
    self.assertEqual(told.kept.tolist(), [[[3, 0]]])
    self.assertEqual(told.kept.dtype, np.uint8)


class RefusalTest(absltest.TestCase):
  def test_there_are_no_traces_of_a_serving_mesh(self):
    serving = serving_mesh.ServingConfig({"data": 2})
    options = EngineOptions(trace=True, serving=serving)
    (problem,) = engine_options.validate_options(testing.tiny(), options)
    self.assertRegex(problem, "^trace=True: must be False with a serving mesh")
    options = dataclasses.replace(options, serving=None)
    self.assertEqual(
      engine_options.validate_options(testing.tiny(), options), []
    )

  def test_new_parameters_are_as_the_old_ones(self):
    old = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    for change, message in (
      ({"b": np.zeros(3, np.float32)}, r"b: is float32\(3,\), must be float32"),
      ({"b": np.zeros(4)}, r"b: is float64\(4,\), must be float32\(4,\)"),
      ({"c": np.zeros(4)}, "c: only in the old or only in the new"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        inference_params.replace(old, old | change)
    new = old | {"b": np.ones(4, np.float32)}
    np.testing.assert_array_equal(inference_params.replace(old, new)["b"], 1)


# --- sampler = trainer ---


@functools.cache
def model():
  """A model whose routers and distributions are not flat."""
  cfg = testing.tiny()
  params = testing.draw(transformer.specs(cfg))
  return cfg, params, testing.normal(cfg.n_routers, 16, seed=1, scale=0.1)


def asked(n, longest=LONGEST):
  """Requests with prompts of 1 to 40 tokens; each has all of SETTINGS."""
  rng = np.random.default_rng(0)
  requests = []
  for i in range(n):
    size = int(rng.integers(1, 41))
    prompt = rng.integers(0, 512, size).tolist()
    most = int(rng.integers(1, longest - size + 1))
    how = SETTINGS[i % len(SETTINGS)]
    requests.append(GenerationRequest(prompt, most, seed=i, **how))
  return requests


@functools.cache
def trainer(cfg):
  """Compiles the training forward pass; it returns logits, and experts too."""

  def run(params, bias, tokens, valid):
    chosen = []

    def ffn(p, x, experts, gates):
      chosen.append(experts.reshape(len(tokens), -1, experts.shape[-1]))
      return moe.LOCAL.ffn(p, x, experts, gates)

    ctx = transformer.ForwardContext(scan=False, experts=moe.Experts(ffn))
    out = transformer.forward(params, bias, tokens, cfg, ctx, valid=valid)
    ahead = [(0, 0), (0, 1), (0, 0)]
    chosen = chosen[: cfg.n_moe_layers] + [
      jnp.pad(e, ahead, constant_values=-1) for e in chosen[cfg.n_moe_layers :]
    ]
    logits = transformer.logits(params, out.hidden)
    return logits, jnp.stack(chosen, 2)

  return jax.jit(run)


def recompute(request, text, found, logits):
  """Log-probabilities of a text by the logits [T, C] of the trainer."""
  z = logits[len(request.prompt) - 1 :].astype(np.float64)
  z = z / request.temperature
  if found.kept is not None:
    bits = np.unpackbits(found.kept, axis=-1, bitorder="little")
    z = np.where(bits[:, : z.shape[-1]], z, -np.inf)
  z = z - z.max(-1, keepdims=True)
  log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
  return log_p[np.arange(len(text)), text]


@dataclasses.dataclass
class Comparison:
  """Numbers of the sampler and of the trainer, of all tokens."""

  logprobs: np.ndarray  # [n, 2]
  same: np.ndarray  # [n_read, n_routers] bool, the same experts
  seen: np.ndarray  # [n_read, n_routers] bool, the sampler tells experts

  @property
  def ratio(self):
    return np.exp(self.logprobs[:, 1] - self.logprobs[:, 0])


def compare(requests, n_drafts, dtype="float32", weights=None, longest=LONGEST):
  """Samples with traces, and reads the texts again as a trainer does."""
  cfg, params, bias = weights or model()
  served = inference_params.from_params(params, bias, cfg)
  if dtype != "float32":
    served = jax.tree.map(
      lambda a: a if a.ndim == 1 else a.astype(dtype), served
    )
  options = EngineOptions(
    dtype=dtype,
    max_batch=32,
    max_len=longest,
    chunk=CHUNK,
    n_drafts=n_drafts,
    trace=True,
  )
  texts, traces = collections.defaultdict(list), {}
  made = engine.Engine(served, cfg, options)
  for event in made.run(requests):
    assert (event.trace is not None) == bool(event.finish_reason)
    texts[event.index].append(event.token)
    traces[event.index] = event.trace
  logprobs, same, seen = [], [], []
  for first in range(0, len(requests), 32):
    rows = range(first, min(first + 32, len(requests)))
    tokens, valid = np.zeros((32, longest), int), np.zeros((32, longest), bool)
    for i, row in enumerate(rows):
      read = traces[row].tokens
      tokens[i, : len(read)], valid[i, : len(read)] = read, True
    found = jax.device_get(trainer(cfg)(params, bias, tokens, valid))
    for row, logits, experts in zip(rows, *found, strict=False):
      r, text, told = requests[row], texts[row], traces[row]
      assert told.tokens.tolist() == [*r.prompt, *text[:-1]]
      n = len(told.tokens)
      due = recompute(r, text, told, logits[:n])
      logprobs.append(np.stack([told.logprobs, due], axis=1))
      here = np.sort(told.routes) == np.sort(experts[:n])
      same.append(here.all(-1))
      seen.append((told.routes >= 0).all(-1))
  return made.stats, Comparison(*map(np.concatenate, (logprobs, same, seen)))


@pytest.mark.slow
class SamplerIsTrainerTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2)
  def test_has_the_same_numbers(self, n_drafts):
    requests = asked(60)
    stats, found = compare(requests, n_drafts)
    n_moe = model()[0].n_moe_layers
    self.assertGreater(len(found.logprobs), 1000)
    difference = found.logprobs[:, 1] - found.logprobs[:, 0]
    self.assertLess(np.abs(difference).max(), 1e-5)
    self.assertLess(found.logprobs[:, 0].min(), -1)
    self.assertLess(abs(found.ratio.mean() - 1), 1e-5)
    self.assertGreater(found.same[found.seen].mean(), 0.9999)
    self.assertTrue(found.seen[:, :n_moe].all())
    if not n_drafts:
      self.assertFalse(found.seen[:, n_moe:].any())
      return
    self.assertGreater(stats.accepted, 0)
    # Only positions of the last step are not read ahead.
    n_unread = (~found.seen[:, n_moe]).sum()
    self.assertBetween(n_unread, len(requests), (n_drafts + 1) * len(requests))


@pytest.mark.slow
class UpdateTest(absltest.TestCase):
  def made(self, served, traced=False):
    options = EngineOptions(
      max_batch=4, max_len=LONGEST, chunk=CHUNK, n_drafts=1, trace=traced
    )
    return engine.Engine(served, model()[0], options)

  def events(self, made):
    first = made.submitted
    found = [
      (e.index - first, e.token, e.logprob, e.finish_reason)
      for e in made.run(asked(10))
    ]
    # Those of different texts come in an order that depends on time.
    return sorted(found, key=operator.itemgetter(0))

  def test_is_a_new_engine_without_a_program_compiled_again(self):
    cfg, params, bias = model()
    served = inference_params.from_params(params, bias, cfg)
    made = self.made(served)
    old = self.events(made)
    programs = [
      f(m)
      for f in (made._decode, made._prefill)
      for m in (sampling.UNTRUNCATED, sampling.TRUNCATED)
    ]
    sizes = [program._cache_size() for program in programs]
    new = jax.tree.map(lambda a: -a if a.ndim > 1 else a, served)
    made.submit(asked(1)[0])
    with self.assertRaisesRegex(RuntimeError, "between requests alone"):
      made.update_params(new)
    made.cancel(made.submitted - 1)
    with mock.patch.object(compiled, "program", None):
      made.update_params(new)
      found = self.events(made)
    self.assertEqual([program._cache_size() for program in programs], sizes)
    self.assertEqual(found, self.events(self.made(new)))
    self.assertNotEqual(found, old)

  def test_a_trace_changes_no_text(self):
    cfg, params, bias = model()
    served = inference_params.from_params(params, bias, cfg)
    plain, traced = self.made(served), self.made(served, traced=True)
    self.assertEqual(self.events(plain), self.events(traced))


if __name__ == "__main__":
  absltest.main()

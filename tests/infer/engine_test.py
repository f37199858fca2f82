"""Tests of continuous batching, with and without drafts."""

import dataclasses
import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import testing
from absl.testing import absltest, parameterized
from sampling_test import distribution, joint, p_value

from dsv3_jax import config
from dsv3_jax.errors import InputError
from dsv3_jax.infer import (
  engine,
  expert_balance,
  forward_form,
  inference_params,
)
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.model import transformer
from dsv3_jax.plan import memory

VOCAB, MAX_LEN, CHUNK, SLOTS = 8, 64, 16, 3
MORE = 3  # the most drafts
# Of a layer: down, up, scores, also in the latent, a softmax, out of the latent
# and of the heads; router, up and down. Then the head.
TERMS = 2 * (16 + 8 + 16 + 2 * MAX_LEN + 8 + 8 + 16 + 16 + 24) + 16
# Lengths of prompts and of texts. The first makes the cache as long as it gets.
LENGTHS = (
  (40, 20),
  (1, 5),
  (16, 12),
  (2, 1),
  (31, 9),
  (17, 14),
  (32, 7),
  (33, 9),
  (15, 16),
  (2, 14),
)


def request(i, n_prompt, max_tokens, **settings):
  settings = {"temperature": 0} | settings
  prompt = testing.tokens(n_prompt, vocab_size=VOCAB, seed=i).tolist()
  return GenerationRequest(prompt, max_tokens, **settings)


def requests(**settings):
  return [request(i, *n, **settings) for i, n in enumerate(LENGTHS)]


@functools.cache
def model(*assignments):
  """A model whose texts vary, and whose drafts are often, not always, kept."""
  cfg = config.override(
    testing.run().model, f"vocab_size={VOCAB}", *assignments
  )
  params, d = testing.draw(transformer.specs(cfg)), cfg.d_model
  # The MTP module goes on from a token as the main model does from its own.
  module = params["mtp"]
  module["proj"] = module["proj"].at[:, :d].add(0.12 * jnp.eye(d)[None])
  depth = cfg.mtp.depth
  module["block"], module["norm"] = jax.tree.map(
    lambda a: jnp.repeat(a, depth, axis=0),
    (params["moe"], params["norm"][None]),
  )
  # Attention to few positions, which counts; logits that are far apart.
  for p in (params["dense"], params["moe"], module["block"]):
    p["mla"] |= {"q_up": 24 * p["mla"]["q_up"], "out": 2 * p["mla"]["out"]}
  params["head"] = 3 * params["head"]
  bias = testing.normal(cfg.n_routers, 8, seed=1, scale=0.1)
  return cfg, params, bias


@functools.cache
def parameters(*assignments):
  cfg, params, bias = model(*assignments)
  return jax.jit(inference_params.from_params, static_argnums=2)(
    params, bias, cfg
  )


def make(
  n_drafts=0,
  n_slots=SLOTS,
  assignments=(),
  params=None,
  form=forward_form.AUTO,
  max_len=MAX_LEN,
):
  options = EngineOptions(
    max_batch=n_slots,
    max_len=max_len,
    chunk=CHUNK,
    n_drafts=n_drafts,
    form=form,
  )
  return engine.Engine(
    params or parameters(*assignments), model(*assignments)[0], options
  )


def texts(events):
  """Tokens of each request, in its order."""
  found = {}
  for event in events:
    found.setdefault(event.index, []).append(event.token)
  return [found[number] for number in sorted(found)]


def run(made, asked):
  return texts(made.run(asked))


@functools.cache
def greedy():
  """Texts of `requests`, and some tokens more each, without drafts."""
  longer = [
    dataclasses.replace(r, max_tokens=r.max_tokens + MORE) for r in requests()
  ]
  return run(make(), longer)


def due():
  """Texts of `requests`."""
  return [
    text[: r.max_tokens] for r, text in zip(requests(), greedy(), strict=True)
  ]


@functools.cache
def _full(text):
  cfg, params, bias = model()
  hidden, *_ = reference.forward(
    *reference.f64((params, bias)), np.array([text]), cfg
  )
  return hidden[0], hidden[0] @ reference.f64(params["head"])


def full(prompt, text):
  """States and logits of each position in float64."""
  return _full((*prompt, *text))


def best(logits):
  """The most likely token, which no rounding makes another."""
  second, first = np.sort(logits)[-2:]
  error = TERMS * testing.EPS * np.abs(logits).max()
  assert first - second > 2 * error, "too close"
  return int(logits.argmax())


def kept_drafts(prompt, text, max_tokens, k):
  """Drafts that each cycle keeps, as whole passes of the network have it.

  Args:
    prompt: token ids.
    text: what follows greedily, at least k tokens more than max_tokens.
    max_tokens: of the text.
    k: drafts a cycle.
  """
  cfg, params, bias = model()
  params, bias = reference.f64((params, bias))
  tokens = [*prompt, *text]
  hidden, _ = full(prompt, text)
  known, kept = len(prompt) + 1, []
  while known < len(prompt) + max_tokens:
    # Position i reads the state there and the token after it.
    read, states, drafts = tokens[:known], hidden[: known - 1], []
    for _ in range(k):
      (found,), *_ = reference.mtp(
        params, bias[cfg.n_moe_layers :], states[None], np.array([read]), cfg
      )
      drafts.append(best(found[0, -1] @ params["head"]))
      read, states = [*read, drafts[-1]], np.append(states, found[0, -1:], 0)
    wrong = np.array(drafts) != tokens[known : known + k]
    kept.append(int(np.argmax([*wrong, True])))
    known += kept[-1] + 1
  return kept


def next_tokens(prompt, length):
  """settings -> probabilities [C, ..., C] of what follows, in float64."""
  cfg, params, bias = model()
  params, bias = reference.f64((params, bias))
  c = cfg.vocab_size
  all_but_last = list(itertools.product(range(c), repeat=length - 1))
  tokens = np.array([[*prompt, *text] for text in all_but_last])
  hidden, *_ = reference.forward(params, bias, tokens, cfg)
  logits = (hidden @ params["head"])[:, len(prompt) - 1 :]
  logits = logits.reshape(*[c] * (length - 1), length, c)

  def probabilities(settings):
    joined = np.ones(())
    for i in range(length):
      # The same whatever comes later.
      here = logits[(slice(None),) * i + (0,) * (length - 1 - i) + (i,)]
      p, close = map(
        np.array,
        zip(
          *(distribution(z, *settings) for z in here.reshape(-1, c)),
          strict=True,
        ),
      )
      assert close.min() > 1e-4, "rounding decides what is cut"
      joined = joined[..., None] * p.reshape(here.shape)
    return joined

  return probabilities


class GreedyTest(parameterized.TestCase):
  def test_takes_the_most_likely_token_each_time(self):
    for r, text in zip(requests(), greedy(), strict=True):
      _, logits = full(r.prompt, text)
      expected = [best(z) for z in logits[len(r.prompt) - 1 : -1]]
      self.assertEqual(text, expected)
      self.assertLen(text, r.max_tokens + MORE)

  def test_tells_log_probabilities_of_the_model(self):
    made, asked = make(), requests()
    checked = 0
    found = {i: [] for i in range(len(asked))}
    for event in made.run(asked):
      found[event.index].append(event.logprob)
    for i, r in enumerate(asked):
      _, logits = full(r.prompt, greedy()[i])
      here = logits[len(r.prompt) - 1 :]
      log_p = np.log(reference.softmax(here))
      for z, row, token, got in zip(
        here, log_p, due()[i], found[i], strict=False
      ):
        # An error of a logit, and of their sum.
        error = 2 * TERMS * testing.EPS * np.abs(z).max()
        self.assertAlmostEqual(got, row[token], delta=error)
        checked += 1
    self.assertEqual(checked, sum(r.max_tokens for r in asked))

  def test_a_cache_that_grows_keeps_what_was_read(self):
    asked, made = requests(), make()
    # The first three need 16 positions. One is over at once; the one that comes
    # in its place needs 64, while two are being written.
    order = [1, 9, 3, 0, 7, 2]
    found = run(made, [asked[i] for i in order])
    self.assertEqual(found, [due()[i] for i in order])

  def test_nothing_is_left_of_a_text_before(self):
    # Long texts first, so that slots hold more than short ones write.
    order = sorted(range(len(LENGTHS)), key=lambda i: -sum(LENGTHS[i]))
    asked = requests()
    found = run(make(), [asked[i] for i in order])
    self.assertEqual(found, [due()[i] for i in order])

  def test_events_tell_where_a_text_ends(self):
    asked = requests()
    ended = {i: [] for i in range(len(asked))}
    for event in make().run(asked):
      ended[event.index].append(event.finish_reason)
    for i, r in enumerate(asked):
      self.assertEqual(ended[i], [""] * (r.max_tokens - 1) + [engine.LENGTH])

  @parameterized.parameters(0, 2)
  def test_a_stop_token_ends_a_text(self, n_drafts):
    asked = requests()
    stops = [(text[len(text) // 2], VOCAB + 5) for text in due()]
    asked = [
      dataclasses.replace(r, stop_token_ids=stop)
      for r, stop in zip(asked, stops, strict=True)
    ]
    events = list(make(n_drafts).run(asked))
    for i, (text, (stop, _)) in enumerate(zip(due(), stops, strict=True)):
      here = [event for event in events if event.index == i]
      expected = text[: text.index(stop) + 1]
      self.assertEqual([event.token for event in here], expected)
      *before, last = [event.finish_reason for event in here]
      self.assertEqual((set(before) - {""}, last), (set(), engine.STOP))

  @parameterized.parameters(0, 2)
  def test_a_stop_token_that_the_device_does_not_know(self, n_drafts):
    expected, asked = [], []
    for r, text in zip(requests(), due(), strict=True):
      n = max(map(text.index, text))  # of the last new token
      expected.append(text[: n + 1])
      stops = *range(-9, -1), text[n]  # more than the device has room for
      asked.append(dataclasses.replace(r, stop_token_ids=stops))
    self.assertGreater(max(map(len, expected)), 2)
    made = make(n_drafts)
    with mock.patch.object(made, "_most_steps", lambda: 8):
      self.assertEqual(run(made, asked), expected)
    self.assertGreater(made.stats.wasted_rows, 0)

  def test_a_lone_text_has_one_row(self):
    made, asked = make(), requests()
    made.form = forward_form.XLA
    made.submit(asked[0])
    events = made.step() + made.step() + made.step()
    self.assertEqual(made._size, (1, MAX_LEN))
    made.submit(asked[4])
    while made.busy:
      events += made.step()
    self.assertEqual(made._size, (SLOTS, MAX_LEN))
    self.assertEqual(texts(events), [due()[0], due()[4]])

  @parameterized.parameters((0, 3), (math.inf, 19), (engine._DISPATCH_S / 4, 5))
  def test_runs_steps_that_take_together_a_moment(self, step_s, n_dispatches):
    made, n = make(), 0
    made.submit(requests()[0])  # of 20 tokens
    while made.busy:
      made._step_s, before = step_s, made.stats.cycles
      made.step()
      n += made.stats.cycles > before
    self.assertEqual((n, made.stats.cycles), (n_dispatches, 19))

  def test_a_step_at_a_time_while_a_text_waits(self):
    made = make()
    for r in requests():
      made.submit(r)
    while made.busy:
      made._step_s, before = 0, made.stats.cycles
      waiting = len(made._slots.waiting)
      made.step()
      if waiting:
        self.assertLessEqual(made.stats.cycles, before + 1)

  def test_one_token_needs_no_cycle(self):
    made = make()
    made.submit(requests()[0])
    made.step()
    made.cancel(0)
    cycles, rows = made.stats.cycles, made.stats.rows
    number = made.submit(requests()[3])
    (event,) = made.step()
    self.assertEqual(
      (event.index, event.finish_reason), (number, engine.LENGTH)
    )
    self.assertEqual([event.token], due()[3])
    self.assertEqual((made.stats.cycles, made.stats.rows), (cycles, rows))
    self.assertFalse(made.busy)
    self.assertEqual(made.step(), [])

  def test_counts_what_experts_get(self):
    cfg, params, bias = model()
    asked, made = requests(), make()
    with mock.patch.object(expert_balance, "MAX_PENDING", 5):
      run(made, asked)
    expected = 0
    for r, text in zip(asked, due(), strict=True):
      # The last token of a text is not read.
      *_, load, _ = reference.forward(
        *reference.f64((params, bias)), np.array([[*r.prompt, *text[:-1]]]), cfg
      )
      expected = expected + load[: cfg.n_moe_layers]
    main, ahead = np.split(made.balancer.load, [cfg.n_moe_layers])
    np.testing.assert_array_equal(main, expected)
    self.assertEqual((ahead.shape, ahead.max()), ((1, 8), 0))
    main += 1  # it is a copy
    np.testing.assert_array_equal(
      made.balancer.load[: cfg.n_moe_layers], expected
    )


class FormTest(absltest.TestCase):
  def choose(self, name, divided=False):
    return forward_form.choose(name, {}, model()[0], divided=divided)

  def test_without_a_native_kernel_it_is_xlas_and_says_so(self):
    unavailable = mock.patch.object(
      forward_form, "_load_native", lambda *_: "there is no compiler"
    )
    with unavailable, self.assertLogs("absl", level="INFO") as logs:
      self.assertIs(self.choose("auto"), forward_form.XLA)
      with self.assertRaisesRegex(InputError, "native: there is no compiler"):
        self.choose("native")
    self.assertRegex("".join(logs.output), "XLA's.*: there is no compiler")

  def test_a_divided_model_has_no_native_kernel(self):
    with self.assertRaisesRegex(InputError, "divide|no native kernel"):
      self.choose("native", divided=True)
    self.assertIs(self.choose("auto", divided=True), forward_form.XLA)
    self.assertIs(self.choose("xla"), forward_form.XLA)


class QueueTest(absltest.TestCase):
  def test_texts_are_taken_when_there_is_room(self):
    taken, ended = [], 0

    def source():
      for r in requests():
        taken.append(r)
        yield r

    made = make()
    for event in made.run(source()):
      ended += bool(event.finish_reason)
      self.assertLessEqual(len(taken), ended + SLOTS)
    self.assertLen(taken, len(LENGTHS))
    self.assertEqual(ended, len(LENGTHS))
    self.assertFalse(made.busy)

  def test_first_tokens_do_not_wait_for_a_decode_step(self):
    made = make()
    self.assertLen(list(itertools.islice(made.run(requests()), SLOTS)), SLOTS)
    self.assertEqual(made.stats.cycles, 0)

  def test_a_cache_that_memory_has_no_room_for_is_not_made(self):
    made = make()
    held = memory.bytes_per_device(made._params)
    host = mock.patch.object(memory, "host_bytes", lambda: held)
    with host, self.assertRaisesRegex(InputError, "a cache of 3 x 64 pos.*GiB"):
      list(made.run(requests()))

  def test_takes_no_more_than_it_has_slots_for(self):
    made, source = make(), iter(requests())
    next(made.run(source))
    self.assertLen(list(source), len(LENGTHS) - SLOTS)

  def test_a_text_that_is_cancelled_leaves_its_slot(self):
    made, asked = make(), requests()
    for i in (0, 2, 4, 5, 8):
      made.submit(asked[i])
    events = made.step()
    self.assertEqual({event.index for event in events}, {0, 1, 2})
    made.cancel(1)  # being written
    made.cancel(3)  # waiting
    later = []
    while made.busy:
      later += made.step()
    self.assertEqual({event.index for event in later}, {0, 2, 4})
    # Number 4 came into the slot of number 1 with the next step.
    self.assertIn(4, [event.index for event in later[:4]])
    found = texts([e for e in events + later if e.index in (0, 2, 4)])
    self.assertEqual(found, [due()[i] for i in (0, 4, 8)])
    made.cancel(0)  # is over; this is no error
    made.cancel(99)

  def test_an_engine_serves_again(self):
    made, asked = make(), requests()
    self.assertEqual(run(made, asked[:2]), due()[:2])
    self.assertEqual(made.submitted, 2)
    self.assertEqual(made.submit(asked[4]), 2)
    events = []
    while made.busy:
      events += made.step()
    self.assertEqual(texts(events), [due()[4]])

  def test_no_request_is_nothing(self):
    made = make()
    self.assertEqual((list(made.run([])), made.step()), ([], []))
    self.assertEqual(made.stats, engine.EngineStats())


SETTINGS = (
  dict(temperature=1, top_p=0.9),
  dict(temperature=0.7, top_k=3),
  dict(temperature=1.4, top_p=0.8, top_k=5),
)


class SampledTest(parameterized.TestCase):
  def asked(self):
    return [
      dataclasses.replace(r, seed=100 + i, **SETTINGS[i % 3])
      for i, r in enumerate(requests())
    ]

  @parameterized.parameters(0, 2)
  def test_what_a_text_is_depends_on_it_alone(self, n_drafts):
    asked = self.asked()
    expected = run(make(n_drafts), asked)
    made = make(n_drafts)
    with self.subTest("one at a time"):
      alone = [text for r in asked for text in run(made, [r])]
      self.assertEqual(alone, expected)
    with self.subTest("in another order, with one that is greedy"):
      order = [0, 8, 2, 5, 1, 7, 3, 6, 4]
      others = [asked[i] for i in order]
      others[3] = requests()[order[3]]
      found = run(made, others)
      self.assertEqual(found[3], due()[order[3]])
      del found[3], order[3]
      self.assertEqual(found, [expected[i] for i in order])
    with self.subTest("with another seed"):
      seeds = 5, 6, 5, 2**32 - 1
      same = [dataclasses.replace(asked[0], seed=seed) for seed in seeds]
      first, second, again, last = run(made, same)
      self.assertEqual(first, again)
      self.assertLen({tuple(text) for text in (first, second, last)}, 3)

  @parameterized.parameters(0, 2)
  def test_log_probabilities_know_no_temperature(self, n_drafts):
    r = self.asked()[0]
    events = list(make(n_drafts).run([r]))
    _, logits = full(r.prompt, tuple(e.token for e in events))
    logits = logits[len(r.prompt) - 1 : -1]
    for z, event in zip(logits, events, strict=True):
      error = 2 * TERMS * testing.EPS * np.abs(z).max()
      expected = np.log(reference.softmax(z))[event.token]
      self.assertAlmostEqual(event.logprob, expected, delta=error)

  @parameterized.parameters((0, 300), (2, 600))
  def test_texts_have_the_distribution_of_the_model(self, n_drafts, n):
    check_distribution(self, make(n_drafts), n, SETTINGS)


def check_distribution(test, made, n, settings, prompt=(3, 6), length=3):
  """The first tokens of n texts for each settings against whole passes."""
  asked = [
    GenerationRequest(prompt, length, seed=seed, **how)
    for seed, how in zip(
      range(n * len(settings)), itertools.cycle(settings), strict=False
    )
  ]
  # The cache as long as in other tests.
  made.submit(dataclasses.replace(requests()[0], **settings[0]))
  made.step()
  made.cancel(0)
  found = np.array(run(made, asked))
  exact = next_tokens(prompt, length)
  for i, how in enumerate(settings):
    here = found[i :: len(settings)]
    expected = exact(
      (how["temperature"], how.get("top_p", 1), how.get("top_k", 0))
    )
    # Together, and each two, which have fewer values.
    for places in ((0, 1, 2), (0, 1), (1, 2), (0, 2)):
      counts = joint(*here[:, places].T, size=VOCAB)
      others = tuple({0, 1, 2} - {*places})
      with test.subTest(how=how, places=places):
        test.assertGreater(p_value(counts, expected.sum(others)), 1e-4)
  if made.options.n_drafts:
    test.assertBetween(made.stats.acceptance, 0.1, 0.9)


class DraftsTest(absltest.TestCase):
  def test_greedy_texts_are_those_without(self):
    check_drafts(self, make(2))

  def test_without_drafts_every_token_is_a_pass(self):
    made = make()
    run(made, requests())
    stats = made.stats
    self.assertEqual((stats.drafts, stats.accepted), (0, 0))
    self.assertEqual(stats.rows, stats.tokens)
    self.assertEqual(stats.tokens, sum(n - 1 for _, n in LENGTHS))
    self.assertEqual((stats.acceptance, stats.calls_per_token), (0, 1))


def check_drafts(test, made):
  """Texts are the same, and as many drafts are kept as should be."""
  asked, k, stats = requests(), made.options.n_drafts, made.stats
  test.assertEqual(run(made, asked), due())
  cycles = [
    kept_drafts(r.prompt, text, r.max_tokens, k)
    for r, text in zip(asked, greedy(), strict=True)
  ]
  kept = sum(map(sum, cycles))
  test.assertEqual(stats.accepted, kept)
  test.assertEqual(stats.rows, sum(map(len, cycles)))
  test.assertEqual(stats.drafts, k * stats.rows)
  test.assertEqual(stats.tokens, stats.rows + kept)
  test.assertEqual(stats.prompt_tokens, sum(n for n, _ in LENGTHS))
  test.assertBetween(stats.cycles, stats.rows / SLOTS, stats.rows - SLOTS)
  test.assertAlmostEqual(stats.acceptance, kept / stats.drafts)
  test.assertAlmostEqual(stats.calls_per_token, 1 / (1 + k * stats.acceptance))
  # The device knows where a text ends.
  test.assertEqual(stats.wasted_rows, 0)
  # Experts get all that is read: by the MTP module what is new of the cycle
  # before, and its own drafts but the last.
  *main, ahead = made.balancer.load.sum(axis=1) // made.cfg.router.top_k
  for n in main:
    test.assertEqual(n, stats.prompt_tokens + (k + 1) * stats.rows)
  new = sum(sum(text[:-1]) + len(text) for text in cycles)
  test.assertEqual(ahead, new + (k - 1) * stats.rows)
  # It happens that none, some and all of a cycle's are kept.
  test.assertEqual({*range(k + 1)}, {n for text in cycles for n in text})


@pytest.mark.slow
class FormsTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2)
  def test_have_the_same_texts(self, n_drafts):
    asked = requests() + [
      request(seed, 5 * seed + 1, 12, seed=seed, **SETTINGS[seed % 3])
      for seed in range(10)
    ]
    xla = run(make(n_drafts, form="xla"), asked)
    self.assertEqual(xla[: len(LENGTHS)], due())
    made = make(n_drafts)
    if made.form.name == "xla":
      self.skipTest("there is no compiler for the native kernel")
    self.assertEqual(run(made, asked), xla)

  @parameterized.parameters(0, 1)
  def test_have_the_same_long_texts(self, n_drafts):
    made = make(n_drafts, max_len=256)
    if made.form.name == "xla":
      self.skipTest("there is no compiler for the native kernel")
    asked = [request(i, n, 200) for i, (n, _) in enumerate(LENGTHS)]
    asked += [
      dataclasses.replace(each, seed=seed, **SETTINGS[seed % 3])
      for seed, each in enumerate(asked)
    ]
    found = run(made, asked)
    self.assertEqual({len(text) for text in found}, {200})
    self.assertEqual(run(make(n_drafts, form="xla", max_len=256), asked), found)


@pytest.mark.slow
class MoreDraftsTest(parameterized.TestCase):
  @parameterized.parameters(1, 3)
  def test_greedy_texts_are_those_without(self, k):
    check_drafts(self, make(k))

  def test_of_several_modules_the_first_drafts(self):
    # Its parameters are others, but those of the main model are not.
    deeper = "mtp.depth=2", "mtp.input_state=pre_norm"
    params = parameters() | {"mtp": parameters(*deeper)["mtp"]}
    made = make(2, assignments=deeper, params=params)
    self.assertEqual(run(made, requests()), due())
    self.assertGreater(made.stats.accepted, 0)

  @parameterized.parameters(0, 1, 2)
  def test_texts_have_the_distribution_of_the_model(self, n_drafts):
    made = make(n_drafts, n_slots=512)
    settings = *SETTINGS, dict(temperature=1)
    check_distribution(self, made, 4000, settings)


@pytest.mark.slow
class MoreSlotsTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 17)
  def test_texts_do_not_depend_on_how_many_there_are(self, n_slots):
    self.assertEqual(run(make(n_slots=n_slots), requests()), due())
    asked = [
      dataclasses.replace(r, seed=i, **SETTINGS[i % 3])
      for i, r in enumerate(requests())
    ]
    found = run(make(n_slots=n_slots), asked)
    self.assertEqual(found, run(make(), asked))

  def test_parameters_in_bfloat16(self):
    params = jax.tree.map(
      lambda a: a if a.ndim == 1 else a.astype(jnp.bfloat16), parameters()
    )
    made = make(1, params=params)
    lengths = [len(text) for text in run(made, requests())]
    self.assertEqual(lengths, [n for _, n in LENGTHS])


class RefusalTest(parameterized.TestCase):
  def engine(self, *assignments, **options):
    cfg = config.override(model()[0], *assignments)
    return engine.Engine(parameters(), cfg, EngineOptions(**options))

  @parameterized.parameters(
    (dict(max_batch=0), "max_batch=0: must be at least 1"),
    (dict(form="fast"), "form=fast: must be one of auto, xla, native"),
    (dict(max_len=0), "max_len=0: must be at least 1"),
    (dict(chunk=0), "chunk=0: must be a power of two, at least 16"),
    (dict(chunk=8), "chunk=8: must be a power of two, at least 16"),
    (dict(chunk=48), "chunk=48: must be a power of two, at least 16"),
    (dict(n_drafts=-1), "n_drafts=-1: must be at least 0"),
  )
  def test_refuses_a_size(self, options, message):
    with self.assertRaises(ValueError) as caught:
      self.engine(**options)
    self.assertEqual(str(caught.exception), message)

  def test_refuses_drafts_without_a_module(self):
    with self.assertRaisesRegex(
      ValueError, r"^n_drafts=1: .* no MTP module .*mtp.depth=0"
    ):
      self.engine("mtp.depth=0", n_drafts=1)
    self.engine("mtp.depth=0", n_drafts=0)

  def test_refuses_what_yarn_does_not_reach(self):
    yarn = "attention.yarn.factor=2.5", "attention.yarn.original_len=8"
    with self.assertRaisesRegex(
      ValueError, "^max_len=21: must be at most 20, the length that"
    ):
      self.engine(*yarn, max_len=21)
    self.engine(*yarn, max_len=20)

  @parameterized.parameters(-1, 5)
  def test_refuses_to_place_experts_of_one_device(self, every):
    with self.assertRaisesRegex(
      ValueError, f"^rebalance_every={every}: must be at least 0, and 0 without"
    ):
      self.engine(rebalance_every=every)

  def test_names_all_problems_of_an_engine(self):
    with self.assertRaises(ValueError) as caught:
      self.engine(max_batch=0, max_len=0, chunk=3, n_drafts=-1)
    self.assertLen(str(caught.exception).splitlines(), 4)

  @parameterized.parameters(
    (dict(prompt=()), "prompt: is empty; at least one token is needed"),
    (dict(prompt=(3, 8)), "prompt: token id 8 must be in [0, 8)"),
    (dict(prompt=(3, -1, 9)), "prompt: token id -1 must be in [0, 8)"),
    (
      dict(prompt=(1.5,)),
      "prompt: token ids must be integers of 64 bits at most",
    ),
    (dict(max_tokens=0), "max_tokens=0: must be at least 1"),
    (dict(max_tokens=-3), "max_tokens=-3: must be at least 1"),
    (
      dict(temperature=-1),
      "temperature=-1: must be at least 0, and at most 1e+30",
    ),
    (dict(top_p=0), "top_p=0: must be above 0 and at most 1"),
    (dict(top_k=-1), "top_k=-1: must be in [0, 2^31), where 0 is no limit"),
    (dict(seed=-1), "seed=-1: must be in [0, 2^32)"),
    (dict(seed=2**32), "seed=4294967296: must be in [0, 2^32)"),
  )
  def test_refuses_a_request(self, changes, message):
    asked = dataclasses.replace(request(0, 3, 4), **changes)
    made = make()
    self.assertEqual(made.validate_request(asked), [message])
    with self.assertRaises(ValueError) as caught:
      made.submit(asked)
    self.assertEqual(str(caught.exception), message)
    with self.assertRaises(ValueError):
      list(made.run([asked]))
    self.assertEqual((made.submitted, made.busy), (0, False))

  @parameterized.parameters(0, 2)
  def test_refuses_what_is_longer_than_the_cache(self, n_drafts):
    made = make(n_drafts)
    fits = request(0, 40, MAX_LEN - 40)  # drafts need no room of the user's
    self.assertEqual(made.validate_request(fits), [])
    more = dataclasses.replace(fits, max_tokens=fits.max_tokens + 1)
    (problem,) = made.validate_request(more)
    self.assertRegex(
      problem,
      f"prompt of 40 tokens with max_tokens={more.max_tokens}: needs 65"
      f" positions .* at most max_len={MAX_LEN}",
    )

  def test_a_text_that_fills_the_cache_is_that_without_drafts(self):
    asked = [dataclasses.replace(request(0, 40, MAX_LEN - 40), temperature=0)]
    self.assertEqual(run(make(2), asked), run(make(0), asked))

  def test_names_all_problems_of_a_request(self):
    asked = GenerationRequest((), 0, -1, 0, -1, -1)
    self.assertLen(make().validate_request(asked), 6)

  def test_tells_when_parameters_are_not_numbers(self):
    bad = jnp.full_like(parameters()["embed"], np.nan)
    made = make(params=parameters() | {"embed": bad})
    with self.assertRaisesRegex(
      FloatingPointError, "^request 0: the log-probability of token .* is nan"
    ):
      run(made, requests())


if __name__ == "__main__":
  absltest.main()

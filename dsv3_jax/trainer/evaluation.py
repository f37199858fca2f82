"""Evaluation of a run on its held-out data: scores, and generated samples."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from dsv3_jax import config, train
from dsv3_jax.data import conversation_corpus, loader, packing, tasks, tokenizer
from dsv3_jax.data.batch import make_batch
from dsv3_jax.evals import answers, hidden, likelihood, preferences
from dsv3_jax.infer import engine, inference_params
from dsv3_jax.infer.engine_options import EngineOptions
from dsv3_jax.infer.request import GenerationRequest
from dsv3_jax.parallel import device_mesh

PROMPT_TOKENS = 16  # of a sample, BOS included
SLOTS = 32  # answers that are generated at the same time


def scores(
  source: loader.BatchSource, state: train.TrainState, mesh: jax.sharding.Mesh
) -> dict[str, float]:
  """Returns losses of held-out data, with bits per byte where it is text."""
  model = hidden.EvalModel(state.params, state.router_bias, source.run, mesh)
  if source.run.data.supervised:
    (domain,), heldout = source.corpus.domains, answers.heldout_loss
    if source.run.model.reward_head:
      heldout = preferences.heldout
    return heldout(model, domain.heldout_rows)
  data, by_domain = source.run.data, {}
  for domain in source.corpus.domains:
    *rows, mask = packing.heldout_windows(domain.heldout_tokens, data.seq_len)
    batch = make_batch(*rows, segment_mask=data.segment_mask)
    by_domain[domain.name] = likelihood.heldout(
      model, batch, mask, domain.heldout.text_bytes
    )
  return likelihood.metrics(by_domain)


def samples(
  source: loader.BatchSource, state: train.TrainState, mesh: jax.sharding.Mesh
) -> dict[str, object]:
  """Returns a text, or answers with their exact match, by process 0.

  The prompts are the same at each evaluation of a run.
  """
  run = source.run
  if run.model.reward_head:
    return {}
  if run.data.supervised:
    asked = answers.questions(source.corpus.domains[0], run.evaluate.answers)
    longest = max(
      (len(one.prompt) + answers.max_tokens(one) for one in asked), default=0
    )
    if not asked:
      return {}
    served = _engine(source, state, mesh, min(SLOTS, len(asked)), longest)
    return _answer(source, served, asked) if served else {}
  if not (n := run.evaluate.sample_tokens):
    return {}
  room = min(PROMPT_TOKENS, run.model.attention.max_len - n)
  heldout = source.corpus.domains[0].heldout_tokens
  prompt = sample_prompt(heldout, max(int(room), 1))
  served = _engine(source, state, mesh, 1, len(prompt) + n)
  return _continue(source, served, prompt, int(state.step)) if served else {}


def sample_prompt(heldout: np.ndarray, most: int) -> list[int]:
  """Returns BOS and the start of a held-out document, `most` tokens together.

  The document is the first one; it may be shorter.

  Args:
    heldout: [n] ids, documents of BOS ... EOS one after the other.
    most: at least 1.
  """
  text = heldout[: most + 1].tolist()
  if text[:1] == [tokenizer.BOS_ID]:
    del text[0]
  whole = itertools.takewhile(lambda token: token != tokenizer.EOS_ID, text)
  return [tokenizer.BOS_ID, *whole][:most]


def _engine(
  source: loader.BatchSource,
  state: train.TrainState,
  mesh: jax.sharding.Mesh,
  max_batch: int,
  max_len: int,
) -> engine.Engine | None:
  """Returns an engine on the first device of process 0; None in the others."""
  arrays = state.params, state.router_bias
  params, bias = device_mesh.on_first_device(arrays, mesh)
  if jax.process_index():
    return None
  model = config.override(source.run.model, "mtp.depth=0")
  weights = inference_params.from_params(params, bias, model)
  options = EngineOptions(max_batch=max_batch, max_len=max_len)
  return engine.Engine(weights, model, options)


def _continue(
  source: loader.BatchSource,
  served: engine.Engine,
  prompt: Sequence[int],
  seed: int,
) -> dict[str, object]:
  """Returns a prompt and its continuation, as text."""
  request = GenerationRequest(
    prompt,
    max_tokens=source.run.evaluate.sample_tokens,
    temperature=0.8,
    top_p=0.95,
    seed=seed,
    stop_token_ids=(tokenizer.EOS_ID,),
  )
  events = served.run([request])
  tokens = [e.token for e in events if e.finish_reason != engine.STOP]
  decode = source.corpus.tokenizer.decode
  return {"sample_prompt": decode(prompt), "sample": decode(tokens)}


def _answer(
  source: loader.BatchSource,
  served: engine.Engine,
  asked: Sequence[answers.Question],
) -> dict[str, object]:
  """Returns the share of answers that match in text, and the first one."""
  decode, data = source.corpus.tokenizer.decode, source.run.data
  generated = [
    None if tokens is None else decode(tokens)
    for tokens in answers.answer(served, asked)
  ]
  expected = [decode(one.answer) for one in asked]
  row = answers.exact_match(expected, generated)
  if data.source == config.TASKS:
    problems = conversation_corpus.split_tasks(data).heldout[: len(asked)]
    row |= answers.score_tasks(tasks.parse(data.path), problems, generated)
  if source.run.grpo.prompts:
    row = {k.replace("exact_match", "accuracy"): v for k, v in row.items()}
  return row | {
    "sample_prompt": decode(asked[0].prompt),
    "sample": generated[0] or "",
  }

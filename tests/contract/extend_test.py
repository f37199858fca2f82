"""Tests that run every example of docs/extend.md."""

import json
import pathlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, optim, train
from dsv3_jax.data import loader, prepare, sources
from dsv3_jax.data.batch import make_batch
from dsv3_jax.infer import engine, engine_options, inference_params, request
from dsv3_jax.interop import open_run
from dsv3_jax.model import attentions, router, transformer
from dsv3_jax.parallel import device_mesh
from dsv3_jax.trainer import distributed, metrics_writer, trainer

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extend.md"
LONGEST = 30  # lines of code of an example, without imports and blank lines

PROSE = "It was a bright cold day, and {} clocks were striking thirteen.\n"


def example(heading: str) -> str:
  """The Python code of a section."""
  section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
  return "\n".join(re.findall("```python\n(.*?)```", section, re.DOTALL))


def run_example(heading: str) -> dict[str, object]:
  """Runs the code of a section; returns the names that it defines."""
  names = {"__name__": "example"}
  exec(compile(example(heading), f"{PAGE}, {heading}", "exec"), names)
  return names


def losses(run, n_steps, mesh=None):
  """Losses of steps on one batch that repeats, from the same first state."""
  state = testing.state(run)
  shape = 1, run.train.batch_size, run.data.seq_len + 1
  rows = testing.tokens(*shape, vocab_size=run.model.vocab_size)
  batch = make_batch(rows)
  if mesh is not None:
    state = jax.device_put(state, train.shardings(run, mesh))
    batch = device_mesh.make_global_batch(
      batch, run.train.batch_size, mesh, dim=1
    )
  step = train.make_step(run, mesh)
  found = []
  for _ in range(n_steps):
    state, metrics = step(state, batch)
    found.append(float(metrics["loss"]))
  return np.array(found)


def trained(run, stop, folder):
  """Trains in a workdir until a step; the losses of all its steps."""
  workdir = folder / "run"
  with mock.patch.object(distributed, "mesh", device_mesh.make_mesh):
    trainer.Trainer(run, workdir, stop=stop, mesh={"data": 1}).fit()
  rows = metrics_writer.read(workdir / metrics_writer.METRICS)
  return [row["loss"] for row in rows if "loss" in row]


def small_run(folder, *settings):
  """A run of a few seconds on a small text."""
  text = folder / "text.txt"
  text.write_text("".join(PROSE.format(i) for i in range(100)))
  return testing.run(
    f"data.path={text}",
    "checkpoint.every=2",
    "evaluate.sample_tokens=0",
    "mtp.depth=0",
    "precision.recipe=fp32",
    *settings,
  )


class PageTest(parameterized.TestCase):
  def test_examples_are_short(self):
    for heading in re.findall("^## (.*)$", PAGE.read_text(), re.MULTILINE):
      lines = [
        line
        for line in example(heading).splitlines()
        if line.strip() and not re.match("(from|import) ", line)
      ]
      self.assertBetween(len(lines), 1, LONGEST, heading)


class AttentionTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(attentions.ATTENTIONS))
    run_example("Attention")

  def test_unknown_attention(self):
    with self.assertRaisesRegex(ValueError, "gqb: must be one of.*gqa"):
      testing.run("attention.type=gqb")

  def test_trains_resumes_and_decodes(self):
    folder = testing.folder(self)
    run = small_run(
      folder,
      "attention.type=gqa",
      "attention.n_heads=4",
      "attention.n_groups=2",
    )
    first = trained(run, 2, folder)
    losses = trained(run, 4, folder)
    self.assertEqual(losses[:2], first)
    self.assertLen(losses, 4)
    self.assertTrue(np.isfinite(losses).all())
    stored = open_run.read_config(folder / "run")
    self.assertEqual(stored["settings"]["model.attention.type"], "gqa")
    self.assertEqual(open_run.run_from_config(stored), run)
    mesh = device_mesh.make_mesh({"data": 1})
    saved = open_run.load_newest_params(folder / "run", run, mesh)
    params, bias = jax.tree.map(jnp.asarray, jax.device_get(saved))
    self.assertIn("gqa", params["moe"])
    self.check_decoding(run.model, params, bias)

  def check_decoding(self, cfg, params, bias):
    """Greedy text of the engine is that of full forward passes."""
    served = inference_params.from_params(params, bias, cfg)
    options = engine_options.EngineOptions(max_batch=2, max_len=32, chunk=16)
    writer = engine.Engine(served, cfg, options)
    prompts = [testing.tokens(n, vocab_size=300, seed=n) for n in (3, 18)]
    requests = [
      request.GenerationRequest(prompt.tolist(), max_tokens=8, temperature=0)
      for prompt in prompts
    ]
    texts = {0: [], 1: []}
    for event in writer.run(requests):
      texts[event.index].append(event.token)

    @jax.jit
    def logits(tokens):
      out = transformer.forward(params, bias, tokens, cfg)
      return transformer.logits(params, out.hidden)

    for i, prompt in enumerate(prompts):
      tokens = list(prompt)
      for _ in range(8):
        padded = np.pad(tokens, (0, 32 - len(tokens)))
        row = logits(padded[None].astype(np.int32))[0, len(tokens) - 1]
        tokens.append(int(row.argmax()))
      self.assertEqual(texts[i], tokens[len(prompt) :])


class RouterScoreTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(router.SCORES))
    self.addCleanup(config.ROUTER_SCORES.remove, "softplus")

  def test_trains(self):
    with self.assertRaisesRegex(ValueError, "must be one of sigmoid, softmax"):
      testing.run("router.score=softplus")
    run_example("Router score")
    found = losses(testing.run("router.score=softplus", "mtp.depth=0"), 2)
    self.assertTrue(np.isfinite(found).all())


class OptimizerTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(optim.OPTIMIZERS))
    self.muon = run_example("Optimizer")["muon"]

  @pytest.mark.slow
  def test_trains_alike_on_one_device_and_two(self):
    run = testing.run("optim.name=muon", "train.tokens=640")
    one = losses(run, 4)
    self.assertLess(one[-1], one[0])
    # Newton-Schulz steps amplify a rounding by the size of their coefficients.
    two = losses(run, 4, device_mesh.make_mesh({"data": 2}))
    np.testing.assert_allclose(two, one, rtol=1e-4)

  def test_updates_of_matrices_have_singular_values_near_1(self):
    run = testing.run("optim.name=muon", "optim.weight_decay=0")
    params = testing.state(run).params
    grads = jax.tree.map(lambda p: testing.normal(*p.shape, seed=1), params)
    muon = optim.make(run)
    updates, _ = jax.jit(muon.update)(grads, muon.init(params), params)
    down = np.asarray(updates["moe"]["ffn"]["experts"]["down"])
    values = np.linalg.svd(
      down / max(1, down.shape[-1] / down.shape[-2]) ** 0.5
    )
    self.assertBetween(values.S.min(), 0.3, 1.7)
    self.assertBetween(values.S.max(), 0.3, 1.7)


class ScheduleTest(absltest.TestCase):
  def test_is_flat_and_then_linear_to_zero(self):
    self.enter_context(mock.patch.dict(optim.SCHEDULES))
    run_example("Learning-rate schedule")
    run = testing.run(
      "schedule.name=trapezoidal",
      "schedule.constant_until=0.5",
      "schedule.warmup_until=0",
    )
    steps = np.array([0, 25, 50, 75, 99])
    rates = [float(optim.learning_rate(step, run)) for step in steps]
    shares = np.minimum(1, 2 * (1 - steps / run.total_steps))
    expected = run.optim.peak_lr * shares
    # A handful of float32 operations.
    np.testing.assert_allclose(rates, expected, rtol=8 * testing.EPS * 100)


class DataSourceTest(absltest.TestCase):
  def test_lines_become_documents_of_their_domains(self):
    self.enter_context(mock.patch.dict(sources.SOURCES))
    run_example("Data source")
    folder = testing.folder(self)
    records = [
      {"text": f"x[{i}] = {i};\n" * 9, "domain": "code"} for i in range(30)
    ] + [
      {"text": f"Clock {i} was striking thirteen.\n", "domain": "prose"}
      for i in range(300)
    ]
    path = folder / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    data = config.Data(
      source="lines", path=str(path), domains="prose=3,code=1", seq_len=16
    )
    corpus = prepare.prepare(data, 300, folder / "data")
    self.assertEqual([d.name for d in corpus.domains], ["prose", "code"])
    prose, code = (
      corpus.tokenizer.decode(domain.train.open()) for domain in corpus.domains
    )
    self.assertIn("was striking", prose)
    self.assertNotIn("x[", prose)
    self.assertIn("x[7] = 7;", code)
    run = testing.run("data.source=lines", f"data.path={path}")
    merged = prepare.prepare(run.data, 300, folder / "merged")
    self.assertEqual(
      merged.train_bytes + merged.heldout_bytes,
      corpus.train_bytes + corpus.heldout_bytes,
    )
    batch = loader.BatchSource(merged, run, 0)(0)
    self.assertEqual(batch.tokens.shape, (1, 8, 8))

  def test_unknown_source(self):
    data = config.Data(source="file", seq_len=16)
    with self.assertRaisesRegex(ValueError, "must be one of.*did you mean"):
      prepare.prepare(data, 300, testing.folder(self))


class MetricsWriterTest(absltest.TestCase):
  def test_writes_a_line_a_row(self):
    self.enter_context(mock.patch.dict(metrics_writer.WRITERS))
    run_example("Metrics writer")
    folder = testing.folder(self)
    writer = metrics_writer.MetricsWriter(folder, 2, writers=("jsonl", "csv"))
    with writer:
      writer.write({"step": 1, "loss": np.float32(2.5)})
      writer.write({"step": 1, "heldout_loss": float("nan")})
    self.assertEqual(
      (folder / "metrics.csv").read_text().splitlines(), ["1,2.5,", "1,,"]
    )
    self.assertLen(metrics_writer.read(folder / metrics_writer.METRICS), 2)


if __name__ == "__main__":
  absltest.main()

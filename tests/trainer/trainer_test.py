"""Tests of a run in a workdir: devices that disagree, a change of layout."""

import contextlib
import functools
import io
import itertools
import pathlib
import shutil
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testing
from absl.testing import absltest, parameterized

from dsv3_jax import config, train
from dsv3_jax.checkpoint import checkpointer, manifest
from dsv3_jax.data import loader, prepare
from dsv3_jax.parallel import device_mesh, replica_check
from dsv3_jax.trainer import (
  distributed,
  event_log,
  exit_codes,
  metrics_writer,
  step_monitor,
  trainer,
  workdir,
)
from dsv3_jax.trainer import replay as replay_lib
from dsv3_jax.trainer.loop import global_batches
from experiments import cli

PROSE = "It was a bright cold day, and {} clocks were striking thirteen.\n"


def write_text(folder):
  path = folder / "text.txt"
  path.write_text("".join(PROSE.format(i) for i in range(100)))
  return path


compiled_step = functools.cache(train.make_step)


class CheckedRunTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.text = write_text(pathlib.Path(folder))

  def setUp(self):
    super().setUp()
    self.folder = testing.folder(self)
    self.checks = self.patch(
      replica_check, "check_replicas", wraps=replica_check.check_replicas
    )
    self.patch(distributed, "mesh", lambda sizes: device_mesh.make_mesh(sizes))
    self.patch(cli, "start_jax")

  def patch(self, *args, **kwargs):
    return self.enter_context(mock.patch.object(*args, **kwargs))

  def command(self, *settings):
    run = testing.run(
      f"data.path={self.text}",
      "parallel.layout=replicated",
      "parallel.replica_check_every=2",
      "checkpoint.every=1",
      "checkpoint.keep=9",
      "evaluate.sample_tokens=0",
      *settings,
    )
    return trainer.Trainer(
      run, self.folder / "run", variant="tiny", stop=4, mesh={"data": 2}
    )

  def train(self, make_step=compiled_step, *settings):
    """Four steps on two devices; exit code and what it said."""
    command = self.command(*settings)
    with mock.patch.object(train, "make_step", make_step):
      return self.ended(lambda: command.fit() and None)

  def ended(self, work):
    with (
      contextlib.redirect_stderr(io.StringIO()) as err,
      contextlib.redirect_stdout(io.StringIO()) as out,
      self.assertRaises(SystemExit) as end,
    ):
      cli.run_main(work)
    self.said = out.getvalue()
    return end.exception.code, err.getvalue()

  def left(self):
    """Steps that were saved, and steps that were reported."""
    rows = metrics_writer.read(self.folder / "run" / metrics_writer.METRICS)
    folders = (self.folder / "run" / "checkpoints").iterdir()
    return (
      {int(folder.name) for folder in folders},
      [row["step"] for row in rows if "loss" in row],
    )

  @pytest.mark.slow
  def test_devices_that_agree_go_on(self):
    self.assertEqual(self.train(), (cli.OK, ""))
    self.assertEqual(self.checks.call_count, 2)
    self.assertEqual(self.left(), ({0, 1, 2, 3, 4}, [1, 2, 3, 4]))

  def test_devices_that_disagree_end_the_run_before_it_saves(self):

    def make_step(run, mesh):
      step = compiled_step(run, mesh)

      def and_a_fault(state, batch):
        state, metrics = step(state, batch)
        if int(state.step) == 2:
          other = testing.with_other_copy(
            state.params["head"], device=1, change=lambda a: a * 1.001
          )
          state = state.replace(params=state.params | {"head": other})
        return state, metrics

      return and_a_fault

    code, err = self.train(make_step)
    self.assertEqual(code, cli.INTERNAL)
    self.assertEqual(
      err,
      "error: params/head: the copy of devices 0 (process 0) differs from the"
      " copy of devices 1 (process 0)\n",
    )
    self.assertEqual(self.left(), ({0, 1}, [1, 2]))
    self.assertFalse((self.folder / "run" / workdir.SUMMARY).exists())


class NumbersTest(CheckedRunTest):
  """Steps that go wrong, and steps that are done again."""

  test_devices_that_agree_go_on = None
  test_devices_that_disagree_end_the_run_before_it_saves = None

  def spoiling(self, spoils, **values):
    """A step whose metrics are others where `spoils` says of a batch."""

    def make_step(run, mesh):
      step = compiled_step(self.command().run, mesh)

      def spoiled(state, batch):
        at = int(state.step)
        tokens = np.asarray(batch.tokens)
        state, metrics = step(state, batch)
        return state, metrics | (values if spoils(at, tokens) else {})

      return spoiled

    return make_step

  def rows(self):
    rows = metrics_writer.read(self.folder / "run" / metrics_writer.METRICS)
    return [row for row in rows if "loss" in row]

  def events(self, kind):
    events = event_log.read(self.folder / "run")
    return [event for event in events if event["event"] == kind]

  @pytest.mark.fault(
    "F30",
    "too many bad steps among the last 100",
    "exits 3; no checkpoint of a bad state",
  )
  def test_too_many_bad_steps_end_the_run(self):
    bad = self.spoiling(
      lambda step, _: step >= 1, finite=np.False_, loss=np.float32("nan")
    )
    code, err = self.train(bad, "train.max_bad_steps=1")
    self.assertEqual(code, exit_codes.NOT_FINITE)
    self.assertRegex(
      err, "error: 2 of the last 3 steps up to step 3 were not f"
    )
    self.assertEqual([event["step"] for event in self.events("bad")], [2, 3])
    self.assertLen(self.events("bad")[0]["rows"], 8)
    (end,) = self.events("end")
    self.assertEqual(end["code"], exit_codes.NOT_FINITE)

  @pytest.mark.fault("F31")
  def test_a_jump_is_gone_back_before_and_left_out(self):
    seen = []

    def jumps(step, tokens):
      seen.append(tokens)
      return step == 2 and len(seen) == 3

    self.patch(step_monitor, "ENOUGH", 2)
    code, _ = self.train(
      self.spoiling(jumps, loss=np.float32(1e4)),
      "train.spike_factor=100",
      "train.spike_skip=1",
    )
    self.assertEqual(code, exit_codes.OK)
    self.assertEqual([row["step"] for row in self.rows()], [1, 2, 3, 4])
    self.assertEqual([event["step"] for event in self.events("bad")], [3])
    # From step 2 on again, with the data of what would have been step 5.
    command = self.command()
    data = trainer.read_data(command)
    source = loader.BatchSource(data, command.run, 0)
    mesh = device_mesh.make_mesh(command.mesh)
    planned = global_batches(source, 0, mesh)
    planned = [np.asarray(b.tokens) for b in itertools.islice(planned, 6)]
    fed = [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(seen[-5:], [planned[i] for i in fed])
    store = checkpointer.Checkpointer(
      self.folder / "run" / "checkpoints", command.run.checkpoint
    )
    self.addCleanup(store.close)
    self.assertEqual(store.metadata(4)["rows"], command.run.rows_before(6))

  @pytest.mark.fault("F31")
  def test_jumps_without_end_end_the_run(self):
    self.patch(step_monitor, "ENOUGH", 2)
    code, err = self.train(
      self.spoiling(lambda step, _: step == 2, loss=np.float32(1e4)),
      "train.spike_factor=100",
      "train.spike_skip=1",
    )
    self.assertEqual(code, exit_codes.NOT_FINITE)
    self.assertRegex(err, "jumped: .*other data after step 2 did not help 3")
    self.assertEqual([event["step"] for event in self.events("bad")], [3] * 4)

  def test_a_damaged_average_is_a_damaged_checkpoint(self):
    average = "optim.ema_decay=0.9"
    self.assertEqual(self.train(compiled_step, average)[0], exit_codes.OK)
    folder = self.folder / "run" / "checkpoints" / "4"
    saved = manifest.read(folder)
    saved.arrays["average/params/head"]["digest"] = "0" * 16
    testing.reseal(folder, arrays=saved.arrays)
    self.assertEqual(self.train(compiled_step, average)[0], exit_codes.OK)
    starts = [event["step"] for event in self.events("start")]
    self.assertEqual(starts, [0, 3])
    self.assertTrue(folder.with_suffix(checkpointer.CORRUPT).exists())

  def test_a_setting_newer_than_a_checkpoint_was_its_default(self):
    self.assertEqual(self.train()[0], exit_codes.OK)
    folder = self.folder / "run" / "checkpoints" / "4"
    facts = manifest.read(folder).metadata
    del facts["model"]["norm_eps"]  # which this run leaves alone
    testing.reseal(folder, facts=facts)
    self.assertEqual(self.train()[0], exit_codes.OK)
    del facts["model"]["init_std"]  # which it does not
    testing.reseal(folder, facts=facts)
    code, err = self.train()
    self.assertEqual(code, exit_codes.BAD_INPUT)
    self.assertRegex(err, r"model is not .*\n.*   init_std: 0.006 -> 0.1\n$")
    starts = [event["step"] for event in self.events("start")]
    self.assertEqual(starts, [0, 4])

  def replay(self, step):
    self.patch(train, "make_step", compiled_step)
    work = functools.partial(replay_lib.replay, self.command(), step)
    return self.ended(work)

  @pytest.mark.fault(
    "F28",
    "a logged step is replayed",
    "bitwise identical, or the differences are named",
  )
  def test_a_step_done_again_is_the_same(self):
    self.train()
    before = sorted(self.folder.rglob("*"))
    self.assertEqual(self.replay(3), (exit_codes.OK, ""))
    self.assertRegex(self.said, "steps 3 to 3 replayed .*: all .* bitwise")
    self.assertEqual(sorted(self.folder.rglob("*")), before)

  @pytest.mark.fault("F28")
  def test_what_differs_is_named(self):
    self.train()
    path = self.folder / "run" / metrics_writer.METRICS
    lines = path.read_text().splitlines(keepends=True)
    row = self.rows()[2]
    changed = float(np.nextafter(np.float32(row["loss"]), np.float32(9)))
    lines = [
      line.replace(f'"loss": {row["loss"]}', f'"loss": {changed}')
      for line in lines
    ]
    path.write_text("".join(lines))
    code, err = self.replay(3)
    self.assertEqual(code, exit_codes.INTERNAL)
    self.assertIn(f"error: step 3: loss was {changed}, is {row['loss']}\n", err)

  @pytest.mark.fault("F28")
  def test_a_step_that_cannot_be_done_again(self):
    self.train()
    code, err = self.replay(5)
    self.assertEqual(code, exit_codes.BAD_INPUT)
    self.assertIn("--replay_step=5: steps 1 to 4 are logged", err)
    shutil.rmtree(self.folder / "run" / "checkpoints" / "0")
    code, err = self.replay(1)
    self.assertEqual(code, exit_codes.NO_CHECKPOINT)
    self.assertIn("no checkpoint from before step 1", err)


# Each is saved and restored on the next: one device, more, fewer experts a
# device and back, and every change of layout.
WAY = (
  ({"data": 1}, "replicated"),
  ({"data": 2}, "zero1"),
  ({"data": 4}, "fsdp"),
  ({"expert": 4}, "zero1"),
  ({"expert": 2}, "replicated"),
  ({"data": 2, "expert": 2}, "fsdp"),
  ({"data": 1}, "replicated"),
)
PAIRS = tuple(itertools.pairwise(WAY))


def middle_state(run):
  """A state in which nothing is as it was at first."""
  state = testing.state(run)
  rng = np.random.default_rng(1)

  def leaf(a):
    if not jnp.issubdtype(a.dtype, jnp.floating):
      return a
    return jnp.asarray(1e-3 * rng.random(a.shape), a.dtype)

  return state.replace(
    opt_state=jax.tree.map(leaf, state.opt_state),
    router_bias=leaf(state.router_bias),
    step=jnp.int32(3),
    skipped=jnp.int32(1),
    key=jax.random.key(9),
  )


@functools.cache
def compiled_loss(run, mesh):
  loss = lambda *args: train.gradients(*args, run, mesh).losses.total
  return jax.jit(loss)


class RelayoutTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    folder = pathlib.Path(folder)
    run = testing.run(f"data.path={write_text(folder)}")
    cls.run_ = run
    cls.data = prepare.prepare(run.data, run.model.vocab_size, folder / "data")
    cls.state = middle_state(run)

  def at(self, sizes, layout):
    run = config.override(self.run_, f"parallel.layout={layout}")
    return run, device_mesh.make_mesh(sizes)

  def next_of(self, state, run, mesh):
    """The batch that comes next and its loss."""
    source = loader.BatchSource(self.data, run, 5)
    batch = next(global_batches(source, int(state.step), mesh))
    return jax.device_get((batch, compiled_loss(run, mesh)(state, batch)))

  def rows_of(self, first, stop, *settings):
    """First tokens of the rows of steps, in order, and the steps' sizes."""
    run = config.override(self.run_, *settings)
    mesh = device_mesh.make_mesh({"data": 2})
    source = loader.BatchSource(self.data, run, 5)
    read = global_batches(source, first, mesh)
    tokens, sizes = [], []
    for batch in itertools.islice(read, stop - first):
      rows = np.asarray(batch.tokens)
      tokens += rows.reshape(-1, rows.shape[-1]).tolist()
      sizes.append(rows.shape[0] * rows.shape[1])
    return tokens, sizes

  @pytest.mark.fault(
    "F25",
    "batch size, split and number of processes change on the way",
    "every row once, in order",
  )
  def test_rows_do_not_depend_on_batch_sizes_splits_or_restarts(self):
    plain, sizes = self.rows_of(0, 8)
    self.assertEqual(sizes, [8] * 8)
    ramp = "train.first_batch_size=4", "schedule.ramp_until=0.03"
    for settings in (
      ("train.micro_batches=4",),
      ("train.micro_batches=2", *ramp, "train.ramp_sizes=1"),
      ("train.micro_batches=4", *ramp, "train.ramp_sizes=2"),
    ):
      found, sizes = self.rows_of(0, 8, *settings)
      self.assertEqual(found, plain[: len(found)])
      self.assertEqual(len(set(sizes)) > 1, len(settings) > 1)
      later, _ = self.rows_of(3, 8, *settings)
      self.assertEqual(later, found[sum(sizes[:3]) :])

  @parameterized.parameters(*PAIRS[:1])
  @pytest.mark.fault(
    "F24",
    "resumed with other devices, layouts, processes",
    "same state and batch, loss within 1e-6",
  )
  def test_a_save_goes_on_in_another_layout(self, before, after):
    self.check_goes_on(before, after)

  @parameterized.parameters(*PAIRS[1:])
  @pytest.mark.slow
  @pytest.mark.fault("F24")
  def test_and_in_every_other_one(self, before, after):
    self.check_goes_on(before, after)

  def check_goes_on(self, before, after):
    checkpoints = checkpointer.Checkpointer(
      testing.folder(self) / "checkpoints", config.Checkpoint()
    )
    self.addCleanup(checkpoints.close)
    run, mesh = self.at(*before)
    state = jax.device_put(self.state, train.shardings(run, mesh))
    checkpoints.save(state, {})
    checkpoints.wait()
    batch, loss = self.next_of(state, run, mesh)

    run, mesh = self.at(*after)
    like = train.abstract_state(run, mesh)
    restored = checkpoints.restore(3, like)
    types = lambda tree: jax.tree.map(lambda a: (a.dtype, a.sharding), tree)
    self.assertEqual(types(restored), types(like))
    testing.assert_same(testing.host(restored), testing.host(self.state))
    next_batch, next_loss = self.next_of(restored, run, mesh)
    testing.assert_same(next_batch, batch)
    np.testing.assert_allclose(next_loss, loss, rtol=1e-6)


if __name__ == "__main__":
  absltest.main()

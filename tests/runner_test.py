"""Tests of a run in a workdir: devices that disagree, a change of layout."""

import contextlib
import functools
import io
import itertools
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import testing
from absl.testing import absltest
from absl.testing import parameterized

from dsv3_jax import checkpoint
from dsv3_jax import config
from dsv3_jax import train
from dsv3_jax.data import stream
from dsv3_jax.parallel import replicas
from dsv3_jax.parallel import topology
from experiments import cluster
from experiments import common
from experiments import feed
from experiments import logbook
from experiments import runner
from experiments import workdir

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
    self.checks = self.patch(replicas, "check", wraps=replicas.check)
    self.patch(cluster, "mesh", lambda sizes: topology.mesh(sizes))
    self.patch(common, "start_jax")

  def patch(self, *args, **kwargs):
    return self.enter_context(mock.patch.object(*args, **kwargs))

  def train(self, make_step=compiled_step):
    """Four steps on two devices; exit code and what it said."""
    run = testing.run(
        f"data.path={self.text}",
        "parallel.layout=replicated",
        "parallel.check_every=2",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "evaluate.sample_tokens=0",
    )
    command = common.Command(
        "tiny",
        run,
        self.folder / "run",
        seed=0,
        stop=4,
        mesh={"data": 2},
        processes=cluster.Processes(),
    )
    self.patch(train, "make_step", make_step)
    with (
        contextlib.redirect_stderr(io.StringIO()) as err,
        self.assertRaises(SystemExit) as end,
    ):
      common.run_main(functools.partial(runner.execute, command))
    return end.exception.code, err.getvalue()

  def left(self):
    """Steps that were saved, and steps that were reported."""
    rows = logbook.read(self.folder / "run" / logbook.METRICS)
    folders = (self.folder / "run" / "checkpoints").iterdir()
    return (
        {int(folder.name) for folder in folders},
        [row["step"] for row in rows if "loss" in row],
    )

  def test_devices_that_agree_go_on(self):
    self.assertEqual(self.train(), (common.OK, ""))
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
    self.assertEqual(code, common.INTERNAL)
    self.assertEqual(
        err,
        "error: params/head: the copy of devices 0 (process 0) differs from the"
        " copy of devices 1 (process 0)\n",
    )
    self.assertEqual(self.left(), ({0, 1}, [1, 2]))
    self.assertFalse((self.folder / "run" / workdir.SUMMARY).exists())


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
  loss = lambda *args: train.gradients(*args, run, mesh)[1].total
  return jax.jit(loss)


class RelayoutTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    folder = pathlib.Path(folder)
    run = testing.run(f"data.path={write_text(folder)}")
    cls.run_ = run
    cls.data = stream.prepare(run.data, run.model.vocab_size, folder / "data")
    cls.state = middle_state(run)

  def at(self, sizes, layout):
    run = config.override(self.run_, f"parallel.layout={layout}")
    return run, topology.mesh(sizes)

  def next_of(self, state, run, mesh):
    """The batch that comes next and its loss."""
    batches = feed.Feed(self.data, run, 5).batches(int(state.step), mesh)
    batch = next(batches)
    return jax.device_get((batch, compiled_loss(run, mesh)(state, batch)))

  def rows_of(self, first, stop, *settings):
    """First tokens of the rows of steps, in order, and the steps' sizes."""
    run = config.override(self.run_, *settings)
    mesh = topology.mesh({"data": 2})
    read = feed.Feed(self.data, run, 5).batches(first, mesh)
    tokens, sizes = [], []
    for batch in itertools.islice(read, stop - first):
      rows = np.asarray(batch.tokens)
      tokens += rows.reshape(-1, rows.shape[-1]).tolist()
      sizes.append(rows.shape[0] * rows.shape[1])
    return tokens, sizes

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

  @parameterized.parameters(*itertools.pairwise(WAY))
  def test_a_save_goes_on_in_another_layout(self, before, after):
    checkpoints = checkpoint.Checkpoints(
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

"""Tests of what the ranks of a pipeline really do, and when."""

import collections

import testing
from absl.testing import absltest, parameterized

from dsv3_jax.parallel import device_mesh
from dsv3_jax.parallel.pipeline import schedules
from experiments import cli
from scripts.bench import pipeline

LAYERS_OF_STAGE = 2


def due(schedule, rank, cell):
  """Returns (kind, layer, micro-batch) of the operations of a cell."""
  found = {}
  for op in cell:
    stage = schedule.stages[rank][op.direction]
    first = stage * LAYERS_OF_STAGE
    layers = range(first, first + LAYERS_OF_STAGE)
    stream = schedule.streams[op.direction] * schedule.n_per_stream
    for kind in {"B": "IW"}.get(op.kind, op.kind):
      order = reversed(layers) if kind == "I" else layers
      found[kind] = [(kind, i, stream + op.micro_batch) for i in order]
  return found


class OrderTest(parameterized.TestCase):
  @parameterized.parameters(
    ("1f1b", 2), ("zb1p", 3), ("dualpipe", 2), ("dualpipev", 2)
  )
  def test_every_rank_does_what_the_schedule_says(self, name, n_ranks):
    schedule = schedules.SCHEDULES[name](n_ranks, 4)
    n_layers = LAYERS_OF_STAGE * schedule.n_stages
    run = pipeline.make_run(name, n_layers, 4)
    sleeper = pipeline.Sleeper(n_ranks, 1e-4)
    mesh = device_mesh.make_mesh({"pipe": n_ranks})
    pipeline.executor(run, mesh, sleeper)()
    done = collections.defaultdict(collections.deque)
    for rank, *event in sleeper.events:
      done[rank].append(tuple(event))
    for rank, cells in enumerate(schedule.cells):
      for turn, cell in enumerate(cells):
        expected = due(schedule, rank, cell)
        n = sum(map(len, expected.values()))
        here = [done[rank].popleft() for _ in range(n)]
        # The layers of a pair are mixed; those of each of the two are in order.
        for kind, events in expected.items():
          found = [event for event in here if event[0] == kind]
          self.assertEqual(found, events, (rank, turn, cell))
      self.assertEmpty(done[rank])


class CommandTest(absltest.TestCase):
  def test_refuses_what_no_schedule_can_do(self):
    code, _, err = testing.command_line(
      pipeline.main, "--ranks=3", "--microbatches=5", "stray"
    )
    self.assertEqual(code, cli.BAD_INPUT)
    self.assertRegex(err, "(?s)stray.*3 ranks.*5 micro")

  def test_a_wrong_flag_is_bad_input(self):
    code, _, err = testing.command_line(pipeline.main, "--ranks=x")
    self.assertEqual(code, cli.BAD_INPUT)
    self.assertIn("--ranks=x: expected a whole number", err)


if __name__ == "__main__":
  absltest.main()

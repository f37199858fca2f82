"""Rounds in which the workers of `scripts.bench` take turns."""

from typing import Any

from dsv3_jax.trainer.terminal import Terminal
from scripts.bench import worker as worker_lib

ROUND_S = 4.0  # about as long is a round; it is of whole steps
Results = dict[str, dict[str, Any]]  # answers of workers by their name


def take_turns(
  workers: dict[str, worker_lib.Worker],
  jobs: dict[str, dict[str, Any]],
  n_rounds: int,
  lines: Terminal,
  round_s: float | None = None,
) -> Results:
  """Sends each worker its job, one after the other, then lets them take turns.

  Returns each worker's answer to the job, with "rounds": its answers to
  the rounds, each with the "steps" that the round had, in about `round_s` or
  `ROUND_S` seconds.
  """
  round_s = round_s or ROUND_S
  results = {}
  for name, worker in workers.items():
    with lines.waiting(f"{name}: starting and compiling"):
      answer = worker_lib.ask(worker, jobs[name])
    results[name] = answer | {"rounds": []}
    lines.print(
      f"{name}: compiled in {answer['compile_s']:.1f} s, a step takes"
      f" {answer['step_s']:.3g} s"
    )
  for i in range(n_rounds):
    for name, worker in workers.items():
      steps = max(1, round(round_s / results[name]["step_s"]))
      with lines.waiting(f"{name}: round {i + 1}/{n_rounds}, {steps} steps"):
        answer = worker_lib.ask(worker, {"steps": steps})
      results[name]["rounds"].append(answer | {"steps": steps})
  return results

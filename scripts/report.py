"""Writes the report of a run: report.html, one file that needs nothing else.

  python -m scripts.report --workdir=runs/demo

The report shows metrics.jsonl, config.json, env.json and summary.json, and
lists what is missing. A run that is still training has a report too. The
pictures are also written to the folder report/.
"""

import dataclasses
from collections.abc import Iterator

from dsv3_jax.report import page
from experiments import cli
from experiments.flag_parser import flag


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  workdir: str = flag("", "folder of a training run")

  def validate(self) -> Iterator[str]:
    """Yields what is wrong with the flags."""
    if not self.workdir:
      yield "--workdir is missing: the folder of a training run"


def execute(args: Args) -> None:
  """Writes the report and prints its path."""
  print(page.write(args.workdir))


def main() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)


if __name__ == "__main__":
  main()

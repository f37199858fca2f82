"""Writes the report of a run: report.html, one file that needs nothing else.

  python -m scripts.report --workdir=runs/demo

The report shows metrics.jsonl, config.json, env.json and summary.json, and
lists what is missing. A run that is still training has a report too. The
pictures are also written to the folder report/.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator

from dsv3_jax.report import page
from experiments import cli, flag_parser


@dataclasses.dataclass(frozen=True)
class Args:
  workdir: str = flag_parser.flag("", "folder of a training run")

  def validate(self) -> Iterator[str]:
    if not self.workdir:
      yield "--workdir is missing: the folder of a training run"


def main() -> None:
  """Writes the report and prints its path."""
  print(page.write(flag_parser.parse(Args, sys.argv).workdir))


if __name__ == "__main__":
  cli.run_main(main, functools.partial(flag_parser.help_text, Args))

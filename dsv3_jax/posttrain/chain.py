"""The chain of post-training (section 5.1): its commands and its scores.

For each domain, a task, an expert is fine-tuned and trained with GRPO. Answers
of the experts that are right make the two types of samples, on which one
student is fine-tuned; then it is trained with GRPO on all tasks. All of these
models answer the same held-out problems greedily.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_jax import config, io
from dsv3_jax.config import presets
from dsv3_jax.data import conversation_corpus, conversations, tasks
from dsv3_jax.errors import InputError
from dsv3_jax.evals import answers
from dsv3_jax.interop import open_run
from dsv3_jax.posttrain import sample_types
from dsv3_jax.trainer import metrics_writer

KINDS = "sft", "grpo"  # of training
_NUMBERS = "max_decimals=0:min_value=0:max_value=9:prompt=short"
# A domain each: of two digits and up to three numbers, or, to try the chain, of
# one digit and two numbers.
TASKS = (
  "chain_sum:max_terms=2:min_digits=2:max_digits=2:prompt=short:n=30000,"
  f"number_sorting:min_numbers=2:max_numbers=3:{_NUMBERS}:n=6000,"
  f"number_filtering:min_numbers=2:max_numbers=3:{_NUMBERS}:n=6000"
)
QUICK_TASKS = (
  "chain_sum:max_terms=2:min_digits=1:max_digits=1:prompt=short,"
  f"number_sorting:min_numbers=2:max_numbers=2:{_NUMBERS},"
  f"number_filtering:min_numbers=2:max_numbers=2:{_NUMBERS}"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Variants of fine-tuning and of GRPO, and sizes of the stages."""

  sft: str
  grpo: str
  system: str = sample_types.SYSTEM  # prompt of the second type of samples
  epochs: float = 2  # of the problems of an expert's fine-tuning
  student_epochs: float = 1  # of the samples, of both types
  iterations: int = 40  # of GRPO, in each of its stages
  questions: int | None = None  # of a domain; None: as many as are trained on
  answers: int = 2  # to a question that an expert is asked
  settings: tuple[str, ...] = ()  # of fine-tuning


RECIPES = {
  # A prompt of few tokens: half of the student's samples have it.
  "tiny": Recipe("sft_tiny", "grpo_tiny", "Reflect and verify."),
  "report": Recipe("sft", "grpo", iterations=1000),
}


def quick(recipe: Recipe) -> Recipe:
  """Returns a recipe of few problems and steps, to see that all works."""
  return dataclasses.replace(
    recipe,
    iterations=5,
    questions=300,
    answers=4,
    settings=(
      *("data.problems=1500", "data.heldout_fraction=0.02"),
      *("train.tokens=61_440", "evaluate.answers=20"),
    ),
  )


@dataclasses.dataclass(frozen=True)
class Stage:
  """A command of the chain, and what it makes."""

  name: str  # path of `out` in the workdir, without its suffix
  command: tuple[str, ...]  # after the name of Python's program
  out: pathlib.Path  # folder or file
  asked: tuple[str, ...] = ()  # tasks that it answers, to be scored
  before: Callable[[], None] | None = None  # called each time it begins


@dataclasses.dataclass(frozen=True)
class Chain:
  """Arguments of the chain."""

  workdir: pathlib.Path
  init_from: str  # run that the experts and the student begin with
  tasks: str  # a domain each
  recipe: Recipe
  seed: int = 0
  set_sft: tuple[str, ...] = ()  # settings, more than those of the recipe
  set_grpo: tuple[str, ...] = ()
  quick: bool = False

  @functools.cached_property
  def named(self) -> list[tasks.Task]:
    """The tasks; raises InputError, see `tasks.parse`."""
    return tasks.parse(self.tasks)

  @functools.cached_property
  def _parts(self) -> dict[str, str]:
    """The text of each task by its name."""
    texts = (part.strip() for part in self.tasks.split(","))
    return {text.partition(":")[0]: text for text in texts}

  def _settings(self, kind: str, base: config.Run) -> tuple[str, ...]:
    """Returns settings on top of a variant's, of a run that begins with base.

    The problems held out are those of fine-tuning.
    """
    if kind == "sft":
      return (*self.recipe.settings, *self.set_sft)
    share = f"data.heldout_fraction={base.data.heldout_fraction:g}"
    return (share, *self.set_grpo)

  def _base(self) -> config.Run:
    """Returns the run of --init_from; raises InputError if there is none."""
    folder = pathlib.Path(self.init_from)
    return open_run.run_from_config(open_run.read_config(folder))

  def _run(self, kind: str, base: config.Run) -> config.Run:
    """Returns the run of sft or grpo that begins with the model of another."""
    variants = {"sft": presets.SFT, "grpo": presets.GRPO}[kind]
    variant = variants[getattr(self.recipe, kind)]
    return config.override(base, *variant, *self._settings(kind, base))

  @functools.cached_property
  def runs(self) -> dict[str, config.Run]:
    """Settings of the runs by kind, sft and grpo, but for their tasks.

    Raises InputError if --init_from is no run, or a setting is wrong.
    """
    sft = self._run("sft", self._base())
    return {"sft": sft, "grpo": self._run("grpo", sft)}

  def validate(self) -> list[str]:
    """Lists what is wrong with tasks, settings and --init_from."""
    problems, base = (
      _problems("", lambda: tasks.parse(self.tasks)),
      presets.TINY,
    )
    if self.init_from:
      wrong = _problems("--init_from: ", self._base)
      problems += wrong
      base = base if wrong else self._base()
    for kind in KINDS:
      run = functools.partial(self._run, kind, base)
      if not (wrong := _problems(f"--set_{kind}: ", run)):
        base = run()
      problems += wrong
    return problems or _problems("", self._check_heldout)

  def _check_heldout(self) -> None:
    parts = [
      (run.data.problems, run.data.heldout_fraction)
      for run in self.runs.values()
    ]
    if parts[0] != parts[1]:
      raise InputError(
        "--set_grpo: data.problems and data.heldout_fraction are"
        f" {parts[1]}, must be {parts[0]}, as in fine-tuning: all models are"
        " asked the same held-out problems; use --set_sft for both"
      )
    self.heldout()

  def heldout(self) -> list[tasks.Problem]:
    """Returns the held-out problems, which all runs leave out of training.

    Raises InputError if a task has no others.
    """
    data = dataclasses.replace(self.runs["sft"].data, path=self.tasks)
    return conversation_corpus.split_tasks(data).heldout

  def stages(self) -> list[Stage]:
    """Returns all stages, in order."""
    experts = [self._expert(name) for name in self._parts]
    samples = self.workdir / "samples"
    student = dataclasses.replace(
      self._sft("student", str(samples), self.recipe.student_epochs),
      before=self.write_samples,
    )
    final = self._grpo("final", "student", self.tasks)
    return [
      *(stage for expert in experts for stage in expert),
      *self._asked(student, *self._parts),
      *self._asked(final, *self._parts),
    ]

  def _expert(self, name: str) -> list[Stage]:
    text, first = self._parts[name], f"expert_{name}_sft"
    sft = self._sft(first, text, self.recipe.epochs)
    grpo = self._grpo(f"expert_{name}_rl", first, text)
    trained_on = {task.name: task.n for task in self.named}[name]
    n = self.recipe.questions or trained_on or self.runs["sft"].data.problems
    asked = [part for part in text.split(":") if not part.startswith("n=")]
    out = self.workdir / "samples" / f"{name}.jsonl"
    command = self._sample(
      grpo.out,
      f"--reject={':'.join(asked)}:n={n}",
      f"--exclude={self.workdir / 'samples' / 'heldout.jsonl'}",
      f"--answers={self.recipe.answers}",
      "--rewards=exact=1",
      f"--system_prompt={self.recipe.system}",
      *("--temperature=1", "--top_p=1", f"--seed={self.seed}"),
      f"--out={out}",
    )
    # Rejection sampling writes to no file that is there.
    remove = functools.partial(out.unlink, missing_ok=True)
    samples = Stage(f"samples/{name}", command, out, before=remove)
    return [*self._asked(sft, name), *self._asked(grpo, name), samples]

  def _train(self, kind: str, name: str, *more: str) -> Stage:
    out, variant = self.workdir / name, getattr(self.recipe, kind)
    command = (
      *("-m", f"experiments.{kind}", f"--workdir={out}"),
      *(f"--variant={variant}", f"--seed={self.seed}", *more),
      *(
        f"--set={setting}" for setting in self._settings(kind, self.runs["sft"])
      ),
    )
    return Stage(name, command, out)

  def _sft(self, name: str, data: str, epochs: float) -> Stage:
    source = f"--init_from={self.init_from}", f"--data={data}"
    return self._train("sft", name, *source, f"--epochs={epochs:g}")

  def _grpo(self, name: str, source: str, text: str) -> Stage:
    return self._train(
      "grpo",
      name,
      f"--init_from={self.workdir / source}",
      f"--tasks={text}",
      f"--iterations={self.recipe.iterations}",
      *["--quick"] * self.quick,
    )

  def _sample(self, folder: pathlib.Path, *more: str) -> tuple[str, ...]:
    run = self.runs["grpo"]
    return (
      *("-m", "experiments.sample", f"--workdir={folder}", *more),
      f"--max_tokens={run.grpo.answer_tokens}",
      f"--max_len={run.data.seq_len + 1}",
      f"--max_batch={run.grpo.slots}",
    )

  def _asked(self, trained: Stage, *names: str) -> list[Stage]:
    """Returns a stage of training, and that of its model's answers."""
    name = f"answers/{trained.name}"
    out = self.workdir / f"{name}.jsonl"
    command = self._sample(
      trained.out,
      f"--prompts={self._questions(names)}",
      f"--out={out}",
      "--temperature=0",
    )
    return [trained, Stage(name, command, out, names)]

  def _questions(self, names: Sequence[str]) -> pathlib.Path:
    name = names[0] if len(names) == 1 else "all"
    return self.workdir / "answers" / f"{name}.questions.jsonl"

  def write_questions(self) -> None:
    """Writes the held-out problems, as conversations and as prompts."""
    problems = self.heldout()
    for folder in ("answers", "samples"):
      (self.workdir / folder).mkdir(exist_ok=True)
    rows = tasks.rows(problems)
    conversations.write(self.workdir / "samples" / "heldout.jsonl", rows)
    for names in (*((name,) for name in self._parts), tuple(self._parts)):
      lines = [
        json.dumps({"messages": row["messages"][:1]})
        for row in rows
        if row["task"] in names
      ]
      io.write_text(self._questions(names), "\n".join(lines) + "\n")

  def write_samples(self) -> None:
    """Writes the student's samples, those of all experts.

    Raises ValueError if a held-out question is among them.
    """
    folder = self.workdir / "samples"
    rows = [
      row
      for name in self._parts
      for row in io.read_jsonl(folder / f"{name}.jsonl")
    ]
    asked = {problem.prompt for problem in self.heldout()}
    if any(row["messages"][-2]["content"] in asked for row in rows):
      raise ValueError(f"{folder}: a held-out question is among the samples")
    conversations.write(folder / "train.jsonl", rows)

  def scores(self, stage: Stage) -> list[dict[str, Any]]:
    """Returns the scores of a stage's answers, a row for each task.

    Raises InputError if answers are missing.
    """
    problems = [one for one in self.heldout() if one.task in stage.asked]
    rows = sorted(io.read_jsonl(stage.out), key=lambda row: row["index"])
    if wrong := [row["error"] for row in rows if "error" in row]:
      raise InputError(f"{stage.out}: {wrong[0]}")
    texts = [row["text"] if row["ended"] == "stop" else None for row in rows]
    values = answers.score_tasks(self.named, problems, texts)
    trained = self.workdir / pathlib.Path(stage.name).name
    steps = metrics_writer.read(trained / metrics_writer.METRICS)
    return [
      {
        "stage": trained.name,
        "task": name,
        "strict": values[f"heldout_exact_match/{name}"],
        "lenient": values[f"heldout_lenient/{name}"],
        "problems": sum(one.task == name for one in problems),
        "tokens": max(row.get("tokens", 0) for row in steps),
      }
      for name in stage.asked
    ]

  def results(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns strict accuracy by model and task, all rows, and the samples."""

    def strict(*stages: str) -> dict[str, float]:
      return {r["task"]: r["strict"] for r in rows if r["stage"] in stages}

    return {
      "experts": strict(*(f"expert_{name}_rl" for name in self._parts)),
      "student": strict("student"),
      "final": strict("final"),
      "rows": list(rows),
      "samples": {
        name: io.read_json_object(
          self.workdir / "samples" / f"{name}.counts.json"
        )
        for name in self._parts
      },
    }


def _problems(flag: str, work: Callable[[], object]) -> list[str]:
  """Returns the lines of the InputError that work raises, after a flag."""
  try:
    work()
  except InputError as error:
    return [flag + line for line in str(error).splitlines()]
  return []

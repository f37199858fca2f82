"""A training run: model, data, optimizer, schedules, precision, layout."""

import dataclasses
import functools
import math
from collections.abc import Iterator

from dsv3_jax.config import fields
from dsv3_jax.config.data import PREFERENCES, Data
from dsv3_jax.config.fields import choice, number, plain
from dsv3_jax.config.grpo import Grpo
from dsv3_jax.config.model import Model


@fields.checked
class Optim:
  """AdamW and clipping (section 4.2)."""

  # A key of optim.OPTIMIZERS.
  name: str = plain("adamw", "optimizer")
  peak_lr: float = number(
    2.2e-4, above=0, doc="learning rate after the warm-up, the highest"
  )
  min_lr: float = number(2.2e-5, low=0, doc="learning rate after the decay")
  final_lr: float = number(7.3e-6, low=0, doc="learning rate of the tail")
  # At 1, Adam's correction of the moments' bias would divide by 0.
  beta1: float = number(0.9, low=0, below=1, doc="decay of Adam's first moment")
  beta2: float = number(
    0.95, low=0, below=1, doc="decay of Adam's second moment"
  )
  eps: float = number(1e-8, above=0, doc="epsilon of Adam")
  weight_decay: float = number(
    0.1, low=0, doc="decoupled weight decay; not of norms"
  )
  clip_norm: float = number(1.0, above=0, doc="largest norm of the gradient")
  moments: str = choice("float32", "bfloat16", doc="type of Adam's moments")
  ema_decay: float = number(
    0.0,
    low=0,
    high=1,
    doc="decay of the parameters' average, in host memory; 0: no average",
  )


@fields.checked
class Schedule:
  """Times of changes, as fractions of the token budget (section 4.2).

  The defaults are the paper's 10T, 14.3T and 14.633T of 14.8T tokens.
  """

  # A key of optim.SCHEDULES.
  name: str = plain("constant_cosine", "shape of the learning rate")
  warmup_until: float = number(
    2000 * 3072 * 4096 / 14.8e12,  # 2000 steps of 3072 sequences
    low=0,
    high=1,
    doc="end of the warm-up, a share of train.tokens, as all times here",
  )
  constant_until: float = number(
    10 / 14.8, low=0, high=1, doc="end of optim.peak_lr"
  )
  decay_until: float = number(
    14.3 / 14.8, low=0, high=1, doc="when optim.min_lr is reached"
  )
  tail_from: float = number(
    14.633 / 14.8, low=0, high=1, doc="when optim.final_lr begins"
  )
  ramp_until: float = number(
    0.0, low=0, high=1, doc="end of the growth of the batch; 0: no growth"
  )
  bias_update_until: float = number(
    14.3 / 14.8, low=0, high=1, doc="when router.bias_speed becomes 0"
  )
  mtp_until: float = number(
    10 / 14.8, low=0, high=1, doc="when mtp.late_weight replaces mtp.weight"
  )

  def validate(self) -> Iterator[str]:
    times = self.constant_until, self.decay_until, self.tail_from
    if list(times) != sorted(times):
      must = "constant_until, decay_until, tail_from must not fall"
      yield f"Schedule: {must}, got {', '.join(f'{time:g}' for time in times)}"


# Activations that a layer can save for its backward pass (`model/remat.py`).
ACTIVATIONS = (
  "norm",  # outputs of RMSNorms
  "latents",  # outputs of the down-projections of attention
  "up",  # queries, keys and values
  "attention",  # output of attention, and the log-sum-exp of its scores
  "residual",  # residual stream between attention and feed-forward
  "routing",  # affinities, and the experts chosen
  "sent",  # tokens received from other devices for local experts
  "hidden",  # gate and up projections of a feed-forward
)


@fields.checked
class Train:
  """Token budget, batch size and memory of a training step."""

  tokens: int = number(low=1, doc="token budget; schedules are shares of it")
  batch_size: int = number(low=1, doc="sequences of an optimizer step")
  micro_batches: int = number(
    1, low=1, doc="parts of the batch, one after the other; saves memory"
  )
  first_batch_size: int = number(
    0, low=0, doc="with schedule.ramp_until, the batch size of the first step"
  )
  ramp_sizes: int = number(
    4, low=1, high=10_000, doc="number of batch sizes before batch_size"
  )
  remat: str = choice(
    "none",
    "selective",
    "block",
    doc="recomputed in the backward pass: nothing, what is not saved, all",
  )
  saved_activations: str = plain(
    "latents,attention,residual,routing,sent,hidden",
    f"saved with remat=selective, of {', '.join(ACTIVATIONS)}",
  )
  scan_layers: bool = plain(
    True, "loop over layers; false: faster on CPU, compiles longer"
  )
  max_bad_steps: int = number(
    8, low=0, doc="non-finite steps of 100 to allow; more end the run (exit 3)"
  )
  spike_factor: float = number(
    0.0,
    low=0,
    doc="loss or gradient norm of a spike, over the median of 100; 0: off",
  )
  spike_skip: int = number(
    0,
    low=0,
    doc="steps of data to skip after a spike, from the newest checkpoint",
  )

  def validate(self) -> Iterator[str]:
    batch = f"batch_size={self.batch_size}"
    first = f"Train.first_batch_size={self.first_batch_size}"
    for name in self._saved_names - set(ACTIVATIONS):
      yield (
        f"Train.saved_activations={self.saved_activations!r}: {name!r} is none"
        f" of {', '.join(ACTIVATIONS)}{fields.nearest(name, ACTIVATIONS)}"
      )
    if self.batch_size % self.micro_batches:
      yield f"Train.micro_batches={self.micro_batches}: must divide {batch}"
    elif self.first_batch_size % (n := self.micro_batch_size):
      yield f"{first}: must be a multiple of the {n} sequences of a micro-batch"
    if self.spike_skip and not self.spike_factor > 1:
      needs = f"needs a spike_factor above 1, got {self.spike_factor:g}"
      yield f"Train.spike_skip={self.spike_skip}: {needs}"
    if self.first_batch_size > self.batch_size:
      yield f"{first}: must be at most {batch}"

  @property
  def _saved_names(self) -> set[str]:
    names = map(str.strip, self.saved_activations.split(","))
    return set(filter(None, names))

  @property
  def activations(self) -> tuple[str, ...] | None:
    """Names of activations that layers save; None: all of them."""
    names = tuple(sorted(self._saved_names))
    return {"none": None, "selective": names, "block": ()}[self.remat]

  @property
  def micro_batch_size(self) -> int:
    return self.batch_size // self.micro_batches


@fields.checked
class Precision:
  """Precision of the forward and backward pass; master weights are float32.

  With `recipe=fp8`, activations are bfloat16 and linear layers multiply in FP8
  (section 3.3); the other settings apply to that recipe.
  """

  recipe: str = choice(
    "fp32", "bf16", "fp8", doc="type of activations and products"
  )
  fp8: str = plain("*mla/*,*ffn/*", "patterns of the paths of FP8 weights")
  tile: int = number(128, low=8, doc="N_c, numbers that share an FP8 scale")
  scales: str = choice("float32", "power_of_two", doc="FP8 scales of tiles")
  gradient_tiles: str = choice(
    "rows", "blocks", doc="tiles of FP8 gradients; blocks diverge (app. B.2)"
  )
  backend: str = choice(
    "auto", "exact", "dequantized", "kernel", doc="how FP8 tiles are multiplied"
  )
  counters: bool = plain(
    False, "log FP8 saturation, underflow and tiles of zeros"
  )

  @property
  def patterns(self) -> tuple[str, ...]:
    return tuple(text.strip() for text in self.fp8.split(",") if text.strip())


@fields.checked
class Parallel:
  """Division of a step over a mesh; it never changes what is computed."""

  layout: str = choice(
    "zero1",
    "fsdp",
    "replicated",
    doc="divided over data: moments, parameters too, or nothing",
  )
  dispatch: str = choice(
    "auto",
    "allgather",
    "all_to_all",
    "hierarchical_all_to_all",
    "ragged_all_to_all",
    "ragged_hierarchical_all_to_all",
    doc="how tokens reach their experts on other devices",
  )
  # `many` have a little more rows than balanced routing needs (usually one
  # round suffices), `one` has the largest possible number of rows.
  rounds: str = choice(
    "auto", "one", "many", doc="rounds of a token exchange; auto: one on CPU"
  )
  schedule: str = choice(
    "none",
    "1f1b",
    "zb1p",
    "dualpipe",
    "dualpipev",
    doc="pipeline schedule, with the mesh axis pipe",
  )
  replica_check_every: int = number(
    0, low=0, doc="steps between comparisons of replicated arrays; 0: never"
  )


@fields.checked
class Checkpoint:
  """Frequency and number of checkpoints."""

  every: int = number(100, low=1, doc="steps between checkpoints")
  keep: int = number(2, low=1, doc="newest checkpoints to keep")
  keep_every: int = number(
    0, low=0, doc="also keep those of multiples of this step; 0: none"
  )
  # If the last save fails, the run ends with an error in both cases.
  on_error: str = choice("stop", "continue", doc="after a save that failed")


@fields.checked
class Evaluate:
  """Held-out evaluation during training."""

  every: int = number(100, low=1, doc="steps between evaluations")
  batch_size: int = number(32, low=1, doc="held-out rows evaluated at a time")
  ema: bool = plain(
    False, "also evaluate averaged parameters, see optim.ema_decay"
  )
  sample_tokens: int = number(
    120, low=0, doc="length of the sample text; 0: none"
  )
  answers: int = number(
    128, low=0, doc="held-out answers generated, of conversations; 0: none"
  )


MOST_STEPS = 2**31 - 1  # devices count steps in int32


@dataclasses.dataclass(frozen=True)
class BatchPhase:
  """Consecutive steps with one batch size, up to the next phase."""

  first_step: int
  first_row: int  # sequences trained on before
  batch_size: int


@fields.checked
class Run:
  """Configuration of a training run: everything but seed and mesh."""

  model: Model
  data: Data
  train: Train
  optim: Optim = Optim()
  schedule: Schedule = Schedule()
  precision: Precision = Precision()
  parallel: Parallel = Parallel()
  checkpoint: Checkpoint = Checkpoint()
  evaluate: Evaluate = Evaluate()
  grpo: Grpo = Grpo()

  def validate(self) -> Iterator[str]:
    if self.model.reward_head != (self.data.source == PREFERENCES):
      yield (
        f"Model.reward_head={self.model.reward_head} with"
        f" Data.source={self.data.source}: a reward model needs"
        f" data.source={PREFERENCES}, which needs model.reward_head=true"
      )
    seq_len, depth = f"Data.seq_len={self.data.seq_len}", self.model.mtp.depth
    if depth >= self.data.seq_len:
      yield (
        f"{seq_len}: must be above MTP.depth={depth}, or no position has a"
        " target that far ahead"
      )
    longest = self.model.attention.max_len
    if self.data.seq_len > longest:
      yield (
        f"{seq_len}: must be at most {longest:g}, the limit of model.attention"
        " (of MLA: yarn.factor * yarn.original_len)"
      )
    if self.evaluate.ema and not self.optim.ema_decay:
      yield "Evaluate.ema=True: needs an average, optim.ema_decay above 0"
    ramp, first = self.schedule.ramp_until, self.train.first_batch_size
    if bool(ramp) != bool(first):
      yield (
        f"Schedule.ramp_until={ramp:g} and Train.first_batch_size={first}: a"
        " batch that grows needs both, one that does not neither"
      )
    if self.train.tokens < self.tokens_per_step:
      yield (
        f"Train.tokens={self.train.tokens}: must be at least one step of"
        f" batch_size * seq_len = {self.tokens_per_step} tokens"
      )

    elif self.total_steps > MOST_STEPS:
      yield (
        f"Train.tokens={self.train.tokens}: must be at most {MOST_STEPS} steps,"
        f" of batch_size * seq_len = {self.tokens_per_step} tokens each"
      )

  @property
  def extends_context(self) -> bool:
    """Returns whether rows are longer than in pre-training, before YaRN."""
    yarn = getattr(self.model.attention, "yarn", None)
    if yarn is None or yarn.factor <= 1:
      return False
    return self.data.seq_len > yarn.original_len

  @property
  def tokens_per_step(self) -> int:
    """Tokens of a step at the full batch size."""
    return self.train.batch_size * self.data.seq_len

  @functools.cached_property
  def batch_phases(self) -> tuple[BatchPhase, ...]:
    """Phases of the batch size, which grows about linearly (section 4.2)."""
    first, full = self.train.first_batch_size, self.train.batch_size
    n = self.train.ramp_sizes if first else 0
    micro = self.train.micro_batch_size
    ramp = self.schedule.ramp_until * self.train.tokens / self.data.seq_len
    step, row, phases = 0, 0, []
    for i in range(n):
      size = first + (full - first) * i // n // micro * micro
      n_steps = max(math.ceil((ramp * (i + 1) / n - row) / size), 0)
      if n_steps:
        phases.append(BatchPhase(step, row, size))
      step, row = step + n_steps, row + n_steps * size
    return *phases, BatchPhase(step, row, full)

  def batch_phase(self, step: int) -> BatchPhase:
    """The phase of a step, counted from 0."""
    return [p for p in self.batch_phases if p.first_step <= step][-1]

  def rows_before(self, step: int) -> int:
    """The number of sequences trained on before a step."""
    phase = self.batch_phase(step)
    return phase.first_row + (step - phase.first_step) * phase.batch_size

  @property
  def total_steps(self) -> int:
    """The number of optimizer steps in the token budget."""
    rows = self.train.tokens // self.data.seq_len
    last = [p for p in self.batch_phases if p.first_row <= rows][-1]
    return last.first_step + (rows - last.first_row) // last.batch_size

  @property
  def warmup_steps(self) -> int:
    """The number of optimizer steps of the warm-up, to the nearest."""
    share = self.schedule.warmup_until
    rows = round(share * self.train.tokens / self.data.seq_len)
    last = [p for p in self.batch_phases if p.first_row <= rows][-1]
    return last.first_step + round((rows - last.first_row) / last.batch_size)

"""Settings of reinforcement learning with GRPO (section 5.2.2)."""

from collections.abc import Iterator

from dsv3_jax.config import fields
from dsv3_jax.config.fields import choice, number, plain

KL = (
  "weighted_k3",  # exact in and off policy (arXiv:2512.02556)
  *("k1", "k2", "k3"),  # k3 is the report's (eq. 28)
  *("weighted_k1", "weighted_k2", "fixed_k1", "fixed_k2", "fixed_k3"),
)
ADVANTAGES = "mean_std", "mean", "leave_one_out", "batch"
AGGREGATIONS = "sequence", "token", "fixed"
SAMPLER, TRAINER = "sampler", "trainer"


@fields.checked
class Grpo:
  """Rollouts, rewards and the objective (eq. 26-28)."""

  prompts: int = number(
    0, low=0, doc="questions of an iteration; 0: no reinforcement learning"
  )
  group_size: int = number(16, low=2, doc="answers to a question")
  updates: int = number(
    1, low=1, doc="optimizer steps of an iteration, each on a part of answers"
  )
  staleness: int = number(
    0, low=0, doc="iterations that answers are generated ahead of their use"
  )
  answer_tokens: int = number(64, low=1, doc="most tokens of an answer")
  temperature: float = number(1.0, above=0, doc="of the answers")
  top_p: float = number(1.0, above=0, high=1, doc="of the answers")
  top_k: int = number(0, low=0, doc="of the answers; 0: all tokens")
  n_drafts: int = number(0, low=0, doc="tokens that the MTP module drafts")
  slots: int = number(32, low=1, doc="answers generated at the same time")
  rewards: str = plain(
    "exact=1", "weights of rewards by name, such as exact=1,format=0.1"
  )
  advantage: str = choice(
    *ADVANTAGES,
    doc="reward less the group's mean, over its standard deviation; without"
    " that; less the mean of the others; over the deviation of all answers",
  )
  kl: str = choice(
    *KL,
    doc="estimator of the KL divergence from the reference: plain, weighted by"
    " policy over sampler, or by that held fixed",
  )
  kl_weight: float = number(0.001, low=0, doc="beta, weight of the divergence")
  clip_low: float = number(
    0.2, above=0, high=1, doc="the ratio is clipped at 1 - clip_low"
  )
  clip_high: float = number(
    0.2, above=0, doc="the ratio is clipped at 1 + clip_high"
  )
  dual_clip: float = number(
    0.0, low=0, doc="largest ratio for a negative advantage; 0: no limit"
  )
  aggregation: str = choice(
    *AGGREGATIONS,
    doc="mean over tokens of an answer and over answers; over all tokens; sum"
    " over tokens, over grpo.answer_tokens and the number of answers",
  )
  old_policy: str = choice(
    SAMPLER,
    TRAINER,
    doc="denominator of the ratio: probabilities of the sampler, or those that"
    " the trainer computes before the iteration",
  )
  importance_cap: float = number(
    0.0,
    low=0,
    doc="with old_policy=trainer, tokens are weighted by trainer over sampler,"
    " at most this; 0: not",
  )
  mask_threshold: float = number(
    0.0,
    low=0,
    doc="leaves out answers with a negative advantage whose mean log of sampler"
    " over policy is above this; 0: none (delta of arXiv:2512.02556)",
  )
  overlong_tokens: int = number(
    0,
    low=0,
    doc="the reward falls by up to 1 over the last so many of answer_tokens",
  )
  filter_groups: bool = plain(
    False, "leave out groups whose mean reward is out of the limits"
  )
  filter_low: float = number(0.0, doc="groups at or below it are left out")
  filter_high: float = number(1.0, doc="groups at or above it are left out")
  reference: str = plain(
    "", "run whose model is the reference; empty: the one that begins"
  )
  replay_routes: bool = plain(
    True, "the trainer takes the experts that the sampler chose"
  )
  replay_mask: bool = plain(
    True, "the trainer's distributions keep the tokens that the sampler kept"
  )

  def validate(self) -> Iterator[str]:
    if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
      yield (
        f"Grpo.dual_clip={self.dual_clip:g}: must be above 1 + clip_high ="
        f" {1 + self.clip_high:g}, or 0"
      )
    if self.overlong_tokens > self.answer_tokens:
      yield (
        f"Grpo.overlong_tokens={self.overlong_tokens}: must be at most"
        f" answer_tokens={self.answer_tokens}"
      )
    if self.filter_low >= self.filter_high:
      yield (
        f"Grpo.filter_low={self.filter_low:g}: must be below"
        f" filter_high={self.filter_high:g}"
      )
    if self.prompts % self.updates:
      yield (
        f"Grpo.updates={self.updates}: must divide prompts={self.prompts}; a"
        " group of answers stays together"
      )
    if self.importance_cap and self.old_policy == SAMPLER:
      yield (
        f"Grpo.importance_cap={self.importance_cap:g}: needs"
        f" old_policy={TRAINER}; with {SAMPLER} the ratio has it already"
      )

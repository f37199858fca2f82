"""Rewards of answers: rules, tests of programs, and a judge (section 5.2.1).

`REWARDS` has the functions that make them, by name; `reward.score_all` scores
answers by several.
"""

from collections.abc import Callable

from dsv3_jax.posttrain.rewards import (
  answer,
  format,
  judge,
  language,
  model,
  program,
)
from dsv3_jax.posttrain.rewards.reward import RewardFunction

# A call makes the reward and raises InputError where it cannot work on this
# machine, before any answer is generated.
REWARDS: dict[str, Callable[..., RewardFunction]] = {
  "correctness": answer.correctness,
  "format": format.format_of_reply,
  "language": language.language,
  "code": program.code,
  "judge": judge.judge,
  "model": model.model,
}

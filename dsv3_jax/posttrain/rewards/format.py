"""Format of a reply: reasoning between tags, then the answer."""

from dsv3_jax.posttrain.rewards.answer import (
  ANSWER,
  END_ANSWER,
  END_THINK,
  THINK,
)
from dsv3_jax.posttrain.rewards.reward import Reward, RewardFunction


def format_of_reply(
  thinking: bool = True, opened: bool = False, tagged: bool = False
) -> RewardFunction:
  """Returns the reward 1 for a reply in the right format, else 0.

  The parts say which rules hold. What the texts between the tags say, and how
  long they are, makes no difference, but none may be empty.

  Args:
    thinking: a reply is <think>, reasoning, </think>, answer, with each tag
      once; otherwise it has neither tag.
    opened: the chat template has written <think>, so that the reply has not.
    tagged: the answer is inside <answer> ... </answer>, once, and ends there.
  """

  def reward(prompt: str, answer: str, reference: str) -> Reward:
    text = (THINK if opened else "") + answer
    parts, final = {"thinking": True}, text
    if thinking:
      head, _, final = text.partition(END_THINK)
      reasoning = head.strip().removeprefix(THINK)
      parts["thinking"] = (
        head.strip().startswith(THINK)
        and bool(reasoning.strip())
        and text.count(THINK) == text.count(END_THINK) == 1
      )
    else:
      parts["thinking"] = THINK not in text and END_THINK not in text
    parts["answer"] = bool(final.strip())
    if tagged:
      inside = final.strip().removeprefix(ANSWER).removesuffix(END_ANSWER)
      parts["answer"] = (
        final.strip() == ANSWER + inside + END_ANSWER
        and final.count(ANSWER) == final.count(END_ANSWER) == 1
        and bool(inside.strip())
      )
    floats = {name: float(holds) for name, holds in parts.items()}
    return Reward(float(all(parts.values())), floats)

  return reward

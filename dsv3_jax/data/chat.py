"""Conversations as DeepSeek-V3 reads them (section 5).

BOS, what the system says, then turns: a mark of the user and a question, a mark
of the assistant, an answer and EOS.
"""

from collections.abc import Mapping, Sequence

import tokenizers

from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError

ROLES = ("system", "user", "assistant")

# The same for software that reads chat templates.
TEMPLATE = (
  "{{ bos_token }}"
  "{% for message in messages if message['role'] == 'system' %}"
  "{{ message['content'] if loop.first else '\\n\\n' + message['content'] }}"
  "{% endfor %}"
  "{% for message in messages %}"
  "{% if message['role'] == 'user' %}"
  f"{{{{ '{tokenizer.USER}' + message['content'] }}}}"
  "{% elif message['role'] == 'assistant' %}"
  f"{{{{ '{tokenizer.ASSISTANT}' + message['content'] + eos_token }}}}"
  "{% elif message['role'] != 'system' %}"
  "{{ raise_exception('role must be system, user or assistant, not '"
  " + message['role']) }}"
  "{% endif %}"
  "{% endfor %}"
  "{% if add_generation_prompt %}"
  f"{tokenizer.ASSISTANT}"
  "{% endif %}"
)


def encode(
  tok: tokenizers.Tokenizer,
  messages: Sequence[Mapping[str, str]],
  answer_next: bool = True,
) -> list[int]:
  """The ids of a conversation.

  A special token's name inside a message is plain text.

  Args:
    tok: whose ids.
    messages: `role`, one of ROLES, and `content` each.
    answer_next: whether the assistant's next answer begins at the end.

  Raises:
    InputError: an unknown role.
  """
  for message in messages:
    if message["role"] not in ROLES:
      raise InputError(
        f"role={message['role']!r}: must be one of {', '.join(ROLES)}"
      )
  own = lambda text: tok.encode(text, add_special_tokens=False).ids
  of = lambda role: [m["content"] for m in messages if m["role"] == role]
  user, assistant = map(tok.token_to_id, (tokenizer.USER, tokenizer.ASSISTANT))
  ids = [tokenizer.BOS_ID, *own("\n\n".join(of("system")))]
  for message in messages:
    if message["role"] == "user":
      ids += [user, *own(message["content"])]
    elif message["role"] == "assistant":
      ids += [assistant, *own(message["content"]), tokenizer.EOS_ID]
  return ids + [assistant] * answer_next

"""The chat format of DeepSeek-V3 (section 5): conversations as token ids.

BOS and the system's messages; then, for each turn, the special token of the
user and a question, and that of the assistant, an answer and EOS.
"""

from collections.abc import Mapping, Sequence

import tokenizers

from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError

ROLES = ("system", "user", "assistant")

# The same as a Jinja template, as Hugging Face and GGUF files hold it.
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
  """Encodes messages of a `role`, one of ROLES, and a `content` each.

  A special token's name inside a message is plain text. With `answer_next`, the
  special token of the assistant is the last. Raises InputError on other roles.
  """
  for message in messages:
    if message["role"] not in ROLES:
      raise InputError(
        f"role={message['role']!r}: must be one of {', '.join(ROLES)}"
      )

  def encode_text(text: str) -> list[int]:
    return tok.encode(text, add_special_tokens=False).ids

  user, assistant = map(tok.token_to_id, (tokenizer.USER, tokenizer.ASSISTANT))
  system = [m["content"] for m in messages if m["role"] == "system"]
  ids = [tokenizer.BOS_ID, *encode_text("\n\n".join(system))]
  for message in messages:
    if message["role"] == "user":
      ids += [user, *encode_text(message["content"])]
    elif message["role"] == "assistant":
      ids += [assistant, *encode_text(message["content"]), tokenizer.EOS_ID]
  return ids + [assistant] * answer_next

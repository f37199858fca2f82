"""Conversations as token ids, by the chat template of a model.

A template is a program in Jinja that comes with a model; it runs in a sandbox,
with what `transformers` gives it. That of DeepSeek-V3 (section 5): BOS and the
system's messages; then, for each turn, the special token of the user and a
question, and that of the assistant, an answer and EOS.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from dsv3_jax.data import tokenizer
from dsv3_jax.errors import InputError

ROLES = ("system", "user", "assistant")

# V3's, as Hugging Face and GGUF files hold it.
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


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A template, and the names of special tokens that it can write."""

  source: str = TEMPLATE  # in Jinja
  tokens: tuple[tuple[str, str], ...] = (
    ("bos_token", tokenizer.BOS),
    ("eos_token", tokenizer.EOS),
    ("pad_token", tokenizer.PAD),
  )

  def render(self, messages: Sequence[Any], answer_next: bool) -> str:
    """Returns the text of a conversation.

    Raises:
      InputError: the template is no Jinja, or refuses the messages.
    """
    names = {"messages": messages, "add_generation_prompt": answer_next}
    names |= {"tools": None, "documents": None, **dict(self.tokens)}
    try:
      return _compile(self.source).render(names)
    except Exception as error:  # a program of others: it may raise anything
      raise InputError(f"messages: the chat template says: {error}") from error


V3 = ChatTemplate()


class _Generation(jinja2.ext.Extension):
  """Reads {% generation %}, which marks an answer, as what is inside."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
  """Compiles a template with the functions that `transformers` offers."""

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)

  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  env.filters["tojson"] = to_json
  env.globals["raise_exception"] = refuse
  env.globals["strftime_now"] = lambda how: datetime.datetime.now().strftime(
    how
  )
  return env.from_string(source)


def encode(
  tok: tokenizers.Tokenizer,
  messages: Sequence[Mapping[str, Any]],
  answer_next: bool = True,
  template: ChatTemplate = V3,
) -> list[int]:
  """Encodes messages of a `role` and a `content` each; V3's has ROLES.

  A special token's name inside a message is plain text. With `answer_next`, the
  template begins the answer of the assistant. Raises InputError on messages
  that the template refuses.
  """
  for message in messages if template.source == TEMPLATE else ():
    if message["role"] not in ROLES:
      raise InputError(
        f"role={message['role']!r}: must be one of {', '.join(ROLES)}"
      )
  added = tok.get_added_tokens_decoder()
  special = {t.content: i for i, t in added.items() if t.special}
  longest_first = sorted(special, key=len, reverse=True)
  names = re.compile("|".join(map(re.escape, longest_first)))
  # A character that stands nowhere breaks special names inside messages.
  seen = json.dumps(messages, ensure_ascii=False) + template.source
  mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in seen)
  broken = _map_texts(
    lambda text: names.sub(lambda m: m[0][0] + mark + m[0][1:], text), messages
  )
  text, ids, at = template.render(broken, answer_next), [], 0

  def encode_text(text: str) -> list[int]:
    return tok.encode(text.replace(mark, ""), add_special_tokens=False).ids

  for match in names.finditer(text):
    ids += [*encode_text(text[at : match.start()]), special[match[0]]]
    at = match.end()
  return ids + encode_text(text[at:])


def _map_texts(function: Any, value: Any) -> Any:
  """Returns JSON with a function applied to all texts but names of fields."""
  if isinstance(value, str):
    return function(value)
  if isinstance(value, Mapping):
    return {k: _map_texts(function, v) for k, v in value.items()}
  if isinstance(value, Sequence):
    return [_map_texts(function, v) for v in value]
  return value

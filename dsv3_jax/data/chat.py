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

THINK, END_THINK = "<think>", "</think>"  # tokens of the released vocabulary


def _write_template(answer: str, opening: str = "") -> str:
  """Returns V3's layout in Jinja.

  `answer` is an expression for an answer after its header and before EOS,
  `opening` is what follows the header of the answer that comes next.
  """
  return (
    "{{ bos_token }}"
    "{% for message in messages if message['role'] == 'system' %}"
    "{{ message['content'] if loop.first else '\\n\\n' + message['content'] }}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    f"{{{{ '{tokenizer.USER}' + message['content'] }}}}"
    "{% elif message['role'] == 'assistant' %}"
    f"{{{{ '{tokenizer.ASSISTANT}' + {answer} + eos_token }}}}"
    "{% elif message['role'] != 'system' %}"
    "{{ raise_exception('role must be system, user or assistant, not '"
    " + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    f"{tokenizer.ASSISTANT}{opening}"
    "{% endif %}"
  )


# V3's, as Hugging Face and GGUF files hold it.
TEMPLATE = _write_template("message['content']")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A template, and the names of special tokens that it can write."""

  source: str = TEMPLATE  # in Jinja
  tokens: tuple[tuple[str, str], ...] = (
    ("bos_token", tokenizer.BOS),
    ("eos_token", tokenizer.EOS),
    ("pad_token", tokenizer.PAD),
  )
  # What a model writes before and after its reasoning; None: it cannot reason.
  reasoning: tuple[str, str] | None = None
  # Whether the next answer begins with reasoning. None: the template decides.
  thinking: bool | None = None
  always_thinks: bool = False  # an answer without reasoning has an empty one

  def render(self, messages: Sequence[Any], answer_next: bool) -> str:
    """Returns the text of a conversation.

    Raises:
      InputError: the template is no Jinja, or refuses the messages.
    """
    names = {"messages": messages, "add_generation_prompt": answer_next}
    names |= {"tools": None, "documents": None, **dict(self.tokens)}
    if self.thinking is not None:
      names["thinking"] = self.thinking
    try:
      return _compile(self.source).render(names)
    except Exception as error:  # a program of others: it may raise anything
      raise InputError(f"messages: the chat template says: {error}") from error

  def write_answer(self, message: Mapping[str, str]) -> str:
    """Returns what a model generates for an answer, without the end token.

    Raises:
      InputError: the template has no place for the reasoning.
    """
    content, reasoning = message["content"], message.get("reasoning_content")
    if self.reasoning is None:
      if reasoning:
        raise InputError(
          "reasoning_content: the chat template has no place for it; put it"
          " into the content, or choose a template that reasons"
        )
      return content
    begin, end = self.reasoning
    if reasoning:
      return begin + reasoning + end + content
    if begin == "" and END_THINK in content:
      raise InputError(
        f"content={content[:40]!r}: has {END_THINK!r}, which ends the reasoning"
        " in this chat template; put what is before it into reasoning_content"
      )
    return end + content if self.always_thinks else content


V3 = ChatTemplate()
_V3_1 = ChatTemplate(
  _write_template(
    f"'{END_THINK}' + message['content'].split('{END_THINK}', 1)[-1]",
    f"{{{{ '{THINK}' if thinking else '{END_THINK}' }}}}",
  ),
  reasoning=("", END_THINK),
  thinking=False,
)
# Conversations in which users and the assistant take turns are written as the
# templates of the released models do; earlier turns lose their reasoning in
# V3.1's and R1's. V3.1 reasons, or not, as the engine asks. The plain one is
# ours: V3's, with reasoning as a part of the answer that stays.
TEMPLATES = {
  "plain": ChatTemplate(
    _write_template(
      f"('{THINK}' + message['reasoning_content'] + '{END_THINK}'"
      " if message['reasoning_content'] else '') + message['content']"
    ),
    reasoning=(THINK, END_THINK),
  ),
  "v3": V3,
  "v3.1": _V3_1,
  "v3.1-thinking": dataclasses.replace(_V3_1, thinking=True),
  "r1": ChatTemplate(
    _write_template(
      f"message['content'].split('{END_THINK}')[-1]", f"{{{{ '{THINK}\\n' }}}}"
    ),
    reasoning=("", f"\n{END_THINK}\n\n"),
    always_thinks=True,
  ),
}


def find(name: str) -> ChatTemplate:
  """Returns a template of TEMPLATES; raises InputError without that name."""
  if name not in TEMPLATES:
    raise InputError(
      f"template={name!r}: must be one of {', '.join(TEMPLATES)}"
    )
  return TEMPLATES[name]


def validate(tok: tokenizers.Tokenizer, template: ChatTemplate) -> list[str]:
  """Lists the special tokens that a template writes and a tokenizer lacks."""
  added = tok.get_added_tokens_decoder().values()
  special = {token.content for token in added if token.special}
  tokens = dict(template.tokens)
  headers = [n for n in tokenizer.SPECIAL if n in template.source]
  return [
    f"the tokenizer has no special token {name}, which the chat template"
    " writes; use the tokenizer that it is made for"
    for name in (tokens["bos_token"], tokens["eos_token"], *headers)
    if name not in special
  ]


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

  def find_names(text: str) -> re.Pattern[str]:
    """Returns the pattern of the special names in a text; "(?!)" is none."""
    here = sorted((name for name in special if name in text), key=len)
    return re.compile("|".join(map(re.escape, reversed(here))) or "(?!)")

  # A character that stands nowhere breaks special names inside messages.
  seen = json.dumps(messages, ensure_ascii=False) + template.source
  mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in seen)
  broken = _map_texts(
    lambda text: find_names(text).sub(
      lambda m: m[0][0] + mark + m[0][1:], text
    ),
    messages,
  )
  text, ids, at = template.render(broken, answer_next), [], 0

  def encode_text(text: str) -> list[int]:
    return tok.encode(text.replace(mark, ""), add_special_tokens=False).ids

  for match in find_names(text).finditer(text):
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

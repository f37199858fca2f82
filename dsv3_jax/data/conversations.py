"""Conversations as training samples, supervised on the answers alone.

A sample holds the ids that the engine sees: each answer follows the context
that `chat.encode` makes of the messages before it; ids are never decoded to be
encoded again. A file has one conversation a line, either

  {"messages": [{"role", "content", "reasoning_content" (of answers, or null)}]}
  {"prompt", "response", "system" (or null), "reasoning_content" (or null)}

Other fields of a line are kept, in `Conversation.extra`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from dsv3_jax import io
from dsv3_jax.data import chat, tokenizer
from dsv3_jax.errors import InputError, raise_problems

_FIELDS = ("role", "content", "reasoning_content")
_SHORT = ("prompt", "response", "system", "reasoning_content")
_TOOLS = ("tools", "functions")  # would change the prompt
_MOST_PROBLEMS = 20  # that are shown


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Messages that end with an answer of the assistant."""

  messages: tuple[Mapping[str, str], ...]
  where: str = ""  # file:line
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """Token ids, and which of them a model learns to write."""

  ids: np.ndarray  # [n] int32, BOS at the beginning and only there
  supervised: np.ndarray  # [n] bool, True for answers and their end tokens


def read(path: pathlib.Path) -> list[Conversation]:
  """Reads a file of conversations; skips blank lines.

  Raises:
    InputError: it cannot be read, is empty, or has lines that are no
      conversation; lists the first problems with their lines.
  """
  conversations = [parse(row, at) for at, row in read_rows(path, validate)]
  if not conversations:
    raise InputError(
      f'{path}: has no conversation; a line is {{"messages": …}}'
    )
  return conversations


def read_rows(
  path: pathlib.Path, validate: Callable[[Any], list[str]]
) -> list[tuple[str, Any]]:
  """Returns `file:line` and JSON of each line; skips blank lines.

  Raises:
    InputError: the file cannot be read, or a line is no JSON or has problems by
      `validate`; lists the first problems with their lines.
  """
  rows, problems = [], []
  try:
    with path.open("rb") as file:
      for n, line in enumerate(file, 1):
        if not line.strip():
          continue
        at = f"{path}:{n}"
        try:
          row = json.loads(line)
        except (ValueError, RecursionError) as error:
          problems.append(f"{at}: is not JSON: {error}")
          continue
        problems += [f"{at}: {problem}" for problem in validate(row)]
        rows.append((at, row))
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error}") from error
  raise_first(problems)
  return rows


def write(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes lines that `read` accepts, complete or not at all.

  Raises:
    InputError: a row is no conversation; nothing is written.
  """
  rows = list(rows)
  raise_first(
    f"{path}:{n}: {problem}"
    for n, row in enumerate(rows, 1)
    for problem in validate(row)
  )
  io.write_text(
    path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  )


def validate(row: Any) -> list[str]:
  """Lists what is wrong with a line of a file of conversations."""
  if not isinstance(row, Mapping):
    return [f"must be an object, not {type(row).__name__}"]
  problems = [
    f"{key}: is not known to the templates" for key in _TOOLS if row.get(key)
  ]
  if "messages" not in row:
    missing = [key for key in ("prompt", "response") if key not in row]
    if missing:
      return [*problems, f"has neither messages nor {' and '.join(missing)}"]
  elif both := [key for key in _SHORT if key in row]:
    return [*problems, f"has messages and {', '.join(both)}; remove one form"]
  messages = _messages(row)
  if not isinstance(messages, Sequence) or isinstance(messages, str):
    return [*problems, "messages: must be a list"]
  for i, message in enumerate(messages, 1):
    problems += [f"message {i}: {text}" for text in _validate_message(message)]
  return problems or _validate_roles([message["role"] for message in messages])


def _messages(row: Mapping[str, Any]) -> Any:
  """Returns the messages of a line in either form."""
  if "messages" in row:
    return row["messages"]
  system = row.get("system")
  first = [] if system is None else [{"role": "system", "content": system}]
  answer = {"role": "assistant", "content": row["response"]}
  if row.get("reasoning_content") is not None:
    answer["reasoning_content"] = row["reasoning_content"]
  return [*first, {"role": "user", "content": row["prompt"]}, answer]


def _validate_message(message: Any) -> list[str]:
  if not isinstance(message, Mapping):
    return [f"must be an object, not {type(message).__name__}"]
  problems = [
    f"{key}: unknown; a message has {', '.join(_FIELDS)}"
    for key in message
    if key not in _FIELDS
  ]
  role, content = message.get("role"), message.get("content")
  reasoning = message.get("reasoning_content")
  if role not in chat.ROLES:
    problems.append(f"role={role!r}: must be one of {', '.join(chat.ROLES)}")
  if not isinstance(content, str):
    problems.append(f"content={content!r:.40}: must be text")
  elif not content.strip() and role == "assistant":
    problems.append("an empty answer")
  if not isinstance(reasoning, str | None):
    problems.append(f"reasoning_content={reasoning!r:.40}: must be text")
  elif reasoning and role != "assistant":
    problems.append(f"reasoning_content: role={role!r} has none")
  elif reasoning and chat.END_THINK in reasoning:
    problems.append(f"reasoning_content: has {chat.END_THINK!r}, its end")
  for key in ("content", "reasoning_content"):
    try:
      str(message.get(key)).encode()
    except UnicodeEncodeError as error:
      problems.append(f"{key}: is not Unicode text: {error}")
  return problems


def _validate_roles(roles: Sequence[str]) -> list[str]:
  """Lists where roles are out of order, and whether the end is an answer."""
  problems = []
  first = roles[:1] == ["system"]
  for n, role in enumerate(roles[first:]):
    if role != (expected := ("user", "assistant")[n % 2]):
      problems.append(
        f"message {n + first + 1}: role={role!r}: must be {expected!r}; system"
        " comes first, or not at all, then user and assistant take turns"
      )
      break
  if "assistant" not in roles:
    problems.append("has no answer: no message is of the assistant")
  elif not problems and roles[-1] != "assistant":
    problems.append("must end with an answer of the assistant")
  return problems


def parse(row: Mapping[str, Any], where: str = "") -> Conversation:
  """Returns the conversation of a valid line, without fields that are null."""
  return Conversation(
    tuple(
      {key: value for key, value in message.items() if value is not None}
      for message in _messages(row)
    ),
    where,
    {
      key: value
      for key, value in row.items()
      if key not in (("messages",) if "messages" in row else _SHORT)
    },
  )


def parse_answer(text: str) -> dict[str, str]:
  """Returns the message of a text that a model generated as its answer.

  What is before `</think>`, if there is one, is its reasoning.
  """
  reasoning, end, content = text.partition(chat.END_THINK)
  if not end:
    return {"role": "assistant", "content": text}
  return {
    "role": "assistant",
    "content": content.lstrip("\n"),
    "reasoning_content": reasoning.removeprefix(chat.THINK).strip("\n"),
  }


def samples(
  tok: tokenizers.Tokenizer,
  conversation: Conversation,
  template: chat.ChatTemplate,
) -> list[Sample]:
  """Encodes a conversation; each of its answers is supervised in one sample.

  An answer continues the sample of the one before it where the context that the
  engine would see begins with that sample. Elsewhere, as after reasoning that
  the template drops from earlier turns, a new sample begins, in which only
  later answers are supervised. Whether an answer reasons is decided by its
  message, also where the template leaves it to the engine.

  Raises:
    InputError: the tokenizer or the template cannot do it.
  """
  end = _end_token(tok, template)
  parts: list[tuple[list[int], list[bool]]] = []
  ids, supervised = [], []
  for i, message in enumerate(conversation.messages):
    if message["role"] != "assistant":
      continue
    asked = template
    if template.thinking is not None:
      thinking = bool(message.get("reasoning_content"))
      asked = dataclasses.replace(template, thinking=thinking)
    context = chat.encode(tok, conversation.messages[:i], template=asked)
    if not ids or context[: len(ids)] != ids:
      ids, supervised = [], []
      parts.append((ids, supervised))
    supervised += [False] * (len(context) - len(ids))
    ids += context[len(ids) :]
    text = template.write_answer(message)
    answer = [*tok.encode(text, add_special_tokens=False).ids, end]
    ids += answer
    supervised += [True] * len(answer)
  for ids, _ in parts:
    if ids[0] != tokenizer.BOS_ID or ids.count(tokenizer.BOS_ID) > 1:
      raise InputError(
        f"a sample must begin with {tokenizer.BOS} (id {tokenizer.BOS_ID}) and"
        f" hold it only there; it has {ids.count(tokenizer.BOS_ID)} of them and"
        f" begins with id {ids[0]}"
      )
  return [
    Sample(np.array(ids, np.int32), np.array(supervised, bool))
    for ids, supervised in parts
  ]


def all_samples(
  tok: tokenizers.Tokenizer,
  conversations: Iterable[Conversation],
  template: chat.ChatTemplate,
  longest: int | None = None,
) -> list[Sample]:
  """Encodes conversations, in order.

  Raises:
    InputError: as of `samples`, or a sample has more than `longest` tokens;
      lists the first problems with their lines.
  """
  _end_token(tok, template)
  result, problems = [], []
  for conversation in conversations:
    try:
      new = samples(tok, conversation, template)
      check_length(max(len(sample.ids) for sample in new), longest)
      result += new
    except InputError as error:
      problems.append(f"{conversation.where}: {error}".removeprefix(": "))
  raise_first(problems)
  return result


def check_length(n: int, longest: int | None) -> None:
  """Raises InputError if n tokens are more than a row has room for."""
  if longest and n > longest:
    raise InputError(
      f"has {n} tokens, a row at most {longest}; set data.seq_len={n} or"
      " more, or remove it"
    )


def _end_token(tok: tokenizers.Tokenizer, template: chat.ChatTemplate) -> int:
  """Returns the id that ends an answer; raises InputError if it cannot."""
  raise_problems(chat.validate(tok, template))
  name = dict(template.tokens)["eos_token"]
  end = tok.token_to_id(name)
  if end == tokenizer.PAD_ID:
    raise InputError(
      f"eos_token={name}: has the id of padding, {end}, so that no answer would"
      f" learn to end; give the chat template another end token, as"
      f" {tokenizer.EOS}"
    )
  return end


def raise_first(problems: Iterable[str]) -> None:
  """Raises InputError with the first problems, and the number of the others."""
  problems = list(problems)
  others = len(problems) - _MOST_PROBLEMS
  raise_problems(
    problems[:_MOST_PROBLEMS] + [f"and {others} more"] * (others > 0)
  )

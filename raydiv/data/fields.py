"""Values of a record's columns: text, labels, prompts and responses, checked one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from raydiv.config.data import RESERVED_OPTIONS
from raydiv.model.chat import ChatPrompt, Conversation, Response, as_messages
from raydiv.model.template import Message, Messages

Record = Mapping[str, Any]

MAX_TEXT_LENGTH = 1_000_000
"""Maximum characters of a text; a longer one is most likely a mistake."""


class BadRow(ValueError):  # noqa: N818 - a row, not an error of the program
    """A record that is not an example; the message gives the reason without the record's text."""


def text_field(record: Record, field: str) -> str:
    """The text of a field. Raises BadRow if it is missing, empty or not text, or messages that are written as text."""
    text = _text(record.get(field), field)
    if text.lstrip().startswith("[{") and MESSAGES_AS_TEXT.match(text):
        raise BadRow(f"{field} is a list of messages written as text, as in a CSV file; write the data as JSON Lines")
    return text


MESSAGES_AS_TEXT = re.compile(r"""\s*\[\{\s*['"](role|content|from|value)['"]\s*:""")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{field} must be non-empty text, found {describe(value)}")
    return valid_text(value, field)


SPELLINGS = ("", "true/false", "1/0", "safe/unsafe")
"""How a column may spell a label. The same spelling in all rows of a source is needed: 1 beside 2 is a rating."""

_SPELLING_OF = {
    **dict.fromkeys(("true", "false"), "true/false"),
    **dict.fromkeys(("1", "0", "1.0", "0.0"), "1/0"),
    **dict.fromkeys(("safe", "unsafe"), "safe/unsafe"),
}

A_RATING = "must be 1 or 0 in all rows"
"""What is wrong with a label that is another number."""


def spelling_of(value: Any) -> str:
    """Which of SPELLINGS a value belongs to; "" for none."""
    return "" if value is None else _SPELLING_OF.get(str(value).strip().lower(), "")


def bool_field(record: Record, field: str) -> bool:
    """The value of a field that is true or false, or 1 or 0, as a value or as text. Raises BadRow for others."""
    value = record.get(field)
    if spelling_of(value) not in ("true/false", "1/0"):
        number = re.fullmatch(r"-?\d+(\.\d+)?", str(value).strip())
        raise BadRow(f"{field} {A_RATING if number else 'must be true or false'}, found {describe(value)}")
    return str(value).strip().lower() in ("true", "1", "1.0")


def prompt_field(record: Record) -> ChatPrompt:
    """The prompt, as text or as chat messages, with the record's system turn, tools and template options.

    Raises BadRow.
    """
    prompt: str | Messages
    if isinstance(record.get("prompt"), list):
        prompt = conversation(record["prompt"], "prompt")
    else:
        prompt = text_field(record, "prompt")
    return _in_context(record, prompt)


TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def asked_turns(prompt: str) -> Messages:
    """The messages of a prompt that ends with ``Assistant:``, for the answer that follows; none for another text."""
    turns = human_turns(prompt) if prompt.lstrip().startswith("Human:") else []
    return turns[:-1] if turns[-1:] == [{"role": "assistant", "content": ""}] else []


def human_turns(text: str) -> Messages:
    """The messages of a text of turns after ``Human:`` and ``Assistant:``, as in HH-RLHF; none for another text."""
    before, *turns = TURN.split(text)
    if before or not turns or turns[0] != "Human":
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": said.strip()} for name, said in zip(turns[::2], turns[1::2], strict=True)]


def _in_context(record: Record, prompt: str | Messages) -> ChatPrompt:
    """A prompt with the columns ``system``, ``tools`` and ``chat_template_kwargs``, where the record has them."""
    if record.get("system"):
        messages = as_messages(prompt)
        if messages[0]["role"] == "system":
            raise BadRow("has a column system and a system message in its prompt; keep one")
        prompt = [{"role": "system", "content": text_field(record, "system")}, *messages]
    tools = _from_json(record.get("tools") or [], "tools")
    tools = _without_nulls(tools)
    if not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise BadRow(f"tools must be a list of JSON schemas, found {describe(tools)}")
    options = _from_json(record.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(options, Mapping):
        raise BadRow(f"chat_template_kwargs must be a mapping, found {describe(options)}")
    options = _without_nulls(options)
    for name in RESERVED_OPTIONS:
        if name in options:
            raise BadRow(f"chat_template_kwargs.{name} is set by raydiv")
    return Conversation(as_messages(prompt), tools, options) if tools or options else prompt


def _from_json(value: Any, field: str) -> Any:
    """A value that may be written as JSON text. Raises BadRow for other text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise BadRow(f"{field} is text that is not JSON") from None


def _without_nulls(value: Any) -> Any:
    """``value`` without nulls in its mappings: Parquet gives a mapping all keys that any row has."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def conversation(value: Any, field: str) -> Messages:
    """The messages of a conversation. Raises BadRow if ``value`` is not a list of messages with role and content."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{field} must be text or a list of messages with role and content, found {describe(value)}")
    return [_message(turn, f"{field}.{number}") for number, turn in enumerate(value)]


SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Values of ``from`` in messages of ``from`` and ``value``, and the roles that they stand for."""


def _message(turn: Any, field: str) -> Message:
    """A message of role and content, or of from and value; keys of no value are left out. Raises BadRow."""
    if isinstance(turn, Mapping) and {"from", "value"} <= turn.keys():
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise BadRow(f"{field}.from is none of {known}; write the message with role and content")
        others = {name: value for name, value in turn.items() if name not in ("from", "value")}
        turn = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"], **others}
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise BadRow(f"{field} must be a message with role and content, found {describe(turn)}")
    message = {name: value for name, value in turn.items() if value is not None}
    message["role"] = valid_text(turn["role"], f"{field}.role")
    content = _joined_parts(turn.get("content"), f"{field}.content")
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], list):
            raise BadRow(f"{field}.tool_calls must be a list, found {describe(message['tool_calls'])}")
        message["tool_calls"] = [_tool_call(_without_nulls(call), field) for call in message["tool_calls"]]
        content = content or ""
    if not isinstance(content, str):
        raise BadRow(f"{field}.content must be text, found {describe(content)}")
    if message.get("reasoning_content") is not None:
        message["reasoning_content"] = text_field(message, "reasoning_content")
    # an empty system turn means no system turn; all other turns must have content
    needs_text = message["role"] != "system" and not message.get("tool_calls")
    message["content"] = (_text if needs_text else valid_text)(content, f"{field}.content")
    return message


def _joined_parts(content: Any, field: str) -> Any:
    """The text of content that is a list of text parts; other content as it is. Raises BadRow for images and such."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = str(part.get("type")) if isinstance(part, Mapping) else describe(part)
            kind = kind if kind.isidentifier() and len(kind) <= 30 else "another kind"  # not a row's text
            raise BadRow(f"{field}.{number} is a part of type {kind}; only text is supported")
    return "".join(part["text"] for part in content)


def _tool_call(call: Any, field: str) -> dict[str, Any]:
    """A tool call in OpenAI's notation, its arguments as a mapping. Raises BadRow."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"{field}.tool_calls must have function.name and function.arguments")
    arguments = _from_json(function.get("arguments") or {}, f"{field}.tool_calls.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def describe(value: Any) -> str:
    """A value's type, without its text: harmful text stays out of messages."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def valid_text(value: str, field: str) -> str:
    """The text, if a tokenizer accepts it. Raises BadRow otherwise."""
    if len(value) > MAX_TEXT_LENGTH:
        raise BadRow(f"{field} has {len(value):,} characters; the maximum is {MAX_TEXT_LENGTH:,}")
    if "\0" in value:
        raise BadRow(f"{field} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"{field} is not UTF-8: it holds a lone surrogate") from None
    return value


def response_field(record: Record, field: str) -> Response:
    """A response, from text or one assistant message."""
    if not isinstance(record.get(field), list):
        return text_field(record, field)
    turns = conversation(record[field], field)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow(f"{field} must be one assistant message, found {len(turns)} messages")
    (message,) = turns
    return message if "reasoning_content" in message or "tool_calls" in message else str(message["content"])


def text_list_field(record: Record, field: str) -> list[str]:
    """The texts of a field that is a list of texts, or one text. Raises BadRow."""
    value = record.get(field)
    return [_text(item, field) for item in (value if isinstance(value, list) else [value])]

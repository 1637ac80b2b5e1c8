"""Formats of examples: recognised by their columns, and converted to raydiv's example schema.

To add a format, add its columns to ``FORMATS`` with the function that converts a record to examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raydiv.config.data import RESERVED_OPTIONS
from raydiv.model.chat import ChatPrompt, Conversation, Response, as_messages
from raydiv.model.template import Message, Messages

Record = Mapping[str, Any]

MAX_TEXT_LENGTH = 1_000_000
"""Maximum characters of a text; a longer one is most likely a mistake."""


class BadRow(ValueError):  # noqa: N818 - a row, not an error of the program
    """A record that is not an example; the message gives the reason without the record's text."""


class TextRecord(dict[str, Any]):
    """A record whose values are all text, as in CSV; its labels still have to be parsed."""


@dataclass(frozen=True, slots=True)
class Example:
    """One (prompt, response) with its label; see raydiv/data/README.md for the schema.

    ``prompt`` is text or chat messages; ``harmful`` is the prompt's label, None if the source has none; ``pair`` names
    the pair within its source; ``source`` is the file and line. ``spelling`` says how the record spells ``harmful``,
    for a format with several spellings (see SAFETY).
    """

    prompt: ChatPrompt
    response: Response
    aligned: bool
    harmful: bool | None
    pair: str | None
    source: str
    spelling: str = ""


@dataclass(frozen=True, slots=True)
class RecordReader:
    """How a source's records are read: its names for a format's columns, and the values of columns that it lacks."""

    columns: Mapping[str, str]
    constants: Mapping[str, Any]

    def examples(self, record: Any, where: str) -> list[Example]:
        """The examples of a record. Raises BadRow."""
        record = self.rename_columns(record)
        return converter_of(record)(record, where)

    def rename_columns(self, record: Any) -> Record:
        """The record with the column names of its format. Raises BadRow for a value that is not a record."""
        if not isinstance(record, Mapping):
            raise BadRow(f"a record is a mapping of columns, found {describe(record)}")
        missing = sorted(name for name in self.columns.values() if name not in record)
        if missing:
            raise BadRow(f"no column {', '.join(missing)}, which data.columns names")
        mapped = set(self.columns.values())
        unmapped = {name: value for name, value in record.items() if name not in mapped}
        renamed = {**self.constants, **unmapped, **{name: record[theirs] for name, theirs in self.columns.items()}}
        if isinstance(record, TextRecord):
            for name in LABEL_COLUMNS & renamed.keys():
                renamed[name] = LABEL_VALUES.get(str(renamed[name]).strip().lower(), renamed[name])
        return renamed


CANONICAL = RecordReader({}, {})
"""Reads records that have a format's column names already."""


def text_field(record: Record, field: str) -> str:
    """The text of a field. Raises BadRow if it is missing, empty or not text."""
    return _text(record.get(field), field)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{field} must be non-empty text, found {describe(value)}")
    return _valid_text(value, field)


def bool_field(record: Record, field: str) -> bool:
    """The value of a field that is true or false. Raises BadRow for any other value."""
    value = record.get(field)
    if not isinstance(value, bool):
        raise BadRow(f"{field} must be true or false, found {describe(value)}")
    return value


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


def _in_context(record: Record, prompt: str | Messages) -> ChatPrompt:
    """A prompt with the columns ``system``, ``tools`` and ``chat_template_kwargs``, where the record has them."""
    if record.get("system"):
        messages = as_messages(prompt)
        if messages[0]["role"] == "system":
            raise BadRow("has a column system and a system message in its prompt; keep one")
        prompt = [{"role": "system", "content": text_field(record, "system")}, *messages]
    tools = _from_json(record.get("tools") or [], "tools")
    if not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise BadRow(f"tools must be a list of JSON schemas, found {describe(tools)}")
    options = _from_json(record.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(options, Mapping):
        raise BadRow(f"chat_template_kwargs must be a mapping, found {describe(options)}")
    options = {name: value for name, value in options.items() if value is not None}  # Parquet's absent fields
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
        if turn["from"] not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise BadRow(f"{field}.from is none of {known}; write the message with role and content")
        others = {name: value for name, value in turn.items() if name not in ("from", "value")}
        turn = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"], **others}
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise BadRow(f"{field} must be a message with role and content, found {describe(turn)}")
    message = {name: value for name, value in turn.items() if value is not None}
    message["role"] = _valid_text(turn["role"], f"{field}.role")
    content = _joined_parts(turn.get("content"), f"{field}.content")
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call, field) for call in message["tool_calls"]]
        content = content or ""
    if not isinstance(content, str):
        raise BadRow(f"{field}.content must be text, found {describe(content)}")
    if message.get("reasoning_content") is not None:
        message["reasoning_content"] = text_field(message, "reasoning_content")
    # an empty system turn means no system turn; all other turns must have content
    needs_text = message["role"] != "system" and not message.get("tool_calls")
    message["content"] = (_text if needs_text else _valid_text)(content, f"{field}.content")
    return message


def _joined_parts(content: Any, field: str) -> Any:
    """The text of content that is a list of text parts; other content as it is. Raises BadRow for images and such."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else describe(part)
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


def _valid_text(value: str, field: str) -> str:
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


def _response_field(record: Record, field: str) -> Response:
    """A response, from text or one assistant message."""
    if not isinstance(record.get(field), list):
        return text_field(record, field)
    turns = conversation(record[field], field)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow(f"{field} must be one assistant message, found {len(turns)} messages")
    (message,) = turns
    return message if "reasoning_content" in message or "tool_calls" in message else str(message["content"])


def _harmful_field(record: Record) -> bool | None:
    return None if record.get("harmful") is None else bool_field(record, "harmful")


def _from_raydiv(record: Record, where: str) -> list[Example]:
    """Raydiv's schema: prompt, response, aligned, harmful, pair, source."""
    pair = None if record.get("pair") is None else _valid_text(str(record["pair"]), "pair")
    prompt, response = prompt_field(record), _response_field(record, "response")
    return [Example(prompt, response, bool_field(record, "aligned"), _harmful_field(record), pair, where)]


def _from_preference(record: Record, where: str) -> list[Example]:
    """TRL's prompt/chosen/rejected; ``harmful`` is optional. Both sides may be whole conversations."""
    record = _without_repeated_prompt(record)
    prompt, harmful = prompt_field(record), _harmful_field(record)
    return [
        Example(prompt, _response_field(record, field), aligned, harmful, where, where)
        for field, aligned in (("chosen", True), ("rejected", False))
    ]


def _without_repeated_prompt(record: Record) -> Record:
    """The record with answers alone, where both sides are conversations that begin with the prompt (UltraFeedback)."""
    sides = [record["chosen"], record["rejected"]]
    if not all(isinstance(side, list) and len(side) > 1 for side in sides):
        return record
    chosen, rejected = (conversation(side, field) for side, field in zip(sides, ("chosen", "rejected"), strict=True))
    asked = record["prompt"]
    prompt = conversation(asked, "prompt") if isinstance(asked, list) else as_messages(text_field(record, "prompt"))
    context = chosen[:-1]
    if context != rejected[:-1] or context[-len(prompt) :] != prompt:
        raise BadRow("chosen and rejected are conversations that do not begin with the prompt alike")
    return {**record, "prompt": context, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _from_implicit_preference(record: Record, where: str) -> list[Example]:
    """TRL's chosen/rejected conversations, whose common beginning is the prompt."""
    chosen, rejected = (
        conversation(record[field], field) if isinstance(record[field], list) else []
        for field in ("chosen", "rejected")
    )
    if not chosen or not rejected:
        raise BadRow("chosen and rejected must be conversations if there is no prompt column")
    turns = enumerate(zip(chosen, rejected, strict=False))
    common = next((number for number, (a, b) in turns if a != b), min(len(chosen), len(rejected)))
    explicit = {
        "prompt": chosen[:common],
        "chosen": chosen[common:],
        "rejected": rejected[common:],
    }
    return _from_preference({**record, **explicit}, where)


def _from_unpaired(record: Record, where: str) -> list[Example]:
    """TRL's prompt/completion/label."""
    response, prompt = _response_field(record, "completion"), prompt_field(record)
    return [Example(prompt, response, bool_field(record, "label"), _harmful_field(record), None, where)]


SAFETY = {
    "safe": (False, "safe"),
    "unsafe": (True, "safe"),
    "1": (False, "1"),
    "0": (True, "1"),
    "true": (False, "true"),
    "false": (True, "true"),
}
"""Values of the KLDO authors' ``safety``: whether the prompt is harmful, and the name of the spelling."""


def _from_kldo_authors(record: Record, where: str) -> list[Example]:
    """The KLDO authors' columns (see FORMATS): the n-th responses of both sides make a pair, the rest are unpaired."""
    safety = str(record.get("safety", "")).strip().lower()
    if safety not in SAFETY:
        raise BadRow(f"safety must be safe or unsafe, found {describe(record.get('safety'))}")
    harmful, spelling = SAFETY[safety]
    accepted, rejected = (_text_list(record, field) for field in ("acc_responses", "rej_responses"))
    pairs = min(len(accepted), len(rejected))
    if not accepted and not rejected:
        raise BadRow("acc_responses and rej_responses are both empty")
    prompt = prompt_field(record)
    return [
        Example(prompt, response, aligned, harmful, f"{where}#{n}" if n < pairs else None, where, spelling)
        for responses, aligned in ((accepted, True), (rejected, False))
        for n, response in enumerate(responses)
    ]


def _text_list(record: Record, field: str) -> list[str]:
    value = record.get(field)
    return [_text(item, field) for item in (value if isinstance(value, list) else [value])]


Converter = Callable[[Record, str], list[Example]]
"""From a record and its file and line to its examples. Raises BadRow."""

FORMATS: list[tuple[frozenset[str], Converter]] = [
    (frozenset({"prompt", "response", "aligned"}), _from_raydiv),
    (frozenset({"prompt", "chosen", "rejected"}), _from_preference),
    (frozenset({"prompt", "completion", "label"}), _from_unpaired),
    (frozenset({"safety", "prompt", "acc_responses", "rej_responses"}), _from_kldo_authors),
    (frozenset({"chosen", "rejected"}), _from_implicit_preference),
]
"""The columns of each format, and its converter. The first format whose columns a record has applies."""

LABEL_COLUMNS = {"aligned", "label", "harmful"}
"""Columns that are true or false."""

LABEL_VALUES = {"true": True, "false": False}
"""The text of a label in a TextRecord, lower-case."""


def converter_of(record: Record) -> Converter:
    """The converter of a record's format. Raises BadRow for columns of no known format, or both aligned and label."""
    if record.get("aligned") is not None and record.get("label") is not None:
        raise BadRow("has both aligned and label, two columns for one label; keep one (data.columns can rename)")
    for columns, convert in FORMATS:
        if columns <= record.keys():
            return convert
    # a CSV file without a header has its first row for column names: text that must not be shown
    names = sorted(str(name) for name in record if str(name).isidentifier() and len(str(name)) <= 30)
    others = f" and {len(record) - len(names)} that are not identifiers" if len(names) < len(record) else ""
    known = "; ".join(", ".join(sorted(columns)) for columns, _ in FORMATS)
    raise BadRow(
        f"unknown format: columns {', '.join(names)}{others} (known formats: {known}); map the names with data.columns"
    )
